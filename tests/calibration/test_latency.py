"""The measurement behind the gate, on a clock that runs as a loaded machine does."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from latentedge.calibration.gate import Race
from latentedge.calibration.latency import (
    EXTENSIONS,
    LEAST_ROUNDS,
    REPEATS,
    ROUNDS,
    Ratio,
    in_turns,
    ratio,
    run_in_turns,
    saved,
)
from latentedge.runtime.bundle import Array, Axis, Component, TensorSpec
from latentedge.runtime.engines.null import NullEngine

TRIALS = 100
ONE = Axis(1, 1, 1)


class LoadedMachine:
    """A clock that engines advance: load comes and goes over many runs, and single runs are held up."""

    def __init__(self, seed: int, level: float = 1.0) -> None:
        self.now = 0.0
        self.random = np.random.default_rng(seed)
        self.level = level
        self.load = 1.0

    def clock(self) -> float:
        return self.now

    def engine(self, seconds: float) -> Callable[[], None]:
        def run() -> None:
            if self.random.random() < 0.05:
                self.load = 1 + self.level * self.random.random()
            held_up = self.random.exponential(3.0) if self.random.random() < 0.1 * self.level else 0.0
            jitter = float(np.exp(0.05 * self.level * abs(self.random.standard_normal())))
            self.now += seconds * self.load * jitter * (1 + held_up)

        return run


def race(seed: int, seconds: dict[str, float], *, budget: float = 1e9, level: float = 1.0) -> dict[str, list[float]]:
    machine = LoadedMachine(seed, level)
    judge = Race("openvino", {"int8": True})
    runs = {name: machine.engine(value) for name, value in seconds.items()}
    return run_in_turns(runs, budget, judge.decided, machine.clock)


def verdicts(seconds: dict[str, float], level: float = 1.0) -> list[str]:
    found = [race(seed, seconds, level=level) for seed in range(TRIALS)]
    return [Race("openvino", {"int8": True}).records(times)["int8"]["verdict"] for times in found]


def test_a_clear_gain_is_seen_through_heavy_load() -> None:
    assert verdicts({"fp32": 1.0, "int8": 0.7}).count("faster") >= 0.97 * TRIALS


def test_a_clear_loss_is_never_taken_for_a_gain() -> None:
    assert "faster" not in verdicts({"fp32": 1.0, "int8": 1.2})


def test_of_two_engines_alike_chance_seldom_makes_one_faster() -> None:
    """Each look leaves out a fortieth on either side, and there are up to three."""
    found = verdicts({"fp32": 1.0, "int8": 1.0})
    assert found.count("faster") <= 0.1 * TRIALS
    assert found.count("undecided") >= 0.8 * TRIALS


def test_it_measures_longer_only_where_that_may_decide() -> None:
    assert len(race(0, {"fp32": 1.0, "int8": 0.5})["int8"]) == ROUNDS
    assert len(race(0, {"fp32": 1.0, "int8": 1.0}, level=0.0)["int8"]) == ROUNDS * EXTENSIONS
    assert len(race(0, {"fp32": 1.0, "int8": 0.5}, budget=0.0)["int8"]) == LEAST_ROUNDS


def test_a_round_keeps_the_fastest_run_of_each_engine_there_and_back() -> None:
    spent = iter([5.0, 5.0, 1.0, 1.0] * LEAST_ROUNDS)
    ran: list[str] = []
    now = 0.0

    def run(name: str) -> Callable[[], None]:
        def once() -> None:
            nonlocal now
            ran.append(name)
            now += next(spent)

        return once

    times = run_in_turns({"a": run("a"), "b": run("b")}, 0.0, clock=lambda: now)
    assert REPEATS == 2
    assert times == {"a": [1.0] * LEAST_ROUNDS, "b": [1.0] * LEAST_ROUNDS}
    assert all(ran[start : start + 4] in (list("abba"), list("baab")) for start in range(0, len(ran), 4))
    assert {ran[start] for start in range(0, len(ran), 4)} == {"a", "b"}


def test_conditioning_is_written_once_as_in_a_pictures_loop() -> None:
    latent = TensorSpec("sample", "float32", ("batch", 4))
    context = TensorSpec("encoder_hidden_states", "float32", ("batch", 3))
    component = Component(
        "unet", (latent, context), (TensorSpec("out_sample", "float32", ("batch", 4)),), {"batch": ONE}
    )
    written: list[str] = []

    class Counting(NullEngine):
        def write(self, name: str, array: Array) -> None:
            written.append(name)
            super().write(name, array)

    engine = Counting(component, lambda inputs: {"out_sample": inputs["sample"]})
    inputs = {"sample": np.ones((1, 4), np.float32), "encoder_hidden_states": np.ones((1, 3), np.float32)}
    in_turns({"only": engine}, inputs, budget=0.0)
    assert written.count("encoder_hidden_states") == 1
    assert written.count("sample") == 1 + LEAST_ROUNDS * REPEATS


@pytest.mark.parametrize(
    ("low", "high", "expected"), [(1.01, 2.0, "faster"), (0.5, 0.99, "slower"), (0.9, 1.1, "undecided")]
)
def test_the_verdict_is_the_intervals(low: float, high: float, expected: str) -> None:
    assert Ratio(1.0, low, high, 5).verdict == expected


def test_the_interval_holds_the_true_ratio() -> None:
    held = 0
    for seed in range(TRIALS):
        times = race(seed, {"fp32": 1.0, "int8": 0.8}, level=0.5)
        found = ratio(times["fp32"], times["int8"])
        held += found.low <= 1.25 <= found.high
        gain, error = saved(times["fp32"], times["int8"])
        assert abs(gain - 0.2) < 0.2 + 6 * error
    assert held >= 0.85 * TRIALS
