"""INT8 graphs of other tools beside ours: the same model, the same calibration inputs, the same pictures and engine.

    python -m latentedge.benchmarks.int8_alternatives BUNDLE --model-optimizer FOLDER

Every tool runs in a process of its own on a copy of the model of its own, so that its time, its peak memory and what it
writes are its own. A tool that is not installed, or that fails, is a line on stderr and has no row. Model Optimizer may
be in a folder apart (``pip install --target FOLDER nvidia-modelopt[onnx]``), because it asks for other versions. Ours
observes the running sampler, and its time includes sampling; the other tools are given the recorded inputs of the same
evaluations.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
import numpy as np

from latentedge.benchmarks.int8_common import (
    Clock,
    Judge,
    Row,
    Setting,
    captured,
    full_plan,
    print_rows,
    recorded_inputs,
    stacked,
    with_cost,
    write_plan,
)
from latentedge.runtime.bundle import Array
from latentedge.runtime.errors import EngineError

Inputs = list[dict[str, Array]]


def with_onnxruntime(model: Path, inputs: Inputs, output: Path, *, like_tensorrt: bool = False) -> None:
    """``quantize_static`` with scales by channel; ``like_tensorrt`` keeps to weighted layers and symmetric ranges."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.left = iter(inputs)

        def get_next(self) -> dict[str, Array] | None:
            return next(self.left, None)

    options: dict[str, Any] = {"per_channel": True, "quant_format": QuantFormat.QDQ, "weight_type": QuantType.QInt8}
    options["activation_type"] = QuantType.QInt8
    if like_tensorrt:
        options["op_types_to_quantize"] = ["Conv", "MatMul", "Gemm"]
        options["extra_options"] = {
            "ActivationSymmetric": True,
            "WeightSymmetric": True,
            "QuantizeBias": False,
            "MatMulConstBOnly": True,
            "OpTypesToExcludeOutputQuantization": ["Conv", "MatMul", "Gemm"],
        }
    quantize_static(str(model), str(output), Reader(), **options)


def with_nncf(model: Path, inputs: Inputs, output: Path) -> None:
    """NNCF's post-training quantisation of the OpenVINO model, for transformers (which adds SmoothQuant)."""
    import nncf
    import openvino

    read = openvino.Core().read_model(model)
    # Activation statistics need the same inputs and outputs, whose order is by name here.
    names = [port.get_any_name() for port in read.inputs]
    dataset = nncf.Dataset([{name: entry[name] for name in names} for entry in inputs])
    quantised = nncf.quantize(
        read,
        dataset,
        subset_size=len(inputs),
        preset=nncf.QuantizationPreset.MIXED,
        model_type=nncf.ModelType.TRANSFORMER,
    )
    openvino.save_model(quantised, output.with_suffix(".xml"), compress_to_fp16=False)


def with_model_optimizer(model: Path, inputs: Inputs, output: Path, method: str = "entropy") -> None:
    """Model Optimizer's ONNX PTQ with its TensorRT-guided placement and float32 floats."""
    spec = importlib.util.find_spec("tensorrt")
    if spec is not None and spec.origin is None:
        # Type stubs are a namespace without contents, which it would take for the library.
        sys.modules["tensorrt"] = None  # type: ignore[assignment]
    from modelopt.onnx.quantization import quantize

    quantize(
        str(model),
        quantize_mode="int8",
        calibration_data=stacked(inputs),
        calibration_method=method,
        calibration_eps=["cpu"],
        high_precision_dtype="fp32",
        output_path=str(output),
    )


#: Tools by the name of their row; the file ending says what they write.
TOOLS: dict[str, tuple[Callable[..., None], str, dict[str, Any]]] = {
    "ONNX Runtime quantize_static": (with_onnxruntime, ".onnx", {}),
    "ONNX Runtime, weighted layers only": (with_onnxruntime, ".onnx", {"like_tensorrt": True}),
    "NNCF": (with_nncf, ".xml", {}),
    "Model Optimizer, entropy": (with_model_optimizer, ".onnx", {}),
    "Model Optimizer, max": (with_model_optimizer, ".onnx", {"method": "max"}),
}


