"""Engine libraries by name. A new backend is one module here and one line in :data:`BACKENDS`."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

from latentedge.runtime.bundle import Bundle, Component
from latentedge.runtime.engines.base import Engine, EngineOptions
from latentedge.runtime.errors import MissingDependencyError, UsageError

__all__ = ["BACKENDS", "Backend", "Engine", "EngineOptions", "open_engine"]

#: ``open(bundle, component, precision, options)`` of a backend's module.
Opener = Callable[[Bundle, Component, str, EngineOptions], Engine]


@dataclass(frozen=True)
class Backend:
    """An engine library: the module that drives it, the import that it needs, and the extra that brings it."""

    module: str
    requires: str
    extra: str
    #: The module's function that opens a component.
    opener: str = "open_engine"
    #: Whether a denoiser that the bundle holds in parts runs in parts (``hoisted.py``) also without step caching.
    hoisting: bool = False
    #: Whether it loads the ONNX graph itself; a plan has a key of its own (``plans.py``).
    reads_graph: bool = True
    #: The fields of ``EngineOptions`` that it follows and a caller may name with it (``settings.py``).
    settings: tuple[str, ...] = ("device", "threads")

    def installed(self) -> bool:
        """Whether the library can be found, without importing it."""
        spec = importlib.util.find_spec(self.requires)
        return spec is not None and spec.loader is not None


BACKENDS: dict[str, Backend] = {
    "onnxruntime": Backend(
        "latentedge.runtime.engines.onnxruntime", "onnxruntime", "cpu", hoisting=True,
        settings=("device", "cuda_graph", "threads"),
    ),
    "openvino": Backend("latentedge.runtime.engines.openvino", "openvino", "openvino", hoisting=True),
    "tensorrt": Backend(
        "latentedge.runtime.engines.tensorrt", "tensorrt", "gpu", reads_graph=False, settings=("device", "cuda_graph")
    ),
    "tensorrt-rtx": Backend(
        "latentedge.runtime.engines.tensorrt", "tensorrt_rtx", "rtx", "open_engine_rtx", reads_graph=False,
        settings=("device", "cuda_graph"),
    ),
}  # fmt: skip


def registered(name: str) -> Backend:
    """The entry of a backend; :class:`UsageError` lists them where there is none."""
    if name not in BACKENDS:
        raise UsageError(f"there is no backend {name!r}; choose one of: auto, {', '.join(BACKENDS)}.")
    return BACKENDS[name]


def backend(name: str) -> Backend:
    """The backend ``name``, whose library is installed; an error says what to install otherwise."""
    found = registered(name)
    if not found.installed():
        raise MissingDependencyError(
            f"the backend {name} needs the Python package {found.requires}, which is not installed.",
            hint=f"pip install 'latentedge[{found.extra}]'",
        )
    return found


def open_engine(bundle: Bundle, component: str, name: str, precision: str, options: EngineOptions) -> Engine:
    """Load one component of a bundle with the backend ``name`` in ``precision``; never another one."""
    found = backend(name)
    if options.cuda_graph and "cuda_graph" not in found.settings:
        raise UsageError(f"the backend {name} has no CUDA graphs.")
    opener = cast("Opener", getattr(importlib.import_module(found.module), found.opener))
    spec = bundle.component(component)
    if options.hoisting and (found.hoisting or options.caching):
        from latentedge.runtime.engines.hoisted import open_parts

        parts = open_parts(bundle, spec, precision, options, opener)
        if parts is not None:
            return parts
    return opener(bundle, spec, precision, options)
