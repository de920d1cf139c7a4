"""Latencies of engines beside each other: in turns, so that what else the machine does falls on all of them alike.

A round runs every engine, then every engine again in the opposite order (A B B A), and keeps each one's fastest run:
load only ever adds time. Engines are compared by the ratios within rounds, whose interval is bootstrapped; a comparison
whose interval holds 1 is measured longer, and in the end says that it is undecided.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from latentedge.calibration.metrics import RESAMPLES, TAIL
from latentedge.runtime.bundle import Array
from latentedge.runtime.engines import Engine

#: Rounds of one measurement; fewer where they take longer than the budget, but at least LEAST_ROUNDS.
ROUNDS = 20
LEAST_ROUNDS = 5
#: Runs of each engine in a round.
REPEATS = 2
#: A measurement that decides nothing goes on until it has taken so many times its budget and rounds.
EXTENSIONS = 3

#: Inputs that are written once for a picture.
CONDITIONING = ("encoder_hidden_states", "text_embeds", "time_ids", "timestep_cond")

FASTER, SLOWER, UNDECIDED = "faster", "slower", "undecided"


@dataclass(frozen=True)
class Ratio:
    """How many times faster one engine is than another: the median over rounds, and its bootstrapped 95 % interval."""

    ratio: float
    low: float
    high: float
    rounds: int

    @property
    def verdict(self) -> str:
        """ "faster" or "slower" where the whole interval lies on that side of 1, otherwise "undecided"."""
        if self.low > 1:
            return FASTER
        return SLOWER if self.high < 1 else UNDECIDED


#: Times by name, whether enough was measured.
Decided = Callable[[Mapping[str, list[float]]], bool]


def in_turns(
    engines: Mapping[str, Engine], inputs: Mapping[str, Array], budget: float, decided: Decided | None = None
) -> dict[str, list[float]]:
    """Fastest seconds of each round by name, every engine used as a picture's loop uses it."""
    for engine in engines.values():
        engine.run(inputs)
    return run_in_turns({name: partial(_evaluate, engine, inputs) for name, engine in engines.items()}, budget, decided)


def _evaluate(engine: Engine, inputs: Mapping[str, Array]) -> None:
    """One evaluation of the loop: what changes is written, the output read; the conditioning stays written."""
    for name, array in inputs.items():
        if name not in CONDITIONING:
            engine.write(name, array)
    engine.run()
    engine.read(engine.component.outputs[0].name)


def run_in_turns(
    runs: Mapping[str, Callable[[], object]],
    budget: float,
    decided: Decided | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Fastest seconds of each round by name, over :data:`ROUNDS` rounds or until ``budget`` seconds are spent.

    While ``decided`` says no, this is done again up to :data:`EXTENSIONS` times.
    """
    names = list(runs)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    generator = np.random.default_rng(0)
    for _ in range(EXTENSIONS):
        start = clock()
        for number in range(ROUNDS):
            if number >= LEAST_ROUNDS and clock() - start > budget:
                break
            order = [names[index] for index in generator.permutation(len(names))]
            _round(runs, order, seconds, clock)
        if decided is None or decided(seconds):
            break
    return seconds


def _round(
    runs: Mapping[str, Callable[[], object]],
    order: Sequence[str],
    seconds: dict[str, list[float]],
    clock: Callable[[], float],
) -> None:
    fastest = dict.fromkeys(order, float("inf"))
    for repeat in range(REPEATS):
        # Threads of the engine before may still spin, and load rises and falls: the way back undoes the way there.
        for name in order if repeat % 2 == 0 else reversed(order):
            before = clock()
            runs[name]()
            fastest[name] = min(fastest[name], clock() - before)
    for name, value in fastest.items():
        seconds[name].append(value)


def ratio(reference: Sequence[float], candidate: Sequence[float]) -> Ratio:
    """How many times faster ``candidate`` is than ``reference``, from times of the same rounds."""
    logarithms = np.log(np.asarray(reference) / np.asarray(candidate))
    generator = np.random.default_rng(0)
    drawn = np.median(generator.choice(logarithms, (RESAMPLES, len(logarithms))), axis=1)
    low, high = np.exp(np.quantile(drawn, (TAIL, 1 - TAIL)))
    return Ratio(float(np.exp(np.median(logarithms))), float(low), float(high), len(logarithms))


def saved(reference: Sequence[float], candidate: Sequence[float]) -> tuple[float, float]:
    """Median of the seconds that ``candidate`` saves in a round, and its standard error (1.25 sigma / sqrt(n))."""
    differences = np.asarray(reference) - np.asarray(candidate)
    middle = float(np.median(differences))
    spread = 1.4826 * float(np.median(np.abs(differences - middle)))
    return middle, 1.2533 * spread / len(differences) ** 0.5
