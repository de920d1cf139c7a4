"""Memory of weight files that an engine library maps, given back while the library makes its own packed copy.

A library that compiles a graph reads each weight once, packs it for its kernels and keeps the file mapped. The pages it
has read count as this process's memory and are never needed again; should they be, the system reads them anew.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

#: Linux's list of this process's mappings; where there is none, nothing is given back.
MAPPINGS = Path("/proc/self/maps")
#: Linux's advice that pages are not needed; read-only pages of a file are read again when they are touched.
MADV_DONTNEED = 4
#: Seconds between two looks while a library compiles.
INTERVAL = 0.05


def give_back(files: Iterable[Path]) -> int:
    """Drop this process's read-only pages of ``files``; gives the bytes of the mappings."""
    names = {os.path.realpath(file) for file in files}
    if not names or not MAPPINGS.is_file():
        return 0
    advise = ctypes.CDLL(None, use_errno=True).madvise
    advise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    given = 0
    for line in MAPPINGS.read_text(encoding="utf-8", errors="surrogateescape").splitlines():
        fields = line.split(maxsplit=5)
        # A writable private mapping may hold changes that the file does not.
        if len(fields) == 6 and fields[5] in names and fields[1].startswith("r--"):
            start, end = (int(address, 16) for address in fields[0].split("-"))
            if advise(start, end - start, MADV_DONTNEED) == 0:
                given += end - start
    return given


@contextmanager
def giving_back(files: Iterable[Path]) -> Iterator[None]:
    """Keep the pages of ``files`` out of this process's memory while the context is open, and drop them at its end."""
    kept = list(files)
    done = threading.Event()

    def watch() -> None:
        while not done.wait(INTERVAL):
            give_back(kept)

    watcher = threading.Thread(target=watch, name="giving-back", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()
        give_back(kept)
