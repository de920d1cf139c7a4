"""What the INT8 benchmarks share: one model, one set of recorded inputs, one way to judge a graph."""

from __future__ import annotations

import dataclasses
import json
import resource
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from latentedge.calibration import gate
from latentedge.calibration.candidates import build, variant_of, with_variant
from latentedge.calibration.capture import STRIDE, CaptureSettings, capture
from latentedge.calibration.graph import save_graph
from latentedge.calibration.latency import in_turns, ratio
from latentedge.calibration.options import Options, Reporter
from latentedge.calibration.pictures import Drawn, differences, summary
from latentedge.calibration.plan import Plan
from latentedge.calibration.planning import first_plan, search_ranges
from latentedge.calibration.quantise import Evidence
from latentedge.calibration.records import Probe
from latentedge.calibration.requests import read_prompts, requests
from latentedge.calibration.scene import Studio, Target
from latentedge.runtime.bundle import Array, Bundle
from latentedge.runtime.engines import Engine, EngineOptions, open_engine
from latentedge.runtime.pipeline import Pipeline

#: Threads of every engine: all rows of a table are measured alike.
THREADS = 2


@dataclass(frozen=True)
class Setting:
    """The model and the requests that every row of a table shares."""

    bundle: Bundle
    samples: int
    steps: int
    pictures: int
    prompts: tuple[str, ...]
    backend: str = "openvino"
    precision: str = "int8"

    @classmethod
    def of(cls, path: Path, samples: int, steps: int, pictures: int, prompts: Path | None) -> Setting:
        """From a script's arguments."""
        texts = tuple(read_prompts(prompts)) if prompts is not None else ()
        return cls(Bundle.open(path), samples, steps, pictures, texts)

    def target(self) -> Target:
        """Where graphs are measured."""
        return Target(self.backend, self.precision, "fp32", THREADS)

    def options(self) -> Options:
        """Calibration's options."""
        return Options(self.samples, self.steps, self.prompts[0::2], backend=self.backend, threads=THREADS)

    def held_out(self) -> list[dict[str, Any]]:
        """The requests that graphs are judged by."""
        return requests(self.bundle, self.pictures, self.steps, self.prompts[1::2], held_out=True)


class RecordingEngine(Engine):
    """Runs another engine and keeps the inputs of every ``stride``-th evaluation, as calibration observes them."""

    backend = "recording"

    def __init__(self, inner: Engine, stride: int = STRIDE) -> None:
        super().__init__(inner.component, "fp32")
        self.inner = inner
        self.stride = stride
        self.offset = 0
        self.number = 0
        self.kept: list[dict[str, Array]] = []
        self._inputs: dict[str, Array] = {}

    def _bind(self) -> None:
        self.inner.bind(**self.axes)

    def _write(self, spec: Any, array: Array) -> None:
        self._inputs[spec.name] = array.copy()
        self.inner.write(spec.name, array)

    def _run(self) -> None:
        if (self.number + self.offset) % self.stride == 0:
            self.kept.append({name: array.copy() for name, array in self._inputs.items()})
        self.number += 1
        self.inner.run()

    def _read(self, spec: Any) -> Array:
        return self.inner.read(spec.name)

    def _close(self) -> None:
        self.inner.close()


def recorded_inputs(setting: Setting) -> list[dict[str, Array]]:
    """The denoiser's inputs at exactly the evaluations that calibration observes."""
    made = requests(setting.bundle, setting.samples, setting.steps, setting.prompts[0::2])
    with Pipeline(setting.bundle, "onnxruntime", "fp32", EngineOptions(threads=THREADS)) as plain:
        recording = RecordingEngine(plain.engine("unet"))
        with Pipeline(setting.bundle, "onnxruntime", "fp32", engines={"unet": recording}) as pipeline:
            for index, request in enumerate(made):
                recording.offset, recording.number = index, 0
                arguments = dict(request)
                for _ in pipeline.steps(arguments.pop("prompt", None), **arguments):
                    pass
        return recording.kept


def captured(setting: Setting, folder: Path, single_step: float | None = None) -> tuple[dict[str, Any], list[Probe]]:
    """Statistics and probes of the trajectory, or of one step of it."""
    options = setting.options()
    settings = CaptureSettings(
        str(setting.bundle.path),
        samples=options.samples,
        steps=options.steps,
        prompts=options.prompts,
        single_step=single_step,
        threads=THREADS,
    )
    return capture(settings, folder)


def full_plan(
    setting: Setting, statistics: dict[str, Any], probes: list[Probe], options: Options
) -> tuple[Plan, Evidence]:
    """Everything that the rules allow in INT8, without sensitivity."""
    faults = [fault for name, entry in statistics.items() for fault in entry.faults(name)]
    result = search_ranges(setting.bundle, options, statistics, probes, faults, Reporter())
    plan = first_plan(setting.bundle, options, setting.target(), statistics, result, faults)
    return plan, Evidence(statistics, result.bias)


