"""Each block's error and gain alone, and the fastest set of blocks whose pictures stay above the floor.

Errors are pure functions of what is stored in the bundle, so they are taken by any process on any machine. Gains are
measured here alone: another machine is not the target, and processes beside each other disturb each other's times. Each
error and each gain is kept in a file when it is known, so that an interrupted run goes on with the next block.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import numpy as np

from latentedge.calibration.candidates import candidate
from latentedge.calibration.capture import drop_others
from latentedge.calibration.latency import in_turns, saved
from latentedge.calibration.metrics import sqnr, worst_low
from latentedge.calibration.pictures import differences, summary
from latentedge.calibration.placement import SHORTCUTS
from latentedge.calibration.plan import FLOAT, INT8, BlockPlan, Plan, write_atomically
from latentedge.calibration.quantise import Evidence
from latentedge.calibration.records import Probe
from latentedge.calibration.requests import requests
from latentedge.calibration.scene import Scene, Studio, Target
from latentedge.calibration.sharding import Mapper, one_by_one
from latentedge.calibration.stored import digest_of, relative_folder, restore, store
from latentedge.runtime.bundle import Bundle
from latentedge.runtime.engines import Engine, open_engine
from latentedge.runtime.machine import machine_fingerprint
from latentedge.runtime.selection import library_version

Progress = Callable[[str, int, int], None]

#: Decibels that the floor is exceeded by when the plan is made, because other pictures are worse than these.
MARGIN_DB = 1.0
#: The worst picture may lie this far below the floor of the mean.
WORST_BELOW_DB = 6.0
#: Pictures so far above the floor are as good as any other.
CLEAR_DB = 20.0
#: Blocks that may break the floor in the middle of the order without ending the plan there.
SKIPS = 2
#: Shortcut convolutions carry the residual stream: they count as harmless this far above the floor.
HARMLESS_DB = 10.0


@dataclass(frozen=True)
class Material:
    """What candidates are judged by: probes, and pictures of the fp32 model for requests that calibration saw.

    ``confirming`` draws more such pictures, for the set that a few pictures chose; ``None``: these few are enough.
    """

    bundle: Bundle
    evidence: Evidence
    probes: list[Probe]
    scene: Scene
    confirming: Callable[[], Scene] | None = None


@dataclass(frozen=True)
class BlockSettings:
    """What a block's error follows from; ``folder`` holds the plan and the evidence."""

    bundle: str
    folder: str
    target: Target
    steps: int | None = None
    prompts: tuple[str, ...] = ()


def measure_blocks(
    plan: Plan,
    material: Material,
    target: Target,
    progress: Progress,
    mapper: Mapper = one_by_one,
    steps: int | None = None,
    prompts: tuple[str, ...] = (),
) -> Plan:
    """The plan with every block's error and gain, measured with only that block in INT8.

    Errors are those of the INT8 graph with fp32 floats, whatever the floats of the target are: which of them is faster
    is a measurement that may turn out otherwise when an interrupted run goes on.
    """
    exact = dataclasses.replace(target, precision=INT8, alternative="fp32")
    stored = dataclasses.replace(plan, precision=INT8)
    digest = digest_of(stored, material.evidence, material.probes, exact, steps, prompts)
    folder = material.bundle.path / relative_sensitivity(plan.component) / digest[:16]
    drop_others(folder)
    store(folder, stored, material.evidence, material.probes)
    settings = BlockSettings(str(material.bundle.path), str(folder), exact, steps, prompts)
    total = len(plan.blocks) * (2 if target.timed else 1)
    files = [folder / f"block-{index:03d}.json" for index in range(len(plan.blocks))]
    missing = [index for index, file in enumerate(files) if not file.is_file()]
    done = len(files) - len(missing)
    for index, error in mapper(block_error, settings, missing):
        write_atomically(files[index], json.dumps(error).encode())
        done += 1
        progress("blocks", done, total)
    _opened.cache_clear()
    blocks = []
    for block, file in zip(plan.blocks, files, strict=True):
        by_timestep, sqnr_db, psnr_db = json.loads(file.read_text())
        pairs = tuple((timestep, decibels) for timestep, decibels in by_timestep)
        blocks.append(dataclasses.replace(block, sqnr_db_by_timestep=pairs, sqnr_db=sqnr_db, psnr_db=psnr_db))
    plan = dataclasses.replace(plan, blocks=tuple(blocks))
    return _with_gains(plan, material, target, folder, lambda count: progress("blocks", done + count, total))


def relative_sensitivity(component: str) -> str:
    """Where the errors of blocks are kept until calibration is done."""
    return f"{relative_folder(component)}/sensitivity"


