"""Cores and memory that a process may use, from folders made like the kernel's."""

from __future__ import annotations

import os
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


@pytest.mark.parametrize(("quota", "cores"), [(None, 4), (2.5, 2), (0.5, 1), (16.0, 4)])
def test_cores_are_physical_and_within_affinity_and_quota(
    quota: float | None, cores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight processors, two on each core."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)))
    monkeypatch.setattr(machine, "_siblings", lambda processor: f"{processor // 2}")
    monkeypatch.setattr(machine, "cgroup_cores", lambda: quota)
    assert machine.usable_cores() == cores
