"""Built engines on disk: written aside and renamed, one build at a time for each key."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from latentedge.runtime.bundle import file_sha256
from latentedge.runtime.engines.plans import KEY_NAME, Plan, PlanFile, PlanKey, read_plan
from latentedge.runtime.errors import BundleError


@contextlib.contextmanager
def build_lock(folder: Path, key: PlanKey, notify: Callable[[str], None]) -> Iterator[None]:
    """Hold the lock of one key; a second build of the same engine waits for the first."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f".{key.folder_name()}.lock"
    with path.open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            notify(f"another process builds {key.component} in {key.precision}; waiting for it")
            fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def stored_plan(folder: Path, key: PlanKey) -> Plan | None:
    """The whole and undamaged engine of exactly this key, if it was built already."""
    path = folder / key.folder_name()
    if not (path / KEY_NAME).is_file():
        return None
    try:
        plan = read_plan(path)
    except BundleError:
        return None
    whole = all((path / file.path).is_file() and file_sha256(path / file.path) == file.sha256 for file in plan.files)
    return plan if whole and plan.key == key else None


def store_plan(folder: Path, key: PlanKey, contents: Sequence[Any]) -> Plan:
    """Write the plans of a chain and their key; the folder appears whole or not at all."""

    def write(aside: Path) -> list[Path]:
        paths = [aside / f"{index}.plan" for index in range(len(contents))]
        for path, content in zip(paths, contents, strict=True):
            path.write_bytes(content)
        return paths

    return store_files(folder, key, write)


def store_files(
    folder: Path, key: PlanKey, write: Callable[[Path], Sequence[Path]], measured: Mapping[str, Any] | None = None
) -> Plan:
    """Keep the files that ``write`` puts into a folder under ``key``, with what was ``measured`` of them."""
    final = folder / key.folder_name()
    aside = folder / f".{key.folder_name()}.partial"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    files = [PlanFile(path.name, path.stat().st_size, file_sha256(path)) for path in write(aside)]
    record = {
        "key": dataclasses.asdict(key),
        "files": [dataclasses.asdict(file) for file in files],
        "built": time.time(),
        **({} if measured is None else {"measured": dict(measured)}),
    }
    (aside / KEY_NAME).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    shutil.rmtree(final, ignore_errors=True)
    aside.rename(final)
    return read_plan(final)
