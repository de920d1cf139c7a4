"""What ``calibrate`` and ``compare`` show: progress, the plan's table, speed and quality by precision."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from latentedge.calibration.applying import Outcome, Part
from latentedge.calibration.options import Reporter
from latentedge.calibration.plan import INT8, BlockPlan, Plan

#: What :func:`floors` says of pictures that are good enough.
HELD = "held"

#: What the user reads for each stage.
STAGES = {
    "capture": "observing the fp32 trajectory",
    "decoder": "observing the decoder",
    "ranges": "choosing ranges by output error",
    "blocks": "measuring each block alone",
    "plan": "looking for the fastest plan above the floor",
    "gate": "measuring speed and pictures",
    "pictures": "drawing",
}


@contextmanager
def reporting() -> Iterator[Reporter]:
    """Progress bars on a terminal; messages on stderr everywhere."""
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not sys.stderr.isatty()) as bars:
        tasks: dict[str, Any] = {}

        def progress(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(STAGES.get(stage, stage))
            bars.update(tasks[stage], completed=done, total=total)

        yield Reporter(progress, lambda message: console.print(message, markup=False, highlight=False, soft_wrap=True))


def print_explanation(plan: Plan, *, to_stderr: bool) -> None:
    """The table of :func:`explanation`, as wide as the terminal, or 140 columns elsewhere."""
    _console(to_stderr).print(explanation(plan))


def _console(to_stderr: bool = False) -> Console:
    return Console(stderr=to_stderr, width=None if sys.stdout.isatty() else 140)


def explanation(plan: Plan) -> Table:
    """The plan as a table: block, error, gain, decision, why; then the layers that rules keep in float."""
    table = Table(title=f"{plan.component} on {plan.backend} ({plan.precision})")
    for name, justify in (("block", "left"), ("layers", "right"), ("SQNR dB", "right"), ("least, timestep", "right")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    for name, justify in (("picture dB", "right"), ("saves ms", "right"), ("decision", "left"), ("why", "left")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    for block in plan.blocks:
        table.add_row(
            block.name, str(len(block.layers)), _decibels(block.sqnr_db), least(block), _decibels(block.psnr_db),
            gain(block), block.precision, block.reason,
        )  # fmt: skip
    by_reason: dict[str, int] = {}
    for reason in plan.kept.values():
        by_reason[reason] = by_reason.get(reason, 0) + 1
    for reason, count in by_reason.items():
        table.add_row("by rule", str(count), "", "", "", "", "float", reason)
    return table


def least(block: BlockPlan) -> str:
    """A block's lowest SQNR in dB, and the timestep that it has it at; nothing where it was not measured."""
    if not block.sqnr_db_by_timestep:
        return ""
    timestep, decibels = min(block.sqnr_db_by_timestep, key=lambda pair: pair[1])
    return f"{decibels:.1f} at {timestep:g}"


def gain(block: BlockPlan) -> str:
    """What a block saves alone, in ms, and the standard error of that."""
    if block.seconds_saved is None:
        return "-"
    return f"{block.seconds_saved * 1e3:.2f} ± {(block.seconds_error or 0) * 1e3:.2f}"


def _decibels(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def result_of(outcome: Outcome) -> dict[str, Any]:
    """The result as JSON data."""
    backend, precision, reason = outcome.choice
    return {
        "bundle": str(outcome.bundle.path),
        "plan": dataclasses.asdict(outcome.plan)["blocks"],
        "int8_layers": len(outcome.layers),
        "components": {
            part.plan.component: {
                "plan": dataclasses.asdict(part.plan)["blocks"],
                "int8_layers": len(part.layers),
                "records": part.records,
            }
            for part in outcome.parts
        },
        "faults": [dataclasses.asdict(fault) for fault in outcome.faults],
        "records": outcome.records,
        "auto": {"backend": backend, "precision": precision, "reason": reason},
    }


def print_outcome(outcome: Outcome) -> None:
    """Speed and quality by component and precision, and what ``auto`` takes."""
    for part in outcome.parts:
        _console().print(_measured(part))
        total = len(part.layers) + len(part.plan.kept)
        total += sum(len(block.layers) for block in part.plan.blocks if block.precision != INT8)
        click.echo(f"{part.plan.component}: {len(part.layers)} of {total} layers in INT8")
    backend, precision, reason = outcome.choice
    click.echo(f"auto is now {precision} with {backend}: {reason}")


def measured_by_precision(part: Part) -> dict[str, dict[str, Any]]:
    """A component's records by backend and precision, each field under ``latency.`` or ``quality.``."""
    rows: dict[str, dict[str, Any]] = {}
    for record in part.records:
        backend = record.get("backend", record.get("measured_with", "any"))
        rows.setdefault(f"{backend} {record['precision']}", {}).update(
            {f"{record['kind']}.{name}": value for name, value in record.items()}
        )
    return rows


def floors(row: dict[str, Any]) -> str:
    """Whether the mean and the worst picture hold their floors, and which one does not."""
    if row["quality.psnr_db"] < row["quality.floor_mean_db"]:
        return f"mean below {row['quality.floor_mean_db']:g}"
    if row["quality.psnr_worst_db"] < row["quality.floor_db"]:
        return f"worst below {row['quality.floor_db']:g}"
    if row["quality.psnr_low_db"] < row["quality.floor_mean_db"]:
        return f"mean perhaps below {row['quality.floor_mean_db']:g}"
    if row["quality.psnr_worst_low_db"] < row["quality.floor_db"]:
        return f"worst perhaps below {row['quality.floor_db']:g}"
    return HELD


def _measured(part: Part) -> Table:
    table = Table(title=part.plan.component)
    for name in ("precision", "ms", "x reference", "at least", "against", "verdict", "PSNR dB", "worst dB", "floor"):
        table.add_column(name, justify="left" if name in ("precision", "against", "verdict", "floor") else "right")
    rows = measured_by_precision(part)
    for precision in sorted(rows, key=lambda name: rows[name].get("latency.ratio", 0.0)):
        row = rows[precision]
        timed = ("-",) * 5
        if "latency.seconds" in row:
            other = row.get("latency.alternative")
            timed = (
                f"{row['latency.seconds'] * 1e3:.1f}",
                f"{row['latency.ratio']:.2f}",
                f"{row['latency.ratio_low']:.2f}",
                f"{row['latency.alternative_ratio']:.2f} x {other}" if other else "-",
                str(row["latency.verdict"]),
            )
        drawn = ("-",) * 3
        if "quality.psnr_db" in row:
            drawn = (f"{row['quality.psnr_db']:.1f}", f"{row['quality.psnr_worst_db']:.1f}", floors(row))
        table.add_row(precision, *timed, *drawn)
    return table
