"""Every check that needs a GPU, in one go: ``python -m latentedge.benchmarks.gpu.run_all -o gpu.json``.

For the default model and for Stable Diffusion 1.5's architecture: the engine conformance suite, engines by TensorRT and
TensorRT-RTX, parity of every component with the CPU, and the denoiser's latency with CUDA graphs on and off, beside
torch, as ratios. What fails is recorded and does not stop the rest; the exit code is 1 if anything failed.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import click

from latentedge.benchmarks.gpu.stable_diffusion import write_checkpoint
from latentedge.benchmarks.gpu.torch_peer import torch_runs
from latentedge.benchmarks.statistics import Times, compare_rounds
from latentedge.export.build_commands import row_json
from latentedge.export.builders import BuildRequest, builder_of
from latentedge.export.exporter import ExportOptions, export_source
from latentedge.export.latency import example_inputs, in_turns
from latentedge.export.model import SourceModel, SourceOptions
from latentedge.export.sources import load_source
from latentedge.export.tensorrt.engine_from_onnx import BuilderSettings, engine_from_onnx, profile_of
from latentedge.export.tensorrt.profiles import engine_axes
from latentedge.runtime import doctor
from latentedge.runtime.bundle import Array, Bundle, Component
from latentedge.runtime.engines import EngineOptions, open_engine
from latentedge.runtime.engines.tensorrt import Log, load_library
from latentedge.runtime.parity import FLOORS, compare
from latentedge.runtime.selection import DENOISER

ROOT = Path(__file__).parents[2]
#: Engine by name: backend and options. What does not run on this GPU is recorded as an error.
ENGINES: dict[str, tuple[str, EngineOptions]] = {
    "onnxruntime cuda": ("onnxruntime", EngineOptions(device="cuda")),
    "onnxruntime cuda graph": ("onnxruntime", EngineOptions(device="cuda", cuda_graph=True)),
    "onnxruntime tensorrt": ("onnxruntime", EngineOptions(device="tensorrt")),
    "tensorrt": ("tensorrt", EngineOptions()),
    "tensorrt graph": ("tensorrt", EngineOptions(cuda_graph=True)),
    "tensorrt-rtx": ("tensorrt-rtx", EngineOptions()),
    "tensorrt-rtx graph": ("tensorrt-rtx", EngineOptions(cuda_graph=True)),
}
#: What the others' latencies are ratios to.
REFERENCE = "onnxruntime cuda fp16"


class Report:
    """Results by step; each is written as soon as it is there."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.results: dict[str, Any] = {}
        self.failed: list[str] = []

    def step(self, name: str, action: Callable[[], Any]) -> Any:
        """Record what ``action`` gives, or its error, under ``name``."""
        click.echo(name, err=True)
        try:
            result = action()
        except Exception as error:  # noqa: BLE001 - one failure must not hide the results of the others
            self.failed.append(name)
            self.results[name] = {"error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()}
            click.echo(f"  failed: {error}", err=True)
            result = None
        else:
            self.results[name] = result
        text = json.dumps({"failed": self.failed, "results": self.results}, indent=2, default=str)
        self.path.write_text(text + "\n", encoding="utf-8")
        return result


@click.command()
@click.argument("sources", nargs=-1)
@click.option("-o", "--output", type=click.Path(path_type=Path), default=Path("gpu.json"), show_default=True)
@click.option("--work", type=click.Path(path_type=Path), default=Path("gpu-work"), help="Folder for bundles.")
@click.option("--stable-diffusion/--no-stable-diffusion", default=True, help="Also the architecture of version 1.5.")
def main(sources: tuple[str, ...], output: Path, work: Path, stable_diffusion: bool) -> None:
    """Check and measure SOURCES (default: the default model) on this machine's GPU."""
    report = Report(output)
    report.step("machine", machine_facts)
    report.step("conformance", conformance)
    named = {Path(source).name: source for source in sources or (str(ROOT / "examples/emoji"),)}
    if stable_diffusion:
        checkpoint = work / "stable-diffusion-1.5"
        if checkpoint.is_dir() or report.step("write stable-diffusion-1.5", lambda: write_checkpoint(checkpoint)):
            named["stable-diffusion-1.5"] = str(checkpoint)
    for name, source in named.items():
        model = report.step(f"{name}: load", partial(load_source, source, SourceOptions()))
        if model is not None:
            report.results[f"{name}: load"] = model.source.layout
            check_source(report, name, model, work / f"{name}.bundle")
    click.echo(f"{len(report.failed)} of {len(report.results)} steps failed: {', '.join(report.failed)}", err=True)
    sys.exit(1 if report.failed else 0)


def machine_facts() -> dict[str, Any]:
    """Facts and findings of ``latentedge doctor``."""
    facts = doctor.gather()
    return {**facts, "backends": [dataclasses.asdict(finding) for finding in doctor.judge(facts)]}


def conformance() -> dict[str, Any]:
    """The conformance suite's summary; a failing test is an error."""
    command = [sys.executable, "-m", "pytest", "-q", "tests/runtime/test_engine_conformance.py"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(result.stdout[-4000:])
    return {"summary": result.stdout.splitlines()[-30:]}


def check_source(report: Report, name: str, model: SourceModel, path: Path) -> None:
    """Export, build, compare and time one model."""

    def exported() -> Bundle:
        if path.is_dir():
            return Bundle.open(path)
        return export_source(model, path, ExportOptions(("fp32", "fp16"), target="generic"))

    bundle = report.step(f"{name}: export", exported)
    if bundle is None:
        return
    for backend in ("tensorrt", "tensorrt-rtx"):
        request = BuildRequest(bundle, backend, notify=lambda message: click.echo(message, err=True))
        report.step(f"{name}: build {backend}", partial(built, request))
    report.step(f"{name}: TensorRT-RTX on this GPU", lambda: rtx_here(bundle))
    for engine in ENGINES:
        report.step(f"{name}: parity {engine}", partial(parity, bundle, engine))
    latency(report, name, bundle, model)


def built(request: BuildRequest) -> list[dict[str, Any]]:
    """The rows of one build."""
    return [row_json(row) for row in builder_of(request.backend)(request)]


def rtx_here(bundle: Bundle) -> dict[str, Any]:
    """What TensorRT-RTX says to a plan of the denoiser on this GPU, whatever it was made for."""
    library = load_library("tensorrt-rtx")
    unet = bundle.component(DENOISER)
    profile = profile_of(unet.inputs, engine_axes(BuildRequest(bundle, "tensorrt-rtx"), unet))
    plan = engine_from_onnx(library, bundle.variant(DENOISER, "fp16")[0], profile, BuilderSettings())
    log = Log(library)
    engine = library.Runtime(log.logger).deserialize_cuda_engine(plan.content)
    return {"loads": engine is not None, "log": log.errors}


def components_of(bundle: Bundle) -> Iterator[tuple[Component, dict[str, Array]]]:
    """Whole components with inputs at the axes that their engines are built for."""
    for name, component in bundle.manifest.components.items():
        if "." not in name:
            axes = engine_axes(BuildRequest(bundle, "tensorrt"), component)
            yield component, example_inputs(component, {axis: length.opt for axis, length in axes.items()})


def parity(bundle: Bundle, name: str) -> dict[str, Any]:
    """PSNR in dB of every component and precision against fp32 on the CPU; under the floor is an error."""
    backend, options = ENGINES[name]
    found: dict[str, float] = {}
    below = []
    for component, inputs in components_of(bundle):
        with open_engine(bundle, component.name, "onnxruntime", "fp32", EngineOptions(hoisting=False)) as reference:
            expected = reference.run(inputs)
        for precision in component.variants:
            with open_engine(bundle, component.name, backend, precision, hoisted_off(options)) as engine:
                computed = engine.run(inputs)
            worst = min(compare(expected[key], computed[key]).psnr_db for key in expected)
            found[f"{component.name} {precision}"] = worst
            if worst < FLOORS.get(precision, 20.0):
                below.append(f"{component.name} {precision} {worst:.1f} dB")
    if below:
        raise RuntimeError(f"below the floor: {', '.join(below)}; all: {found}")
    return found


def hoisted_off(options: EngineOptions) -> EngineOptions:
    """The options with the denoiser as one graph, so that every backend computes the same."""
    return dataclasses.replace(options, hoisting=False)


def latency(report: Report, name: str, bundle: Bundle, model: SourceModel) -> None:
    """The denoiser's seconds in rounds in which every engine and torch run once, and ratios to :data:`REFERENCE`."""
    component, inputs = next(pair for pair in components_of(bundle) if pair[0].name == DENOISER)
    with ExitStack() as stack:
        runs: dict[str, Callable[[], Any]] = {}
        for engine in ENGINES:
            for precision in component.variants:
                label = f"{engine} {precision}"
                opened = report.step(f"{name}: open {label}", partial(ready, stack, bundle, engine, precision, inputs))
                if opened is not None:
                    report.results[f"{name}: open {label}"] = "runs"
                    runs[label] = opened
        source = next(part for part in model.components if part.spec.name == DENOISER)
        peers = report.step(f"{name}: torch", lambda: torch_runs(source, inputs)) or {}
        for label, run in peers.items():
            report.step(f"{name}: first run of {label}", run)
            if f"{name}: first run of {label}" not in report.failed:
                runs[label] = run
        report.results.pop(f"{name}: torch", None)
        report.step(f"{name}: latency", lambda: summary(in_turns(runs)))


def ready(stack: ExitStack, bundle: Bundle, name: str, precision: str, inputs: dict[str, Array]) -> Callable[[], Any]:
    """The denoiser of an engine with its inputs written and run once; the stack closes it."""
    backend, options = ENGINES[name]
    engine = stack.enter_context(open_engine(bundle, DENOISER, backend, precision, hoisted_off(options)))
    engine.run(inputs)
    engine.run()
    return engine.run


def summary(seconds: dict[str, list[float]]) -> dict[str, Any]:
    """Percentiles by name, and how many times faster than the reference, with the interval."""
    found: dict[str, Any] = {}
    for label, times in seconds.items():
        found[label] = dataclasses.asdict(Times.of(times))
        if REFERENCE in seconds:
            found[label]["ratio"] = dataclasses.asdict(compare_rounds(seconds[REFERENCE], times))
    return found


if __name__ == "__main__":
    main()
