"""What ``latentedge build`` asks of a backend, and which module answers. A new backend is one line in :data:`BUILDERS`."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from latentedge.runtime.bundle import Bundle, Component
from latentedge.runtime.engines import BACKENDS
from latentedge.runtime.engines.hoisted import PARTS
from latentedge.runtime.errors import UsageError

#: ``module:function`` by backend; the function is a :data:`Builder`.
BUILDERS: dict[str, str] = {
    "onnxruntime": "latentedge.export.measured_builder:build",
    "openvino": "latentedge.export.measured_builder:build",
    "tensorrt": "latentedge.export.tensorrt.builder:build",
    "tensorrt-rtx": "latentedge.export.tensorrt.builder:build",
}


@dataclass(frozen=True)
class Range:
    """Lengths that an engine has to take, from ``low`` to ``high``."""

    low: int
    high: int

    @classmethod
    def parse(cls, text: str) -> Range:
        """``"2"`` or ``"1..4"``; :class:`UsageError` for anything else."""
        match = re.fullmatch(r"(\d+)(?:\.\.(\d+))?", text)
        if match is None or not 1 <= int(match[1]) <= int(match[2] or match[1]):
            raise UsageError(f"expected a length such as 2 or a range such as 1..4, found {text!r}.")
        return cls(int(match[1]), int(match[2] or match[1]))


@dataclass(frozen=True)
class BuildRequest:
    """One call of ``latentedge build``. ``None`` leaves a setting to the builder."""

    bundle: Bundle
    backend: str
    #: Precisions of the denoiser; the other components follow it. Empty: every one that the bundle has.
    precisions: tuple[str, ...] = ()
    #: Compile and report, but keep nothing.
    check: bool = False
    #: Pictures at once, and pixels of height and width; ``None``: one picture of the model's own size.
    batch: Range | None = None
    size: tuple[Range, Range] | None = None
    compute_capabilities: tuple[str, ...] = ()
    #: Bytes.
    max_engine_memory: int | None = None
    memory_limit: int | None = None
    optimization_level: int | None = None
    version_compatible: bool = False
    stripped: bool = False
    #: Also the two graphs of step caching (``docs/speed.md``).
    step_caching: bool = False
    #: For ``generate --low-memory``, which evaluates one branch of guidance at a time.
    low_memory: bool = False
    cache: Path | None = None
    notify: Callable[[str], None] = print

    def settings(self) -> dict[str, object]:
        """The settings that differ from their defaults, by the names of their options."""
        values: dict[str, object] = {
            "--check": self.check,
            "--batch": self.batch,
            "--size": self.size,
            "--compute-capability": self.compute_capabilities,
            "--max-engine-memory": self.max_engine_memory,
            "--memory-limit": self.memory_limit,
            "--optimization-level": self.optimization_level,
            "--plan version-compatible": self.version_compatible,
            "--plan stripped": self.stripped,
            "--plan step-caching": self.step_caching,
            "--low-memory": self.low_memory,
        }
        return {name: value for name, value in values.items() if value not in (None, False, ())}

    def refuse_others(self, *known: str) -> None:
        """:class:`UsageError` where a setting was made that this backend does not have."""
        others = [name for name in self.settings() if name not in known]
        if others:
            raise UsageError(f"the backend {self.backend} has no {', '.join(others)}.")


@dataclass(frozen=True)
class BuildRow:
    """What became of one component in one precision. Sizes in bytes, ``None`` where the backend does not tell."""

    component: str
    precision: str
    target: str
    seconds: float
    #: Where the engine lies; ``None`` when it was only checked, or failed.
    folder: Path | None = None
    plan_size: int | None = None
    weight_memory: int | None = None
    scratch_memory: int | None = None
    #: Why it does not compile; empty when it does.
    errors: tuple[str, ...] = ()
    #: What the compiler said although it compiles.
    warnings: tuple[str, ...] = ()
    #: Number of consecutive engines.
    parts: int = 1
    reused: bool = False


Builder = Callable[[BuildRequest], list[BuildRow]]


def builder_of(backend: str) -> Builder:
    """The builder of a backend; :class:`UsageError` lists them where there is none."""
    if backend not in BUILDERS:
        raise UsageError(
            f"there is nothing to build for the backend {backend!r}; choose one of: {', '.join(BUILDERS)}."
        )
    module, _, function = BUILDERS[backend].partition(":")
    return cast("Builder", getattr(importlib.import_module(module), function))


def components_to_build(bundle: Bundle, backend: str, *, step_caching: bool = False) -> Iterable[Component]:
    """The components that a backend opens: the parts of a split denoiser only where it runs them as parts.

    A backend that otherwise runs the denoiser whole opens with ``step_caching`` all parts but the single step.
    """
    for name, component in bundle.manifest.components.items():
        part = name.partition(".")[2]
        if not part or BACKENDS[backend].hoisting or (step_caching and part != PARTS[-1]):
            yield component
