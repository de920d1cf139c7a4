"""Measures every precision of the denoiser on this machine, side by side, and writes down what decides ``auto``.

INT8 is chosen only where its latency's lower bound beats the fastest float precision and its pictures hold the floor;
``latentedge.runtime.selection`` reads the records. Where the machine is too noisy to tell, the record says "undecided"
and what is proven stays.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from latentedge.calibration.candidates import with_component
from latentedge.calibration.correct import WORTHWHILE_DB
from latentedge.calibration.latency import FASTER, UNDECIDED, Ratio, in_turns, ratio
from latentedge.calibration.metrics import mean_low, sqnr, worst_low
from latentedge.calibration.pictures import Drawn, differences, summary
from latentedge.calibration.records import Probe
from latentedge.calibration.scene import Scene, Studio, Target
from latentedge.calibration.sensitivity import CLEAR_DB, WORST_BELOW_DB
from latentedge.runtime.bundle import Array, Bundle, graph_precision
from latentedge.runtime.engines import BACKENDS, Engine, open_engine
from latentedge.runtime.errors import EngineError
from latentedge.runtime.machine import machine_fingerprint
from latentedge.runtime.selection import PRECISIONS, holds_floor, latency_identity

#: What runs where nothing was measured.
REFERENCE_BACKEND = "onnxruntime"
REFERENCE = f"{REFERENCE_BACKEND} fp32"

Notify = Callable[[str], None]
Record = dict[str, Any]


def open_precisions(
    stack: ExitStack, bundle: Bundle, component: str, target: Target, wanted: Sequence[str], notify: Notify
) -> dict[str, Engine]:
    """An engine for each of the ``wanted`` precisions that this machine computes in; ``notify`` hears of the others."""
    engines: dict[str, Engine] = {}
    for precision in wanted:
        if graph_precision(precision) not in bundle.component(component).variants:
            continue
        try:
            engines[precision] = stack.enter_context(
                open_engine(bundle, component, target.backend, precision, target.options)
            )
        except EngineError as error:
            notify(f"{component} in {precision} was not measured: {error.message}")
    return engines


def precisions_of(backend: str) -> tuple[str, ...]:
    """What a backend computes in."""
    return PRECISIONS[backend]


def is_quantised(precision: str) -> bool:
    """Whether a precision runs the int8 graph."""
    return graph_precision(precision) == "int8"


@dataclass(frozen=True)
class Race:
    """Which times decide: ``backend``'s precisions, of which those in ``good`` may be alternatives to INT8.

    ``reference``: the name of ONNX Runtime's fp32 among the times, which is what runs where nothing was measured; the
    backend's own fp32 is the reference where it is not there.
    """

    backend: str
    good: Mapping[str, bool]

    def reference(self, times: Mapping[str, list[float]]) -> str:
        """The name of the times that ratios are taken against."""
        return REFERENCE if REFERENCE in times else "fp32"

    def alternative(self, times: Mapping[str, list[float]]) -> str:
        """The fastest float precision that is good enough."""
        floats = [name for name in times if name != REFERENCE and not is_quantised(name)]
        usable = [name for name in floats if name == "fp32" or self.good.get(name, False)]
        return max(usable, key=lambda name: ratio(times["fp32"], times[name]).ratio)

    def against(self, times: Mapping[str, list[float]], name: str) -> list[Ratio]:
        """What a precision has to beat: the reference; a quantised one the best float precision as well."""
        found = [ratio(times[self.reference(times)], times[name])]
        return [*found, ratio(times[self.alternative(times)], times[name])] if is_quantised(name) else found

    def decided(self, times: Mapping[str, list[float]]) -> bool:
        """Whether each precision that could be chosen is faster, or slower, than what it has to beat."""
        wanted = [name for name in times if name not in (REFERENCE, "fp32") and self.good.get(name, False)]
        return all(verdict(self.against(times, name)) != UNDECIDED for name in wanted)

    def records(self, times: Mapping[str, list[float]]) -> dict[str, Record]:
        """Latency records by precision.

        ``ratio`` is the speed against the reference. For a quantised precision ``alternative`` names the float precision
        to beat, and ``ratio_low`` is the smaller of the lower bounds against the reference and against it.
        """
        reference = self.reference(times)
        named = REFERENCE if reference == REFERENCE else f"{self.backend} fp32"
        found = {}
        for name, seconds in times.items():
            if name == REFERENCE:
                continue
            bounds = self.against(times, name)
            record = latency_identity(self.backend, name, machine_fingerprint())
            record["seconds"] = sorted(seconds)[len(seconds) // 2]
            record |= {"reference": named, "ratio": bounds[0].ratio, "rounds": bounds[0].rounds}
            record |= {"ratio_low": min(b.low for b in bounds), "ratio_high": min(b.high for b in bounds)}
            record["verdict"] = "reference" if name == reference else verdict(bounds)
            if len(bounds) > 1:
                other = {"alternative": self.alternative(times), "alternative_ratio": bounds[1].ratio}
                other |= {"alternative_ratio_low": bounds[1].low, "alternative_ratio_high": bounds[1].high}
                record |= other
            found[name] = record
        return found


def verdict(bounds: Sequence[Ratio]) -> str:
    """Faster than all, slower than one, or undecided."""
    verdicts = [bound.verdict for bound in bounds]
    if all(found == FASTER for found in verdicts):
        return FASTER
    return next((found for found in verdicts if found not in (FASTER, UNDECIDED)), UNDECIDED)


def quality_record(
    precision: str, backend: str, reference: Drawn, drawn: Drawn, floor_db: float, exchanged: Sequence[float] = ()
) -> Record:
    """Pictures of a precision against fp32's. ``floor_db`` is the floor of the worst, ``floor_mean_db`` of the mean.

    Other pictures differ, so ``psnr_low_db``, the lower end of the mean's interval, has to be above the latter, and
    ``psnr_worst_low_db``, what is foreseen of the worst of 64, above the former. ``exchanged``: what
    :meth:`~latentedge.calibration.scene.Scene.exchanged` gives.
    """
    found = differences(reference, drawn)
    mean, worst = summary(found)
    values = [entry.psnr_db for entry in found]
    return {
        "kind": "quality",
        "backend": backend,
        "precision": precision,
        "pictures": len(found),
        "psnr_db": mean,
        "psnr_low_db": mean_low(values),
        "psnr_worst_db": worst,
        "psnr_worst_low_db": worst_low(values, floor_db + CLEAR_DB, exchanged),
        **({"psnr_worst_exchanged_db": min(exchanged)} if exchanged else {}),
        "ssim": sum(entry.ssim for entry in found) / len(found),
        "floor_db": floor_db - WORST_BELOW_DB,
        "floor_mean_db": floor_db,
    }


def with_correction(bundle: Bundle, precision: str, record: Record | None) -> Bundle:
    """The bundle, in memory, with the correction of one precision set or removed; only one that is ``applied`` counts."""
    calibration = dict(bundle.manifest.calibration)
    corrections = {name: value for name, value in calibration.get("correction", {}).items() if name != precision}
    if record is not None:
        corrections[precision] = record
    calibration["correction"] = corrections
    return Bundle(bundle.path, dataclasses.replace(bundle.manifest, calibration=calibration))


def measure(
    bundle: Bundle,
    component: str,
    target: Target,
    probes: Sequence[Probe],
    requests: Sequence[dict[str, Any]],
    floor_db: float,
    corrections: Mapping[str, Record],
    notify: Notify,
) -> tuple[Bundle, list[Record]]:
    """Latency and quality of every precision, written into the bundle (in memory); the records as they were written.

    A correction is applied in a precision where the pictures are closer to fp32's with it than without.
    """
    with ExitStack() as stack:
        wanted = precisions_of(target.backend)
        engines = open_precisions(stack, bundle, component, target, wanted, notify)
        studio = stack.enter_context(Studio(bundle, target))
        scene = Scene.of(studio, component, requests, engines["fp32"])
        quality: dict[str, Record] = {}
        for precision, engine in engines.items():
            if precision == "fp32":
                continue
            shot = _Shot(target, engine, precision, scene, floor_db)
            bundle, quality[precision] = shot.best(bundle, corrections.get(precision))
        records = list(quality.values())
        if target.timed:
            race = Race(target.backend, {precision: holds_floor(record) for precision, record in quality.items()})
            times = _timed(stack, bundle, component, target, engines, probes[0].inputs, race)
            records += race.records(times).values()
            if REFERENCE in times:
                records += Race(REFERENCE_BACKEND, {}).records({"fp32": times[REFERENCE]}).values()
    for record in records:
        if record.get("verdict") == UNDECIDED and record["precision"] != "fp32":
            notify(
                f"{component} in {record['precision']}: undecided after {record['rounds']} rounds, {record['ratio_low']:.2f} "
                f"to {record['ratio_high']:.2f} times what it has to beat; what is proven stays"
            )
    return with_records(bundle, component, records), records


def _timed(
    stack: ExitStack,
    bundle: Bundle,
    component: str,
    target: Target,
    engines: Mapping[str, Engine],
    inputs: Mapping[str, Array],
    race: Race,
) -> dict[str, list[float]]:
    """Times of all engines in turns, with ONNX Runtime's fp32 among them where it is installed."""
    running = dict(engines)
    if target.backend != REFERENCE_BACKEND and BACKENDS[REFERENCE_BACKEND].installed():
        running[REFERENCE] = stack.enter_context(
            open_engine(bundle, component, REFERENCE_BACKEND, "fp32", target.options)
        )
    return in_turns(running, inputs, target.seconds * len(running), race.decided)


