"""Speed of an INT8 denoiser beside its float precisions, in one run and in turns.

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

from latentedge.calibration import gate
from latentedge.calibration.candidates import candidate
from latentedge.calibration.capture import open_observed
from latentedge.calibration.graph import load_graph, name_nodes
from latentedge.calibration.latency import in_turns, ratio
from latentedge.calibration.observers import TensorStatistics
from latentedge.calibration.placement import place
from latentedge.calibration.plan import INT8, ActivationPlan, BlockPlan, Plan
from latentedge.calibration.quantise import Evidence
from latentedge.calibration.scene import Target
from latentedge.runtime.bundle import Array, Bundle


def inputs_of(bundle: Bundle, latent_side: int, batch: int) -> dict[str, Array]:
    """N(0, 1) inputs at one size, timesteps in the middle of the schedule."""
    component = bundle.component("unet")
    axes = {name: axis.opt for name, axis in component.axes.items()}
    axes |= {"batch": batch, "latent_height": latent_side, "latent_width": latent_side}
    generator = np.random.default_rng(0)
    made = {}
    for spec in component.inputs:
        shape = spec.resolve({name: axes[name] for name in component.axes})
        made[spec.name] = generator.standard_normal(shape).astype(np.float32)
    made["timestep"] = np.full((batch,), 500.0, np.float32)
    return made


def plan_of(bundle: Bundle, inputs: dict[str, Array], backend: str) -> tuple[Plan, Evidence]:
    """Everything in INT8, with the absolute maximum of one evaluation."""
    observed = open_observed(bundle, "unet", outputs=backend == "onnxruntime", threads=None)
    statistics = {}
    for name, array in observed.fetch(inputs).items():
        axis = observed.axis_of(name)
        statistics[name] = TensorStatistics.empty(array.shape[axis])
        statistics[name].observe(array, axis, 500.0)
    observed.close()
    model = load_graph(bundle.variant("unet", "fp32")[0])
    name_nodes(model)
    blocks: dict[str, list[str]] = {}
    for entry in place(model):
        if entry.kept is None:
            blocks.setdefault(entry.block, []).append(entry.layer.name)
    plan = Plan(
        component="unet",
        backend=backend,
        precision="int8",
        floor_db=0.0,
        blocks=tuple(BlockPlan(name, INT8, "", tuple(layers)) for name, layers in blocks.items()),
        activations={name: ActivationPlan(entry.largest, "absmax") for name, entry in statistics.items()},
        clip_weights=False,
        correct_bias=False,
        quantise_outputs=backend == "onnxruntime",
    )
    return plan, Evidence(statistics)


@click.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--size", default=256, help="Side of the picture in pixels.")
@click.option("--batch", default=2, help="Evaluations at once: 2 with guidance.")
@click.option("--backend", default="openvino")
@click.option("--place-for", help="Backend that the graph is placed for; default: the one it runs on.")
@click.option("--seconds", default=60.0, help="Time to measure.")
@click.option("-o", "--output", type=click.Path(path_type=Path))
def main(
    path: Path, size: int, batch: int, backend: str, place_for: str | None, seconds: float, output: Path | None
) -> None:
    """Measure BUNDLE's denoiser in every precision of a backend."""
    bundle = Bundle.open(path)
    inputs = inputs_of(bundle, size // bundle.manifest.latent.downscale, batch)
    plan, evidence = plan_of(bundle, inputs, place_for or backend)
    target = Target(backend, "int8", "fp32")
    with candidate(bundle, plan, evidence) as trial, ExitStack() as stack:
        wanted = [name for name in gate.precisions_of(backend) if name != "fp16"]
        engines = gate.open_precisions(stack, trial, "unet", target, wanted, lambda text: click.echo(text, err=True))
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
