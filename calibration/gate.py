"""Measures every precision of the denoiser on this machine, side by side, and writes down what decides ``auto``.

INT8 is chosen only where its latency's lower bound beats the fastest float precision and its pictures hold the floor;
``latentedge.runtime.selection`` reads the records.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from latentedge.calibration.candidates import with_component
from latentedge.calibration.latency import in_turns, ratio
from latentedge.calibration.metrics import sqnr
from latentedge.calibration.pictures import Drawn, differences, summary
from latentedge.calibration.records import Probe
from latentedge.calibration.sensitivity import WORST_BELOW_DB, Studio, Target
from latentedge.runtime.bundle import Array, Bundle, graph_precision
from latentedge.runtime.engines import BACKENDS, Engine, open_engine
from latentedge.runtime.errors import EngineError
from latentedge.runtime.machine import machine_fingerprint
from latentedge.runtime.selection import PRECISIONS, library_version

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


def latency_records(
    times: Mapping[str, list[float]], backend: str, good: Mapping[str, bool], reference: list[float] | None = None
) -> dict[str, Record]:
    """Latency records by precision from times of the same rounds.

    ``ratio`` is the speed against ONNX Runtime in fp32 (times ``reference``), which is what runs where nothing was
    measured; against the backend's own fp32 without it. For a quantised precision ``alternative`` names the fastest
    float precision that is good enough, and ``ratio_low`` is the smaller of the lower bounds against the reference and
    against it, so that quantisation has to beat both.
    """
    floats = {name: ratio(times["fp32"], seconds) for name, seconds in times.items() if not is_quantised(name)}
    base, named = (times["fp32"], f"{backend} fp32") if reference is None else (reference, REFERENCE)
    best = max(
        (name for name in floats if name == "fp32" or good.get(name, False)), key=lambda name: floats[name].ratio
    )
    records = {}
    for name, seconds in times.items():
        against = ratio(base, seconds)
        record: Record = {
            "kind": "latency",
            "backend": backend,
            "precision": name,
            "machine": machine_fingerprint(),
            "library": library_version(backend),
            "seconds": float(sorted(seconds)[len(seconds) // 2]),
            "reference": named,
            "ratio": against.ratio,
            "ratio_low": against.low,
            "rounds": against.rounds,
        }
        if is_quantised(name):
            other = ratio(times[best], seconds)
            record |= {"alternative": best, "alternative_ratio": other.ratio, "alternative_ratio_low": other.low}
            record["ratio_low"] = min(against.low, other.low)
        records[name] = record
    return records


def quality_record(precision: str, backend: str, reference: Drawn, drawn: Drawn, floor_db: float) -> Record:
    """Pictures of a precision against fp32's. ``floor_db`` is the floor of the worst, ``floor_mean_db`` of the mean."""
    found = differences(reference, drawn)
    mean, worst = summary(found)
    return {
        "kind": "quality",
        "backend": backend,
        "precision": precision,
        "pictures": len(found),
        "psnr_db": mean,
        "psnr_worst_db": worst,
        "ssim": sum(entry.ssim for entry in found) / len(found),
        "floor_db": floor_db - WORST_BELOW_DB,
        "floor_mean_db": floor_db,
    }


def holds(record: Record) -> bool:
    """Whether a quality record is above both of its floors."""
    return bool(record["psnr_db"] >= record["floor_mean_db"] and record["psnr_worst_db"] >= record["floor_db"])


