"""Every check that needs a GPU, in one go: ``python -m latentedge.benchmarks.gpu.run_all -o gpu.json``.

For the default model and for Stable Diffusion 1.5's denoiser: the engine conformance suite, engines by TensorRT and
TensorRT-RTX, parity of every component with the CPU, and the denoiser's latency with CUDA graphs on and off, beside
torch, as ratios. What fails is recorded and does not stop the rest; the exit code is 1 if anything failed. What is not
installed is recorded as such. A second run takes the bundles and engines of the first from ``--work``.
"""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import click

from latentedge.benchmarks.gpu.report import Report
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
from latentedge.runtime.errors import MissingDependencyError
from latentedge.runtime.parity import FLOORS, compare
from latentedge.runtime.selection import DENOISER

ROOT = Path(__file__).parents[2]
#: Engine by name: backend and options, with the denoiser as one graph, so that every backend computes the same.
ENGINES: dict[str, tuple[str, EngineOptions]] = {
    "onnxruntime cuda": ("onnxruntime", EngineOptions(device="cuda", hoisting=False)),
    "onnxruntime cuda graph": ("onnxruntime", EngineOptions(device="cuda", cuda_graph=True, hoisting=False)),
    "onnxruntime tensorrt": ("onnxruntime", EngineOptions(device="tensorrt", hoisting=False)),
    "tensorrt": ("tensorrt", EngineOptions(hoisting=False)),
    "tensorrt graph": ("tensorrt", EngineOptions(cuda_graph=True, hoisting=False)),
    "tensorrt-rtx": ("tensorrt-rtx", EngineOptions(hoisting=False)),
    "tensorrt-rtx graph": ("tensorrt-rtx", EngineOptions(cuda_graph=True, hoisting=False)),
}
#: What the others' latencies are ratios to; where it did not run, the first that did.
REFERENCE = "onnxruntime cuda fp16"
PRECISIONS = ("fp32", "fp16")

#: Component, inputs, and what fp32 on the processor computes from them.
Case = tuple[Component, dict[str, Array], dict[str, Array]]


@click.command()
@click.argument("sources", nargs=-1)
@click.option("-o", "--output", type=click.Path(path_type=Path), default=Path("gpu.json"), show_default=True)
@click.option("--work", type=click.Path(path_type=Path), default=Path("gpu-work"), help="Folder for bundles.")
@click.option("--stable-diffusion/--no-stable-diffusion", default=True, help="Also the denoiser of version 1.5.")
@click.option("--minutes", type=float, help="Begin no step after this time; what is left out is listed.")
@click.option("--autotune", is_flag=True, help="Let torch.compile try every kernel, which takes it many minutes.")
def main(
    sources: tuple[str, ...], output: Path, work: Path, stable_diffusion: bool, minutes: float | None, autotune: bool
) -> None:
    """Check and measure SOURCES (default: the default model) on this machine's GPU."""
    report = Report(output, minutes)
    report.step("machine", machine_facts)
    report.step("conformance", conformance)
    named = {Path(source).name: source for source in sources or (str(ROOT / "examples/emoji"),)}
    if stable_diffusion:
        checkpoint = work / "stable-diffusion-1.5"
        if report.step("write stable-diffusion-1.5", lambda: write_checkpoint(checkpoint), str):
            named["stable-diffusion-1.5"] = str(checkpoint)
    for name, source in named.items():
        loaded = partial(load_source, source, SourceOptions())
        model = report.step(f"{name}: load", loaded, lambda found: found.source.layout)
        if model is not None:
            check_source(report, name, model, work / f"{name}.bundle", autotune)
    for what, names in (("failed", report.failed), ("not here", report.missing), ("left out", report.left_out)):
        if names:
            click.echo(f"{what}: {', '.join(names)}", err=True)
    click.echo(f"{len(report.results)} steps gave results: {output}", err=True)
    sys.exit(1 if report.failed else 0)


def machine_facts() -> dict[str, Any]:
    """Facts and findings of ``latentedge doctor``."""
    facts = doctor.gather()
    return {**facts, "backends": [dataclasses.asdict(finding) for finding in doctor.judge(facts)]}


