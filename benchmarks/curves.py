"""How time and memory grow with size, batch and steps: ``python -m latentedge.benchmarks.curves BUNDLE -o curves.json``.

Every length of an axis is measured in a process of its own. Beside each measured exponent (the slope of log time over
log length) stands the expected one: of the denoiser's operations for size and batch, and 1 for steps. Memory is what
the process holds at its peak; its growth is given in bytes for each further unit, because most of it is weights.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np

from latentedge.benchmarks.graph_cost import graph_cost
from latentedge.benchmarks.processes import MeasuredProcess
from latentedge.benchmarks.statistics import Times, exponent
from latentedge.runtime.bundle import Bundle
from latentedge.runtime.errors import UsageError
from latentedge.runtime.selection import DENOISER, choose


@click.command()
@click.argument("path", metavar="BUNDLE", type=click.Path(path_type=Path))
@click.option("--backend", default="auto", show_default=True)
@click.option("--precision", default="auto", show_default=True)
@click.option("--sides", default="", help="Pixels of a side.  [default: half, once and twice the bundle's own]")
@click.option("--batches", default="1,2,4", show_default=True, help="Pictures at once.")
@click.option("--steps", default="2,4,8", show_default=True)
@click.option("--threads", type=click.IntRange(min=1), help="Threads of the engines.  [default: physical cores]")
@click.option("--rounds", type=click.IntRange(min=1), default=3, show_default=True)
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="JSON file.")
def main(path: Path, backend: str, precision: str, output: Path, rounds: int, **options: Any) -> None:
    """Measure BUNDLE for every length of each axis, and print the exponents."""
    bundle = Bundle.open(path)
    own = bundle.manifest.defaults.height
    lengths = {
        "side": lengths_from(options["sides"] or f"{own // 2},{own},{own * 2}"),
        "batch": lengths_from(options["batches"]),
        "steps": lengths_from(options["steps"]),
    }
    choice = choose(bundle, backend, precision)
    setting = {"backend": choice.backend, "precision": choice.precision}
    engine_options = {} if options["threads"] is None else {"threads": options["threads"]}
    curves = {}
    for axis, values in lengths.items():
        rows = []
        for value in values:
            rows.append(_measure(bundle, setting, engine_options, axis, value, rounds))
            click.echo(
                f"{axis} {value}: {rows[-1]['seconds']:.3f} s, {rows[-1]['peak_bytes'] / 2**20:.0f} MiB", err=True
            )
        curves[axis] = summary(axis, rows)
    output.write_text(json.dumps({**setting, "curves": curves}, indent=1) + "\n", encoding="utf-8")
    for axis, curve in curves.items():
        click.echo(
            f"{axis}: time grows with the power {curve['exponent']:.2f}, operations with {curve['expected']:.2f}; "
            f"memory by {curve['bytes_each'] / 2**20:.2f} MiB for each {curve['unit']}"
        )


def lengths_from(text: str) -> list[int]:
    """``"1,2,4"`` as rising numbers; :class:`UsageError` for anything else, or for fewer than two."""
    try:
        found = sorted({int(part) for part in text.split(",")})
    except ValueError:
        found = []
    if len(found) < 2 or found[0] < 1:
        raise UsageError(f"a curve takes two or more lengths such as 1,2,4, found {text!r}.")
    return found


def summary(axis: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A curve: its rows, measured and expected exponent, and bytes for each further unit of length.

    A side's unit is a thousand pixels of the picture: both grow with its area.
    """
    units = [row["value"] ** 2 / 1000 if axis == "side" else row["value"] for row in rows]
    peaks = [row["peak_bytes"] for row in rows]
    return {
        "rows": list(rows),
        "exponent": exponent([row["value"] for row in rows], [row["seconds"] for row in rows]),
        "expected": exponent([row["value"] for row in rows], [row["operations"] for row in rows]),
        "unit": {"side": "thousand pixels", "batch": "picture", "steps": "step"}[axis],
        "bytes_each": float(np.polyfit(units, peaks, 1)[0]),
    }


def _measure(
    bundle: Bundle, setting: Mapping[str, str], options: Mapping[str, Any], axis: str, value: int, rounds: int
) -> dict[str, Any]:
    """Seconds of denoising a picture and peak of memory for one length, and the operations that it takes."""
    request: dict[str, Any] = {"steps": 2}
    request |= {"height": value, "width": value} if axis == "side" else {{"batch": "batch_size"}.get(axis, axis): value}
    with MeasuredProcess(f"{axis} {value}") as process:
        loaded = process.ask("load", bundle=str(bundle.path), **setting, request=request, options=dict(options))
        drawn = [process.ask("picture") for _ in range(rounds)]
        peak = process.ask("memory")["peak_rss"]
    entry = loaded["components"][DENOISER]
    evaluations = len(drawn[0]["steps"])
    component = bundle.component(DENOISER)
    shapes = {spec.name: spec.resolve(entry["axes"]) for spec in component.inputs}
    cost = graph_cost(bundle.variant(DENOISER, "fp32")[0], shapes)
    return {
        "value": value,
        "seconds": Times.of([sum(one["steps"]) for one in drawn]).p50,
        "processor_seconds": Times.of([one["processor_seconds"] for one in drawn]).p50,
        "peak_bytes": peak,
        "operations": cost.flops * evaluations,
    }


if __name__ == "__main__":
    main()
