"""diffusers with torch on the CPU: FP32, BF16, eager or compiled."""

from __future__ import annotations

import time
from importlib import import_module
from typing import Any

from protocol import serve, timed


class DiffusersWorker:
    """``dtype``: "float32" or "bfloat16"; ``compiled``: torch.compile for denoiser and decoder."""

    def load(
        self,
        folder: str,
        dtype: str,
        threads: int,
        steps: int,
        side: int,
        prompt: str,
        pictures: bool = True,
        compiled: bool = False,
    ) -> dict[str, Any]:
        """Open the pipeline and draw the first picture."""
        start = time.perf_counter()
        import torch

        diffusers: Any = import_module("diffusers")

        torch.set_num_threads(threads)
        self._torch = torch
        self._pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder, torch_dtype=getattr(torch, dtype))
        self._pipe.set_progress_bar_config(disable=True)
        if compiled:
            self._pipe.unet = torch.compile(self._pipe.unet)
            self._pipe.vae.decode = torch.compile(self._pipe.vae.decode)
        self._arguments = {"prompt": prompt, "num_inference_steps": steps, "height": side, "width": side}
        size, config = side // self._pipe.vae_scale_factor, self._pipe.unet.config
        self._inputs = (
            torch.randn(2, config.in_channels, size, size, dtype=getattr(torch, dtype)),
            torch.tensor(500),
            torch.randn(2, 77, config.cross_attention_dim, dtype=getattr(torch, dtype)),
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
        with self._torch.no_grad():
            return dict(timed(lambda: self._pipe.unet(*self._inputs, return_dict=False), runs))


if __name__ == "__main__":
    serve(DiffusersWorker())
