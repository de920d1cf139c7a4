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

from latentedge.calibration.calibrate import Outcome, Reporter
from latentedge.calibration.plan import Plan

#: What the user reads for each stage.
STAGES = {
    "capture": "observing the fp32 trajectory",
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

        yield Reporter(progress, lambda message: console.print(message, markup=False, highlight=False))


def print_explanation(plan: Plan, *, to_stderr: bool) -> None:
    """The table of :func:`explanation`, as wide as the terminal, or 140 columns elsewhere."""
    Console(stderr=to_stderr, width=None if sys.stdout.isatty() else 140).print(explanation(plan))


def explanation(plan: Plan) -> Table:
    """The plan as a table: block, error, gain, decision, why; then the layers that rules keep in float."""
    table = Table(title=f"{plan.component} on {plan.backend} ({plan.precision})")
    for name, justify in (("block", "left"), ("layers", "right"), ("SQNR dB", "right"), ("picture dB", "right")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    for name, justify in (("saves ms", "right"), ("decision", "left"), ("why", "left")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    for block in plan.blocks:
        gain = (
            "-"
            if block.seconds_saved is None
            else f"{block.seconds_saved * 1e3:.2f}±{(block.seconds_error or 0) * 1e3:.2f}"
        )
        table.add_row(
            block.name, str(len(block.layers)), _decibels(block.sqnr_db), _decibels(block.psnr_db), gain,
            block.precision, block.reason,
        )  # fmt: skip
    by_reason: dict[str, int] = {}
    for reason in plan.kept.values():
        by_reason[reason] = by_reason.get(reason, 0) + 1
    for reason, count in by_reason.items():
        table.add_row("by rule", str(count), "", "", "", "float", reason)
    return table


def _decibels(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def result_of(outcome: Outcome) -> dict[str, Any]:
    """The result as JSON data."""
    backend, precision, reason = outcome.choice
    return {
        "bundle": str(outcome.bundle.path),
        "plan": dataclasses.asdict(outcome.plan)["blocks"],
        "int8_layers": len(outcome.layers),
        "faults": [dataclasses.asdict(fault) for fault in outcome.faults],
        "records": outcome.records,
        "auto": {"backend": backend, "precision": precision, "reason": reason},
    }


def print_outcome(outcome: Outcome) -> None:
    """Speed and quality by precision, and what ``auto`` takes."""
    table = Table()
    for name in ("precision", "ms", "x reference", "at least", "PSNR dB", "worst dB"):
        table.add_column(name, justify="left" if name == "precision" else "right")
    rows: dict[str, dict[str, Any]] = {}
    for record in outcome.records:
        rows.setdefault(f"{record.get('backend', 'any')} {record['precision']}", {}).update(
            {f"{record['kind']}.{name}": value for name, value in record.items()}
        )
    for precision in sorted(rows, key=lambda name: rows[name].get("latency.ratio", 0.0)):
        row = rows[precision]
        timed = "latency.seconds" in row
        drawn = "quality.psnr_db" in row
        table.add_row(
            precision,
            f"{row['latency.seconds'] * 1e3:.1f}" if timed else "-",
            f"{row['latency.ratio']:.2f}" if timed else "-",
            f"{row['latency.ratio_low']:.2f}" if timed else "-",
            f"{row['quality.psnr_db']:.1f}" if drawn else "-",
            f"{row['quality.psnr_worst_db']:.1f}" if drawn else "-",
        )
    Console().print(table)
    backend, precision, reason = outcome.choice
    click.echo(f"{len(outcome.layers)} layers in INT8; auto is now {precision} with {backend}: {reason}")