def block_error(settings: BlockSettings, index: int) -> tuple[list[tuple[float, float]], float, float]:
    """With only block ``index`` in INT8, in dB: SQNR of the output by timestep, its mean, and PSNR of a picture."""
    plan, material = _opened(settings)
    alone = plan.with_blocks(frozenset({plan.blocks[index].name}))
    with (
        candidate(material.bundle, alone, material.evidence) as bundle,
        _engine(bundle, alone.component, settings.target, settings.target.precision) as engine,
    ):
        errors = probe_sqnr(engine, material.probes)
        drawn = material.scene.drawn(engine)
    psnr_db, _ = summary(differences(material.scene.reference, drawn))
    return _by_timestep(material.probes, errors), float(np.mean(errors)), psnr_db


def _by_timestep(probes: Sequence[Probe], errors: Sequence[float]) -> list[tuple[float, float]]:
    """The mean error of the probes of each timestep, in rising order; of a network without timesteps none."""
    found: dict[float, list[float]] = {}
    for probe, error in zip(probes, errors, strict=True):
        if "timestep" in probe.inputs:
            found.setdefault(probe.timestep, []).append(error)
    return [(timestep, float(np.mean(found[timestep]))) for timestep in sorted(found)]


@lru_cache(maxsize=1)
def _opened(settings: BlockSettings) -> tuple[Plan, Material]:
    """Plan and material as they are stored; one picture, because it is drawn for each block."""
    bundle = Bundle.open(settings.bundle)
    folder = Path(settings.folder)
    plan = Plan.load(folder / "plan.json")
    evidence, probes = restore(folder)
    studio = Studio(bundle, settings.target)
    scene = Scene.of(studio, plan.component, requests(bundle, 1, settings.steps, settings.prompts))
    return plan, Material(bundle, evidence, probes, scene)


def _with_gains(plan: Plan, material: Material, target: Target, folder: Path, progress: Callable[[int], None]) -> Plan:
    """The plan with the seconds that each block saves alone, in turns with the float graph.

    Both compute the remaining floats in one type: beside another, every block alone would pay for all floats.
    """
    if not target.timed:
        return plan
    # What was measured of other precisions, or elsewhere, says nothing here.
    place = f"{machine_fingerprint()} {library_version(target.backend)}"
    setting = hashlib.sha256(f"{place} {target.precision}".encode()).hexdigest()[:8]
    blocks = []
    with ExitStack() as stack:
        floats: Engine | None = None
        for number, block in enumerate(plan.blocks):
            file = folder / f"gain-{setting}-{number:03d}.json"
            if not file.is_file():
                same = target.precision.partition("+")[2] or "fp32"
                floats = floats or stack.enter_context(_engine(material.bundle, plan.component, target, same))
                write_atomically(file, json.dumps(_gain_alone(plan, block, material, target, floats)).encode())
            gain, error = json.loads(file.read_text())
            blocks.append(dataclasses.replace(block, seconds_saved=gain, seconds_error=error))
            progress(number + 1)
    return dataclasses.replace(plan, blocks=tuple(blocks))


def _gain_alone(
    plan: Plan, block: BlockPlan, material: Material, target: Target, floats: Engine
) -> tuple[float, float]:
    """Seconds that a block saves, and their standard error."""
    alone = plan.with_blocks(frozenset({block.name}))
    with (
        candidate(material.bundle, alone, material.evidence) as bundle,
        _engine(bundle, plan.component, target, target.precision) as engine,
    ):
        times = in_turns({"float": floats, "int8": engine}, material.probes[0].inputs, target.seconds / 4)
    return saved(times["float"], times["int8"])


def _engine(bundle: Bundle, component: str, target: Target, precision: str) -> Engine:
    return open_engine(bundle, component, target.backend, precision, target.options)


def probe_sqnr(engine: Engine, probes: Sequence[Probe]) -> list[float]:
    """SQNR of the network's output in dB for each probe."""
    output = engine.component.outputs[0].name
    return [sqnr(probe.output, engine.run(probe.inputs)[output]) for probe in probes]


def choose_blocks(plan: Plan, material: Material, target: Target, progress: Progress) -> Plan:
    """The fastest set of blocks above the floor, with the floats of the target, or in fp32 where those spoil every set.

    Where no set holds the floor, the one that a few pictures chose is written, or every block becomes INT8, and the gate
    says by how much it misses.
    """
    harmful = {block.name: why for block in plan.blocks if (why := _harm(block, plan.floor_db)) is not None}
    closest: frozenset[str] = frozenset()
    for precision in dict.fromkeys((target.precision, INT8)):
        tried = dataclasses.replace(target, precision=precision)
        chosen = _best_set(plan, harmful, material, tried, progress)
        if chosen and material.confirming is not None:
            # Few pictures may all be lucky: one entry of a codebook that turns over in one of ten pictures is not in four.
            closest = chosen
            more = dataclasses.replace(material, scene=material.confirming(), confirming=None)
            kept = [block for block in plan.blocks if block.name in chosen]
            chosen = _longest(plan, sorted(kept, key=_noise), more, tried, progress)
        if chosen:
            decided = tuple(_decided(block, chosen, harmful, plan.floor_db) for block in plan.blocks)
            return dataclasses.replace(plan, precision=precision, blocks=decided)
    reason = f"no plan holds {plan.floor_db:g} dB; the gate refuses this one"
    if closest:
        reason = f"holds {plan.floor_db:g} dB in few pictures and not in more; the gate decides"
    whole = closest or {block.name for block in plan.blocks}
    blocks = [
        dataclasses.replace(block, precision=INT8, reason=reason)
        if block.name in whole
        else dataclasses.replace(_decided(block, closest, harmful, plan.floor_db), precision=FLOAT)
        for block in plan.blocks
    ]
    return dataclasses.replace(plan, precision=INT8 if closest else plan.precision, blocks=tuple(blocks))


