"""OpenVINO GenAI: optimum-intel's export of the diffusers folder, run by its C++ pipeline."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

from protocol import serve


class OpenVinoGenAiWorker:
    """``precision``: "f32" or "bf16"; ``weights``: the exporter's weight format; ``static``: reshaped to one size.

    ``quantised``: every operator of the denoiser in INT8 by NNCF, with random inputs to calibrate by: what it costs in
    time does not depend on them.
    """

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
        quantised: bool = False,
    ) -> dict[str, Any]:
        """Open the exported pipeline and draw the first picture. The export into ``cache`` is not timed."""
        exported = Path(cache) / weights
        if not (exported / "complete").is_file():
            command = [str(Path(sys.executable).with_name("optimum-cli")), "export", "openvino", "--model", folder]
            # Without a task the exporter asks the hub which one a folder is for.
            subprocess.run([*command, "--task", "text-to-image", "--weight-format", weights, str(exported)], check=True)
            (exported / "complete").touch()
        if quantised:
            exported = quantise(exported, Path(cache) / "int8-full", side // 8)
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


def quantise(exported: Path, target: Path, side: int) -> Path:
    """The exported pipeline with its denoiser in INT8, weights and activations, in ``target``; made once."""
    if (target / "complete").is_file():
        return target
    nncf: Any = import_module("nncf")
    openvino: Any = import_module("openvino")
    numpy: Any = import_module("numpy")
    shutil.copytree(exported, target, dirs_exist_ok=True)
    model = openvino.Core().read_model(exported / "unet" / "openvino_model.xml")
    generator = numpy.random.default_rng(0)
    samples = []
    for timestep in (900, 500, 100):
        inputs: dict[str, Any] = {}
        for value in model.inputs:
            sides = [dimension.get_length() if dimension.is_static else 0 for dimension in value.get_partial_shape()]
            filled = [(2, 0, side, side)[index] if length == 0 else length for index, length in enumerate(sides)]
            if value.any_name == "encoder_hidden_states":
                filled = [2, 77, sides[2]]
            elif value.any_name == "timestep":
                filled = [max(length, 1) for length in sides]
            kind = value.get_element_type().to_dtype()
            drawn = numpy.full(filled, timestep) if value.any_name == "timestep" else generator.standard_normal(filled)
            inputs[value.any_name] = drawn.astype(kind)
        samples.append(inputs)
    quantised = nncf.quantize(
        model, nncf.Dataset(samples), subset_size=len(samples), model_type=nncf.ModelType.TRANSFORMER
    )
    # The file is read lazily, so the new one may not take its place while it is written.
    for suffix in (".xml", ".bin"):
        (target / "unet" / f"openvino_model{suffix}").unlink()
    openvino.save_model(quantised, target / "unet" / "openvino_model.xml", compress_to_fp16=False)
    (target / "complete").touch()
    return target


if __name__ == "__main__":
    serve(OpenVinoGenAiWorker())
