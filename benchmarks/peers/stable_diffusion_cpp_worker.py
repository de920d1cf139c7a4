"""stable-diffusion.cpp through its Python package, on the diffusers folder's weights."""

from __future__ import annotations

import time
from typing import Any

from protocol import serve


class StableDiffusionCppWorker:
    """``kind``: the type that weights are converted to when they are loaded, such as "f16" or "q8_0".

    The denoiser runs once for each branch of guidance; a step is both.
    """

    def load(
        self, folder: str, kind: str, threads: int, steps: int, side: int, prompt: str, pictures: bool = True
    ) -> dict[str, Any]:
        """Open the model and draw the first picture."""
        start = time.perf_counter()
        from stable_diffusion_cpp import StableDiffusion

        self._steps: list[float] = []
        self._total = steps
        self._model = StableDiffusion(model_path=folder, wtype=kind, n_threads=threads, verbose=False)
        self._arguments = {"prompt": prompt, "sample_steps": steps, "height": side, "width": side, "cfg_scale": 7.5}
        if pictures:
            self.picture()
        return {"first_picture_seconds": time.perf_counter() - start}

    def picture(self) -> dict[str, Any]:
        """Seconds of a picture with guidance."""
        start = time.perf_counter()
        self._model.generate_image(**self._arguments, progress_callback=self._note)
        return {"seconds": time.perf_counter() - start}

    def step(self, runs: int) -> dict[str, Any]:
        """Seconds of each step of pictures, as the library's progress reports them."""
        self._steps.clear()
        while len(self._steps) < runs:
            self.picture()
        return {"seconds": list(self._steps)}

    def _note(self, step: int, steps: int, seconds: float) -> None:
        # The library reports loading tensors and decoding tiles through the same callback.
        if 0 < step <= steps == self._total:
            self._steps.append(seconds)


if __name__ == "__main__":
    serve(StableDiffusionCppWorker())
