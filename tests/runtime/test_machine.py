"""Cores and memory that a process may use, from folders made like the kernel's."""

from __future__ import annotations

from pathlib import Path

import pytest

from latentedge.runtime import machine


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({"cpu.max": "150000 100000\n"}, 1.5),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "400000", "cpu/cpu.cfs_period_us": "100000"}, 4.0),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
        ({}, None),
    ],
)
def test_quota_of_both_cgroup_versions(tmp_path: Path, files: dict[str, str], cores: float | None) -> None:
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    assert machine.cgroup_cores(tmp_path) == cores


def test_a_quota_limits_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    everything = machine.usable_cores()
    monkeypatch.setattr(machine, "cgroup_cores", lambda: 1.9)
    assert machine.usable_cores() == 1
    monkeypatch.setattr(machine, "cgroup_cores", lambda: 1000.0)
    assert machine.usable_cores() == everything >= 1


def test_a_memory_limit_counts(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text("1048576\n")
    assert machine.memory_limit(tmp_path) == 1 << 20
    (tmp_path / "memory.max").write_text("max\n")
    whole = machine.memory_limit(tmp_path)
    assert whole is None or whole > 1 << 28


def test_the_fingerprint_follows_from_what_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    before = machine.machine_fingerprint()
    assert machine.machine_fingerprint() == before
    facts = machine.machine()
    assert facts["processor"]
    assert int(facts["cores"]) >= 1
    monkeypatch.setattr(machine, "machine", lambda: {**facts, "processor": "another"})
    assert machine.machine_fingerprint() != before
