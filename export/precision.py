"""The float16 variant of a component: what overflows or loses too much stays float32, and is named.

First the float32 graph is run to see every tensor's largest magnitude; nodes that touch one near float16's end are
kept. If the cast graph is still below its floor, the smallest set of modules whose return to float32 lifts it over
the floor is searched by halving.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from latentedge.export.onnx_files import remove_model, save_model
from latentedge.export.parity import Case, Measurement, measure
from latentedge.export.passes.cleanup import infer_shapes
from latentedge.export.passes.half_precision import HALF_MAX, cast_to_half, needs_float32
from latentedge.export.passes.ranges import add_range_outputs, ranges_of
from latentedge.export.passes.rounding import round_every_result
from latentedge.export.session import HostSession
from latentedge.runtime.errors import ParityError
from latentedge.runtime.parity import FLOORS

#: Tensors measured above this part of float16's range stay float32: other inputs than the measured ones reach higher.
HEADROOM = 0.5
#: Modules that the search for losses halves; more are joined by their common parent.
SEARCHED_MODULES = 48
#: Cases that magnitudes are measured on.
RANGE_CASES = 4


@dataclass(frozen=True)
class HalfPrecision:
    """A written float16 graph: its parity, and the nodes that stayed float32 with the reason."""

    measurement: Measurement
    kept: dict[str, str]
    nodes: int


def half_from_onnx(
    source: Path, target: Path, component: str, cases: list[Case], notify: Callable[[str], None]
) -> HalfPrecision:
    """Write the float16 form of the float32 graph ``source`` to ``target`` and measure it.

    ``cases`` hold the original's outputs. ``notify`` is told what stays float32. :class:`ParityError` when nothing
    may be float16.
    """
    ranges = measure_ranges(source, cases)
    model = _load(source)
    kept = {node.name or "": reason for node, reason in needs_float32(model).items()}
    overflowing = _overflowing(model, ranges)
    kept |= overflowing
    nodes = len(model.graph)
    if overflowing:
        notify(f"{component}: {len(overflowing)} of {nodes} nodes stay float32, {_summary(overflowing)}")
    measurement = write_half(source, target, kept, cases)
    if measurement.psnr_db < FLOORS["fp16"]:
        lossy = _search(source, target, component, set(kept), cases)
        notify(f"{component}: kept in float32 to reach {FLOORS['fp16']:g} dB: {', '.join(sorted(set(lossy.values())))}")
        kept |= {name: f"loses too much in float16 ({module})" for name, module in lossy.items()}
        measurement = write_half(source, target, kept, cases)
    return HalfPrecision(measurement, kept, nodes)


def write_half(source: Path, target: Path, kept: Collection[str], cases: list[Case]) -> Measurement:
    """Cast the graph except the nodes named in ``kept``, write it, and compare it with the original.

    The comparison rounds every operator's result to float16, as a float16 engine does at the least.
    """
    model = _load(source)
    cast_to_half(model, [node for node in model.graph if node.name in kept])
    remove_model(target)
    save_model(model, target)
    del model
    with _probe(target, round_every_result) as session:
        return measure(session.run, cases)


@contextlib.contextmanager
def _probe(source: Path, change: Callable[[ir.Model], object]) -> Iterator[HostSession]:
    """A session of the graph at ``source`` with a ``change``.

    It is written beside ``source``, which holds its external weights, and freed before it runs: a copy of a large
    model's weights fewer. The file is deleted.
    """
    path = source.with_name(f"{source.stem}.probe.onnx")
    try:
        model = _load(source)
        change(model)
        save_model(model, path, keep_external=True)
        del model
        with HostSession(path) as session:
            yield session
    finally:
        path.unlink(missing_ok=True)


def measure_ranges(source: Path, cases: list[Case]) -> dict[str, float]:
    """Largest magnitude of every float tensor of the graph at ``source``, over some of the cases."""
    ranges: dict[str, float] = {}
    with _probe(source, add_range_outputs) as session:
        for case in cases[:RANGE_CASES]:
            outputs = {name: float(array) for name, array in session.run(case.inputs).items()}
            for name, value in ranges_of(outputs).items():
                ranges[name] = max(value, ranges.get(name, 0.0))
    return ranges


def _load(path: Path) -> ir.Model:
    model = ir.load(path)
    infer_shapes(model)
    return model


def _overflowing(model: ir.Model, ranges: dict[str, float]) -> dict[str, str]:
    limit = HALF_MAX * HEADROOM
    found = {}
    for node in model.graph:
        touched = [value.name for value in (*node.inputs, *node.outputs) if value is not None and value.name]
        highest = max((ranges.get(name, 0.0) for name in touched), default=0.0)
        # "not <=" also catches a magnitude that is NaN.
        if not highest <= limit:
            found[node.name or ""] = f"reaches {highest:.3g}"
    return found


def _summary(kept: dict[str, str]) -> str:
    modules = list(dict.fromkeys(name.rpartition("/")[0] or "the root" for name in kept))
    shown = ", ".join(modules[:6]) + (f" and {len(modules) - 6} more" if len(modules) > 6 else "")
    return f"their values are too large for float16: {shown}"


def _search(source: Path, target: Path, component: str, kept: set[str], cases: list[Case]) -> dict[str, str]:
    """Names of further nodes to keep in float32, with their module: a set from which no module can be left out."""
    groups = group_by_module([node.name or "" for node in _load(source).graph if node.name not in kept])

    def passes(modules: list[str]) -> bool:
        names = kept.union(*(groups[module] for module in modules))
        return write_half(source, target, names, cases).psnr_db >= FLOORS["fp16"]

    needed = smallest_passing(list(groups), passes)
    if len(needed) == len(groups):
        raise ParityError(
            f"{component}: no part of it may be float16, at {FLOORS['fp16']:g} dB against the original.",
            hint="export it with --precision fp32",
        )
    return {name: module for module in needed for name in groups[module]}


def smallest_passing(items: list[str], passes: Callable[[list[str]], bool]) -> list[str]:
    """A subset of ``items`` that passes and from which no single item can be left out.

    All items together are taken to pass. Chunks are left out while the rest passes, from halves down to single
    items (delta debugging, Zeller and Hildebrandt 2002).
    """
    chunk = (len(items) + 1) // 2
    while True:
        start = 0
        while start < len(items):
            rest = items[:start] + items[start + chunk :]
            if rest and passes(rest):
                items = rest
            else:
                start += chunk
        if chunk <= 1:
            return items
        chunk = (chunk + 1) // 2


def group_by_module(names: list[str]) -> dict[str, list[str]]:
    """Node names by the deepest module level that gives at most ``SEARCHED_MODULES`` groups."""
    best: dict[str, list[str]] = {}
    for depth in range(1, 12):
        groups: dict[str, list[str]] = {}
        for name in names:
            path = name.rpartition("/")[0]
            groups.setdefault(".".join(path.split(".")[:depth]), []).append(name)
        if best and len(groups) > SEARCHED_MODULES:
            break
        best = groups
    return best
