"""Writes a plan's graph into the bundle, measures it there, and records what was measured."""

from __future__ import annotations

import dataclasses
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latentedge.calibration import gate
from latentedge.calibration.candidates import build, parts_with, variant_of, with_variant, write_manifest
from latentedge.calibration.capture import DECODER
from latentedge.calibration.correct import measured_fit
from latentedge.calibration.graph import save_graph
from latentedge.calibration.layers import check_model
from latentedge.calibration.lint import lint
from latentedge.calibration.observers import Fault
from latentedge.calibration.options import Options, Reporter, target_of
from latentedge.calibration.plan import INT8, Plan
from latentedge.calibration.quantise import Evidence
from latentedge.calibration.records import Probe
from latentedge.calibration.requests import requests
from latentedge.calibration.scene import Target
from latentedge.calibration.stored import relative_folder, restore, store
from latentedge.calibration.vectors import with_parity
from latentedge.runtime.bundle import Bundle, Component, Variant
from latentedge.runtime.errors import LatentEdgeError
from latentedge.runtime.selection import choose


@dataclass(frozen=True)
class Part:
    """What calibration found of one component, and wrote."""

    plan: Plan
    records: list[dict[str, Any]]
    layers: tuple[str, ...]


@dataclass(frozen=True)
class Outcome:
    """The bundle as it was written, the parts of the denoiser and of the decoder, and what is unfit to be calibrated."""

    bundle: Bundle
    parts: tuple[Part, ...]
    faults: list[Fault]
    #: Backend and precision that ``auto`` takes now, and why.
    choice: tuple[str, str, str]

    @property
    def plan(self) -> Plan:
        """The denoiser's plan; of a reapplied plan its component's."""
        return self.parts[-1].plan

    @property
    def records(self) -> list[dict[str, Any]]:
        """The denoiser's records."""
        return self.parts[-1].records

    @property
    def layers(self) -> tuple[str, ...]:
        """The denoiser's layers that became INT8."""
        return self.parts[-1].layers


def held_out(prompts: tuple[str, ...]) -> tuple[str, ...]:
    """The prompts that only the gate sees, every other one; a single prompt is judged with other seeds."""
    return prompts[1::2] or prompts


def outcome_of(bundle: Bundle, parts: tuple[Part, ...], faults: list[Fault]) -> Outcome:
    """The outcome for a bundle as it is written now."""
    chosen = choose(bundle)
    return Outcome(bundle, parts, faults, (chosen.backend, chosen.precision, chosen.reason))


def apply(
    bundle: Bundle,
    plan: Plan,
    evidence: Evidence,
    probes: list[Probe],
    target: Target,
    options: Options,
    reporter: Reporter,
) -> tuple[Bundle, Part]:
    """Write the plan's graph into the bundle, measure it, and record what was measured."""
    model, layers = build(bundle, plan, evidence)
    findings = lint(model, quantised_outputs=plan.quantise_outputs)
    if findings:
        raise LatentEdgeError("the written graph breaks the Q/DQ rules: " + "; ".join(map(str, findings[:5])))
    folder = bundle.variant(plan.component, "fp32")[0].parent
    split = parts_with(bundle, plan.component, "int8")
    files = save_graph(model, folder / "model.int8.onnx")
    check_model(str(files[0]))
    bundle = with_variant(
        bundle, plan.component, "int8", _same_or_new(bundle, plan.component, variant_of(bundle, files))
    )
    reporter.progress("gate", 0, 1)
    # The correction belongs to the sampler's loop, which only the denoiser is in.
    corrections = {} if plan.component == DECODER else fit_corrections(bundle, plan, probes, target, reporter)
    wanted = requests(bundle, options.pictures, options.steps, held_out(options.prompts), held_out=True)
    bundle, records = gate.measure(
        bundle, plan.component, target, probes, wanted, plan.floor_db, corrections, reporter.notify
    )
    bundle = with_parity(bundle, plan.component, probes, options.threads)
    reporter.progress("gate", 1, 1)
    bundle = _with_summary(bundle, plan, layers)
    store(bundle.path / relative_folder(plan.component), plan, evidence, probes)
    write_manifest(bundle)
    _remove_parts(bundle, split, reporter)
    return bundle, Part(plan, records, layers)


def _remove_parts(bundle: Bundle, parts: list[Component], reporter: Reporter) -> None:
    """Delete the int8 graphs of parts that the manifest no longer names."""
    variants = [variant for component in bundle.manifest.components.values() for variant in component.variants.values()]
    named = {name for variant in variants for name in (variant.path, *variant.external_data)}
    for part in parts:
        old = part.variants["int8"]
        for name in {old.path, *old.external_data} - named:
            (bundle.path / name).unlink(missing_ok=True)
        reporter.notify(f"{part.name} was cut from the former int8 graph and is gone; `latentedge build` cuts it anew")


def _same_or_new(bundle: Bundle, component: str, written: Variant) -> Variant:
    """What was measured of a graph stays with it where the same graph was written again."""
    before = bundle.component(component).variants.get("int8")
    same = before is not None and (before.sha256, before.external_data) == (written.sha256, written.external_data)
    return dataclasses.replace(written, measured=before.measured) if before is not None and same else written


def _with_summary(bundle: Bundle, plan: Plan, layers: tuple[str, ...]) -> Bundle:
    """The bundle, in memory, with what was done to a component: the denoiser's facts stand at the top."""
    found = {
        "plan": f"{relative_folder(plan.component)}/plan.json",
        "backend": plan.backend,
        "samples": plan.calibration.get("samples"),
        "steps": plan.calibration.get("steps"),
        "int8_layers": len(layers),
        "float_layers": len(plan.kept) + sum(len(b.layers) for b in plan.blocks if b.precision != INT8),
    }
    facts = {plan.component: found} if plan.component == DECODER else found
    calibration = {**bundle.manifest.calibration, **facts}
    return Bundle(bundle.path, dataclasses.replace(bundle.manifest, calibration=calibration))


def fit_corrections(
    bundle: Bundle, plan: Plan, probes: list[Probe], target: Target, reporter: Reporter
) -> dict[str, dict[str, Any]]:
    """A correction for each quantised precision, with what it gains on outputs that it was not fitted to."""
    found: dict[str, dict[str, Any]] = {}
    with ExitStack() as stack:
        wanted = [name for name in gate.precisions_of(target.backend) if gate.is_quantised(name)]
        engines = gate.open_precisions(stack, bundle, plan.component, target, wanted, lambda message: None)
        for precision, engine in engines.items():
            outputs = gate.outputs_of(engine, probes)
            steps, references = [probe.timestep for probe in probes], [probe.output for probe in probes]
            record = measured_fit(steps, references, outputs)
            message = f"{precision}: output SQNR {gate.mean_sqnr(probes, outputs):.1f} dB"
            if record is not None:
                found[precision] = record
                message += f"; correction by timestep {record['sqnr_db_gained']:+.2f} dB on held-out outputs"
            reporter.notify(message)
    return found


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
    evidence, probes = restore(path / relative_folder(plan.component))
    target = target_of(dataclasses.replace(options, backend=plan.backend))
    target = dataclasses.replace(target, precision=plan.precision)
    bundle, part = apply(bundle, plan, evidence, probes, target, options, reporter)
    return outcome_of(bundle, (part,), [])
