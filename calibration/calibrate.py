"""The whole way: capture, search, sensitivity, plan, graph, gate, and what is written into the bundle."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from latentedge.calibration import gate
from latentedge.calibration.candidates import build, candidate, variant_of, with_variant, write_manifest
from latentedge.calibration.capture import CaptureSettings, Mapper, capture, one_by_one, open_observed
from latentedge.calibration.correct import fit, fit_if_better
from latentedge.calibration.graph import load_graph, name_nodes, save_graph
from latentedge.calibration.latency import in_turns
from latentedge.calibration.layers import check_model
from latentedge.calibration.lint import lint
from latentedge.calibration.observers import Fault, TensorStatistics
from latentedge.calibration.placement import place
from latentedge.calibration.plan import INT8, ActivationPlan, BlockPlan, Plan, write_atomically
from latentedge.calibration.quantise import Evidence
from latentedge.calibration.ranges import OBSERVERS
from latentedge.calibration.records import Probe, pack, unpack
from latentedge.calibration.requests import requests
from latentedge.calibration.search import Search, SearchResult, SearchSettings
from latentedge.calibration.sensitivity import Material, Studio, Target, choose_blocks, measure_blocks
from latentedge.runtime.bundle import Array, Bundle
from latentedge.runtime.engines import BACKENDS, EngineOptions, backend
from latentedge.runtime.errors import LatentEdgeError, UsageError
from latentedge.runtime.selection import choose

#: Probes whose activations are fetched to judge ranges; more do not change the choice.
SEARCH_PROBES = 6
#: Calibration pictures that the plan is made with.
PLAN_PICTURES = 4
FOLDER = "calibration"


@dataclass(frozen=True)
class Options:
    """What the caller of :func:`calibrate` may say."""

    samples: int = 32
    steps: int | None = None
    prompts: tuple[str, ...] = ()
    floor_db: float = 30.0
    backend: str = "auto"
    #: Held-out pictures behind the gate's decision.
    pictures: int = 16
    threads: int | None = None
    #: What the rest computes in, "fp32" or "fp16"; ``None``: by the backend.
    floats: str | None = None
    component: str = "unet"
    search: SearchSettings = field(default_factory=SearchSettings)


@dataclass(frozen=True)
class Outcome:
    """What calibration found and wrote."""

    bundle: Bundle
    plan: Plan
    faults: list[Fault]
    records: list[dict[str, Any]]
    layers: tuple[str, ...]
    #: Backend and precision that ``auto`` takes now, and why.
    choice: tuple[str, str, str]


@dataclass(frozen=True)
class Reporter:
    """Where progress and messages go."""

    progress: Callable[[str, int, int], None] = lambda stage, done, total: None
    notify: Callable[[str], None] = lambda message: None


def target_of(options: Options) -> Target:
    """The engine to measure on: the one asked for, else OpenVINO where it is installed, else ONNX Runtime.

    TensorRT's graph is judged with ONNX Runtime where TensorRT is not there, and its gain stays unknown.
    """
    name = options.backend
    if name == "auto":
        name = "openvino" if BACKENDS["openvino"].installed() else "onnxruntime"
    engine_options = EngineOptions(threads=options.threads)
    if name.startswith("tensorrt"):
        return Target("onnxruntime", "int8", "fp32", engine_options, timed=False)
    backend(name)
    return Target(name, "int8", "fp32", engine_options)


def calibrate(path: Path, options: Options, reporter: Reporter, mapper: Mapper = one_by_one) -> Outcome:
    """Quantise the denoiser of the bundle at ``path`` and write graph, plan, records and manifest."""
    bundle = Bundle.open(path)
    target = target_of(options)
    settings = CaptureSettings(
        str(path),
        options.component,
        options.samples,
        options.steps,
        _observed(options.prompts),
        outputs=needs_outputs(options),
        threads=options.threads,
    )
    folder = path / FOLDER
    statistics, probes = capture(
        settings, folder / "samples", mapper, lambda done, total: reporter.progress("capture", done, total)
    )
    faults = [fault for name, entry in statistics.items() for fault in entry.faults(name)]
    for fault in faults:
        reporter.notify(f"{fault}; layers that read it stay in higher precision")
    result = search_ranges(bundle, options, statistics, probes, faults, reporter)
    plan = first_plan(bundle, options, target, statistics, result, faults)
    evidence = Evidence(statistics, result.bias)
    target = faster_precision(bundle, plan, evidence, target, probes, reporter)
    plan = dataclasses.replace(plan, precision=target.precision)
    wanted = requests(bundle, PLAN_PICTURES, options.steps, _observed(options.prompts))
    with Studio(bundle, target) as studio:
        reference = studio.with_denoiser(None, wanted)
        material = Material(bundle, studio, evidence, probes, wanted, reference)
        plan = measure_blocks(plan, material, target, reporter.progress)
        plan = choose_blocks(plan, material, target, reporter.progress)
    return apply(bundle, plan, evidence, probes, target, options, reporter, faults)


def _observed(prompts: tuple[str, ...]) -> tuple[str, ...]:
    """The prompts that calibration sees: every other one."""
    return prompts[0::2]


def _held_out(prompts: tuple[str, ...]) -> tuple[str, ...]:
    """The prompts that only the gate sees; a single prompt is judged with other seeds."""
    return prompts[1::2] or prompts


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
    fetched = [observed.fetch(ordered[index].inputs) for index in spread]
    observed.close()
    return Search(model, statistics, options.search).run(
        fetched, {fault.tensor for fault in faults}, lambda done, total: reporter.progress("ranges", done, total)
    )


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
            reason = "its activation was never seen"
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
        raise LatentEdgeError(f"{options.component} has no layer that can be quantised.", hint="keep fp16")
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


def apply(
    bundle: Bundle,
    plan: Plan,
    evidence: Evidence,
    probes: list[Probe],
    target: Target,
    options: Options,
    reporter: Reporter,
    faults: list[Fault],
) -> Outcome:
    """Write the plan's graph into the bundle, measure it, and record what was measured."""
    model, layers = build(bundle, plan, evidence)
    findings = lint(model, quantised_outputs=plan.quantise_outputs)
    if findings:
        raise LatentEdgeError("the written graph breaks the Q/DQ rules: " + "; ".join(map(str, findings[:5])))
    folder = bundle.variant(plan.component, "fp32")[0].parent
    files = save_graph(model, folder / "model.int8.onnx")
    check_model(str(files[0]))
    bundle = with_variant(bundle, plan.component, "int8", variant_of(bundle, files))
    reporter.progress("gate", 0, 1)
    corrections = fit_corrections(bundle, plan, probes, target, reporter)
    held_out = requests(bundle, options.pictures, options.steps, _held_out(options.prompts), held_out=True)
    bundle, records = gate.measure(
        bundle, plan.component, target, probes, held_out, plan.floor_db, corrections, reporter.notify
    )
    reporter.progress("gate", 1, 1)
    calibration = {
        **bundle.manifest.calibration,
        "plan": f"{FOLDER}/plan.json",
        "backend": plan.backend,
        "samples": plan.calibration.get("samples"),
        "steps": plan.calibration.get("steps"),
        "int8_layers": len(layers),
        "float_layers": len(plan.kept) + sum(len(b.layers) for b in plan.blocks if b.precision != INT8),
    }
    bundle = Bundle(bundle.path, dataclasses.replace(bundle.manifest, calibration=calibration))
    store(bundle.path / FOLDER, plan, evidence, probes)
    write_manifest(bundle)
    chosen = choose(bundle)
    return Outcome(bundle, plan, faults, records, layers, (chosen.backend, chosen.precision, chosen.reason))


