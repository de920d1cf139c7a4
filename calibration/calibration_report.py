"""Writes what calibration found as one HTML page and as JSON: what was chosen and why, block by block."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from latentedge.calibration import html
from latentedge.calibration.applying import Outcome, Part
from latentedge.calibration.plan import INT8, BlockPlan, write_atomically
from latentedge.calibration.presentation import HELD, floors, gain, least, measured_by_precision, result_of

#: Where a bundle keeps the report.
FOLDER = Path("reports", "calibration")


def write_report(outcome: Outcome) -> dict[str, Path]:
    """Write ``calibration.json`` and ``calibration.html`` into the bundle's reports; gives their paths."""
    folder = outcome.bundle.path / FOLDER
    files = {kind: folder / f"calibration.{kind}" for kind in ("json", "html")}
    write_atomically(files["json"], (json.dumps(result_of(outcome), indent=2) + "\n").encode())
    write_atomically(files["html"], page(outcome).encode())
    return files


def page(outcome: Outcome) -> str:
    """What ``auto`` takes and the figures behind that, then each component's precisions and blocks."""
    backend, precision, reason = outcome.choice
    name = outcome.bundle.path.name
    heading = (
        f"<h1>{html.text(name)}: <small>auto is</small> {html.text(precision)} <small>with</small> {html.text(backend)}"
        f"</h1><p class=muted>{html.text(reason)}</p>"
    )
    body = "".join(html.tiles(_tiles(part)) for part in outcome.parts[::-1]) + "".join(
        _part(part, outcome.choice) for part in outcome.parts[::-1]
    )
    if outcome.faults:
        rows = [(html.text(f.tensor), html.text(f"{f.timestep:g}"), html.text(f.detail)) for f in outcome.faults]
        body += "<h2>Activations that cannot be quantised</h2>" + html.table(("tensor", "timestep", "what"), rows, (1,))
    return html.page(f"Calibration of {name}", heading, body)


def _tiles(part: Part) -> list[html.Tile]:
    """The fastest INT8 precision's pictures and speed, and how much of the component is INT8."""
    rows = {name: row for name, row in measured_by_precision(part).items() if name.split(" ", 1)[1].startswith(INT8)}
    best = max(rows.values(), key=lambda row: row.get("latency.ratio", 0.0), default={})
    label = part.plan.component
    found = []
    if "quality.psnr_db" in best:
        refused = floors(best) != HELD
        note = f"worst {best['quality.psnr_worst_db']:.1f}; floors {best['quality.floor_mean_db']:g} and "
        note += f"{best['quality.floor_db']:g} dB; {best['quality.pictures']} pictures"
        found.append(html.Tile(f"{label}: pictures", f"{best['quality.psnr_db']:.1f} dB", note, refused))
    if "latency.ratio" in best:
        verdict = str(best["latency.verdict"])
        note = f"{verdict}: {best['latency.ratio_low']:.2f} to {best['latency.ratio_high']:.2f}"
        speed = min(best["latency.ratio"], best["latency.alternative_ratio"])
        found.append(html.Tile(f"{label}: speed against floats", f"{speed:.2f} x", note, verdict != "faster"))
    total = len(part.layers) + len(part.plan.kept)
    total += sum(len(block.layers) for block in part.plan.blocks if block.precision != INT8)
    return [*found, html.Tile(f"{label}: layers in INT8", f"{len(part.layers)} of {total}")]


def _part(part: Part, choice: tuple[str, str, str]) -> str:
    plan = part.plan
    kept = Counter(plan.kept.values())
    rules = "; ".join(f"{count} {html.text(reason)}" for reason, count in kept.items())
    return (
        f"<h2>{html.text(plan.component)} on {html.text(plan.backend)}</h2>"
        + _precisions(part, choice)
        + f"<h2>{html.text(plan.component)}, block by block</h2>"
        + _blocks(plan.blocks)
        + (f"<p class=muted>Float by rule: {rules}.</p>" if rules else "")
    )


def _precisions(part: Part, choice: tuple[str, str, str]) -> str:
    rows = []
    found = measured_by_precision(part)
    for name in sorted(found, key=lambda key: -found[key].get("latency.ratio", 0.0)):
        row = found[name]
        shown = html.text(name)
        rows.append(
            (
                f"<b>{shown}</b>" if name == f"{choice[0]} {choice[1]}" and part.plan.component == "unet" else shown,
                _figure(row, "latency.seconds", 1e3, "{:.1f}"),
                _figure(row, "latency.ratio", 1, "{:.2f}"),
                _interval(row),
                html.text(row.get("latency.verdict", "")),
                _figure(row, "quality.psnr_db", 1, "{:.1f}"),
                _figure(row, "quality.psnr_worst_db", 1, "{:.1f}"),
                html.text(floors(row)) if "quality.psnr_db" in row else "",
            )
        )
    head = ("precision", "ms", "x reference", "x what it has to beat, 95 %", "verdict", "PSNR dB", "worst", "floors")
    return html.table(head, rows, (1, 2, 5, 6))


def _interval(row: dict[str, Any]) -> str:
    if "latency.ratio_low" not in row or row["latency.rounds"] == 0:
        return ""
    return f"{row['latency.ratio_low']:.2f} to {row['latency.ratio_high']:.2f}"


def _figure(row: dict[str, Any], name: str, factor: float, form: str) -> str:
    return form.format(row[name] * factor) if name in row else ""


def _blocks(blocks: tuple[BlockPlan, ...]) -> str:
    """The blocks, the one with the largest error first; bars show shares of the largest error and gain.

    A network without timesteps has no column for the worst of them.
    """
    ordered = sorted(blocks, key=lambda block: block.sqnr_db if block.sqnr_db is not None else 0.0)
    noise = {block.name: 10 ** (-block.sqnr_db / 10) for block in blocks if block.sqnr_db is not None}
    most = max(noise.values(), default=1.0)
    gains = [block.seconds_saved for block in blocks if block.seconds_saved is not None]
    largest = max([*gains, 1e-9])
    stepwise = any(block.sqnr_db_by_timestep for block in blocks)
    rows = []
    for block in ordered:
        saved = block.seconds_saved
        rows.append(
            (
                html.text(block.name),
                str(len(block.layers)),
                "" if block.sqnr_db is None else f"{block.sqnr_db:.1f} {html.bar(noise[block.name] / most)}",
                *((least(block),) if stepwise else ()),
                "" if block.psnr_db is None else f"{block.psnr_db:.1f}",
                "" if saved is None else f"{gain(block)} {html.bar(saved / largest)}",
                html.text(block.precision),
                html.text(block.reason),
            )
        )
    head = ["block", "layers", "SQNR dB alone, and its noise", "picture dB alone", "saves ms alone", "decision", "why"]
    head[3:3] = ["least SQNR, at timestep"] if stepwise else []
    return html.table(head, rows, (1, 3, 4) if stepwise else (1, 3))
