"""Measured processes: started, asked one thing at a time, and ended. The same protocol for this project and its peers."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from latentedge.runtime.errors import EngineError

#: This project's own worker.
WORKER = (sys.executable, "-m", "latentedge.benchmarks.worker")


class MeasuredProcess:
    """A worker process. ``ask`` sends one message and waits for its answer."""

    def __init__(self, name: str, command: Sequence[str] = WORKER, environment: dict[str, str] | None = None) -> None:
        self.name = name
        self._errors: list[str] = []
        self._process = subprocess.Popen(
            list(command),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL if environment is None else None,
            text=True,
            env=environment,
        )

    def ask(self, do: str, **message: Any) -> dict[str, Any]:
        """Send ``{"do": do, ...}``; :class:`EngineError` with the worker's words when it fails or is gone."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, **message}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            code = self._process.wait()
            reason = "it ran out of memory" if code == -9 else f"its exit code was {code}"
            raise EngineError(f"the process that measures {self.name} ended during {do!r}: {reason}.")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise EngineError(f"{self.name}: {answer['error']}")
        return answer

    def close(self) -> None:
        """End the process: politely, by closing its input."""
        if self._process.poll() is None and self._process.stdin is not None:
            self._process.stdin.close()
            try:
                self._process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()

    def __enter__(self) -> MeasuredProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def python_in(environment: Path) -> str:
    """The interpreter of a virtual environment."""
    return str(environment / "bin" / "python")
