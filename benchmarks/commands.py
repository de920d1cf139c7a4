"""``latentedge bench``. Everything heavy is imported when the command runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from latentedge.runtime.bundle import Bundle
from latentedge.runtime.errors import UsageError


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--backend", default="auto", show_default=True, help="Backends and settings, with commas between, or all."
)
@click.option("--precision", default="all", show_default=True, help="Precisions, with commas between, auto, or all.")
@click.option("--steps", type=click.IntRange(min=1), help="Steps of a picture.  [default: the bundle's]")
@click.option("--size", metavar="WIDTHxHEIGHT", help="Size of a picture.  [default: the bundle's]")
@click.option("--rounds", type=click.IntRange(min=2), default=5, show_default=True, help="Pictures of each setting.")
@click.option("--threads", type=click.IntRange(min=1), help="Threads of the engines.  [default: physical cores]")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="JSON file; a plot is written beside it.")
@click.option("--compare", type=click.Path(path_type=Path), help="An older JSON file to compare with.")
@click.option("--estimate", metavar="DEVICE", help="Predict instead of measuring: orin-nano, orin-nx, agx-orin, thor.")
@click.option("--memory", is_flag=True, help="Peaks of memory instead, for `generate --memory-limit`.")
@click.option("--step-caching", is_flag=True, help="Intervals of step caching instead, for `generate --auto-quality`.")
@click.option("--record", is_flag=True, help="Write what was measured into the bundle, for `generate` to choose by.")
@click.option("--json", "as_json", is_flag=True, help="Write the report to stdout as JSON.")
def bench(bundle: Path, estimate: str | None, **options: Any) -> None:
    """Measure a bundle on this machine: time, memory, energy, by backend and precision.

    Every setting runs in a process of its own; they take turns, and the first one is what the others are compared with.
    """
    opened = Bundle.open(bundle)
    size = parse_size(options["size"])
    if estimate is not None:
        _estimate(opened, estimate, size, options)
        return
    if options["memory"] or options["step_caching"]:
        _tradeoffs(opened, size, options)
        return
    _measure(opened, size, options)


def parse_size(text: str | None) -> tuple[int, int] | None:
    """Height and width from ``"WIDTHxHEIGHT"``; :class:`UsageError` for anything else."""
    if text is None:
        return None
    width, separator, height = text.partition("x")
    if not (separator and width.isdigit() and height.isdigit()):
        raise UsageError(f"--size is WIDTHxHEIGHT, such as 512x512, found {text!r}.")
    return int(height), int(width)


def _estimate(bundle: Bundle, device: str, size: tuple[int, int] | None, options: dict[str, Any]) -> None:
    from latentedge.benchmarks.estimate import estimate

    variants = list(bundle.component("unet").variants)
    asked = variants if options["precision"] in ("all", "auto") else options["precision"].split(",")
    rows = [estimate(bundle, device, precision, options["steps"], size) for precision in asked]
    if options["as_json"]:
        click.echo(json.dumps(rows, indent=1))
        return
    for row in rows:
        parts = ", ".join(f"{name} {value * 1000:.1f} ms" for name, value in row["components"].items())
        fits = "fits" if row["fits"] else "does not fit"
        click.echo(
            f"estimate, not measured: {row['device']} {row['precision']}: {row['picture_seconds']:.2f} s for a picture "
            f"of {row['steps']} steps ({parts}), {row['memory_bytes'] / 2**30:.1f} GiB, which {fits}"
        )
    click.echo(f"figures: {rows[0]['source']}; {rows[0]['efficiency']:.0%} of them are assumed to be reached", err=True)


def _tradeoffs(bundle: Bundle, size: tuple[int, int] | None, options: dict[str, Any]) -> None:
    """What less memory costs, or step caching: a line each on stderr, JSON on stdout or in a file."""
    from latentedge.benchmarks.bench import settings_of
    from latentedge.benchmarks.tradeoffs import keep, measure_memory, measure_step_caching
    from latentedge.runtime.engines.settings import listed_backends

    if options["memory"] and options["step_caching"]:
        raise UsageError("--memory and --step-caching measure different things; give one of them.")
    settings = settings_of(bundle, listed_backends(options["backend"]), options["precision"].split(","))
    request: dict[str, Any] = {} if options["steps"] is None else {"steps": options["steps"]}
    request |= {} if size is None else {"height": size[0], "width": size[1]}
    threads = {} if options["threads"] is None else {"threads": options["threads"]}

    def notify(line: str) -> None:
        click.echo(line, err=True)

    if options["memory"]:
        kind, rows = "memory", measure_memory(bundle, settings, request, threads, notify)
    else:
        rows = measure_step_caching(bundle, settings, request, threads, options["rounds"], notify)
        kind = "step-caching"
    if options["record"]:
        keep(bundle, kind, rows)
    if options["output"] is not None:
        options["output"].write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    if options["as_json"]:
        click.echo(json.dumps(rows))


def _measure(bundle: Bundle, size: tuple[int, int] | None, options: dict[str, Any]) -> None:
    from latentedge.benchmarks.bench import Plan, measure, settings_of, write_report
    from latentedge.benchmarks.report import compare_reports, plot_report, print_report, read_report
    from latentedge.runtime.engines.settings import listed_backends

    old = None if options["compare"] is None else read_report(options["compare"])
    request: dict[str, Any] = {} if options["steps"] is None else {"steps": options["steps"]}
    if size is not None:
        request |= {"height": size[0], "width": size[1]}
    engine_options = {} if options["threads"] is None else {"threads": options["threads"]}
    settings = settings_of(bundle, listed_backends(options["backend"]), options["precision"].split(","))
    plan = Plan(settings, request, engine_options, rounds=options["rounds"])
    report = measure(bundle, plan, lambda message: click.echo(message, err=True))
    if options["output"] is not None:
        write_report(report, options["output"])
        plot_report(report, options["output"].with_suffix(".png"))
    if options["record"]:
        from latentedge.benchmarks.records import record

        record(bundle, report, lambda message: click.echo(message, err=True))
    if options["as_json"]:
        click.echo(json.dumps(report))
    print_report(report)
    for row in [] if old is None else compare_reports(old, report):
        interval = f"{row['low']:.2f}-{row['high']:.2f}"
        click.echo(
            f"{row['setting']} {row['what']}: {row['verdict']}, {row['ratio']:.2f} times as fast ({interval})", err=True
        )
