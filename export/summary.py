"""What an export shows: progress while it runs, and a table at its end, both on stderr."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from latentedge.runtime.bundle import Bundle, Variant

#: Told (component, stage) as work goes on.
Reporter = Callable[[str, str], None]
#: Told what the user should know.
Notifier = Callable[[str], None]


@contextlib.contextmanager
def progress_on_terminal(components: list[str]) -> Iterator[tuple[Reporter, Notifier]]:
    """A progress bar over the components on a terminal; elsewhere only messages are written."""
    console = Console(stderr=True, highlight=False)
    if not sys.stderr.isatty():
        yield (lambda component, stage: None), (lambda message: console.print(f"note: {message}", soft_wrap=True))
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=len(components))

        def report(component: str, stage: str) -> None:
            done = components.index(component) if component in components else 0
            progress.update(task, completed=done, description=f"{component}: {stage}")

        yield report, lambda message: progress.console.print(f"note: {message}", soft_wrap=True)


def summary_of(bundle: Bundle) -> dict[str, Any]:
    """The export as data: path, and for each component and precision its file, size, parity and latencies."""
    components = {
        component.name: {precision: _variant(variant) for precision, variant in component.variants.items()}
        for component in bundle.manifest.components.values()
    }
    return {"bundle": str(bundle.path), "family": bundle.manifest.family, "components": components}


def _variant(variant: Variant) -> dict[str, Any]:
    parity = _record(variant, "parity")
    kept = _record(variant, "float32_nodes")
    return {
        "path": variant.path,
        "size": variant.size,
        "psnr_db": parity.get("psnr_db"),
        "max_abs_error": parity.get("max_abs_error"),
        "floor_psnr_db": parity.get("floor_psnr_db"),
        "float32_nodes": kept.get("float32"),
        "latency": [record for record in variant.measured if record.get("kind") == "latency"],
    }


def _record(variant: Variant, kind: str) -> dict[str, Any]:
    return next((record for record in variant.measured if record.get("kind") == kind), {})


def print_summary(bundle: Bundle) -> None:
    """The table at the end, on stderr."""
    table = Table(box=None, pad_edge=False)
    table.add_column("component")
    table.add_column("precision")
    for name in ("MB", "PSNR dB", "floor", "max abs error", "ms"):
        table.add_column(name, justify="right")
    for component, variants in summary_of(bundle)["components"].items():
        for precision, row in variants.items():
            table.add_row(component, precision, *_cells(row))
    console = Console(stderr=True, highlight=False)
    console.print(table)
    console.print(f"wrote {bundle.path}", soft_wrap=True)


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    parity = ("-", "-", "-")
    if row["psnr_db"] is not None:
        parity = (f"{row['psnr_db']:.1f}", f"{row['floor_psnr_db']:g}", f"{row['max_abs_error']:.2g}")
    latency = f"{1000 * row['latency'][-1]['seconds']:.1f}" if row["latency"] else "-"
    return (f"{row['size'] / 1e6:.1f}", *parity, latency)