def work(tool: str, model: Path, inputs: Path, output: Path) -> dict[str, float]:
    """Run one tool here; its seconds and this process's peak memory."""
    with np.load(inputs, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    names = sorted({name.split("/", 1)[1] for name in arrays})
    count = len(arrays) // len(names)
    entries = [{name: arrays[f"{index}/{name}"] for name in names} for index in range(count)]
    function, _, options = TOOLS[tool]
    clock = Clock()
    function(model, entries, output, **options)
    return clock.cost()


def in_own_process(
    tool: str, original: Path, inputs: Path, output: Path, folder: Path | None
) -> dict[str, float] | None:
    """What :func:`work` gives, from a fresh process on a copy of the model; ``None`` and a message where it fails.

    ``folder``: where Model Optimizer is, when it is not installed beside the rest.
    """
    own = output.parent / f"{output.stem}-input"
    own.mkdir()
    for file in (original, *original.parent.glob(f"{original.name}.data")):
        shutil.copy2(file, own / file.name)
    command = [sys.executable, "-m", "latentedge.benchmarks.int8_alternatives", "--work", tool]
    command += ["--inputs", str(inputs), "-o", str(output), str(own / original.name)]
    environment = dict(os.environ)
    if folder is not None and tool.startswith("Model Optimizer"):
        environment["PYTHONPATH"] = os.pathsep.join([str(folder), *filter(None, [environment.get("PYTHONPATH")])])
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    shutil.rmtree(own)
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        click.echo(f"{tool} failed: {done.stderr.strip().splitlines()[-1:]}", err=True)
        return None
    cost: dict[str, float] = json.loads(lines[-1])
    return cost


@click.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--samples", default=12)
@click.option("--steps", default=20)
@click.option("--pictures", default=8)
@click.option("--prompts", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path))
@click.option("--only", default="", help="Run only the tools whose row's name begins with this.")
@click.option("--model-optimizer", type=click.Path(path_type=Path, exists=True), help="Folder that it is in.")
@click.option("--work", "tool", hidden=True)
@click.option("--inputs", type=click.Path(path_type=Path), hidden=True)
def main(
    path: Path,
    samples: int,
    steps: int,
    pictures: int,
    prompts: Path | None,
    output: Path | None,
    only: str,
    model_optimizer: Path | None,
    tool: str | None,
    inputs: Path | None,
) -> None:
    """Quantise BUNDLE's denoiser with every tool and judge the graphs beside each other."""
    if tool is not None and inputs is not None and output is not None:
        click.echo(json.dumps(work(tool, path, inputs, output)))
        return
    setting = Setting.of(path, samples, steps, pictures, prompts)
    folder = setting.bundle.variant("unet", "fp32")[0].parent
    judged: list[tuple[Row, Path]] = []
    with TemporaryDirectory(dir=folder, prefix=".alternatives-") as name:
        scratch = Path(name)
        clock = Clock()
        statistics, probes = captured(setting, scratch / "capture")
        plan, evidence = full_plan(setting, statistics, probes, setting.options())
        ours = write_plan(setting.bundle, plan, evidence, scratch / "ours.onnx")
        cost = clock.cost()
        judge = Judge(setting, probes)
        judged.append((with_cost(judge.row("latentedge, no layer kept back", ours), cost), ours))
        recorded = scratch / "inputs.npz"
        entries = {
            f"{i}/{name}": array for i, entry in enumerate(recorded_inputs(setting)) for name, array in entry.items()
        }
        np.savez(recorded, **entries)  # type: ignore[arg-type]
        original = setting.bundle.variant("unet", "fp32")[0]
        chosen = {label: entry for label, entry in TOOLS.items() if label.startswith(only)}
        for number, (label, (_, ending, _)) in enumerate(chosen.items()):
            graph = scratch / f"tool{number}{ending}"
            spent = in_own_process(label, original, recorded, graph, model_optimizer)
            if spent is None or not graph.is_file():
                continue
            try:
                judged.append((with_cost(judge.row(label, graph), spent), graph))
            except EngineError as error:
                click.echo(f"{label} wrote a graph that is not run: {' '.join(error.message.split())}", err=True)
        variants = setting.bundle.component("unet").variants
        if "int8" in variants:
            graph = setting.bundle.file(variants["int8"].path)
            judged.append((judge.row("latentedge calibrate, as planned", graph), graph))
        rows = judge.timed(judged)
    print_rows(rows, output)


if __name__ == "__main__":
    main()
