"""A bundle that cannot be written leaves nothing behind, and the error says what to do."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from latentedge.export.bundle_writer import staged
from latentedge.export.errors import ExportError


def test_a_place_below_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("text")
    with (
        pytest.raises(ExportError, match="cannot be written") as caught,
        staged(tmp_path / "file" / "a", overwrite=True),
    ):
        pass
    assert "choose an -o" in str(caught.value.hint)
    assert (tmp_path / "file").read_text() == "text"


def write_to_a_full_disk(output: Path) -> None:
    with staged(output, overwrite=False) as folder:
        (folder / "graph").symlink_to("/dev/full")
        (folder / "graph").write_bytes(bytes(100_000))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_a_full_disk(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="No space left") as caught:
        write_to_a_full_disk(tmp_path / "a")
    assert "free that much" in str(caught.value.hint)
    assert list(tmp_path.iterdir()) == []


def test_a_file_inside_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="graph") as caught, staged(tmp_path / "a", overwrite=False) as folder:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder / "graph"))
    assert "that you may write to" in str(caught.value.hint)
    assert list(tmp_path.iterdir()) == []


def test_a_file_elsewhere_is_not_the_bundle(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), staged(tmp_path / "a", overwrite=False):
        (tmp_path / "weights").read_bytes()
    assert list(tmp_path.iterdir()) == []


def test_a_bundle_is_replaced_as_a_whole(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "latentedge.json").write_text("{}")
    with staged(tmp_path / "a", overwrite=True) as folder:
        (folder / "new").write_text("")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
