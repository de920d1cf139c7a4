"""What every peer's worker answers: one JSON line for each JSON line of stdin. Standard library only."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def serve(worker: Any) -> None:
    """Call the worker's method named by ``do`` for every line; libraries' output goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        message = json.loads(line)
        try:
            answer = memory() if message["do"] == "memory" else getattr(worker, message.pop("do"))(**message)
        except Exception as error:  # noqa: BLE001 - a peer's failure is a result, told in its own words
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def timed(run: Callable[[], object], runs: int) -> dict[str, list[float]]:
    """Seconds of each run by the clock, and what the process spent on processors."""
    found: dict[str, list[float]] = {"seconds": [], "processor_seconds": []}
    for _ in range(runs):
        start, processor = time.perf_counter(), time.process_time()
        run()
        found["seconds"].append(time.perf_counter() - start)
        found["processor_seconds"].append(time.process_time() - processor)
    return found


def memory() -> dict[str, int]:
    """Resident memory of this process in bytes: now, at its peak, and what no file backs."""
    names = {"VmRSS": "rss", "VmHWM": "peak_rss", "RssAnon": "anonymous"}
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {names[key]: int(words[1]) * 1024 for words in lines if (key := words[0].rstrip(":")) in names}
