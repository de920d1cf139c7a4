"""The engine protocol: bind shapes once, write inputs when they change, run, read."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, overload

import numpy as np

from latentedge.runtime.bundle import Array, Component, TensorSpec
from latentedge.runtime.errors import EngineError, UsageError


@dataclass(frozen=True)
class EngineOptions:
    """What the caller asks of a backend. ``None`` leaves the backend's own measured default."""

    threads: int | None = None
    #: The backend's name for a device: "cpu", "gpu", "gpu:1", "cuda", "tensorrt".
    device: str | None = None
    cuda_graph: bool = False
    #: Components are loaded when they are needed and freed before the next one.
    low_memory: bool = False
    #: Folder for compiled models; ``None``: inside the bundle's ``engines/``.
    cache: Path | None = None
    #: Run a denoiser that the bundle holds in parts (``docs/speed.md``) as parts.
    hoisting: bool = True
    #: Compute a denoiser's deep blocks in every n-th evaluation only (step caching, ``docs/speed.md``); 1: in each.
    cache_interval: int = 1
    #: Evaluations of a picture, counted from 0, that compute the deep blocks, in place of an interval.
    cache_full: tuple[int, ...] = ()
    #: Further backend-specific settings, by that backend's own names.
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def caching(self) -> bool:
        """Whether a denoiser's deep blocks are left out of some evaluations."""
        return self.cache_interval > 1 or bool(self.cache_full)


class Engine(ABC):
    """One component, loaded by one engine library.

    ``bind(batch=2, ...)`` fixes the axes and allocates buffers, ``write`` copies an input, ``run`` computes,
    ``read`` gives an output. Buffers keep their address between two ``bind`` calls with the same axes (CUDA graphs
    need that), and a written input stays written. The arrays that ``read`` returns are the caller's own.
    """

    #: The registry's name of the backend.
    backend: str

    def __init__(self, component: Component, precision: str) -> None:
        self.component = component
        self.precision = precision
        self.axes: dict[str, int] = {}
        #: Whoever relies on its inputs staying written; cleared when the buffers are bound anew.
        self.writer: object | None = None
        self._written: set[str] = set()
        #: Inputs by name as the bound axes make them: declaration, dtype, shape.
        self._expected: dict[str, tuple[TensorSpec, np.dtype[Any], tuple[int, ...]]] = {}
        self._offered = {spec.name: spec for spec in component.outputs}
        self._bound = False
        self._closed = False

    def bind(self, **axes: int) -> None:
        """Fix every axis of the component and allocate buffers; a repeated call with the same axes does nothing."""
        self._check_open()
        if set(axes) != set(self.component.axes):
            raise UsageError(f"{self.component.name} has the axes {sorted(self.component.axes)}, found {sorted(axes)}.")
        for name, length in axes.items():
            multiple = self.component.axes[name].multiple
            if length < 1 or length % multiple:
                raise UsageError(
                    f"{self.component.name}: {name} must be a positive multiple of {multiple}, found {length}."
                )
        if axes == self.axes and self._bound:
            return
        self.axes = dict(axes)
        self._written.clear()
        self.writer = None
        # A failure leaves the engine unbound, not bound to buffers that are gone.
        self._bound = False
        self._expected = {
            spec.name: (spec, np.dtype(spec.dtype), spec.resolve(self.axes)) for spec in self.component.inputs
        }
        self._bind()
        self._bound = True

    def write(self, name: str, array: Array) -> None:
        """Copy an input. Dtype and shape must be exactly what the component declares for the bound axes."""
        if self._closed or not self._bound or name not in self._expected:
            self._check_open()
            self.component.input(name)
            self._check_bound()
        spec, dtype, expected = self._expected[name]
        if array.dtype != dtype or array.shape != expected:
            raise UsageError(
                f"{self.component.name} input {name}: expected {spec.dtype} {list(expected)}, "
                f"found {array.dtype} {list(array.shape)}."
            )
        self._write(spec, array)
        self._written.add(name)

    @overload
    def run(self) -> None: ...
    @overload
    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]: ...

    def run(self, inputs: Mapping[str, Array] | None = None) -> dict[str, Array] | None:
        """Compute. With ``inputs``: bind from their shapes, write them all, run, and return every output."""
        self._check_open()
        if inputs is not None:
            self.writer = None
            self.bind(**self.component.axes_of(inputs))
            for name, array in inputs.items():
                self.write(name, array)
        self._check_bound()
        if len(self._written) < len(self._expected):
            missing = [name for name in self._expected if name not in self._written]
            raise UsageError(f"{self.component.name} cannot run: inputs not written: {', '.join(missing)}.")
        self._run()
        if inputs is None:
            return None
        return {spec.name: self.read(spec.name) for spec in self.component.outputs}

    def read(self, name: str) -> Array:
        """A copy of an output of the last ``run``."""
        if self._closed or not self._bound or name not in self._offered:
            self._check_open()
            self._check_bound()
            self.component.output(name)
        return self._read(self._offered[name])

    def close(self) -> None:
        """Free everything; closing twice is allowed."""
        if not self._closed:
            self._close()
            self._closed = True

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _check_open(self) -> None:
        if self._closed:
            raise EngineError(f"{self.component.name}: this engine was closed.")

    def _check_bound(self) -> None:
        if not self._bound:
            raise UsageError(f"{self.component.name}: bind the axes {sorted(self.component.axes)} first.")

    @abstractmethod
    def _bind(self) -> None:
        """Allocate buffers for ``self.axes``."""

    @abstractmethod
    def _write(self, spec: TensorSpec, array: Array) -> None:
        """Copy a checked input into its buffer."""

    @abstractmethod
    def _run(self) -> None:
        """Compute all outputs from the written inputs."""

    @abstractmethod
    def _read(self, spec: TensorSpec) -> Array:
        """Copy an output out."""

    @abstractmethod
    def _close(self) -> None:
        """Free device memory and sessions."""