@dataclass(frozen=True)
class _Shot:
    """Draws the held-out requests in one precision, all networks as a pipeline would run them."""

    target: Target
    engine: Engine
    precision: str
    scene: Scene
    floor_db: float

    def record(self, bundle: Bundle) -> Record:
        with Studio(bundle, self.target, self.precision) as studio:
            drawn = self.scene.drawn(self.engine, studio)
            exchanged = self.scene.exchanged(drawn, studio)
        reference = self.scene.reference
        record = quality_record(self.precision, self.target.backend, reference, drawn, self.floor_db, exchanged)
        if not self.target.timed:
            # The Q/DQ graph fixes the arithmetic, so its pictures stand for the engine that is not here.
            record["measured_with"] = record.pop("backend")
        return record

    def best(self, bundle: Bundle, correction: Record | None) -> tuple[Bundle, Record]:
        """The bundle with the correction, applied where the pictures are closer with it, and the record of what runs."""
        plain = self.record(with_correction(bundle, self.precision, None))
        if correction is None or correction["sqnr_db_gained"] < WORTHWHILE_DB:
            left = None if correction is None else {**correction, "applied": False}
            return with_correction(bundle, self.precision, left), plain
        record = self.record(with_correction(bundle, self.precision, {**correction, "applied": True}))
        gained = record["psnr_db"] - plain["psnr_db"]
        kept = {**correction, "psnr_db_gained": gained, "applied": gained > 0}
        return with_correction(bundle, self.precision, kept), record if gained > 0 else plain


