"""``latentedge bench``: every asked setting in a process of its own, taking turns, so that drift of the machine is shared."""

from __future__ import annotations

import dataclasses
import datetime
import platform
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from latentedge.benchmarks.energy import measured_energy
from latentedge.benchmarks.graph_cost import GraphCost, graph_cost
from latentedge.benchmarks.peaks import copy_peak, gemm_peak
from latentedge.benchmarks.processes import MeasuredProcess
from latentedge.benchmarks.statistics import Times, compare_rounds
from latentedge.runtime import engines
from latentedge.runtime.bundle import Bundle, graph_precision
from latentedge.runtime.engines.settings import parse_backend
from latentedge.runtime.errors import EngineError, LatentEdgeError
from latentedge.runtime.machine import machine, machine_fingerprint
from latentedge.runtime.selection import PRECISIONS, choose, library_version

FORMAT, VERSION = "latentedge-bench", 1

Setting = tuple[str, str]


@dataclass(frozen=True)
class Plan:
    """What to measure: settings as (backend, precision), arguments of ``generate``, and how often."""

    settings: tuple[Setting, ...]
    request: dict[str, Any] = field(default_factory=dict)
    #: Options of every engine, by the names of ``EngineOptions``.
    options: dict[str, Any] = field(default_factory=dict)
    warmup: int = 1
    rounds: int = 5
    #: Runs of each component in each round.
    runs: int = 3
    peaks: bool = True


def settings_of(bundle: Bundle, backends: Sequence[str], precisions: Sequence[str]) -> tuple[Setting, ...]:
    """Every asked pair that can be; "auto" alone is what ``Pipeline`` would choose, "all" everything that is there.

    :class:`~latentedge.runtime.errors.UsageError` when an asked backend or precision is not there at all.
    """
    names = list(engines.BACKENDS) if "all" in backends else list(backends)
    if "all" in backends:
        names = [name for name in names if engines.BACKENDS[name].installed()]
    found: list[Setting] = []
    for text in names:
        name, options = parse_backend(text, engines.EngineOptions())
        for precision in _all_precisions(bundle, name) if "all" in precisions else precisions:
            choice = choose(bundle, name, precision, measured_here=options.device is None)
            found.append((choice.backend + text[len(name) :], choice.precision))
    return tuple(dict.fromkeys(found))


def _all_precisions(bundle: Bundle, backend: str) -> list[str]:
    variants = bundle.component("unet").variants if "unet" in bundle.manifest.components else {}
    known = PRECISIONS[choose(bundle, backend, "fp32").backend if backend == "auto" else backend]
    return [precision for precision in known if graph_precision(precision) in variants]


def measure(bundle: Bundle, plan: Plan, notify: Callable[[str], None] = lambda message: None) -> dict[str, Any]:
    """Measure every setting of ``plan`` in turns; gives the report as plain JSON data.

    A setting that this machine does not offer (a precision that the processor does not compute in) is reported with
    its reason; :class:`EngineError` when none is left.
    """
    rows: list[dict[str, Any]] = []
    with ExitStack() as stack:
        running: list[tuple[dict[str, Any], MeasuredProcess]] = []
        for backend, precision in plan.settings:
            row: dict[str, Any] = {"backend": backend, "precision": precision}
            rows.append(row)
            notify(f"load {backend} {precision}")
            process = stack.enter_context(MeasuredProcess(f"{backend} {precision}"))
            try:
                row["load"] = _load(process, bundle, plan, row)
                running.append((row, process))
            except EngineError as error:
                row["refused"] = error.message
                process.close()
        if not running:
            raise EngineError(
                "no setting could be measured: " + "; ".join(str(row.get("refused")) for row in rows),
                hint="`latentedge doctor` shows what this machine offers",
            )
        _rounds(running, plan, notify)
        for row, process in running:
            row["memory"] = process.ask("memory")
    _ratios(rows)
    report = header(bundle, plan)
    report["rows"] = rows
    report["cost"] = {name: _cost_json(cost) for name, cost in costs(bundle, rows).items()}
    report["peaks"] = _peaks(rows, plan, notify) if plan.peaks else {}
    return report


def header(bundle: Bundle, plan: Plan) -> dict[str, Any]:
    """Everything that a number of this report depends on: machine, libraries, bundle, settings."""
    backends = {backend for backend, _ in plan.settings}
    return {
        "format": FORMAT,
        "version": VERSION,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": machine(),
        "fingerprint": machine_fingerprint(),
        "libraries": {
            "python": platform.python_version(),
            **{name: library_version(name.partition(":")[0]) for name in sorted(backends)},
        },
        "bundle": {
            "name": bundle.path.name,
            "digest": bundle.digest(),
            "graphs": {
                f"{name} {precision}": variant.sha256
                for name, component in bundle.manifest.components.items()
                for precision, variant in component.variants.items()
            },
        },
        "request": plan.request,
        "options": {name: str(value) for name, value in plan.options.items()},
        "rounds": plan.rounds,
    }


