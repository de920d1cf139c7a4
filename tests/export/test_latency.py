"""What a latency record says, from the times of rounds."""

from __future__ import annotations

import pytest

from latentedge.export.latency import LEAST_ROUNDS, ROUNDS, in_turns, latency_record


def test_ratios_are_taken_within_rounds_and_their_lower_quartile_is_the_bound() -> None:
    seconds = {"fp32": [1.0, 2.0, 4.0, 8.0, 3.0], "fp16": [0.5, 0.5, 1.0, 8.0, 1.0]}
    record = latency_record("fp16", "onnxruntime", seconds)
    assert record["seconds"] == 1.0
    assert record["ratio"] == 3.0  # of 2, 4, 4, 1 and 3; the medians' ratio is 3 too, the means' is not
    assert record["ratio_low"] == 2.0
    assert (record["reference"], record["rounds"]) == ("fp32", 5)


def test_without_fp32_a_precision_is_its_own_reference() -> None:
    record = latency_record("fp16", "onnxruntime", {"fp16": [0.5, 0.7]})
    assert (record["reference"], record["ratio"], record["ratio_low"]) == ("fp16", 1.0, 1.0)


def test_every_one_runs_once_in_each_round(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    runs = {name: lambda name=name: order.append(name) for name in ("a", "b")}
    seconds = in_turns(runs)
    assert order == ["a", "b"] * ROUNDS
    assert {len(times) for times in seconds.values()} == {ROUNDS}
    order.clear()
    monkeypatch.setattr("latentedge.export.latency.BUDGET_SECONDS", -1.0)
    in_turns(runs)
    assert order == ["a", "b"] * LEAST_ROUNDS
    assert in_turns({}) == {}