def with_records(bundle: Bundle, component: str, records: Sequence[Record]) -> Bundle:
    """The bundle, in memory, with new records in place of older ones of the same kind, backend, precision, machine.

    A latency that proved a precision faster stays where the new measurement of the same graph is undecided.
    """
    found = bundle.component(component)
    variants = dict(found.variants)
    for record in records:
        name = graph_precision(record["precision"])
        identity = {key: record.get(key) for key in ("kind", "backend", "precision", "machine")}
        same = [old for old in variants[name].measured if all(old.get(key) == value for key, value in identity.items())]
        if record.get("verdict") == UNDECIDED and any(_proves(old, record) for old in same):
            continue
        others = tuple(old for old in variants[name].measured if old not in same)
        variants[name] = dataclasses.replace(variants[name], measured=(*others, record))
    return Bundle(bundle.path, with_component(bundle.manifest, dataclasses.replace(found, variants=variants)))


def _proves(old: Record, new: Record) -> bool:
    """Whether an older record holds for what is installed now, and shows a gain."""
    return bool(old.get("library") == new["library"] and old.get("ratio_low", 0.0) > 1)


def outputs_of(engine: Engine, probes: Sequence[Probe]) -> list[Array]:
    """The denoiser's output for every probe."""
    name = engine.component.outputs[0].name
    return [engine.run(probe.inputs)[name] for probe in probes]


def mean_sqnr(probes: Sequence[Probe], outputs: Sequence[Array]) -> float:
    """Mean SQNR of the denoiser's output in dB."""
    values = [sqnr(probe.output, output) for probe, output in zip(probes, outputs, strict=True)]
    return sum(values) / len(values)
