"""Results of a run by step, each written as soon as it is there."""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from latentedge.runtime.errors import MissingDependencyError


class Report:
    """Steps that gave a result, that failed, that something is missing for, and that the time was over for."""

    def __init__(self, path: Path, minutes: float | None = None) -> None:
        self.path = path
        self.results: dict[str, Any] = {}
        self.failed: dict[str, dict[str, str]] = {}
        self.missing: dict[str, str] = {}
        self.left_out: list[str] = []
        self._deadline = float("inf") if minutes is None else time.monotonic() + 60 * minutes

    def step(self, name: str, action: Callable[[], Any], shown: Callable[[Any], Any] = lambda result: result) -> Any:
        """What ``action`` gives, recorded under ``name`` as ``shown`` gives it; ``None`` where it did not come to that."""
        if time.monotonic() > self._deadline:
            self.left_out.append(name)
            self.write()
            return None
        click.echo(name, err=True)
        start, result = time.monotonic(), None
        try:
            result = action()
            self.results[name] = {"seconds": round(time.monotonic() - start, 2), "result": shown(result)}
        except (MissingDependencyError, ImportError) as error:
            self.missing[name] = str(getattr(error, "message", error))
            click.echo(f"  not here: {self.missing[name]}", err=True)
        except Exception as error:  # noqa: BLE001 - one failure must not hide the results of the others
            self.failed[name] = {"error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()}
            click.echo(f"  failed: {error}", err=True)
        self.write()
        return result

    def write(self) -> None:
        """Write everything so far."""
        content = {
            "failed": self.failed,
            "not here": self.missing,
            "left out": self.left_out,
            "results": self.results,
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
