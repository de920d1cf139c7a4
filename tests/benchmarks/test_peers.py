"""The peers' run: what is measured, what is kept from an earlier run, and what a broken peer leaves behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from latentedge.benchmarks.peers import results, run
from latentedge.benchmarks.peers.run import HERE, SIDES, main, result_file
from latentedge.runtime.errors import EngineError

TABLE: dict[str, Any] = json.loads((HERE / "peers.json").read_text(encoding="utf-8"))


def test_every_peer_names_an_environment_a_worker_and_its_minutes() -> None:
    for peer in TABLE["peers"]:
        assert peer["environment"] in TABLE["environments"]
        assert (HERE / peer["worker"]).is_file()
        assert set(peer["minutes"]) == set(SIDES)
    assert sum(peer["minutes"]["sd15"] for peer in TABLE["peers"]) <= 25
    for pins in TABLE["environments"].values():
        assert all("==" in pin for pin in pins)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Peers that were measured, in order; the first call for one of them fails."""
    names: list[str] = []

    def measure(peer: dict[str, Any], *_: Any) -> dict[str, Any]:
        names.append(peer["name"])
        if peer["name"].startswith("optimum") and names.count(peer["name"]) == 1:
            raise EngineError("no such operator")
        return {"steps": 4}

    monkeypatch.setattr(run, "_measure", measure)
    monkeypatch.setattr(run, "make_workload", lambda *_: None)
    monkeypatch.setattr(run, "environment_of", lambda *_: "python")
    return names


def call(output: Path, *options: str) -> str:
    done = CliRunner().invoke(main, ["sd15", "-o", str(output), *options], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def test_a_second_run_measures_what_failed_and_nothing_else(tmp_path: Path, measured: list[str]) -> None:
    output = tmp_path / "sd15.json"
    call(output)
    everyone = [peer["name"] for peer in TABLE["peers"]]
    assert measured == everyone
    assert result_file(output, "optimum-onnx, FP32") == tmp_path / "sd15" / "optimum-onnx-fp32.json"
    failed = [row["peer"] for row in json.loads(output.read_text())["rows"] if "failed" in row]
    assert failed == ["optimum-onnx, FP32"]
    call(output)
    assert measured[len(everyone) :] == failed
    rows = json.loads(output.read_text())["rows"]
    assert [row["peer"] for row in rows] == everyone
    assert not any("failed" in row for row in rows)


def test_a_result_of_other_settings_is_measured_again(tmp_path: Path, measured: list[str]) -> None:
    call(tmp_path / "sd15.json", "--only", "BF16")
    first = len(measured)
    call(tmp_path / "sd15.json", "--only", "BF16", "--steps", "20")
    assert measured[first:] == measured[:first]


def test_a_dry_run_measures_nothing_and_says_how_long_it_takes(tmp_path: Path, measured: list[str]) -> None:
    output = call(tmp_path / "sd15.json", "--dry-run")
    assert "about 25 minutes" in output
    assert measured == []
    assert not (tmp_path / "sd15.json").exists()


class Answering:
    """A process that answers what it is asked for."""

    def __init__(self, **answers: dict[str, Any]) -> None:
        self.answers, self.asked = answers, list[str]()

    def ask(self, do: str, **_: Any) -> dict[str, Any]:
        self.asked.append(do)
        return self.answers[do]


@pytest.mark.parametrize("draws", [True, False])
def test_the_mean_of_a_pictures_steps_is_beside_the_peers_step(draws: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "SETTLING_SECONDS", 0)
    own: Any = Answering(
        component={"seconds": [9.0, 1.0], "processor_seconds": [9.0, 2.0]},
        picture={"seconds": 12.0, "steps": [4.0, 1.0, 1.0, 2.0]},
    )
    other: Any = Answering(step={"seconds": [9.0, 6.0]}, picture={"seconds": 36.0})
    measured: dict[str, run.Pair] = {name: ([], []) for name in run.MEASURED}
    for _ in range(2):
        run._step_round(own, other, measured)
        run._picture_round(own, other, measured, draws)
    pictures = ([12.0] * 2, [36.0] * 2) if draws else ([], [])
    expected = {"step": ([1.0] * 2, [6.0] * 2), "processor": ([], []), "mean": ([2.0] * 2, [6.0] * 2)}
    assert measured == {**expected, "picture": pictures}
    assert other.asked == (["step", "picture"] if draws else ["step"]) * 2
    row = {name: run._result(*pair) for name, pair in measured.items() if pair[1]}
    assert row["mean"]["ratio"]["ratio"] == 3
    assert set(results.COLUMNS) == set(run.MEASURED)
    cells = [results._cell(row.get(name)) for name in results.COLUMNS]
    assert cells[2].startswith("2.000 / 6.000 s, **3.00x**")
    assert (cells[1], bool(cells[3])) == ("", draws)
