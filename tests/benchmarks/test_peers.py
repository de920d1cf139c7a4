"""The peers' run: what is measured, what is kept from an earlier run, and what a broken peer leaves behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from latentedge.benchmarks.peers import run
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
