"""Runs the real sampler on the fp32 denoiser and takes statistics of every activation that a layer reads.

Each sample is a picture of its own: its statistics are written to a checkpoint when it is done, so an interrupted run
loses at most one sample, and samples may be taken by any process on any machine. Statistics are added up at the end,
which gives the same numbers in whatever order the samples came. The decoder is observed on the latents that some of
these trajectories ended in, which the checkpoints hold.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import onnx_ir as ir
import onnxruntime

from latentedge.calibration.graph import load_graph, name_nodes, value_by_name
from latentedge.calibration.observers import TensorStatistics, merge_all
from latentedge.calibration.placement import Placed, place
from latentedge.calibration.plan import write_atomically
from latentedge.calibration.records import Probe, final_latents, pack, unpack
from latentedge.calibration.requests import requests
from latentedge.calibration.sharding import Mapper, one_by_one
from latentedge.runtime import samplers
from latentedge.runtime.bundle import Array, Bundle, Component
from latentedge.runtime.engines import Engine, EngineOptions
from latentedge.runtime.engines.null import NullEngine
from latentedge.runtime.engines.onnxruntime import open_session
from latentedge.runtime.pipeline import Pipeline

#: Every so many evaluations are observed; the first one moves on with each sample, so that all steps are seen.
STRIDE = 5
#: Spreads the one evaluation of each sample that is kept as a probe evenly over the trajectory.
GOLDEN = (5**0.5 - 1) / 2
#: The component that turns final latents into pictures, and every how many samples it is observed.
DECODER = "vae_decoder"
DECODED = 4
#: Changes with what a checkpoint holds.
CHECKPOINT_LAYOUT = 4
#: Activations of a decoder that are fetched at once: they are as large as the picture, hundreds of MB each at 512x512.
DECODER_TAPS = 6


@dataclass(frozen=True)
class CaptureSettings:
    """What one run of calibration observes; equal settings give equal statistics."""

    bundle: str
    component: str = "unet"
    samples: int = 32
    steps: int | None = None
    prompts: tuple[str, ...] = ()
    #: Observe only the step at this fraction of the trajectory (for comparison); ``None``: the whole trajectory.
    single_step: float | None = None
    #: Observe the convolutions' outputs as well.
    outputs: bool = False
    threads: int | None = None
    #: Folder of the denoiser's checkpoints, for the decoder.
    latents: str = ""

    def digest(self) -> str:
        """SHA-256 over the settings and the fp32 graph; checkpoints of another digest are not used."""
        bundle = Bundle.open(self.bundle)
        facts = {**asdict(self), "bundle": "", "threads": 0, "samples": 0, "stride": STRIDE}
        facts |= {"latents": Path(self.latents).name, "layout": CHECKPOINT_LAYOUT}
        facts["graph"] = bundle.component(self.component).variants["fp32"].sha256
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def tapped(placed: Iterable[Placed]) -> dict[str, int]:
    """Axis of the features of every activation to observe, by tensor name."""
    taps: dict[str, int] = {}
    for entry in placed:
        if entry.kept is None:
            taps[entry.layer.activation] = entry.layer.feature_axis
            taps |= dict.fromkeys(entry.split, entry.layer.feature_axis)
    return taps


class ObservedEngine(NullEngine):
    """The fp32 denoiser with its activations as further outputs; ``observe`` decides which runs fetch them."""

    backend = "onnxruntime"

    def __init__(self, component: Component, session: onnxruntime.InferenceSession, taps: Mapping[str, int]) -> None:
        super().__init__(component, self._compute)
        self._session = session
        self._taps = dict(taps)
        self.evaluations = 0
        #: Whether to fetch the activations of an evaluation, by its number since :meth:`begin`.
        self.observe: Callable[[int], bool] = lambda index: False
        #: How many activations are fetched at once; ``None``: all of them.
        self.at_once: int | None = None
        self.keep: Callable[[int], bool] = lambda index: False
        self.statistics: dict[str, TensorStatistics] = {}
        self.probes: list[Probe] = []
        #: The evaluation that was computed last, whether it was kept or not.
        self.latest: Probe | None = None
        self._sample = 0

    def begin(self, sample: int, observe: Callable[[int], bool], keep: Callable[[int], bool]) -> None:
        """Forget everything and start with a new sample."""
        self._sample, self.observe, self.keep, self.evaluations = sample, observe, keep, 0
        self.statistics, self.probes, self.latest = {}, [], None

    def axis_of(self, tensor: str) -> int:
        """The features' axis of an observed activation."""
        return self._taps[tensor]

    def fetch(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Every activation for the given inputs, by tensor name."""
        names = [name for name in self._taps if name not in inputs]
        arrays = dict(zip(names, self._session.run(names, dict(inputs)), strict=True))
        return {name: arrays[name] if name in arrays else inputs[name] for name in self._taps}

    def _compute(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        declared = [spec.name for spec in self.component.outputs]
        seen = self.observe(self.evaluations)
        names = [*declared, *(name for name in self._taps if seen and name not in (*declared, *inputs))]
        size = self.at_once or len(names)
        outputs: dict[str, Array] = {}
        for start in range(0, len(names), size):
            part = names[start : start + size]
            arrays = dict(zip(part, self._session.run(part, dict(inputs)), strict=True))
            outputs.update({name: arrays[name] for name in declared if name in arrays})
            if seen:
                timestep = float(inputs["timestep"][0]) if "timestep" in inputs else 0.0
                self._observe_all({**arrays, **(inputs if start == 0 else {})}, timestep)
        kept = {name: array.copy() for name, array in inputs.items()}
        self.latest = Probe(self._sample, self.evaluations, kept, outputs[declared[0]].copy())
        if self.keep(self.evaluations):
            self.probes.append(self.latest)
        self.evaluations += 1
        return outputs

    def _observe_all(self, arrays: Mapping[str, Array], timestep: float) -> None:
        for name, array in arrays.items():
            if name in self._taps:
                axis = self._taps[name]
                entry = self.statistics.setdefault(name, TensorStatistics.empty(array.shape[axis]))
                entry.observe(array, axis, timestep)


def open_observed(bundle: Bundle, component: str, *, outputs: bool, threads: int | None) -> ObservedEngine:
    """The instrumented fp32 engine of a component.

    The instrumented graph lies beside the original for a moment, because its weights may be in a file there.
    """
    path, _ = bundle.variant(component, "fp32")
    model = load_graph(path)
    name_nodes(model)
    placed = place(model)
    values = value_by_name(model)
    taps = tapped(placed)
    if outputs:
        nodes = {str(node.name): node for node in model.graph}
        for entry in placed:
            if entry.kept is None and entry.layer.kind == "Conv":
                taps[str(nodes[entry.layer.node].outputs[0].name)] = 1
    present = {str(value.name) for value in model.graph.outputs}
    inputs = {str(value.name) for value in model.graph.inputs}
    model.graph.outputs.extend(values[name] for name in taps if name not in present | inputs)
    instrumented = path.with_name(f".{path.stem}.observed-{uuid.uuid4().hex}.onnx")
    try:
        ir.save(model, instrumented)
        session = open_session(instrumented, EngineOptions(threads=threads))
    finally:
        instrumented.unlink(missing_ok=True)
    return ObservedEngine(bundle.component(component), session, taps)


class ObservedPipeline(Pipeline):
    """A pipeline on ONNX Runtime in fp32 whose denoiser is observed."""

    def __init__(self, bundle: Bundle, observed: ObservedEngine, threads: int | None) -> None:
        super().__init__(bundle, "onnxruntime", "fp32", EngineOptions(threads=threads))
        self._observed = observed

    def engine(self, component: str) -> Engine:
        """The observed engine for its component, plain fp32 engines for the others."""
        return self._observed if component == self._observed.component.name else super().engine(component)


@lru_cache(maxsize=1)
def _opened(settings: CaptureSettings) -> tuple[ObservedPipeline, ObservedEngine]:
    bundle = Bundle.open(settings.bundle)
    engine = open_observed(bundle, settings.component, outputs=settings.outputs, threads=settings.threads)
    return ObservedPipeline(bundle, engine, settings.threads), engine


def evaluations(bundle: Bundle, steps: int | None) -> int:
    """How often the denoiser is evaluated for one picture from noise: some samplers do it twice in a step."""
    manifest = bundle.manifest
    plan = samplers.prepare(manifest.schedule, manifest.defaults.sampler, steps or manifest.defaults.steps)
    return len(plan.timesteps)


def take_sample(settings: CaptureSettings, index: int) -> bytes:
    """Draw one calibration picture and give its statistics and probes as bytes; a pure function of its arguments."""
    pipeline, engine = _opened(settings)
    if settings.component == DECODER:
        return _decoded_sample(settings, index, pipeline, engine)
    bundle = Bundle.open(settings.bundle)
    request = requests(bundle, index + 1, settings.steps, settings.prompts)[index]
    count = evaluations(bundle, settings.steps)
    probe = int(((index + 1) * GOLDEN) % 1.0 * count)
    if settings.single_step is None:
        engine.begin(index, lambda number: (number + index) % STRIDE == 0, lambda number: number == probe)
    else:
        only = int(settings.single_step * (count - 1))
        engine.begin(index, lambda number: number == only, lambda number: number == probe)
    prompt = request.pop("prompt", None)
    latents = None
    for step in pipeline.steps(prompt, **request):
        latents = step.latents
    # A picture that another one is made from begins later in the schedule, and may end before the probe's turn.
    probes = engine.probes or ([] if engine.latest is None else [engine.latest])
    return pack(engine.statistics, probes, latents)


def _decoded_sample(settings: CaptureSettings, index: int, pipeline: ObservedPipeline, engine: ObservedEngine) -> bytes:
    """Decode the latents that a trajectory ended in."""
    latents = final_latents(checkpoint(Path(settings.latents), index * DECODED))
    engine.begin(index, lambda number: True, lambda number: True)
    engine.at_once = DECODER_TAPS
    pipeline.decode(latents)
    return pack(engine.statistics, engine.probes)


def checkpoint(folder: Path, index: int) -> Path:
    """The file of one sample."""
    return folder / f"sample-{index:05d}.npz"


def capture(
    settings: CaptureSettings,
    folder: Path,
    mapper: Mapper = one_by_one,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[dict[str, TensorStatistics], list[Probe]]:
    """Statistics and probes of all samples; checkpoints in ``folder`` are used, and written for every new sample."""
    folder = folder / settings.digest()[:16]
    drop_others(folder)
    files = [checkpoint(folder, index) for index in range(settings.samples)]
    missing = [index for index, file in enumerate(files) if not file.is_file()]
    done = settings.samples - len(missing)
    for index, data in mapper(take_sample, settings, missing):
        write_atomically(files[index], data)
        done += 1
        if progress is not None:
            progress(done, settings.samples)
    _opened.cache_clear()
    statistics: dict[str, TensorStatistics] = {}
    probes: list[Probe] = []
    for file in files:
        part, kept = unpack(file)
        statistics = merge_all([statistics, part])
        probes += kept
    return statistics, probes


def drop_others(folder: Path) -> None:
    """Make a folder of checkpoints, and remove those of other settings beside it."""
    if folder.parent.is_dir():
        for other in folder.parent.iterdir():
            if other != folder and other.is_dir():
                shutil.rmtree(other)
    folder.mkdir(parents=True, exist_ok=True)
