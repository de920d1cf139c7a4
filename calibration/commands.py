"""``latentedge calibrate`` and ``latentedge compare``."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from latentedge.calibration.calibrate import Options, Outcome, Reporter, reapply
from latentedge.calibration.calibrate import calibrate as run_calibration
from latentedge.calibration.plan import Plan
from latentedge.calibration.requests import read_prompts
from latentedge.calibration.sharding import mapper_of
from latentedge.runtime.errors import UsageError

#: What the user reads for each stage.
STAGES = {
    "capture": "observing the fp32 trajectory",
    "ranges": "choosing ranges by output error",
    "blocks": "measuring each block alone",
    "plan": "looking for the fastest plan above the floor",
    "gate": "measuring speed and pictures",
    "pictures": "drawing",
}


def decibels(text: str) -> float:
    """``"30dB"`` or ``"30"`` as a number; :class:`UsageError` for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:dB)?\s*", text, re.IGNORECASE)
    if match is None:
        raise UsageError(f"--floor takes decibels like 30dB, found {text!r}.")
    return float(match[1])


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


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--prompts", type=click.Path(path_type=Path), help="A file with one prompt a line; every other one is held out."
)
@click.option("--samples", type=click.IntRange(min=1), default=32, show_default=True, help="Pictures to observe.")
@click.option("--steps", type=click.IntRange(min=1), help="Sampler steps; default: the bundle's.")
@click.option("--floor", default="30dB", show_default=True, help="Lowest mean PSNR of pictures against fp32.")
@click.option("--backend", default="auto", show_default=True, help="Engine that the graph is placed for.")
@click.option(
    "--pictures", type=click.IntRange(min=1), default=16, show_default=True, help="Held-out pictures to judge."
)
@click.option("--floats", type=click.Choice(["fp32", "fp16"]), help="What the rest computes in; default: by backend.")
@click.option("--plan", "plan_file", type=click.Path(path_type=Path), help="Apply this (edited) plan; no new capture.")
@click.option("--workers", type=click.IntRange(min=1), default=1, show_default=True, help="Processes that observe.")
@click.option("--ray", metavar="ADDRESS", help="Observe on a Ray cluster; needs the extra [ray].")
@click.option("--explain", is_flag=True, help="Print each block's error, gain and decision.")
@click.option("--json", "as_json", is_flag=True, help="Write the result to stdout as JSON.")
def calibrate(
    bundle: Path,
    prompts: Path | None,
    samples: int,
    steps: int | None,
    floor: str,
    backend: str,
    pictures: int,
    floats: str | None,
    plan_file: Path | None,
    workers: int,
    ray: str | None,
    explain: bool,
    as_json: bool,
) -> None:
    """Quantise the denoiser of BUNDLE to INT8, and measure whether that pays on this machine."""
    texts = tuple(read_prompts(prompts)) if prompts is not None else ()
    options = Options(samples, steps, texts, decibels(floor), backend, pictures, floats=floats)
    with reporting() as reporter:
        if plan_file is not None:
            outcome = reapply(bundle, Plan.load(plan_file), options, reporter)
        else:
            outcome = run_calibration(bundle, options, reporter, mapper_of(workers, ray))
    if explain:
        Console(stderr=as_json, width=None if sys.stdout.isatty() else 140).print(explanation(outcome.plan))
    if as_json:
        click.echo(json.dumps(result_of(outcome), indent=2))
    else:
        print_outcome(outcome)


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


@click.command()
@click.argument("first")
@click.argument("second")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="Folder of the report; default: FIRST's reports/."
)
@click.option("--pictures", type=click.IntRange(min=1), default=16, show_default=True, help="Pictures to draw.")
@click.option("--prompts", type=click.Path(path_type=Path), help="A file with one prompt a line.")
@click.option("--steps", type=click.IntRange(min=1), help="Sampler steps; default: the bundle's.")
@click.option("--reference", type=click.Path(path_type=Path), help="Folder or NPZ of real pictures to measure against.")
@click.option("--json", "as_json", is_flag=True, help="Write all figures to stdout as JSON.")
def compare(
    first: str,
    second: str,
    output: Path | None,
    pictures: int,
    prompts: Path | None,
    steps: int | None,
    reference: Path | None,
    as_json: bool,
) -> None:
    """Compare the pictures of two bundles or variants, seed for seed.

    FIRST and SECOND are BUNDLE, BUNDLE:PRECISION or BUNDLE:BACKEND:PRECISION.
    """
    from latentedge.calibration.compare import Side
    from latentedge.calibration.compare import compare as run_comparison
    from latentedge.calibration.report import figures, write_report

    one, two = Side.parse(first), Side.parse(second)
    with reporting() as reporter:
        found = run_comparison(one, two, pictures, steps, prompts, reference, reporter.progress)
    files = write_report(found, output or one.path / "reports" / "comparison")
    if as_json:
        click.echo(json.dumps(found.to_json(), indent=2))
        return
    for name, value in figures(found).items():
        click.echo(f"{name}: {value}")
    click.echo(f"report: {files['html']}", err=True)
