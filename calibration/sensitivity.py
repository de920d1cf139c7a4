"""Each block's error and gain alone, and the fastest set of blocks whose pictures stay above the floor."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np

from latentedge.calibration.candidates import candidate
from latentedge.calibration.latency import in_turns, saved
from latentedge.calibration.metrics import sqnr
from latentedge.calibration.pictures import Drawn, differences, draw, summary
from latentedge.calibration.placement import SHORTCUTS
from latentedge.calibration.plan import FLOAT, INT8, BlockPlan, Plan
from latentedge.calibration.quantise import Evidence
from latentedge.calibration.records import Probe
from latentedge.runtime.bundle import Bundle
from latentedge.runtime.engines import Engine, EngineOptions, open_engine
from latentedge.runtime.pipeline import Pipeline

Progress = Callable[[str, int, int], None]

#: Decibels that the floor is exceeded by when the plan is made, because other pictures are worse than these.
MARGIN_DB = 1.0
#: The worst picture may lie this far below the floor of the mean.
WORST_BELOW_DB = 6.0
#: Shortcut convolutions carry the residual stream: they count as harmless this far above the floor.
HARMLESS_DB = 10.0


@dataclass(frozen=True)
class Target:
    """The engine that the plan is made for, and where it is measured.

    ``precision`` names the int8 graph there ("int8", "int8+bf16"), ``alternative`` the float precision to beat.
    ``timed``: whether this machine is the target; otherwise gains are unknown and errors come from another engine.
    """

    backend: str
    precision: str
    alternative: str
    options: EngineOptions
    timed: bool = True
    seconds: float = 4.0


@dataclass(frozen=True)
class Material:
    """What candidates are judged by: probes, and pictures of the fp32 model for requests that calibration saw."""

    bundle: Bundle
    studio: Studio
    evidence: Evidence
    probes: list[Probe]
    requests: Sequence[dict[str, Any]]
    reference: Drawn


def measure_blocks(plan: Plan, material: Material, target: Target, progress: Progress) -> Plan:
    """The plan with every block's error and gain, measured with only that block in INT8."""
    with ExitStack() as stack:
        floats = stack.enter_context(_engine(material.bundle, plan.component, target, target.alternative))
        blocks = []
        for index, block in enumerate(plan.blocks):
            progress("blocks", index, len(plan.blocks))
            alone = plan.with_blocks(frozenset({block.name}))
            blocks.append(_measured(block, alone, material, target, floats))
        progress("blocks", len(plan.blocks), len(plan.blocks))
    return dataclasses.replace(plan, blocks=tuple(blocks))


def _measured(block: BlockPlan, alone: Plan, material: Material, target: Target, floats: Engine) -> BlockPlan:
    with (
        candidate(material.bundle, alone, material.evidence) as bundle,
        _engine(bundle, alone.component, target, target.precision) as engine,
    ):
        gain: tuple[float | None, float | None] = (None, None)
        if target.timed:
            times = in_turns({"float": floats, "int8": engine}, material.probes[0].inputs, target.seconds / 4)
            gain = saved(times["float"], times["int8"])
        error = probe_sqnr(engine, material.probes)
        # One request, because it is drawn for each block; the plan's own pictures are drawn in full.
        drawn = material.studio.with_denoiser(engine, material.requests[:1])
        reference = Drawn(material.reference.pictures[:1], [array[:1] for array in material.reference.latents])
        psnr_db, _ = summary(differences(reference, drawn))
    return dataclasses.replace(
        block, sqnr_db=float(np.mean(error)), psnr_db=psnr_db, seconds_saved=gain[0], seconds_error=gain[1]
    )


def _engine(bundle: Bundle, component: str, target: Target, precision: str) -> Engine:
    return open_engine(bundle, component, target.backend, precision, target.options)


