"""Pages of mapped weight files leave the process's memory, and only those that the file can give again."""

from __future__ import annotations

import mmap
import time
from pathlib import Path

import numpy as np
import pytest

from latentedge.runtime.engines.mapped import MAPPINGS, give_back, giving_back

SIZE = 32 << 20

linux = pytest.mark.skipif(not MAPPINGS.is_file(), reason="needs Linux's list of mappings")


def resident_of_files() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssFile:"))


def weights(folder: Path) -> Path:
    path = folder / "model with a space.data"
    np.arange(SIZE // 8).tofile(path)
    return path


@linux
def test_pages_are_given_back_and_read_again(tmp_path: Path) -> None:
    path = weights(tmp_path)
    mapped = np.memmap(path, np.int64, "r")
    total = int(mapped.sum())
    before = resident_of_files()
    assert give_back([path]) >= SIZE
    assert before - resident_of_files() > SIZE * 0.9
    assert int(mapped.sum()) == total


@linux
def test_other_files_stay(tmp_path: Path) -> None:
    path = weights(tmp_path)
    mapped = np.memmap(path, np.int64, "r")
    mapped.sum()
    before = resident_of_files()
    assert give_back([tmp_path / "another.data"]) == 0
    assert give_back([]) == 0
    assert abs(before - resident_of_files()) < SIZE * 0.1


@linux
def test_changes_of_a_private_mapping_are_kept(tmp_path: Path) -> None:
    path = weights(tmp_path)
    with path.open("rb") as file:
        private = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    private[0] = 77
    assert give_back([path]) == 0
    assert private[0] == 77


@linux
def test_what_is_read_inside_of_the_context_is_given_back_at_once(tmp_path: Path) -> None:
    path = weights(tmp_path)
    mapped = np.memmap(path, np.int64, "r")
    with giving_back([path]):
        mapped.sum()
        deadline = time.monotonic() + 10
        while resident_of_files_of(path) > SIZE * 0.1 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert resident_of_files_of(path) <= SIZE * 0.1
        mapped.sum()
    assert resident_of_files_of(path) == 0


def resident_of_files_of(path: Path) -> int:
    lines = iter(Path("/proc/self/smaps").read_text().splitlines())
    for line in lines:
        if line.endswith(path.name):
            found = next(line for line in lines if line.startswith("Rss:"))
            return int(found.split()[1]) * 1024
    return 0


def test_systems_without_that_list_do_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("latentedge.runtime.engines.mapped.MAPPINGS", tmp_path / "none")
    with giving_back([weights(tmp_path)]):
        assert give_back([tmp_path / "model with a space.data"]) == 0
