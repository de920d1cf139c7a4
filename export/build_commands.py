"""``latentedge build``: engines for a target, or with ``--check`` only the proof that the graphs compile."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from latentedge.export.builders import BUILDERS, BuildRequest, BuildRow, Range, builder_of
from latentedge.runtime.bundle import Bundle
from latentedge.runtime.errors import EngineError
from latentedge.runtime.tradeoffs import parse_bytes

_PLANS = ("version-compatible", "stripped", "step-caching")


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--backend", type=click.Choice(list(BUILDERS)), required=True, help="Engine library to build for.")
@click.option("--precision", default="", help="fp32, fp16, int8, separated by commas; default: all of the bundle's.")
@click.option("--check", is_flag=True, help="Compile and report, keep nothing. Exit code 1 if any graph fails.")
@click.option("--batch", metavar="N|LOW..HIGH", help="Pictures at once.  [default: 1]")
@click.option("--size", metavar="N|LOW..HIGH|WxH", help="Pixels of a side.  [default: the model's own]")
@click.option("--compute-capability", metavar="8.9,12.0", default="", help="GPUs to compile for (tensorrt-rtx).")
@click.option("--max-engine-memory", metavar="SIZE", help="Cut the denoiser into engines of at most, say, 1GiB.")
@click.option("--memory-limit", metavar="SIZE", help="Memory for kernels and for timing them, such as 2GiB.")
@click.option("--optimization-level", type=click.IntRange(0, 5), help="Builder effort; the library's own by default.")
@click.option("--plan", "plans", type=click.Choice(_PLANS), multiple=True, help="Kind of plan; may be repeated.")
@click.option("--low-memory", is_flag=True, help="For `generate --low-memory`: guidance one branch at a time.")
@click.option("--json", "as_json", is_flag=True, help="Write the table to stdout as JSON.")
def build(bundle: Path, as_json: bool, **options: Any) -> None:
    """Build the engines of BUNDLE on the machine that will run them."""
    request = build_request(Bundle.open(bundle), **options)
    rows = builder_of(request.backend)(request)
    if as_json:
        click.echo(json.dumps([row_json(row) for row in rows], indent=2))
    else:
        print_rows(rows)
    failed = [row for row in rows if row.errors]
    if failed:
        names = ", ".join(f"{row.component} {row.precision}" for row in failed)
        raise EngineError(f"{len(failed)} of {len(rows)} do not compile: {names}.")


def build_request(bundle: Bundle, **options: Any) -> BuildRequest:
    """A request from the command's options; :class:`UsageError` names a value that cannot be read."""
    return BuildRequest(
        bundle=bundle,
        backend=options["backend"],
        precisions=listed(options["precision"]),
        check=options["check"],
        batch=Range.parse(options["batch"]) if options["batch"] else None,
        size=parse_size(options["size"]) if options["size"] else None,
        compute_capabilities=listed(options["compute_capability"]),
        max_engine_memory=parse_bytes(options["max_engine_memory"]),
        memory_limit=parse_bytes(options["memory_limit"]),
        optimization_level=options["optimization_level"],
        version_compatible="version-compatible" in options["plans"],
        stripped="stripped" in options["plans"],
        step_caching="step-caching" in options["plans"],
        low_memory=options["low_memory"],
        notify=lambda message: click.echo(message, err=True),
    )


def listed(text: str) -> tuple[str, ...]:
    """``"8.9, 12.0"`` as names, each once, in that order."""
    return tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))


def parse_size(text: str) -> tuple[Range, Range]:
    """Height and width from ``"512"``, ``"256..768"`` (both sides) or ``"768x512"`` (width x height)."""
    width, _, height = text.partition("x")
    return Range.parse(height or width), Range.parse(width)


def row_json(row: BuildRow) -> dict[str, Any]:
    """A row as JSON data."""
    folder = None if row.folder is None else str(row.folder)
    return {**dataclasses.asdict(row), "folder": folder, "compiles": not row.errors}


def print_rows(rows: Sequence[BuildRow]) -> None:
    """The table on stdout, and what the compiler complained about below it."""
    table: list[tuple[str, ...]] = [
        ("component", "precision", "target", "compiles", "plan", "weights", "scratch", "engines", "seconds")
    ]
    table += [
        (
            row.component,
            row.precision,
            row.target,
            "NO" if row.errors else "built before" if row.reused else "yes",
            _size(row.plan_size),
            _size(row.weight_memory),
            _size(row.scratch_memory),
            str(row.parts),
            f"{row.seconds:.3g}",
        )
        for row in rows
    ]
    # A backend that compiles when it loads tells no sizes.
    shown = [column for column in range(len(table[0])) if any(line[column] != "-" for line in table[1:])]
    table = [tuple(line[column] for column in shown) for line in table]
    widths = [max(len(line[column]) for line in table) for column in range(len(table[0]))]
    for cells in table:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip())
    for row in rows:
        for line in (*row.errors, *row.warnings):
            click.echo(f"\n{row.component} {row.precision} ({row.target}): {line}")


def _size(value: int | None) -> str:
    return "-" if value is None else f"{value / 2**20:.1f} MiB"
