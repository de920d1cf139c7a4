"""The builder's progress on a terminal, and a clean stop on Ctrl-C."""

from __future__ import annotations

import importlib.util
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from latentedge.runtime.errors import Interrupted


class Stop:
    """Whether the user asked to stop."""

    asked = False


@contextmanager
def stop_on_interrupt() -> Iterator[Stop]:
    """Turn Ctrl-C into a request that the builder is told about; afterwards :class:`Interrupted` is raised.

    An exception must not pass through the library's callbacks, so the signal only sets ``asked``.
    """
    stop = Stop()

    def ask(number: int, frame: Any) -> None:
        stop.asked = True

    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = signal.signal(signal.SIGINT, ask)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)
    if stop.asked:
        raise Interrupted("the build was stopped; nothing was kept of the engine that it was at.")


def progress_monitor(library: Any, stop: Stop, bars: Any) -> Any:
    """A TensorRT progress monitor: one bar for each phase, and no further step once ``stop`` was asked."""

    class Monitor(library.IProgressMonitor):  # type: ignore[misc]  # the class to derive from is known when the library is
        def __init__(self) -> None:
            library.IProgressMonitor.__init__(self)
            self.tasks: dict[str, list[Any]] = {}

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:
            if bars is not None:
                depth = 0 if parent is None else 1
                self.tasks.setdefault(name, []).append(bars.add_task("  " * depth + name, total=steps))

        def step_complete(self, name: str, step: int) -> bool:
            if self.tasks.get(name):
                bars.update(self.tasks[name][-1], completed=step + 1)
            return not stop.asked

        def phase_finish(self, name: str) -> None:
            if self.tasks.get(name):
                bars.remove_task(self.tasks[name].pop())

    return Monitor()


def progress_bars() -> Any:
    """A context manager that gives bars on stderr where it is a terminal and rich is installed, else ``None``."""
    if not sys.stderr.isatty() or importlib.util.find_spec("rich") is None:
        return nullcontext()
    from rich.console import Console
    from rich.progress import Progress

    return Progress(console=Console(stderr=True), transient=True)
