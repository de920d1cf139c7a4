"""Energy readers on folders made like the kernel's."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from latentedge.benchmarks import energy
from latentedge.benchmarks.energy import ina, measured_energy, rapl


def test_rapl_counts_joules_across_its_overflow(tmp_path: Path) -> None:
    zone = tmp_path / "intel-rapl:0"
    zone.mkdir()
    (zone / "max_energy_range_uj").write_text("1000000\n")
    (zone / "energy_uj").write_text("900000\n")
    reader = rapl(tmp_path)
    assert reader is not None
    with reader() as joules:
        (zone / "energy_uj").write_text("150000\n")
    assert joules() == pytest.approx(0.25)


def test_rapl_without_counters_is_not_reported(tmp_path: Path) -> None:
    assert rapl(tmp_path) is None


def test_the_input_rail_of_a_jetson_is_integrated(tmp_path: Path) -> None:
    folder = tmp_path / "1-0040" / "hwmon" / "hwmon3"
    folder.mkdir(parents=True)
    for number, label, millivolts, milliamperes in ((1, "VDD_IN", 5000, 2000), (2, "VDD_CPU_GPU_CV", 5000, 9999)):
        (folder / f"in{number}_label").write_text(f"{label}\n")
        (folder / f"in{number}_input").write_text(f"{millivolts}\n")
        (folder / f"curr{number}_input").write_text(f"{milliamperes}\n")
    reader = ina(tmp_path)
    assert reader is not None
    start = time.perf_counter()
    with reader() as joules:
        time.sleep(0.12)
    seconds = time.perf_counter() - start
    assert 10 * 0.11 < joules() < 10 * seconds * 1.01  # 10 watts


def test_without_any_reader_nothing_is_made_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(energy, "READERS", {"nobody": lambda: None})
    with measured_energy() as found:
        pass
    assert found.joules is None
    assert found.source is None
