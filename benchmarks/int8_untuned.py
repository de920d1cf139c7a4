"""INT8 graphs to measure speed with: every layer that the rules allow, ranges from a single picture.

What such a graph costs does not depend on its ranges; what it draws does, so it is no replacement for calibration. What
it is worth is measured all the same: a pipeline takes the decoder's only where this machine's records allow it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from latentedge.benchmarks.int8_common import RecordingEngine
from latentedge.benchmarks.worker import example
from latentedge.calibration import gate
from latentedge.calibration.candidates import build, variant_of, with_variant, write_manifest
from latentedge.calibration.capture import open_observed
from latentedge.calibration.graph import load_graph, name_nodes, save_graph
from latentedge.calibration.observers import TensorStatistics
from latentedge.calibration.pictures import draw
from latentedge.calibration.placement import place
from latentedge.calibration.plan import INT8, ActivationPlan, BlockPlan, Plan
from latentedge.calibration.quantise import Evidence
from latentedge.calibration.ranges import OBSERVERS
from latentedge.calibration.records import Probe
from latentedge.calibration.scene import Target
from latentedge.runtime.bundle import Array, Bundle
from latentedge.runtime.engines import EngineOptions
from latentedge.runtime.pipeline import Pipeline

#: Components that calibration quantises.
DENOISER, DECODER = COMPONENTS = ("unet", "vae_decoder")
#: Pictures that graphs are judged by, and their lowest mean PSNR against fp32 in dB.
PICTURES, FLOOR_DB = 4, 30.0


def inputs_of(bundle: Bundle, component: str, axes: Mapping[str, int]) -> dict[str, Array]:
    """N(0, 1) inputs for the axes that are named and the best length of the others; timesteps of 500."""
    declared = bundle.component(component)
    lengths = {name: axes.get(name, axis.opt) for name, axis in declared.axes.items()}
    generator = np.random.default_rng(0)
    return {spec.name: example(declared, spec.name, lengths, generator) for spec in declared.inputs}


def recorded_inputs(
    bundle: Bundle, request: Mapping[str, Any], threads: int | None
) -> dict[str, list[dict[str, Array]]]:
    """What denoiser and decoder read while one picture is drawn in fp32, by component."""
    arguments = dict(request)
    with Pipeline(bundle, "onnxruntime", "fp32", EngineOptions(threads=threads)) as plain:
        recording = {name: RecordingEngine(plain.engine(name), stride=1) for name in COMPONENTS}
        with Pipeline(bundle, "onnxruntime", "fp32", engines=dict(recording)) as pipeline:
            pipeline.generate(arguments.pop("prompt", None), **arguments)
        return {name: engine.kept for name, engine in recording.items()}


def untuned_plan(
    bundle: Bundle, component: str, inputs: Sequence[dict[str, Array]], backend: str
) -> tuple[Plan, Evidence]:
    """Everything in INT8, with the ranges of least squared error over a few evaluations."""
    observed = open_observed(bundle, component, outputs=backend == "onnxruntime", threads=None)
    statistics: dict[str, TensorStatistics] = {}
    for given in inputs:
        for name, array in observed.fetch(given).items():
            axis = observed.axis_of(name)
            statistics.setdefault(name, TensorStatistics.empty(array.shape[axis])).observe(array, axis, 500.0)
    observed.close()
    model = load_graph(bundle.variant(component, "fp32")[0])
    name_nodes(model)
    blocks: dict[str, list[str]] = {}
    for entry in place(model):
        if entry.kept is None:
            blocks.setdefault(entry.block, []).append(entry.layer.name)
    plan = Plan(
        component=component,
        backend=backend,
        precision="int8",
        floor_db=0.0,
        blocks=tuple(BlockPlan(name, INT8, "", tuple(layers)) for name, layers in blocks.items()),
        activations={name: ActivationPlan(OBSERVERS["mse"](entry), "mse") for name, entry in statistics.items()},
        clip_weights=True,
        correct_bias=False,
        quantise_outputs=backend == "onnxruntime",
    )
    return plan, Evidence(statistics)


def write_untuned(bundle: Bundle, request: Mapping[str, Any], backend: str, threads: int | None) -> Bundle:
    """Give denoiser and decoder of ``bundle`` an int8 variant; the bundle as it is then.

    ``request``: arguments of ``generate`` of the picture that ranges come from.
    """
    recorded = recorded_inputs(bundle, request, threads)
    for component, inputs in recorded.items():
        model, _ = build(bundle, *untuned_plan(bundle, component, inputs, backend))
        path = bundle.variant(component, "fp32")[0].with_name("model.int8.onnx")
        bundle = with_variant(bundle, component, "int8", variant_of(bundle, save_graph(model, path)))
    write_manifest(bundle)
    return bundle


def judge(bundle: Bundle, target: Target, request: Mapping[str, Any], notify: Callable[[str], None]) -> Bundle:
    """Record what the int8 graphs of ``bundle`` are worth on this machine; the bundle as it is then.

    The decoder is timed beside the float precisions and judged by its pictures, as calibration's gate does it; the
    denoiser, which runs in the precision that is asked for, is judged by its pictures only. ``request``: arguments of
    ``generate`` that all pictures share, with the size.
    """
    requests = [{**request, "seed": seed} for seed in range(1, PICTURES + 1)]
    side = request["height"] // bundle.manifest.latent.downscale
    inputs = inputs_of(bundle, DECODER, {"batch": 1, "latent_height": side, "latent_width": side})
    probe = Probe(0, 0, inputs, np.zeros(0, np.float32))
    bundle, _ = gate.measure(bundle, DECODER, target, [probe], requests, FLOOR_DB, {}, notify)
    drawn = {}
    for precision in ("fp32", target.precision):
        with Pipeline(bundle, target.backend, precision, target.options) as pipeline:
            drawn[precision] = draw(pipeline, requests)
    record = gate.quality_record(target.precision, target.backend, drawn["fp32"], drawn[target.precision], FLOOR_DB)
    notify(f"{target.precision}: {record['psnr_db']:.1f} dB on average, {record['psnr_worst_db']:.1f} at worst")
    bundle = gate.with_records(bundle, DENOISER, [record])
    write_manifest(bundle)
    return bundle