def fit_corrections(
    bundle: Bundle, plan: Plan, probes: list[Probe], target: Target, reporter: Reporter, *, keep_all: bool = False
) -> dict[str, dict[str, Any]]:
    """A correction for each quantised precision that gains on outputs that it was not fitted to (or for all)."""
    found: dict[str, dict[str, Any]] = {}
    with ExitStack() as stack:
        wanted = [name for name in gate.precisions_of(target.backend) if gate.is_quantised(name)]
        engines = gate.open_precisions(stack, bundle, plan.component, target, wanted, lambda message: None)
        for precision, engine in engines.items():
            outputs = gate.outputs_of(engine, probes)
            steps, references = [probe.timestep for probe in probes], [probe.output for probe in probes]
            record, gained = fit_if_better(steps, references, outputs)
            record = fit(steps, references, outputs) if keep_all else record
            reporter.notify(
                f"{precision}: output SQNR {gate.mean_sqnr(probes, outputs):.1f} dB; "
                f"correction by timestep {gained:+.2f} dB on held-out outputs"
            )
            if record is not None:
                found[precision] = {**record, "sqnr_db_gained": gained}
    return found


def store(folder: Path, plan: Plan, evidence: Evidence, probes: list[Probe]) -> None:
    """Write plan, statistics and bias corrections, so that an edited plan can be applied without a new capture."""
    plan.save(folder / "plan.json")
    write_atomically(folder / "statistics.npz", pack(dict(evidence.statistics), probes))
    stream = io.BytesIO()
    np.savez_compressed(stream, **dict(evidence.bias))  # type: ignore[arg-type]
    write_atomically(folder / "bias.npz", stream.getvalue())


def restore(folder: Path) -> tuple[Evidence, list[Probe]]:
    """What :func:`store` wrote."""
    if not (folder / "statistics.npz").is_file():
        raise UsageError(
            f"{folder} holds no statistics that a plan could be applied with.",
            hint="run `latentedge calibrate BUNDLE` first",
        )
    statistics, probes = unpack(folder / "statistics.npz")
    with np.load(folder / "bias.npz", allow_pickle=False) as file:
        bias: dict[str, Array] = {name: file[name] for name in file.files}
    return Evidence(statistics, bias), probes


def reapply(path: Path, plan: Plan, options: Options, reporter: Reporter) -> Outcome:
    """Write the graph of an edited plan, with the statistics of the last calibration."""
    bundle = Bundle.open(path)
    recorded = plan.calibration.get("graph_sha256")
    found = bundle.component(plan.component).variants["fp32"].sha256
    if recorded != found:
        raise LatentEdgeError(
            f"the plan was made for another {plan.component}: graph {recorded}, this bundle has {found}.",
            hint="calibrate this bundle",
        )
    evidence, probes = restore(path / FOLDER)
    target = target_of(dataclasses.replace(options, backend=plan.backend))
    target = dataclasses.replace(target, precision=plan.precision)
    return apply(bundle, plan, evidence, probes, target, options, reporter, [])
