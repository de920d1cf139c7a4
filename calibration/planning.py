"""From statistics to the first plan: ranges by measured error, and everything that the rules allow in INT8."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack

import numpy as np

from latentedge.calibration import gate
from latentedge.calibration.candidates import candidate
from latentedge.calibration.capture import DECODER, open_observed
from latentedge.calibration.graph import load_graph, name_nodes
from latentedge.calibration.latency import in_turns
from latentedge.calibration.observers import Fault, TensorStatistics
from latentedge.calibration.options import Options, Reporter
from latentedge.calibration.placement import place
from latentedge.calibration.plan import INT8, ActivationPlan, BlockPlan, Plan
from latentedge.calibration.quantise import Evidence
from latentedge.calibration.ranges import OBSERVERS
from latentedge.calibration.records import Probe
from latentedge.calibration.scene import Target
from latentedge.calibration.search import Search, SearchResult
from latentedge.runtime.bundle import Array, Bundle, Component
from latentedge.runtime.errors import LatentEdgeError, UsageError

#: Probes whose activations are fetched to judge ranges; more do not change the choice.
SEARCH_PROBES = 6
#: A decoder's ranges are judged on this much of the latent (a side): its activations are as large as the picture.
SEARCH_SIDE = 16


class NothingToQuantise(LatentEdgeError):  # noqa: N818 - what was found, not a fault of the program
    """Every layer of a component stays in higher precision by rule."""


def nothing_to_quantise(component: str, kept: Mapping[str, str]) -> NothingToQuantise:
    """The error that says why each layer of a component stays float."""
    why = "; ".join(f"{count} of {len(kept)}: {reason}" for reason, count in Counter(kept.values()).items())
    return NothingToQuantise(
        f"{component} has no layer that can be quantised ({why or 'it has no layer with weights'}).",
        hint="run it in fp32, fp16 or bf16",
    )


def check_quantisable(bundle: Bundle, component: str) -> None:
    """:class:`NothingToQuantise` where the rules keep every layer of a component in float."""
    model = load_graph(bundle.variant(component, "fp32")[0])
    name_nodes(model)
    placed = place(model)
    if all(entry.kept is not None for entry in placed):
        raise nothing_to_quantise(component, {entry.layer.name: str(entry.kept) for entry in placed})


def needs_outputs(options: Options) -> bool:
    """Whether convolutions need Q/DQ on their outputs: ONNX Runtime's CPU kernels fuse nothing without."""
    return options.backend == "onnxruntime"


def floats_of(bundle: Bundle, options: Options) -> str:
    """The graph to quantise: float16 for TensorRT where the bundle has it, float32 otherwise."""
    variants = bundle.component(options.component).variants
    wanted = options.floats or ("fp16" if options.backend.startswith("tensorrt") and "fp16" in variants else "fp32")
    if wanted not in variants:
        raise UsageError(
            f"{options.component} is not in this bundle in {wanted}; it is there in: {', '.join(variants)}.",
            hint=f"export the checkpoint with --precision fp32,{wanted}",
        )
    return wanted


def search_ranges(
    bundle: Bundle,
    options: Options,
    statistics: dict[str, TensorStatistics],
    probes: list[Probe],
    faults: list[Fault],
    reporter: Reporter,
) -> SearchResult:
    """Ranges, balancing and bias corrections by measured output error, from the activations of some probes."""
    observed = open_observed(bundle, options.component, outputs=False, threads=options.threads)
    model = load_graph(bundle.variant(options.component, "fp32")[0])
    name_nodes(model)
    spread = np.linspace(0, len(probes) - 1, min(SEARCH_PROBES, len(probes))).astype(int)
    ordered = sorted(probes, key=lambda probe: probe.timestep)
    fetched = [observed.fetch(_judged(observed.component, ordered[index].inputs)) for index in spread]
    observed.close()
    return Search(model, statistics, options.search).run(
        fetched, {fault.tensor for fault in faults}, lambda done, total: reporter.progress("ranges", done, total)
    )


