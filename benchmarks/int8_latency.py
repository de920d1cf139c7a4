"""Speed of an INT8 denoiser or decoder beside its float precisions, in one run and in turns.

    python -m latentedge.benchmarks.int8_latency BUNDLE --size 256

Every layer that the rules allow becomes INT8, with ranges from a few evaluations: speed does not depend on them.
Nothing is written into the bundle.
"""

from __future__ import annotations

import dataclasses
import json
from contextlib import ExitStack
from pathlib import Path

import click
import numpy as np

from latentedge.benchmarks.int8_untuned import COMPONENTS, inputs_of, untuned_plan
from latentedge.calibration import gate
from latentedge.calibration.candidates import candidate
from latentedge.calibration.latency import in_turns, ratio
from latentedge.calibration.scene import Target
from latentedge.runtime.bundle import Bundle


@click.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--component", type=click.Choice(COMPONENTS), default="unet")
@click.option("--size", default=256, help="Side of the picture in pixels.")
@click.option("--batch", default=2, help="Evaluations at once: 2 for a denoiser with guidance.")
@click.option("--backend", default="openvino")
@click.option("--place-for", help="Backend that the graph is placed for; default: the one it runs on.")
@click.option("--seconds", default=60.0, help="Time to measure.")
@click.option("-o", "--output", type=click.Path(path_type=Path))
def main(
    path: Path,
    component: str,
    size: int,
    batch: int,
    backend: str,
    place_for: str | None,
    seconds: float,
    output: Path | None,
) -> None:
    """Measure BUNDLE's denoiser or decoder in every precision of a backend."""
    bundle = Bundle.open(path)
    side = size // bundle.manifest.latent.downscale
    inputs = inputs_of(bundle, component, {"batch": batch, "latent_height": side, "latent_width": side})
    plan, evidence = untuned_plan(bundle, component, [inputs], place_for or backend)
    target = Target(backend, "int8", "fp32")
    with candidate(bundle, plan, evidence) as trial, ExitStack() as stack:
        wanted = [name for name in gate.precisions_of(backend) if name != "fp16"]
        engines = gate.open_precisions(stack, trial, component, target, wanted, lambda text: click.echo(text, err=True))
        times = in_turns(engines, inputs, seconds)
    result = []
    for name, measured in times.items():
        found = {other: dataclasses.asdict(ratio(times[other], measured)) for other in times if other != name}
        result.append({"precision": name, "median_seconds": float(np.median(measured)), "faster_than": found})
        against = ", ".join(f"{value['ratio']:.2f} x {other} (>= {value['low']:.2f})" for other, value in found.items())
        click.echo(f"{name:10s} {np.median(measured) * 1e3:8.1f} ms  {against}")
    if output is not None:
        output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
