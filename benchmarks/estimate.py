"""What a bundle would need on a device that is not at hand: from its graphs and a table of device figures.

An estimate, and said to be one: each operator takes the longer of its operations at the device's peak and its bytes at
the device's copy rate, both times a measured efficiency. :func:`back_test` does the same for a machine that was
measured, with that machine's own peaks, and says how far off it is.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from latentedge.benchmarks.graph_cost import PRODUCTS, GraphCost, graph_cost
from latentedge.runtime.bundle import Bundle, graph_precision
from latentedge.runtime.errors import UsageError

#: Share of the peaks that a good engine reaches on a whole denoiser. MLPerf Inference v4.1 (closed, edge, SDXL on AGX
#: Orin 64GB): 9.96 s for 20 guided steps of about 6 TFLOP and a picture's decoding is 24 to 27 effective TOPS of the 85
#: dense INT8 TOPS that the data sheet names.
EFFICIENCY = 0.3

#: Operators that an engine runs on their own; the others are fused into them and move no bytes of their own.
ALONE = PRODUCTS | {"Softmax", "LayerNormalization", "InstanceNormalization", "GroupNormalization"}

#: Bytes of a number, by precision; activations of an int8 graph are counted as fp16 where they are not quantised.
WEIGHT_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "int8": 1}
ACTIVATION_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "int8": 1.5}

#: What a library and its context take beside weights and activations.
OVERHEAD_BYTES = 600e6


@dataclass(frozen=True)
class Device:
    """A device's figures: operations a second by precision, bytes a second, bytes of memory, and where they are from."""

    name: str
    flops: dict[str, float]
    copy_bytes_per_second: float
    memory_bytes: float
    source: str


@cache
def devices() -> dict[str, Device]:
    """The table, ``devices.json``."""
    data = json.loads(Path(__file__).with_name("devices.json").read_text(encoding="utf-8"))
    return {name: Device(**entry) for name, entry in data.items()}


def device(name: str) -> Device:
    """One device; :class:`UsageError` lists the table where there is none."""
    if name not in devices():
        raise UsageError(f"there are no figures for the device {name!r}; there are for: {', '.join(devices())}.")
    return devices()[name]


def graph_seconds(cost: GraphCost, precision: str, machine: Device, efficiency: float = EFFICIENCY) -> float:
    """Seconds of one run of a graph: the sum over its operators of the slower of computing and moving."""
    floats = precision.partition("+")[2] or precision
    kind = graph_precision(precision) if precision != "bf16" else "bf16"
    weights, activations = WEIGHT_BYTES[kind] / 4, ACTIVATION_BYTES[kind] / 4
    peak = machine.flops[kind]
    slow = machine.flops.get(floats, machine.flops.get("fp16", peak)) if kind == "int8" else peak
    total = 0.0
    for operation in cost.operations:
        if operation.operator in ALONE:
            moved = operation.weight_bytes * weights + operation.activation_bytes * activations
            rate = peak if operation.operator in PRODUCTS else slow
            total += max(operation.flops / rate, moved / machine.copy_bytes_per_second)
    return total / efficiency


def estimate(
    bundle: Bundle, name: str, precision: str, steps: int | None, size: tuple[int, int] | None
) -> dict[str, Any]:
    """Seconds and bytes of a guided picture of ``bundle`` on a device of the table, as plain JSON data."""
    machine = device(name)
    manifest = bundle.manifest
    count = steps or manifest.defaults.steps
    guided = manifest.defaults.guidance_scale != 1 and manifest.conditioning.unconditional != "none"
    found = picture_costs(bundle, size, 2 if guided else 1)
    kinds = {key: _held(bundle, key, precision) for key in found}
    seconds = {key: graph_seconds(cost, kinds[key], machine) for key, cost in found.items()}
    weights = sum(cost.weight_bytes * WEIGHT_BYTES[graph_precision(kinds[key])] / 4 for key, cost in found.items())
    activations = max(
        cost.peak_activation_bytes * ACTIVATION_BYTES[graph_precision(kinds[key])] / 4 for key, cost in found.items()
    )
    memory = weights + activations + OVERHEAD_BYTES
    picture = sum(value * (count if key == "unet" else 1) for key, value in seconds.items())
    return {
        "estimate": True,
        "device": machine.name,
        "source": machine.source,
        "precision": precision,
        "steps": count,
        "efficiency": EFFICIENCY,
        "components": seconds,
        "picture_seconds": picture,
        "memory_bytes": memory,
        "fits": memory < machine.memory_bytes,
    }


def _held(bundle: Bundle, component: str, precision: str) -> str:
    """What a component would run in: int8 where the bundle holds it so, else fp16, which a device casts to."""
    graph = graph_precision(precision)
    return precision if graph != "int8" or "int8" in bundle.component(component).variants else "fp16"


def picture_costs(bundle: Bundle, size: tuple[int, int] | None, branches: int) -> dict[str, GraphCost]:
    """Costs of what draws a picture from text: encoders, denoiser with ``branches`` of guidance, decoder."""
    manifest = bundle.manifest
    height, width = size or (manifest.defaults.height, manifest.defaults.width)
    latent = {"latent_height": height // manifest.latent.downscale, "latent_width": width // manifest.latent.downscale}
    found = {}
    for name, component in manifest.components.items():
        if "." in name or name == "vae_encoder" or "fp32" not in component.variants:
            continue
        axes = {axis: entry.opt for axis, entry in component.axes.items()} | latent
        axes["batch"] = branches if name in ("unet", "text_encoder") else 1
        shapes = {spec.name: spec.resolve(axes) for spec in component.inputs}
        found[name] = graph_cost(bundle.variant(name, "fp32")[0], shapes)
    return found


def back_test(report: Mapping[str, Any], bundle: Bundle) -> list[dict[str, Any]]:
    """Predict every measured component from the report's own peaks, and give prediction over measurement.

    With efficiency 1: what is predicted is the limit, and the quotient is the share of it that was reached.
    """
    rows = []
    for row in report["rows"]:
        for name, times in row.get("components", {}).items():
            entry = row["load"]["components"][name]
            peak = report["peaks"].get(f"{row['backend']} {entry['precision']}")
            if peak is None or name not in report["cost"]:
                continue
            kind = entry["precision"] if entry["precision"] == "bf16" else graph_precision(entry["precision"])
            machine = Device("here", {kind: peak}, report["peaks"]["copy_bytes_per_second"], 0, "measured")
            component = bundle.component(name)
            shapes = {spec.name: spec.resolve(entry["axes"]) for spec in component.inputs}
            limit = graph_seconds(graph_cost(bundle.variant(name, "fp32")[0], shapes), entry["precision"], machine, 1.0)
            rows.append(
                {"setting": f"{row['backend']} {entry['precision']}", "component": name, "limit_seconds": limit,
                 "measured_seconds": times["p50"], "efficiency": limit / times["p50"]}
            )  # fmt: skip
    return rows
