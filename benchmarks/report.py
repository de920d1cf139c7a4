"""A bench report as a table, as a picture, and against an older one."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from latentedge.benchmarks.bench import FORMAT, VERSION
from latentedge.benchmarks.statistics import compare
from latentedge.runtime.bundle import graph_precision
from latentedge.runtime.errors import UsageError


def read_report(path: Path) -> dict[str, Any]:
    """A report written earlier; :class:`UsageError` where the file is none."""
    try:
        report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UsageError(f"{path} is no bench report: {error}.") from error
    if report.get("format") != FORMAT or report.get("version") != VERSION:
        raise UsageError(
            f"{path} is no bench report of version {VERSION}.", hint="write one with `latentedge bench -o`"
        )
    return report


def measured(report: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows that were measured, without the refused ones."""
    return [row for row in report["rows"] if "samples" in row]


def print_report(report: dict[str, Any]) -> None:
    """Tables of settings and components, to stderr."""
    from rich.console import Console
    from rich.table import Table

    console = Console(stderr=True, width=None if sys.stderr.isatty() else 180)
    table = Table(title=f"{report['bundle']['name']} on {report['machine']['processor']}")
    for heading in ("setting", "first picture", "picture p50", "p90", "p99", "spread", "step p50", "steps/s", "outside",
                    "peak memory", "energy", "against first"):  # fmt: skip
        table.add_column(heading, justify="left" if heading == "setting" else "right")
    for row in report["rows"]:
        name = f"{row['backend']} {row['precision']}"
        if "refused" in row:
            table.add_row(name, "refused", *[""] * 10)
            continue
        picture, step, ratio = row["picture"], row.get("step"), row["ratio"]
        table.add_row(
            name,
            seconds(row["load"]["first_picture_seconds"]),
            *(seconds(picture[key]) for key in ("p50", "p90", "p99")),
            f"{picture['spread']:.0%}",
            seconds(step["p50"]) if step else "",
            f"{row['steps_per_second']:.2f}" if step else "",
            f"{row['outside_engines']:.1%}",
            _bytes(row["memory"].get("peak_rss")),
            "not reported" if row["joules"] is None else f"{row['joules']:.1f} J",
            f"{ratio['ratio']:.2f} ({ratio['low']:.2f}-{ratio['high']:.2f})",
        )
    console.print(table)
    console.print(_component_table(report))
    for row in report["rows"]:
        if "refused" in row:
            console.print(f"{row['backend']} {row['precision']}: {row['refused']}")


def _component_table(report: dict[str, Any]) -> Any:
    from rich.table import Table

    table = Table(title="components")
    for heading in ("component", "setting", "p50", "p90", "GFLOP", "weights", "GFLOP/s", "of the product peak", "GB/s"):
        table.add_column(heading, justify="left" if heading in ("component", "setting") else "right")
    for row in measured(report):
        for name, times in row["components"].items():
            point = roofline_point(report, row, name)
            table.add_row(
                name,
                f"{row['backend']} {row['load']['components'][name]['precision']}",
                seconds(times["p50"]),
                seconds(times["p90"]),
                f"{report['cost'][name]['flops'] / 1e9:.2f}" if name in report["cost"] else "",
                _bytes(report["cost"].get(name, {}).get("weight_bytes")),
                f"{point['flops_per_second'] / 1e9:.1f}" if point else "",
                f"{point['share']:.0%}" if point and point["share"] is not None else "",
                f"{point['bytes_per_second'] / 1e9:.1f}" if point else "",
            )
    return table


