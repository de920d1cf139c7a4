"""Latency of each component and precision on this machine, measured in turns, for the manifest's records."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from latentedge.export.builders import components_to_build
from latentedge.export.bundle_writer import write_manifest
from latentedge.runtime.bundle import Array, Bundle, Component, Variant
from latentedge.runtime.engines import EngineOptions, open_engine
from latentedge.runtime.engines.base import Engine
from latentedge.runtime.errors import PrecisionError
from latentedge.runtime.machine import machine_fingerprint
from latentedge.runtime.selection import latency_identity

#: Rounds in which every precision runs once; fewer when they take longer than the budget, but at least three.
ROUNDS = 20
LEAST_ROUNDS = 3
BUDGET_SECONDS = 10.0


def measure_bundle(bundle: Bundle, backend: str, notify: Callable[[str], None]) -> Bundle:
    """Open every graph with ``backend``, time it at its best axes, and record it in the manifest.

    A precision that this device does not compute in is left out, and ``notify`` is told. :class:`EngineError` when a
    graph does not open or run.
    """
    components = dict(bundle.manifest.components)
    for component in components_to_build(bundle, backend):
        seconds = _time_component(bundle, component, backend, notify)
        variants = {
            precision: _with_latency(variant, precision, backend, seconds)
            for precision, variant in component.variants.items()
        }
        components[component.name] = dataclasses.replace(component, variants=variants)
    manifest = dataclasses.replace(bundle.manifest, components=components)
    write_manifest(bundle.path, manifest)
    return Bundle.open(bundle.path)


def _time_component(
    bundle: Bundle, component: Component, backend: str, notify: Callable[[str], None]
) -> dict[str, list[float]]:
    """Seconds of each run by precision; the first run of each is not counted."""
    engines: dict[str, Engine] = {}
    try:
        for precision in component.variants:
            try:
                engines[precision] = open_engine(bundle, component.name, backend, precision, EngineOptions())
            except PrecisionError as error:
                notify(f"{component.name} in {precision} was not timed: {error.message}")
        inputs = example_inputs(component, {name: axis.opt for name, axis in component.axes.items()})
        for engine in engines.values():
            engine.run(inputs)
        return in_turns({precision: engine.run for precision, engine in engines.items()})
    finally:
        for engine in engines.values():
            engine.close()


def in_turns(runs: Mapping[str, Callable[[], Any]]) -> dict[str, list[float]]:
    """Seconds of each run by name, in rounds in which every one runs once, so that drift of the machine is shared."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    start = time.perf_counter()
    for index in range(ROUNDS if runs else 0):
        if index >= LEAST_ROUNDS and time.perf_counter() - start > BUDGET_SECONDS:
            break
        for name, run in runs.items():
            before = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - before)
    return seconds


def latency_record(precision: str, backend: str, seconds: Mapping[str, list[float]]) -> dict[str, Any]:
    """The manifest's record: median seconds, and how many times faster than fp32 with its lower bound.

    The ratio is the median over rounds of fp32's time by this precision's in the same round; the lower bound is the
    rounds' lower quartile.
    """
    times = np.array(seconds[precision])
    reference = np.array(seconds.get("fp32", seconds[precision]))
    ratios = reference / times
    return {
        **latency_identity(backend, precision, machine_fingerprint()),
        "seconds": float(np.median(times)),
        "ratio": float(np.median(ratios)),
        "ratio_low": float(np.quantile(ratios, 0.25)),
        "rounds": len(times),
        "reference": "fp32" if "fp32" in seconds else precision,
    }


def _with_latency(variant: Variant, precision: str, backend: str, seconds: Mapping[str, list[float]]) -> Variant:
    if precision not in seconds:
        return variant
    record = latency_record(precision, backend, seconds)
    identity = latency_identity(backend, precision, machine_fingerprint())
    others = [old for old in variant.measured if any(old.get(k) != v for k, v in identity.items())]
    return dataclasses.replace(variant, measured=(*others, record))


def example_inputs(component: Component, axes: Mapping[str, int]) -> dict[str, Array]:
    """Inputs to time with: N(0, 1), timesteps in the middle of the schedule, zeros for whole numbers."""
    generator = np.random.default_rng(0)
    arrays: dict[str, Array] = {}
    for spec in component.inputs:
        shape, dtype = spec.resolve(axes), np.dtype(spec.dtype)
        if dtype.kind != "f":
            arrays[spec.name] = np.zeros(shape, dtype)
        elif spec.name == "timestep":
            arrays[spec.name] = np.full(shape, 500.0, dtype)
        else:
            arrays[spec.name] = generator.standard_normal(shape).astype(dtype)
    return arrays
