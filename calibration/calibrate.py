"""The whole way: capture, ranges, sensitivity, plan, graph, gate; the decoder first, then the denoiser."""

from __future__ import annotations

import dataclasses
import shutil
from functools import lru_cache
from pathlib import Path

from latentedge.calibration.applying import Outcome, Part, apply, outcome_of, reapply
from latentedge.calibration.candidates import remove_leftovers
from latentedge.calibration.capture import DECODED, DECODER, CaptureSettings, capture
from latentedge.calibration.observers import Fault, TensorStatistics
from latentedge.calibration.options import Options, Reporter, target_of
from latentedge.calibration.planning import (
    NothingToQuantise,
    check_quantisable,
    faster_precision,
    first_plan,
    needs_outputs,
    search_ranges,
)
from latentedge.calibration.quantise import Evidence
from latentedge.calibration.records import Probe
from latentedge.calibration.requests import requests
from latentedge.calibration.scene import Scene, Studio, Target
from latentedge.calibration.sensitivity import Material, choose_blocks, measure_blocks, relative_sensitivity
from latentedge.calibration.sharding import Mapper, one_by_one
from latentedge.calibration.stored import FOLDER
from latentedge.runtime.bundle import Bundle

__all__ = ["Options", "Outcome", "Reporter", "calibrate", "reapply"]

#: Calibration pictures that the plan is looked for with; it is confirmed with as many as the gate draws.
PLAN_PICTURES = 4
#: The decoder's error comes on top of the denoiser's: it has to stay so far above the floor, a quarter of the noise.
DECODER_MARGIN_DB = 6.0

#: Statistics by tensor, and probes.
Observed = tuple[dict[str, TensorStatistics], list[Probe]]


def calibrate(path: Path, options: Options, reporter: Reporter, mapper: Mapper = one_by_one) -> Outcome:
    """Quantise the denoiser and the decoder of the bundle at ``path``; write graphs, plans, records and manifest.

    The decoder comes first, because the denoiser's pictures are judged with the decoder that a pipeline would take.
    """
    bundle = Bundle.open(path)
    requests(bundle, 1, options.steps, options.prompts)
    target = target_of(options)
    if options.backend == "auto":
        options = dataclasses.replace(options, backend=target.backend)
    check_quantisable(bundle, options.component)
    remove_leftovers(bundle)
    seen, folder = _observe(bundle, options, mapper, reporter)
    faults: list[Fault] = []
    parts: list[Part] = []
    if DECODER in bundle.manifest.components:
        decoder = dataclasses.replace(options, component=DECODER, floor_db=options.floor_db + DECODER_MARGIN_DB)
        try:
            check_quantisable(bundle, DECODER)
            observed = _observe_decoder(bundle, decoder, folder, mapper, reporter)
            bundle, part = _component(bundle, decoder, target, observed, reporter, mapper, faults)
            parts.append(part)
        except NothingToQuantise as found:
            reporter.notify(found.message)
    bundle, part = _component(bundle, options, target, seen, reporter, mapper, faults)
    parts.append(part)
    # Kept until now: an interrupted run does not measure the decoder's blocks again.
    for made in parts:
        shutil.rmtree(bundle.path / relative_sensitivity(made.plan.component))
    return outcome_of(bundle, tuple(parts), faults)


def observed_prompts(prompts: tuple[str, ...]) -> tuple[str, ...]:
    """The prompts that calibration sees: every other one."""
    return prompts[0::2]


def _observe(bundle: Bundle, options: Options, mapper: Mapper, reporter: Reporter) -> tuple[Observed, Path]:
    """Statistics and probes of the denoiser over its trajectories, and the folder of the checkpoints."""
    settings = CaptureSettings(
        str(bundle.path),
        options.component,
        options.samples,
        options.steps,
        observed_prompts(options.prompts),
        outputs=needs_outputs(options),
        threads=options.threads,
    )
    folder = bundle.path / FOLDER / "samples"
    found = capture(settings, folder, mapper, lambda done, total: reporter.progress("capture", done, total))
    return found, folder / settings.digest()[:16]


def _observe_decoder(bundle: Bundle, options: Options, latents: Path, mapper: Mapper, reporter: Reporter) -> Observed:
    """Statistics and probes of the decoder on the latents that every :data:`DECODED`-th trajectory ended in."""
    settings = CaptureSettings(
        str(bundle.path),
        DECODER,
        -(-options.samples // DECODED),
        outputs=needs_outputs(options),
        threads=options.threads,
        latents=str(latents),
    )
    folder = bundle.path / FOLDER / DECODER / "samples"
    return capture(settings, folder, mapper, lambda done, total: reporter.progress("decoder", done, total))


def _component(
    bundle: Bundle,
    options: Options,
    target: Target,
    observed: Observed,
    reporter: Reporter,
    mapper: Mapper,
    faults: list[Fault],
) -> tuple[Bundle, Part]:
    """Ranges, sensitivity, plan, graph and gate of one component; what is unfit is added to ``faults``."""
    statistics, probes = observed
    unfit = [fault for name, entry in statistics.items() for fault in entry.faults(name)]
    for fault in unfit:
        reporter.notify(f"{options.component}: {fault}; layers that read it stay in higher precision")
    faults += unfit
    result = search_ranges(bundle, options, statistics, probes, unfit, reporter)
    plan = first_plan(bundle, options, target, statistics, result, unfit)
    evidence = Evidence(statistics, result.bias)
    target = faster_precision(bundle, plan, evidence, target, probes, reporter)
    plan = dataclasses.replace(plan, precision=target.precision)
    prompts = observed_prompts(options.prompts)
    wanted = requests(bundle, PLAN_PICTURES, options.steps, prompts)
    with Studio(bundle, target) as studio:

        @lru_cache
        def confirming() -> Scene:
            return Scene.of(studio, options.component, requests(bundle, options.pictures, options.steps, prompts))

        material = Material(bundle, evidence, probes, Scene.of(studio, options.component, wanted), confirming)
        plan = measure_blocks(plan, material, target, reporter.progress, mapper, options.steps, prompts)
        plan = choose_blocks(plan, material, target, reporter.progress)
    return apply(bundle, plan, evidence, probes, target, options, reporter)