def with_correction(bundle: Bundle, precision: str, record: Record | None, *, note: Record | None = None) -> Bundle:
    """The bundle, in memory, with the correction of one precision set or removed."""
    calibration = dict(bundle.manifest.calibration)
    corrections = {name: value for name, value in calibration.get("correction", {}).items() if name != precision}
    if record is not None:
        corrections[precision] = {**record, **(note or {})}
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

    A correction is kept for a precision where the pictures are closer to fp32's with it than without.
    """
    with ExitStack() as stack:
        wanted = precisions_of(target.backend)
        engines = open_precisions(stack, bundle, component, target, wanted, notify)
        with Studio(bundle, target) as studio:
            reference = studio.with_denoiser(engines["fp32"], requests)
        quality: dict[str, Record] = {}
        for precision, engine in engines.items():
            if precision == "fp32":
                continue
            shot = _Shot(target, engine, precision, requests, reference, floor_db)
            bundle, quality[precision] = shot.best(bundle, corrections.get(precision))
        times = _timed(stack, bundle, component, target, engines, probes[0].inputs) if target.timed else {}
    good = {precision: holds(record) for precision, record in quality.items()}
    reference_times = times.pop(REFERENCE, None)
    records = list(quality.values())
    if times:
        records += latency_records(times, target.backend, good, reference_times).values()
    if reference_times is not None:
        records += latency_records({"fp32": reference_times}, REFERENCE_BACKEND, {}).values()
    return with_records(bundle, component, records), records


def _timed(
    stack: ExitStack,
    bundle: Bundle,
    component: str,
    target: Target,
    engines: Mapping[str, Engine],
    inputs: Mapping[str, Array],
) -> dict[str, list[float]]:
    """Times of all engines in turns, with ONNX Runtime's fp32 among them where it is installed."""
    running = dict(engines)
    if target.backend != REFERENCE_BACKEND and BACKENDS[REFERENCE_BACKEND].installed():
        running[REFERENCE] = stack.enter_context(
            open_engine(bundle, component, REFERENCE_BACKEND, "fp32", target.options)
        )
    return in_turns(running, inputs, target.seconds * len(running))


@dataclass(frozen=True)
class _Shot:
    """Draws the held-out requests in one precision, all networks as a pipeline would run them."""

    target: Target
    engine: Engine
    precision: str
    requests: Sequence[dict[str, Any]]
    reference: Drawn
    floor_db: float

    def record(self, bundle: Bundle) -> Record:
        with Studio(bundle, self.target, self.precision) as studio:
            drawn = studio.with_denoiser(self.engine, self.requests)
        record = quality_record(self.precision, self.target.backend, self.reference, drawn, self.floor_db)
        if not self.target.timed:
            # The Q/DQ graph fixes the arithmetic, so its pictures stand for the engine that is not here.
            record["measured_with"] = record.pop("backend")
        return record

    def best(self, bundle: Bundle, correction: Record | None) -> tuple[Bundle, Record]:
        """The bundle with the correction where the pictures are closer with it, and the record of what was kept."""
        bundle = with_correction(bundle, self.precision, None)
        plain = self.record(bundle)
        if correction is None:
            return bundle, plain
        trial = with_correction(bundle, self.precision, correction)
        record = self.record(trial)
        if record["psnr_db"] <= plain["psnr_db"]:
            return bundle, plain
        gained = {"psnr_db_gained": record["psnr_db"] - plain["psnr_db"]}
        return with_correction(bundle, self.precision, correction, note=gained), record


def with_records(bundle: Bundle, component: str, records: Sequence[Record]) -> Bundle:
    """The bundle, in memory, with new records in place of older ones of the same kind, backend, precision, machine."""
    found = bundle.component(component)
    variants = dict(found.variants)
    for record in records:
        name = graph_precision(record["precision"])
        identity = {key: record.get(key) for key in ("kind", "backend", "precision", "machine")}
        others = [
            old for old in variants[name].measured if any(old.get(key) != value for key, value in identity.items())
        ]
        variants[name] = dataclasses.replace(variants[name], measured=(*others, record))
    return Bundle(bundle.path, with_component(bundle.manifest, dataclasses.replace(found, variants=variants)))


def outputs_of(engine: Engine, probes: Sequence[Probe]) -> list[Array]:
    """The denoiser's output for every probe."""
    name = engine.component.outputs[0].name
    return [engine.run(probe.inputs)[name] for probe in probes]


def mean_sqnr(probes: Sequence[Probe], outputs: Sequence[Array]) -> float:
    """Mean SQNR of the denoiser's output in dB."""
    values = [sqnr(probe.output, output) for probe, output in zip(probes, outputs, strict=True)]
    return sum(values) / len(values)
