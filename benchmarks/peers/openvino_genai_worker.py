"""OpenVINO GenAI: optimum-intel's export of the diffusers folder, run by its C++ pipeline."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from protocol import serve


class OpenVinoGenAiWorker:
    """``precision``: "f32" or "bf16"; ``weights``: the exporter's weight format; ``static``: reshaped to one size."""

    def load(
        self,
        folder: str,
        cache: str,
        precision: str,
        threads: int,
        steps: int,
        side: int,
        prompt: str,
        pictures: bool = True,
        weights: str = "fp32",
        static: bool = False,
    ) -> dict[str, Any]:
        """Open the exported pipeline and draw the first picture. The export into ``cache`` is not timed."""
        exported = Path(cache) / weights
        if not (exported / "model_index.json").is_file():
            command = [str(Path(sys.executable).with_name("optimum-cli")), "export", "openvino", "--model", folder]
            subprocess.run([*command, "--weight-format", weights, str(exported)], check=True)
        start = time.perf_counter()
        import openvino_genai

        self._pipe = openvino_genai.Text2ImagePipeline(str(exported))
        if static:
            self._pipe.reshape(1, side, side, 7.5)
        self._pipe.compile("CPU", INFERENCE_PRECISION_HINT=precision, INFERENCE_NUM_THREADS=threads)
        self._prompt = prompt
        self._arguments = {"num_inference_steps": steps, "height": side, "width": side, "guidance_scale": 7.5}
        if pictures:
            self.picture()
        return {"first_picture_seconds": time.perf_counter() - start}

    def picture(self) -> dict[str, Any]:
        """Seconds of a picture with guidance."""
        start = time.perf_counter()
        self._pipe.generate(self._prompt, **self._arguments)
        return {"seconds": time.perf_counter() - start}

    def step(self, runs: int) -> dict[str, Any]:
        """Seconds of the denoiser in each step of a picture, as the library reports them."""
        seconds: list[float] = []
        while len(seconds) < runs:
            self._pipe.generate(self._prompt, **self._arguments)
            durations = self._pipe.get_performance_metrics().raw_metrics.unet_inference_durations
            seconds += [duration / 1e6 for duration in durations]
        return {"seconds": seconds}


if __name__ == "__main__":
    serve(OpenVinoGenAiWorker())
