"""optimum-onnx: its own export of the diffusers folder, run by its pipeline."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from protocol import serve, timed


class OptimumWorker:
    """Exports once, into ``cache``; the export is not timed."""

    def load(
        self, folder: str, cache: str, threads: int, steps: int, side: int, prompt: str, pictures: bool = True
    ) -> dict[str, Any]:
        """Open the exported pipeline and draw the first picture."""
        import onnxruntime
        import torch
        from optimum.onnxruntime import ORTStableDiffusionPipeline

        if not (Path(cache) / "model_index.json").is_file():
            ORTStableDiffusionPipeline.from_pretrained(folder, export=True).save_pretrained(cache)
        start = time.perf_counter()
        torch.set_num_threads(threads)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self._pipe = ORTStableDiffusionPipeline.from_pretrained(cache, session_options=options)
        self._pipe.set_progress_bar_config(disable=True)
        self._arguments = {"prompt": prompt, "num_inference_steps": steps, "height": side, "width": side}
        size = side // self._pipe.vae_scale_factor
        config = self._pipe.unet.config
        self._inputs = (
            torch.randn(2, config.in_channels, size, size),
            torch.tensor(500),
            torch.randn(2, 77, config.cross_attention_dim),
        )
        if pictures:
            self.picture()
        return {"first_picture_seconds": time.perf_counter() - start}

    def picture(self) -> dict[str, Any]:
        """Seconds of a picture with guidance."""
        start = time.perf_counter()
        self._pipe(**self._arguments, guidance_scale=7.5)
        return {"seconds": time.perf_counter() - start}

    def step(self, runs: int) -> dict[str, Any]:
        """Seconds of guided denoiser steps: two samples at once."""
        return dict(timed(lambda: self._pipe.unet(*self._inputs), runs))


if __name__ == "__main__":
    serve(OptimumWorker())