def _load(process: MeasuredProcess, bundle: Bundle, plan: Plan, row: dict[str, Any]) -> dict[str, Any]:
    loaded = process.ask(
        "load",
        bundle=str(bundle.path),
        backend=row["backend"],
        precision=row["precision"],
        request=plan.request,
        options=plan.options,
    )
    for _ in range(plan.warmup):
        process.ask("picture")
    return {name: loaded[name] for name in ("open_seconds", "first_picture_seconds", "components")}


def _rounds(running: list[tuple[dict[str, Any], MeasuredProcess]], plan: Plan, notify: Callable[[str], None]) -> None:
    """Rounds in which every setting draws one picture, then runs each component; the order turns with each round."""
    for row, _ in running:
        row["samples"] = {"picture": [], "step": [], "engine_share": [], "components": {}}
        row["energy"] = []
    for index in range(plan.rounds):
        notify(f"round {index + 1} of {plan.rounds}")
        turn = index % len(running)
        for row, process in running[turn:] + running[:turn]:
            samples = row["samples"]
            with measured_energy() as energy:
                drawn = process.ask("picture")
            samples["picture"].append(drawn["seconds"])
            samples["step"] += drawn["steps"]
            samples["engine_share"].append(drawn["engine_seconds"] / drawn["seconds"])
            if energy.joules is not None:
                row["energy"].append(energy.joules)
                row["energy_source"] = energy.source
            for name in row["load"]["components"]:
                timed = process.ask("component", name=name, runs=plan.runs)["seconds"]
                samples["components"].setdefault(name, []).extend(timed)
    for row, _ in running:
        _summarise(row)


def _summarise(row: dict[str, Any]) -> None:
    samples = row["samples"]
    row["picture"] = dataclasses.asdict(Times.of(samples["picture"]))
    if samples["step"]:
        row["step"] = dataclasses.asdict(Times.of(samples["step"]))
        row["steps_per_second"] = 1 / row["step"]["p50"]
    row["components"] = {name: dataclasses.asdict(Times.of(times)) for name, times in samples["components"].items()}
    shares = samples["engine_share"]
    row["outside_engines"] = 1 - sorted(shares)[len(shares) // 2]
    energy = row.pop("energy")
    row["joules"] = sum(energy) / len(energy) if energy else None


def _ratios(rows: list[dict[str, Any]]) -> None:
    """How many times faster than the first measured setting, from the rounds that they shared."""
    measured = [row for row in rows if "samples" in row]
    for row in measured:
        ratio = compare_rounds(measured[0]["samples"]["picture"], row["samples"]["picture"])
        row["ratio"] = {
            **dataclasses.asdict(ratio),
            "reference": f"{measured[0]['backend']} {measured[0]['precision']}",
        }


def costs(bundle: Bundle, rows: list[dict[str, Any]]) -> dict[str, GraphCost]:
    """Cost of each component's fp32 graph for the shapes that were measured; a graph is its own unit, never its parts."""
    found: dict[str, GraphCost] = {}
    for row in rows:
        for name, entry in row.get("load", {}).get("components", {}).items():
            component = bundle.component(name)
            if name not in found and component.variants:
                precision = "fp32" if "fp32" in component.variants else next(iter(component.variants))
                shapes = {spec.name: spec.resolve(entry["axes"]) for spec in component.inputs}
                found[name] = graph_cost(bundle.variant(name, precision)[0], shapes)
    return found


def _cost_json(cost: GraphCost) -> dict[str, Any]:
    return {
        "flops": cost.flops,
        "weight_bytes": cost.weight_bytes,
        "io_bytes": cost.io_bytes,
        "peak_activation_bytes": cost.peak_activation_bytes,
        "by_operator": cost.by_operator,
    }


def _peaks(rows: list[dict[str, Any]], plan: Plan, notify: Callable[[str], None]) -> dict[str, Any]:
    """The machine's own limits: copies of memory, and products in each setting that was measured."""
    notify("peaks of this machine")
    peaks: dict[str, Any] = {"copy_bytes_per_second": copy_peak(plan.options.get("threads"))}
    for row in rows:
        if "samples" in row:
            name = f"{row['backend']} {row['precision']}"
            try:
                backend, options = parse_backend(
                    row["backend"], engines.EngineOptions(threads=plan.options.get("threads"))
                )
                peaks[name] = gemm_peak(backend, row["precision"], options)
            except LatentEdgeError as error:
                notify(f"no product peak for {name}: {error.message}")
    return peaks


def write_report(report: dict[str, Any], path: Path) -> None:
    """Write the report as JSON."""
    import json

    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n", encoding="utf-8")
