"""Which backend and precision run: what was asked for, else what was measured faster and good enough on this machine.

The manifest's variants of the denoiser hold the records that decide (``docs/bundle.md``): ``latency`` with this
machine's fingerprint, and ``quality`` against the fp32 pictures. Without records fp32 runs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from latentedge.runtime import engines
from latentedge.runtime.bundle import Bundle, Component, graph_precision
from latentedge.runtime.errors import MissingDependencyError, UsageError
from latentedge.runtime.machine import machine_fingerprint

#: The component whose records decide; the others follow it.
DENOISER = "unet"

#: What each backend computes in. "int8+bf16" is the int8 graph with its floats computed in bf16.
PRECISIONS: dict[str, tuple[str, ...]] = {
    "onnxruntime": ("fp32", "fp16", "int8"),
    "openvino": ("fp32", "bf16", "fp16", "int8", "int8+bf16", "int8+fp16"),
    "tensorrt": ("fp32", "fp16", "int8"),
    "tensorrt-rtx": ("fp32", "fp16", "int8"),
}


@dataclass(frozen=True)
class Choice:
    """What runs, and why."""

    backend: str
    precision: str
    reason: str


def component_precision(component: Component, precision: str, backend: str | None = None) -> str:
    """The precision of one component where the denoiser runs in ``precision``.

    A component that was not quantised, or not measured faster and good enough here in INT8, runs in the type of the int8
    graph's floats: named after the "+", fp16 with TensorRT where the variant is there, and fp32 otherwise. The denoiser
    never runs in anything but ``precision``.
    """
    graph = graph_precision(precision)
    if component.name == DENOISER or (graph in component.variants and graph != "int8"):
        return precision
    if graph in component.variants and backend is not None and _pays(component, backend, precision):
        return precision
    floats = precision.partition("+")[2]
    if floats and graph_precision(floats) in component.variants:
        return floats
    on_tensorrt = backend is not None and backend.startswith("tensorrt")
    return "fp16" if on_tensorrt and "fp16" in component.variants else "fp32"


def _pays(component: Component, backend: str, precision: str) -> bool:
    """Whether a precision was measured faster here than what it has to beat, and is good enough."""
    record = latency_record(component, backend, precision, machine_fingerprint())
    return record is not None and record["ratio_low"] > 1 and good_enough(component, backend, precision)


def choose(bundle: Bundle, backend: str = "auto", precision: str = "auto", *, measured_here: bool = True) -> Choice:
    """Backend and precision for ``bundle`` on this machine; records are of its backends' default devices.

    A name is taken as it is, or is an error. "auto" takes the fastest that was measured here: its latency record's
    lower bound of the ratio is over 1, and its worst picture is above the quality floor. A precision that the caller
    names needs no quality record.
    """
    component = _denoiser(bundle)
    candidates = list(_candidates(component, backend, precision))
    if not candidates:
        raise UsageError(
            f"no installed backend runs {bundle.path} with backend {backend} and precision {precision}; "
            f"the bundle has: {', '.join(component.variants)}.",
            hint="write another precision with `latentedge export ... --precision`, or install another backend",
        )
    default = next((pair for pair in candidates if pair[1] == "fp32"), candidates[0])
    measured = [
        (*speed, name, wanted)
        for name, wanted in (candidates if measured_here else ())
        if (speed := _speed(component, name, wanted, default[0])) is not None
        and (precision != "auto" or (speed[1] > 1 and good_enough(component, name, wanted)))
    ]
    if measured:
        ratio, _, name, wanted = max(measured)
        return Choice(name, wanted, f"measured here: {ratio:.2f} times the speed of {default[0]} fp32")
    name, wanted = default
    asked = backend != "auto" and precision != "auto"
    return Choice(name, wanted, "asked for" if asked else "nothing faster was measured on this machine")


def _speed(component: Component, backend: str, precision: str, default: str) -> tuple[float, float] | None:
    """How many times faster than ``default`` in fp32 a setting was measured here, and the lower bound of that.

    A record's reference is a setting; "fp32" alone means the same backend. Records with another reference are
    brought to the default's by the default's own record.
    """
    machine = machine_fingerprint()
    record = latency_record(component, backend, precision, machine)
    if record is None:
        return None
    reference = record["reference"] if " " in record["reference"] else f"{backend} {record['reference']}"
    if reference == f"{default} fp32":
        return record["ratio"], record["ratio_low"]
    base = latency_record(component, default, "fp32", machine)
    if base is None or base["reference"] != reference:
        return None
    return record["ratio"] / base["ratio"], record["ratio_low"] / base["ratio"]


def latency_identity(backend: str, precision: str, machine: str) -> dict[str, Any]:
    """What a latency record is a measurement of: one setting on one machine, with the library that is installed."""
    names = {"kind": "latency", "backend": backend, "precision": precision}
    return {**names, "machine": machine, "library": library_version(backend)}


def latency_record(component: Component, backend: str, precision: str, machine: str) -> dict[str, Any] | None:
    """The latest latency record of a backend and precision on ``machine`` with the library that is installed."""
    expected = latency_identity(backend, precision, machine)
    found = None
    for record in _records(component, precision):
        found = record if all(record.get(name) == value for name, value in expected.items()) else found
    return found


def good_enough(component: Component, backend: str, precision: str) -> bool:
    """Whether every quality record of a precision (for this backend, or for any) is above its floor.

    Without a record only fp32 is good enough.
    """
    records = _quality(component, backend, precision)
    return all(map(holds_floor, records)) and (bool(records) or precision == "fp32")


def below_floor(bundle: Bundle, choice: Choice) -> str | None:
    """What the caller of a precision below its quality floor must know, with the figures; ``None`` above it."""
    for record in _quality(_denoiser(bundle), choice.backend, choice.precision):
        if not holds_floor(record):
            sure = f" (95 % sure: {record['psnr_low_db']:.1f})" if "psnr_low_db" in record else ""
            others = f" (of 64: {record['psnr_worst_low_db']:.1f})" if "psnr_worst_low_db" in record else ""
            return (
                f"{choice.precision} with {choice.backend} is below this bundle's quality floor: "
                f"{record.get('psnr_db', record['psnr_worst_db']):.1f} dB PSNR on average{sure} and "
                f"{record['psnr_worst_db']:.1f} dB at worst{others} against fp32 "
                f"(floors {record.get('floor_mean_db', record['floor_db']):g} and {record['floor_db']:g} dB)."
            )
    return None


def _quality(component: Component, backend: str, precision: str) -> list[dict[str, Any]]:
    return [
        record
        for record in _records(component, precision)
        if record.get("kind") == "quality"
        and record.get("precision", precision) == precision
        and record.get("backend", backend) == backend
    ]


def holds_floor(record: dict[str, Any]) -> bool:
    """Whether a quality record's worst picture and its mean are above their floors.

    Of both what other pictures are sure to hold counts, where the record has it.
    """
    mean = record.get("psnr_low_db", record.get("psnr_db", record["psnr_worst_db"]))
    worst = min(record["psnr_worst_db"], record.get("psnr_worst_low_db", record["psnr_worst_db"]))
    return bool(worst >= record["floor_db"] and mean >= record.get("floor_mean_db", record["floor_db"]))


def library_version(backend: str) -> str:
    """Version of a backend's library as installed; empty where it is not."""
    requires = engines.BACKENDS[backend].requires
    for distribution in (requires, f"{requires}-gpu"):
        with contextlib.suppress(PackageNotFoundError):
            return f"{distribution} {version(distribution)}"
    return ""


def _records(component: Component, precision: str) -> tuple[dict[str, Any], ...]:
    variant = component.variants.get(graph_precision(precision))
    return () if variant is None else variant.measured


def _denoiser(bundle: Bundle) -> Component:
    components = bundle.manifest.components
    return components[DENOISER] if DENOISER in components else next(iter(components.values()))


def _candidates(component: Component, backend: str, precision: str) -> Iterator[tuple[str, str]]:
    if backend != "auto":
        engines.backend(backend)
    known = {name for names in PRECISIONS.values() for name in names}
    if precision != "auto" and precision not in known:
        raise UsageError(f"there is no precision {precision!r}; choose one of: auto, {', '.join(sorted(known))}.")
    names = [name for name, entry in engines.BACKENDS.items() if entry.installed()] if backend == "auto" else [backend]
    if not names:
        raise MissingDependencyError(
            "no engine library is installed.",
            hint="pip install 'latentedge[cpu]' on any processor; [openvino], [gpu] and [rtx] are the others",
        )
    for name in names:
        for wanted in PRECISIONS[name] if precision == "auto" else (precision,):
            if wanted in PRECISIONS[name] and graph_precision(wanted) in component.variants:
                yield name, wanted