def roofline_point(report: dict[str, Any], row: dict[str, Any], component: str) -> dict[str, Any] | None:
    """What a component reaches: operations and bytes a second, operations a byte, and its share of the product peak.

    Bytes are those that must move at least: weights in the precision's size, inputs and outputs.
    """
    cost = report["cost"].get(component)
    if cost is None:
        return None
    precision = row["load"]["components"][component]["precision"]
    size = {"fp32": 4, "fp16": 2, "int8": 1}[graph_precision(precision)] / 4
    size = min(size, 0.5) if "bf16" in precision else size
    least = cost["weight_bytes"] * size + cost["io_bytes"]
    time = row["components"][component]["p50"]
    peak = report["peaks"].get(f"{row['backend']} {precision}")
    reached = cost["flops"] / time
    return {
        "flops_per_second": reached,
        "bytes_per_second": least / time,
        "intensity": cost["flops"] / least,
        "share": None if peak is None else reached / peak,
        "peak": peak,
    }


def plot_report(report: dict[str, Any], path: Path) -> None:
    """PNG: picture times by setting, and the roofline of every component."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    rows = measured(report)
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5), layout="constrained")
    names = [f"{row['backend']} {row['precision']}" for row in rows]
    left.boxplot([row["samples"]["picture"] for row in rows], tick_labels=names, whis=(0, 100))
    left.set(
        ylabel="seconds for a picture", ylim=(0, None), title=f"{report['bundle']['name']}, {report['rounds']} rounds"
    )
    left.tick_params(axis="x", rotation=20)
    _roofline(right, report, rows)
    figure.suptitle(f"{report['machine']['processor']}, {report['machine']['cores']} cores")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _roofline(axes: Any, report: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    import numpy as np

    copy = report["peaks"].get("copy_bytes_per_second")
    intensities = np.logspace(-1, 4, 50)
    for name, peak in report["peaks"].items():
        if name != "copy_bytes_per_second" and copy:
            axes.plot(intensities, np.minimum(peak, intensities * copy) / 1e9, linewidth=0.8, label=f"limit {name}")
    for row in rows:
        points = {name: roofline_point(report, row, name) for name in row["components"]}
        known = {name: point for name, point in points.items() if point}
        axes.scatter(
            [point["intensity"] for point in known.values()],
            [point["flops_per_second"] / 1e9 for point in known.values()],
            label=f"{row['backend']} {row['precision']}",
        )
        for name, point in known.items():
            axes.annotate(name, (point["intensity"], point["flops_per_second"] / 1e9), fontsize=7)
    axes.set(xscale="log", yscale="log", xlabel="operations for each byte that must move", ylabel="GFLOP/s",
             title="roofline")  # fmt: skip
    axes.legend(fontsize=7)


def compare_reports(old: dict[str, Any], new: dict[str, Any]) -> list[dict[str, Any]]:
    """For every setting in both: pictures and components, faster, slower or within noise.

    :class:`UsageError` when the reports are of different machines or requests: their times say nothing about each
    other.
    """
    for name in ("fingerprint", "request"):
        if old[name] != new[name]:
            raise UsageError(
                f"the reports differ in their {name}: {old[name]} and {new[name]}.",
                hint="measure both on one machine with the same options",
            )
    before = {(row["backend"], row["precision"]): row for row in measured(old)}
    found = []
    for row in measured(new):
        earlier = before.get((row["backend"], row["precision"]))
        if earlier is None:
            continue
        pairs = {"picture": (earlier["samples"]["picture"], row["samples"]["picture"])}
        for name, times in row["samples"]["components"].items():
            if name in earlier["samples"]["components"]:
                pairs[name] = (earlier["samples"]["components"][name], times)
        for what, (was, now) in pairs.items():
            ratio = compare(was, now)
            found.append(
                {"setting": f"{row['backend']} {row['precision']}", "what": what, "ratio": ratio.ratio,
                 "low": ratio.low, "high": ratio.high, "verdict": ratio.verdict}
            )  # fmt: skip
    return found


def seconds(value: float) -> str:
    """``"1.23 s"`` or ``"45.6 ms"``."""
    return f"{value:.2f} s" if value >= 1 else f"{value * 1000:.1f} ms"


def _bytes(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value / 2**30:.2f} GiB" if value >= 2**30 else f"{value / 2**20:.0f} MiB"