class Studio(Pipeline):
    """A pipeline whose denoiser is a given engine: the other networks are loaded once for all candidates."""

    def __init__(self, bundle: Bundle, target: Target, precision: str = "fp32") -> None:
        super().__init__(bundle, target.backend, precision, target.options)
        self.denoiser: Engine | None = None

    def engine(self, component: str) -> Engine:
        """The borrowed engine for its component; for the others what the pipeline's precision means for them."""
        borrowed = self.denoiser
        return borrowed if borrowed is not None and component == borrowed.component.name else super().engine(component)

    def with_denoiser(self, engine: Engine | None, requests: Sequence[dict[str, Any]]) -> Drawn:
        """Draw with ``engine`` as the denoiser; ``None`` is the bundle's own in fp32."""
        self.denoiser = engine
        return draw(self, requests)


def probe_sqnr(engine: Engine, probes: Sequence[Probe]) -> list[float]:
    """SQNR of the denoiser's output in dB for each probe."""
    output = engine.component.outputs[0].name
    return [sqnr(probe.output, engine.run(probe.inputs)[output]) for probe in probes]


def choose_blocks(plan: Plan, material: Material, target: Target, progress: Progress) -> Plan:
    """The fastest set of blocks above the floor.

    Blocks that measured no faster stay float. The others are ordered by error for each second that they save; the
    longest beginning of that order whose pictures hold the floor is found by bisection, each length being drawn.
    """
    slow = {block.name: reason for block in plan.blocks if (reason := _ruled_out(block, plan.floor_db)) is not None}
    order = sorted((block for block in plan.blocks if block.name not in slow), key=_cost)
    low, high = 0, len(order)
    quality: dict[int, tuple[float, float]] = {}
    attempt = 0
    while low < high:
        # All of them first: most models hold the floor with every block in INT8.
        middle = high if not quality else (low + high + 1) // 2
        progress("plan", attempt, len(order).bit_length() + 1)
        attempt += 1
        names = frozenset(block.name for block in order[:middle])
        quality[middle] = _picture_quality(plan.with_blocks(names), material, target)
        if _holds(quality[middle], plan.floor_db + MARGIN_DB):
            low = middle
        else:
            high = middle - 1
    chosen = {block.name for block in order[:low]}
    blocks = tuple(_decided(block, block.name in chosen, slow.get(block.name), plan.floor_db) for block in plan.blocks)
    return dataclasses.replace(plan, blocks=blocks)


def _decided(block: BlockPlan, chosen: bool, slow: str | None, floor: float) -> BlockPlan:
    if chosen:
        return dataclasses.replace(block, precision=INT8, reason=f"{_gain(block)}, and the pictures hold the floor")
    reason = slow or f"the pictures fall below {floor + MARGIN_DB:g} dB with it"
    return dataclasses.replace(block, precision=FLOAT, reason=reason)


def _gain(block: BlockPlan) -> str:
    if block.seconds_saved is None or block.seconds_error is None:
        return "gain not measured"
    return "faster" if block.seconds_saved > 2 * block.seconds_error else "no slower within the error"


def _ruled_out(block: BlockPlan, floor: float) -> str | None:
    if block.name == SHORTCUTS and block.psnr_db is not None and block.psnr_db < floor + HARMLESS_DB:
        return f"not harmless: {block.psnr_db:.1f} dB alone"
    if block.seconds_saved is None or block.seconds_error is None:
        return None
    if block.seconds_saved < -2 * block.seconds_error:
        return "measured slower in INT8"
    return None


def _cost(block: BlockPlan) -> float:
    """Noise power for each second saved; a block whose gain was not measured counts by its noise alone."""
    noise = 10 ** (-(block.sqnr_db if block.sqnr_db is not None else 0.0) / 10)
    if block.seconds_saved is None or block.seconds_error is None:
        return noise
    return float(noise / max(block.seconds_saved, block.seconds_error, 1e-6))


def _holds(quality: tuple[float, float], floor: float) -> bool:
    mean, worst = quality
    return mean >= floor and worst >= floor - WORST_BELOW_DB


def _picture_quality(plan: Plan, material: Material, target: Target) -> tuple[float, float]:
    with (
        candidate(material.bundle, plan, material.evidence) as bundle,
        _engine(bundle, plan.component, target, target.precision) as engine,
    ):
        drawn = material.studio.with_denoiser(engine, material.requests)
    return summary(differences(material.reference, drawn))
