"""Kernels that TensorRT-RTX compiled for the GPU at hand, in a file beside the plan: the next load need not compile.

A TensorRT-RTX plan is compiled for the GPU when it first runs. The library itself refuses a cache of another GPU, driver
or version of its own (NVIDIA, TensorRT for RTX, "Working with Runtime Cache"); such a file is replaced.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

from latentedge.runtime.engines import cuda
from latentedge.runtime.errors import EngineError


def cache_path(plan: Path, compute_capability: str) -> Path:
    """Where the kernels of a plan lie for GPUs of one compute capability."""
    return plan.with_name(f"{plan.stem}-{compute_capability}.kernels")


class KernelCache:
    """How the contexts of one engine are made, and the kernels that they compiled.

    ``runtime_config`` goes to ``create_execution_context``; :meth:`save` keeps what was compiled since.
    """

    def __init__(self, library: Any, engine: Any, path: Path) -> None:
        self.path = path
        self.runtime_config = engine.create_runtime_config()
        self.runtime_config.set_execution_context_allocation_strategy(
            library.ExecutionContextAllocationStrategy.USER_MANAGED
        )
        # Otherwise a fallback runs until the kernels for a shape are there: numbers would change within a picture, and a
        # recorded graph would keep the fallback.
        self.runtime_config.dynamic_shapes_kernel_specialization_strategy = (
            library.DynamicShapesKernelSpecializationStrategy.EAGER
        )
        self._kernel_cache = self.runtime_config.create_runtime_cache()
        self._kept = path.read_bytes() if path.is_file() else b""
        self.loaded = bool(self._kept) and bool(self._kernel_cache.deserialize(self._kept))
        if not self.runtime_config.set_runtime_cache(self._kernel_cache):
            raise EngineError(f"TensorRT-RTX takes no runtime cache for {path}.")

    def save(self) -> None:
        """Write the kernels if there are others than in the file. A folder that cannot be written to is a warning."""
        content = bytes(self._kernel_cache.serialize())
        if content == self._kept:
            return
        aside = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        try:
            aside.write_bytes(content)
            aside.replace(self.path)
        except OSError as error:
            warnings.warn(f"compiled kernels are not kept, the next start compiles them again: {error}", stacklevel=2)
        self._kept = content


def open_kernel_cache(library: Any, engine: Any, plan: Path, device: int, errors: list[str]) -> KernelCache:
    """The cache of the plan at ``plan``; what the library logs into ``errors`` about a file that it refuses is dropped."""
    logged = len(errors)
    cache = KernelCache(library, engine, cache_path(plan, cuda.compute_capability(device)))
    if not cache.loaded:
        del errors[logged:]
    return cache