def conformance() -> list[str]:
    """The conformance suite's summary; a failing test is an error."""
    command = [sys.executable, "-m", "pytest", "-q", "tests/runtime/test_engine_conformance.py"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError((result.stdout + result.stderr)[-4000:])
    return result.stdout.splitlines()[-30:]


def check_source(report: Report, name: str, model: SourceModel, path: Path, autotune: bool) -> None:
    """Export, build, compare and time one model."""

    def exported() -> Bundle:
        return Bundle.open(path) if path.is_dir() else export_source(model, path, ExportOptions(PRECISIONS))

    bundle = report.step(f"{name}: export", exported, lambda found: found.digest())
    if bundle is None:
        return
    report.step(f"{name}: TensorRT-RTX on this GPU", lambda: rtx_here(bundle))
    for backend in ("tensorrt", "tensorrt-rtx"):
        report.step(f"{name}: build {backend}", partial(built, bundle, backend))
    cases = report.step(f"{name}: reference", lambda: references(bundle), len)
    for engine in ENGINES if cases else ():
        report.step(f"{name}: parity {engine}", partial(parity, bundle, engine, cases))
    if cases:
        latency(report, name, bundle, cases, partial(torch_runs, denoiser_of(model), autotune=autotune))


def denoiser_of(model: SourceModel) -> Any:
    """The source of a model's denoiser."""
    return next(part for part in model.components if part.spec.name == DENOISER)


def require(backend: str) -> None:
    """:class:`MissingDependencyError` where ``latentedge doctor`` says that a backend does not run here."""
    finding = next(found for found in doctor.judge(doctor.gather()) if found.backend == backend)
    if not finding.runs:
        raise MissingDependencyError(finding.why, finding.hint)


def built(bundle: Bundle, backend: str) -> list[dict[str, Any]]:
    """The rows of one build."""
    require(backend)
    request = BuildRequest(bundle, backend, PRECISIONS, notify=lambda message: click.echo(message, err=True))
    return [row_json(row) for row in builder_of(backend)(request)]


def rtx_here(bundle: Bundle) -> dict[str, Any]:
    """What TensorRT-RTX says to a plan of the denoiser on this GPU, whatever it was made for."""
    library = load_library("tensorrt-rtx")
    unet = bundle.component(DENOISER)
    profile = profile_of(unet.inputs, engine_axes(BuildRequest(bundle, "tensorrt-rtx"), unet))
    plan = engine_from_onnx(library, bundle.variant(DENOISER, "fp16")[0], profile, BuilderSettings())
    log = Log(library)
    engine = library.Runtime(log.logger).deserialize_cuda_engine(plan.content)
    return {"plan bytes": plan.plan_size, "loads": engine is not None, "log": log.errors}


def whole_components(bundle: Bundle) -> Iterator[tuple[Component, dict[str, Array]]]:
    """Whole components with inputs at the axes that their engines are built for."""
    for name, component in bundle.manifest.components.items():
        if "." not in name:
            axes = engine_axes(BuildRequest(bundle, "tensorrt"), component)
            yield component, example_inputs(component, {axis: length.opt for axis, length in axes.items()})


def references(bundle: Bundle) -> list[Case]:
    """What each component computes in fp32 on the processor."""
    found = []
    for component, inputs in whole_components(bundle):
        with open_engine(bundle, component.name, "onnxruntime", "fp32", EngineOptions(hoisting=False)) as engine:
            found.append((component, inputs, engine.run(inputs)))
    return found


def parity(bundle: Bundle, name: str, cases: list[Case]) -> dict[str, Any]:
    """PSNR in dB of every component and precision against fp32 on the CPU; under the floor is an error."""
    backend, options = ENGINES[name]
    require(backend)
    found: dict[str, float] = {}
    below = []
    for component, inputs, expected in cases:
        for precision in component.variants:
            with open_engine(bundle, component.name, backend, precision, options) as engine:
                computed = engine.run(inputs)
            worst = min(compare(expected[key], computed[key]).psnr_db for key in expected)
            found[f"{component.name} {precision}"] = worst
            if not worst >= FLOORS.get(precision, 20.0):
                below.append(f"{component.name} {precision} {worst:.1f} dB")
    if below:
        raise RuntimeError(f"below the floor: {', '.join(below)}; all: {found}")
    return found


def latency(report: Report, name: str, bundle: Bundle, cases: list[Case], torch_peer: Callable[..., Any]) -> None:
    """The denoiser's seconds in rounds in which every engine and torch run once, and ratios to :data:`REFERENCE`."""
    component, inputs, _ = next(case for case in cases if case[0].name == DENOISER)
    with ExitStack() as stack:
        runs: dict[str, Callable[[], Any]] = {}
        for engine in ENGINES:
            for precision in component.variants:
                label = f"{engine} {precision}"
                opening = partial(ready, stack, bundle, engine, precision, inputs)
                opened = report.step(f"{name}: open {label}", opening, lambda _: "runs")
                if opened is not None:
                    runs[label] = opened
        peers = report.step(f"{name}: torch", partial(torch_peer, inputs), list) or {}
        for label, run in peers.items():
            if report.step(f"{name}: first run of {label}", partial(warm, run), lambda _: "runs"):
                runs[label] = run
        if runs:
            report.step(f"{name}: latency", lambda: summary(in_turns(runs)))


def ready(stack: ExitStack, bundle: Bundle, name: str, precision: str, inputs: dict[str, Array]) -> Callable[[], Any]:
    """The denoiser of an engine with its inputs written and run once; the stack closes it."""
    backend, options = ENGINES[name]
    require(backend)
    engine = stack.enter_context(open_engine(bundle, DENOISER, backend, precision, options))
    engine.run(inputs)
    warm(engine.run)
    return engine.run


def warm(run: Callable[[], Any]) -> bool:
    """Run three times: a compiler compiles in the first, and may record a CUDA graph in the second and third."""
    for _ in range(3):
        run()
    return True


def summary(seconds: dict[str, list[float]]) -> dict[str, Any]:
    """Percentiles by name, and how many times faster than the reference, with the interval."""
    reference = REFERENCE if REFERENCE in seconds else next(iter(seconds))
    found: dict[str, Any] = {"reference": reference}
    for label, times in seconds.items():
        ratio = compare_rounds(seconds[reference], times)
        found[label] = {**dataclasses.asdict(Times.of(times)), "ratio": dataclasses.asdict(ratio)}
        click.echo(f"  {label:32}{1000 * found[label]['p50']:9.3f} ms  {ratio.ratio:.2f} times {reference}", err=True)
    return found


if __name__ == "__main__":
    main()
