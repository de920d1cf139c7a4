"""Latencies of engines beside each other: in turns, so that what else the machine does falls on all of them alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from latentedge.runtime.bundle import Array
from latentedge.runtime.engines import Engine

#: Rounds of one measurement; fewer where they take longer than the budget, but at least LEAST_ROUNDS.
ROUNDS = 30
LEAST_ROUNDS = 5
#: Resamples of the bootstrap behind a ratio's lower bound, and the tail that it leaves out.
RESAMPLES = 2000
TAIL = 0.05


@dataclass(frozen=True)
class Ratio:
    """How many times faster one engine is than another: the median over rounds, and its bootstrapped lower bound."""

    ratio: float
    low: float
    rounds: int


def in_turns(engines: Mapping[str, Engine], inputs: Mapping[str, Array], budget: float) -> dict[str, list[float]]:
    """Seconds of each run by name. Every round runs each engine once, in another order."""
    for engine in engines.values():
        engine.run(inputs)
    return run_in_turns({name: engine.run for name, engine in engines.items()}, budget)


def run_in_turns(runs: Mapping[str, Callable[[], object]], budget: float) -> dict[str, list[float]]:
    """Seconds of each call by name, over :data:`ROUNDS` rounds or until ``budget`` seconds are spent."""
    names = list(runs)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    generator = np.random.default_rng(0)
    start = time.perf_counter()
    for number in range(ROUNDS):
        if number >= LEAST_ROUNDS and time.perf_counter() - start > budget:
            break
        # Threads of the engine before may still spin; another order each round spreads that over all.
        for name in (names[index] for index in generator.permutation(len(names))):
            before = time.perf_counter()
            runs[name]()
            seconds[name].append(time.perf_counter() - before)
    return seconds


def ratio(reference: list[float], candidate: list[float]) -> Ratio:
    """How many times faster ``candidate`` is than ``reference``, from times of the same rounds."""
    logarithms = np.log(np.asarray(reference) / np.asarray(candidate))
    generator = np.random.default_rng(0)
    drawn = generator.choice(logarithms, (RESAMPLES, len(logarithms)))
    low = np.quantile(np.median(drawn, axis=1), TAIL)
    return Ratio(float(np.exp(np.median(logarithms))), float(np.exp(low)), len(logarithms))


def saved(reference: list[float], candidate: list[float]) -> tuple[float, float]:
    """Median of the seconds that ``candidate`` saves in a round, and its standard error (1.25 sigma / sqrt(n))."""
    differences = np.asarray(reference) - np.asarray(candidate)
    middle = float(np.median(differences))
    spread = 1.4826 * float(np.median(np.abs(differences - middle)))
    return middle, 1.2533 * spread / len(differences) ** 0.5
