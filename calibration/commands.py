"""``latentedge calibrate`` and ``latentedge compare``."""

from __future__ import annotations

import json
import re
from pathlib import Path

import click

from latentedge.runtime.errors import UsageError


def decibels(text: str) -> float:
    """``"30dB"`` or ``"30"`` as a number; :class:`UsageError` for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:dB)?\s*", text, re.IGNORECASE)
    if match is None:
        raise UsageError(f"--floor takes decibels like 30dB, found {text!r}.")
    return float(match[1])


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--prompts", type=click.Path(path_type=Path), help="A file with one prompt a line; every other one is held out."
)
@click.option("--samples", type=click.IntRange(min=1), default=32, show_default=True, help="Pictures to observe.")
@click.option("--steps", type=click.IntRange(min=1), help="Sampler steps; default: the bundle's.")
@click.option("--floor", default="30dB", show_default=True, help="Lowest mean PSNR of pictures against fp32.")
@click.option("--backend", default="auto", show_default=True, help="Engine that the graph is placed for.")
@click.option("--floats", type=click.Choice(["fp32", "fp16"]), help="What the rest computes in; default: by backend.")
@click.option("--plan", "plan_file", type=click.Path(path_type=Path), help="Apply this (edited) plan; no new capture.")
@click.option("--ray", metavar="ADDRESS", help='Shard over a Ray cluster, or "local"; needs the extra [ray].')
@click.option("--explain", is_flag=True, help="Print each block's error, gain and decision.")
@click.option("--json", "as_json", is_flag=True, help="Write the result to stdout as JSON.")
def calibrate(
    bundle: Path,
    prompts: Path | None,
    samples: int,
    steps: int | None,
    floor: str,
    backend: str,
    floats: str | None,
    plan_file: Path | None,
    ray: str | None,
    explain: bool,
    as_json: bool,
) -> None:
    """Quantise denoiser and decoder of BUNDLE to INT8, and measure whether that pays on this machine."""
    from latentedge.calibration.calibrate import Options, reapply
    from latentedge.calibration.calibrate import calibrate as run_calibration
    from latentedge.calibration.calibration_report import write_report
    from latentedge.calibration.plan import Plan
    from latentedge.calibration.presentation import print_explanation, print_outcome, reporting, result_of
    from latentedge.calibration.requests import read_prompts
    from latentedge.calibration.sharding import mapper_of

    texts = tuple(read_prompts(prompts)) if prompts is not None else ()
    options = Options(samples, steps, texts, decibels(floor), backend, floats=floats)
    with reporting() as reporter:
        if plan_file is not None:
            outcome = reapply(bundle, Plan.load(plan_file), options, reporter)
        else:
            outcome = run_calibration(bundle, options, reporter, mapper_of(ray))
    files = write_report(outcome)
    click.echo(f"report: {files['html']}", err=True)
    if explain:
        for part in outcome.parts:
            print_explanation(part.plan, to_stderr=as_json)
    if as_json:
        click.echo(json.dumps(result_of(outcome), indent=2))
    else:
        print_outcome(outcome)


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
    from latentedge.calibration.presentation import reporting
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