def _judged(component: Component, inputs: Mapping[str, Array]) -> dict[str, Array]:
    """A probe's inputs; of a decoder's latents the middle, at most :data:`SEARCH_SIDE` a side."""
    if component.name != DECODER:
        return dict(inputs)
    cut = {}
    for spec in component.inputs:
        array = inputs[spec.name]
        slices = [slice(None)] * array.ndim
        for position, side in enumerate(spec.shape):
            if isinstance(side, str) and side.startswith("latent_"):
                unit = component.axes[side].multiple
                length = min(array.shape[position], max(SEARCH_SIDE // unit, 1) * unit)
                start = (array.shape[position] - length) // 2
                slices[position] = slice(start, start + length)
        cut[spec.name] = np.ascontiguousarray(array[tuple(slices)])
    return cut


def first_plan(
    bundle: Bundle,
    options: Options,
    target: Target,
    statistics: dict[str, TensorStatistics],
    result: SearchResult,
    faults: list[Fault],
) -> Plan:
    """Everything that the rules allow in INT8; sensitivity takes blocks out of it."""
    model = load_graph(bundle.variant(options.component, "fp32")[0])
    name_nodes(model)
    broken = {fault.tensor: fault.kind for fault in faults}
    nodes = {str(node.name): node for node in model.graph}
    blocks: dict[str, list[str]] = {}
    kept: dict[str, str] = {}
    activations = dict(result.activations)
    for entry in place(model):
        layer = entry.layer
        output = str(nodes[layer.node].outputs[0].name)
        reason = entry.kept
        if reason is None and layer.activation in broken:
            reason = f"its activation is {broken[layer.activation]}"
        if reason is None and layer.activation not in activations:
            reason = "no range fits: its output is not finite in fp32"
        if reason is None and needs_outputs(options) and layer.kind == "Conv":
            if output in broken:
                reason = f"its output is {broken[output]}"
            else:
                activations[output] = ActivationPlan(OBSERVERS["mse"](statistics[output]), "mse")
        if reason is None:
            blocks.setdefault(entry.block, []).append(layer.name)
        else:
            kept[layer.name] = reason
    if not blocks:
        raise nothing_to_quantise(options.component, kept)
    return Plan(
        component=options.component,
        backend=options.backend if options.backend != "auto" else target.backend,
        precision=target.precision,
        floor_db=options.floor_db,
        blocks=tuple(BlockPlan(name, INT8, "", tuple(layers)) for name, layers in blocks.items()),
        activations=activations,
        kept=kept,
        # Cut in two, a shortcut's halves would each need a range for their output; casting renames what is joined.
        split=() if needs_outputs(options) or floats_of(bundle, options) != "fp32" else tuple(result.split),
        floats=floats_of(bundle, options),
        clip_weights=options.search.clip_weights,
        correct_bias=options.search.correct_bias,
        quantise_outputs=needs_outputs(options),
        calibration={
            "samples": options.samples,
            "steps": options.steps or bundle.manifest.defaults.steps,
            "graph_sha256": bundle.component(options.component).variants["fp32"].sha256,
        },
    )


def faster_precision(
    bundle: Bundle, plan: Plan, evidence: Evidence, target: Target, probes: Sequence[Probe], reporter: Reporter
) -> Target:
    """The target with the type of the int8 graph's floats that runs faster, and the float precision to beat."""
    if not target.timed:
        return target
    with candidate(bundle, plan, evidence) as trial, ExitStack() as stack:
        wanted = [name for name in gate.precisions_of(target.backend) if not name.endswith("fp16")]
        engines = gate.open_precisions(stack, trial, plan.component, target, wanted, reporter.notify)
        times = in_turns(engines, probes[0].inputs, target.seconds * len(engines))
    middle = {name: float(np.median(seconds)) for name, seconds in times.items()}
    floats = [name for name in middle if not gate.is_quantised(name)]
    quantised = [name for name in middle if gate.is_quantised(name)]
    return dataclasses.replace(
        target, precision=min(quantised, key=middle.__getitem__), alternative=min(floats, key=middle.__getitem__)
    )
