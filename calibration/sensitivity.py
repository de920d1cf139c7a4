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

    def __enter__(self) -> Studio:
        return self

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

    Two sets compete: without the blocks that measured slower alone, and with them, because an INT8 block between two
    others saves conversions that it needs alone; the faster one in the same rounds wins. Where no set holds the floor
    every block becomes INT8, and the gate refuses it with the figure.
    """
    harmful = {block.name: why for block in plan.blocks if (why := _harm(block, plan.floor_db)) is not None}
    slow = {block.name for block in plan.blocks if _is_slower(block)}
    usable = [block for block in plan.blocks if block.name not in harmful]
    sets: list[frozenset[str]] = []
    for blocks in ([block for block in usable if block.name not in slow], usable):
        held = _longest(plan, blocks, material, target, progress)
        sets += [held] if held and held not in sets else []
    if not sets:
        reason = f"no plan holds {plan.floor_db:g} dB; the gate refuses this one"
        blocks = [dataclasses.replace(block, precision=INT8, reason=reason) for block in plan.blocks]
        return dataclasses.replace(plan, blocks=tuple(blocks))
    chosen = sets[0] if len(sets) == 1 or not target.timed else _fastest(plan, sets, material, target)
    decided = tuple(_decided(block, chosen, harmful, plan.floor_db) for block in plan.blocks)
    return dataclasses.replace(plan, blocks=decided)


def _longest(
    plan: Plan, blocks: Sequence[BlockPlan], material: Material, target: Target, progress: Progress
) -> frozenset[str]:
    """The longest beginning of ``blocks``, cheapest first, whose pictures hold the floor; found by bisection."""
    order = [block.name for block in sorted(blocks, key=_cost)]
    low, high, attempt = 0, len(order), 0
    while low < high:
        # All of them first: most models hold the floor with every block in INT8.
        middle = high if attempt == 0 else (low + high + 1) // 2
        progress("plan", attempt, len(order).bit_length() + 1)
        attempt += 1
        quality = _picture_quality(plan.with_blocks(frozenset(order[:middle])), material, target)
        if _holds(quality, plan.floor_db + MARGIN_DB):
            low = middle
        else:
            high = middle - 1
    return frozenset(order[:low])


def _fastest(plan: Plan, sets: Sequence[frozenset[str]], material: Material, target: Target) -> frozenset[str]:
    with ExitStack() as stack:
        engines = {}
        for number, names in enumerate(sets):
            bundle = stack.enter_context(candidate(material.bundle, plan.with_blocks(names), material.evidence))
            engines[str(number)] = stack.enter_context(_engine(bundle, plan.component, target, target.precision))
        times = in_turns(engines, material.probes[0].inputs, target.seconds * len(sets))
    return sets[min(range(len(sets)), key=lambda number: float(np.median(times[str(number)])))]


def _decided(block: BlockPlan, chosen: frozenset[str], harmful: dict[str, str], floor: float) -> BlockPlan:
    if block.name in chosen:
        gain = "slower alone, not among the others" if _is_slower(block) else _gain(block)
        return dataclasses.replace(block, precision=INT8, reason=f"{gain}; the pictures hold the floor")
    reason = f"the pictures fall below {floor + MARGIN_DB:g} dB with it"
    reason = "measured slower in INT8" if _is_slower(block) else reason
    return dataclasses.replace(block, precision=FLOAT, reason=harmful.get(block.name, reason))


def _gain(block: BlockPlan) -> str:
    if block.seconds_saved is None or block.seconds_error is None:
        return "gain not measured"
    return "faster" if block.seconds_saved > 2 * block.seconds_error else "no slower within the error"


def _harm(block: BlockPlan, floor: float) -> str | None:
    """Why shortcut convolutions are not harmless; ``None`` for other blocks."""
    if block.name != SHORTCUTS or block.psnr_db is None or block.psnr_db >= floor + HARMLESS_DB:
        return None
    return f"not harmless: {block.psnr_db:.1f} dB alone"


def _is_slower(block: BlockPlan) -> bool:
    if block.seconds_saved is None or block.seconds_error is None:
        return False
    return block.seconds_saved < -2 * block.seconds_error


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