def _best_set(
    plan: Plan, harmful: dict[str, str], material: Material, target: Target, progress: Progress
) -> frozenset[str]:
    """The names of the fastest set of blocks above the floor; empty where there is none.

    Two sets compete: without the blocks that measured slower alone, and with them, because an INT8 block between two
    others saves conversions that it needs alone; the faster one in the same rounds wins. Where neither holds the floor,
    blocks are taken by their error alone.
    """
    slow = {block.name for block in plan.blocks if _is_slower(block)}
    usable = [block for block in plan.blocks if block.name not in harmful]
    usable = [block for block in usable if block.psnr_db is None or block.psnr_db >= plan.floor_db]
    errors = [block.seconds_error for block in plan.blocks if block.seconds_error is not None]
    resolution = max(float(np.median(errors)) if errors else 1.0, 1e-6)
    sets: list[frozenset[str]] = []
    for blocks in ([block for block in usable if block.name not in slow], usable):
        held = _longest(plan, sorted(blocks, key=partial(_cost, resolution=resolution)), material, target, progress)
        sets += [held] if held and held not in sets else []
    if not sets:
        return _longest(plan, sorted(usable, key=_noise), material, target, progress)
    return sets[0] if len(sets) == 1 or not target.timed else _fastest(plan, sets, material, target)


def _longest(
    plan: Plan,
    blocks: Sequence[BlockPlan],
    material: Material,
    target: Target,
    progress: Progress,
) -> frozenset[str]:
    """As many of ``blocks`` as hold the floor, in their order; about SKIPS that break it are left out on the way.

    The block that breaks it is found by bisection: all of them first, because most models hold the floor with every
    block in INT8.
    """
    order = [block.name for block in blocks]
    chosen: list[str] = []
    trials = (1 + SKIPS) * (len(order).bit_length() + 1)
    attempt = 0
    while order and attempt < trials:
        low, high, all_of_them = 0, len(order), True
        while low < high and attempt < trials:
            middle = high if all_of_them else (low + high + 1) // 2
            all_of_them = False
            progress("plan", attempt, trials)
            attempt += 1
            quality = _picture_quality(plan.with_blocks(frozenset([*chosen, *order[:middle]])), material, target)
            if _holds(quality, plan.floor_db + MARGIN_DB):
                low = middle
            else:
                high = middle - 1
        chosen += order[:low]
        order = order[low + 1 :]
    return frozenset(chosen)


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
    reason = f"the pictures fall below {floor + MARGIN_DB:g} dB with it and the others"
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


def _cost(block: BlockPlan, resolution: float) -> float:
    """Noise power for each second saved; a gain within its error counts as what can just be measured."""
    gain = block.seconds_saved or 0.0
    certain = block.seconds_error is not None and gain > 2 * block.seconds_error
    return _noise(block) / max(gain if certain else 0.0, resolution)


def _noise(block: BlockPlan) -> float:
    """Power of a block's error against that of the output."""
    return float(10 ** (-(block.sqnr_db if block.sqnr_db is not None else 0.0) / 10))


def _holds(quality: tuple[float, float], floor: float) -> bool:
    mean, worst = quality
    return mean >= floor and worst >= floor - WORST_BELOW_DB


def _picture_quality(plan: Plan, material: Material, target: Target) -> tuple[float, float]:
    """Mean PSNR of the pictures, and the worst, or where it is lower what is foreseen of the worst of others."""
    with (
        candidate(material.bundle, plan, material.evidence) as bundle,
        _engine(bundle, plan.component, target, target.precision) as engine,
        Studio(bundle, target, target.precision) as studio,
    ):
        # The other networks run as they would beside this one, a decoder in INT8 too.
        drawn = material.scene.drawn(engine, studio)
    values = [entry.psnr_db for entry in differences(material.scene.reference, drawn)]
    return float(np.mean(values)), worst_low(values, plan.floor_db + CLEAR_DB)
