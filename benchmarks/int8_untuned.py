"""INT8 graphs to measure speed with: every layer that the rules allow, ranges from one evaluation of random inputs.

What such a graph costs does not depend on its ranges; what it draws does, so it is no replacement for calibration.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from latentedge.benchmarks.worker import example
from latentedge.calibration.candidates import build, variant_of, with_variant, write_manifest
from latentedge.calibration.capture import open_observed
from latentedge.calibration.graph import load_graph, name_nodes, save_graph
from latentedge.calibration.observers import TensorStatistics
from latentedge.calibration.placement import place
from latentedge.calibration.plan import INT8, ActivationPlan, BlockPlan, Plan
from latentedge.calibration.quantise import Evidence
from latentedge.runtime.bundle import Array, Bundle

#: Components that calibration quantises.
COMPONENTS = ("unet", "vae_decoder")


def inputs_of(bundle: Bundle, component: str, axes: Mapping[str, int]) -> dict[str, Array]:
    """N(0, 1) inputs for the axes that are named and the best length of the others; timesteps of 500."""
    declared = bundle.component(component)
    lengths = {name: axes.get(name, axis.opt) for name, axis in declared.axes.items()}
    generator = np.random.default_rng(0)
    return {spec.name: example(declared, spec.name, lengths, generator) for spec in declared.inputs}


def untuned_plan(bundle: Bundle, component: str, inputs: dict[str, Array], backend: str) -> tuple[Plan, Evidence]:
    """Everything in INT8, with the absolute maximum of one evaluation."""
    observed = open_observed(bundle, component, outputs=backend == "onnxruntime", threads=None)
    statistics = {}
    for name, array in observed.fetch(inputs).items():
        axis = observed.axis_of(name)
        statistics[name] = TensorStatistics.empty(array.shape[axis])
        statistics[name].observe(array, axis, 500.0)
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
        activations={name: ActivationPlan(entry.largest, "absmax") for name, entry in statistics.items()},
        clip_weights=False,
        correct_bias=False,
        quantise_outputs=backend == "onnxruntime",
    )
    return plan, Evidence(statistics)


def write_untuned(bundle: Bundle, axes: Mapping[str, int], backend: str) -> Bundle:
    """Give denoiser and decoder of ``bundle`` an int8 variant where they have none; the bundle as it is then."""
    for component in COMPONENTS:
        if component in bundle.manifest.components and "int8" not in bundle.component(component).variants:
            inputs = inputs_of(bundle, component, {**axes, "batch": 1} if component == "vae_decoder" else axes)
            model, _ = build(bundle, *untuned_plan(bundle, component, inputs, backend))
            path = bundle.variant(component, "fp32")[0].with_name("model.int8.onnx")
            bundle = with_variant(bundle, component, "int8", variant_of(bundle, save_graph(model, path)))
            write_manifest(bundle)
    return bundle