def write_plan(bundle: Bundle, plan: Plan, evidence: Evidence, path: Path) -> Path:
    """Write a plan's graph to ``path``, inside the bundle."""
    model, _ = build(bundle, plan, evidence)
    return save_graph(model, path)[0]


def with_graph(bundle: Bundle, graph: Path) -> Bundle:
    """The bundle with a graph as its int8 variant, in memory."""
    files = [graph, *(file for file in (graph.with_suffix(".bin"), Path(f"{graph}.data")) if file.is_file())]
    return with_variant(bundle, "unet", "int8", variant_of(bundle, files))


@dataclass(frozen=True)
class Row:
    """One graph, judged."""

    name: str
    psnr_db: float
    psnr_worst_db: float
    sqnr_db: float
    ratio: float | None = None
    ratio_low: float | None = None
    seconds: float | None = None
    peak_mib: float | None = None
    processor_seconds: float | None = None


def with_cost(row: Row, cost: Mapping[str, float]) -> Row:
    """The row with what :meth:`Clock.cost` gave."""
    return dataclasses.replace(
        row, seconds=cost["seconds"], peak_mib=cost["peak_mib"], processor_seconds=cost["processor_seconds"]
    )


class Judge:
    """Draws the held-out requests and times graphs against fp32, in one process."""

    def __init__(self, setting: Setting, probes: list[Probe]) -> None:
        self.setting = setting
        self.probes = probes
        self.target = setting.target()
        with Studio(setting.bundle, self.target) as studio:
            self.reference: Drawn = studio.drawn(None, setting.held_out())

    def row(self, name: str, graph: Path) -> Row:
        """A graph's pictures and output SQNR."""
        bundle = with_graph(self.setting.bundle, graph)
        with ExitStack() as stack:
            engine = self._opened(stack, bundle, self.setting.precision)
            studio = stack.enter_context(Studio(bundle, self.target))
            studio.precision = "fp32"
            drawn = studio.drawn(engine, self.setting.held_out())
            mean, worst = summary(differences(self.reference, drawn))
            sqnr_db = gate.mean_sqnr(self.probes, gate.outputs_of(engine, self.probes))
        return Row(name, mean, worst, sqnr_db)

    def timed(self, rows: Sequence[tuple[Row, Path]]) -> list[Row]:
        """The rows with their graphs' speed against fp32; all in the same rounds, so that load falls on all alike."""
        found = []
        with ExitStack() as stack:
            engines = {"": self._opened(stack, self.setting.bundle, "fp32")}
            for row, graph in rows:
                engines[row.name] = self._opened(stack, with_graph(self.setting.bundle, graph), self.setting.precision)
            times = in_turns(engines, self.probes[0].inputs, 4.0 * len(engines))
            for row, _ in rows:
                speed = ratio(times[""], times[row.name])
                found.append(dataclasses.replace(row, ratio=speed.ratio, ratio_low=speed.low))
        return found

    def _opened(self, stack: ExitStack, bundle: Bundle, precision: str) -> Engine:
        return stack.enter_context(open_engine(bundle, "unet", self.target.backend, precision, self.target.options))


class Clock:
    """Seconds and peak memory of what runs between entering and :meth:`cost`."""

    def __init__(self) -> None:
        self.start, self.processor = time.perf_counter(), time.process_time()

    def cost(self) -> dict[str, float]:
        """Seconds since the start, by the clock and of the processor, and this process's peak resident memory in MiB."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        spent = time.process_time() - self.processor
        return {"seconds": time.perf_counter() - self.start, "peak_mib": peak, "processor_seconds": spent}


def print_rows(rows: list[Row], output: Path | None) -> None:
    """The table on stdout, and as JSON where a file is named."""
    head = f"{'':34s} {'PSNR':>6s} {'worst':>6s} {'SQNR':>6s} {'x fp32':>7s} {'>=':>5s} {'s':>7s} {'cpu s':>7s} {'MiB':>6s}"
    print(head)  # noqa: T201
    for row in rows:
        cells = [row.ratio, row.ratio_low, row.seconds, row.processor_seconds, row.peak_mib]
        texts = ["-" if cell is None else f"{cell:.2f}" if cell < 100 else f"{cell:.0f}" for cell in cells]
        print(  # noqa: T201
            f"{row.name:34s} {row.psnr_db:6.2f} {row.psnr_worst_db:6.2f} {row.sqnr_db:6.2f} "
            f"{texts[0]:>7s} {texts[1]:>5s} {texts[2]:>7s} {texts[3]:>7s} {texts[4]:>6s}"
        )
    if output is not None:
        output.write_text(json.dumps([dataclasses.asdict(row) for row in rows], indent=2) + "\n", encoding="utf-8")


def stacked(inputs: list[dict[str, Array]]) -> dict[str, Array]:
    """Inputs of several evaluations along the batch, as Model Optimizer takes calibration data."""
    return {name: np.concatenate([entry[name] for entry in inputs]) for name in inputs[0]}
