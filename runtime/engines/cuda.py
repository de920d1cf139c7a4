"""The CUDA runtime as engines need it: checked calls, memory with an owner, one stream, graphs of its work.

Driven through ``cuda-bindings`` 12 or 13. Every return code is checked; a failure is an :class:`EngineError` that
names the call. Addresses are plain integers.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from latentedge.runtime.bundle import Array
from latentedge.runtime.errors import EngineError, MissingDependencyError

#: Where the runtime API lives: cuda-bindings since 12.6.1, and cuda-python before.
MODULES = ("cuda.bindings.runtime", "cuda.cudart")


@functools.cache
def api() -> Any:
    """The bindings of the CUDA runtime; :class:`MissingDependencyError` says what to install."""
    for name in MODULES:
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError:
            continue
    raise MissingDependencyError(
        "driving a GPU needs the Python package cuda-bindings, which is not installed.",
        hint="pip install cuda-bindings, of the major version of the installed CUDA (12 on JetPack 6)",
    )


def call(name: str, *arguments: Any) -> Any:
    """Call ``name`` of the CUDA runtime and return its result; an error code becomes an :class:`EngineError`."""
    runtime = api()
    code, *results = getattr(runtime, name)(*arguments)
    if int(code) != 0:
        _, text = runtime.cudaGetErrorString(code)
        words = text.decode() if isinstance(text, bytes) else str(text)
        raise EngineError(f"CUDA call {name} failed: {words} (error {int(code)}).", hint=_HINTS.get(int(code)))
    return results[0] if len(results) == 1 else tuple(results)


_HINTS = {
    2: "free GPU memory, use --low-memory, or build for smaller batches and pictures",
    35: "install or update the NVIDIA driver; `latentedge doctor` shows what is here",
    100: "no NVIDIA GPU is visible; `latentedge doctor` shows what is here",
}


def compute_capability(device: int = 0) -> str:
    """Compute capability of a device, such as ``"8.7"``."""
    attributes = api().cudaDeviceAttr
    major = call("cudaDeviceGetAttribute", attributes.cudaDevAttrComputeCapabilityMajor, device)
    minor = call("cudaDeviceGetAttribute", attributes.cudaDevAttrComputeCapabilityMinor, device)
    return f"{int(major)}.{int(minor)}"


class DeviceMemory:
    """Bytes on the device, at one address until they are freed."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.address = int(call("cudaMalloc", max(size, 1)))

    def free(self) -> None:
        """Give the memory back; freeing twice is allowed."""
        if self.address:
            address, self.address = self.address, 0
            call("cudaFree", address)


class PinnedArray:
    """A numpy array in page-locked host memory, which the device copies from and to without a detour."""

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        size = math.prod(shape) * dtype.itemsize
        self.address = int(call("cudaMallocHost", max(size, 1)))
        raw = (ctypes.c_byte * size).from_address(self.address)
        self.array: Array = np.ctypeslib.as_array(raw).view(dtype).reshape(shape)

    def free(self) -> None:
        """Give the memory back; ``array`` must not be used afterwards. Freeing twice is allowed."""
        if self.address:
            address, self.address = self.address, 0
            self.array = np.empty(0)
            call("cudaFreeHost", address)


class Graph:
    """Recorded work of a stream, launched as one."""

    def __init__(self, graph: Any) -> None:
        try:
            self._executable = call("cudaGraphInstantiate", graph, 0)
        finally:
            call("cudaGraphDestroy", graph)

    def launch(self, stream: Stream) -> None:
        """Put the recorded work on ``stream``."""
        call("cudaGraphLaunch", self._executable, stream.handle)

    def free(self) -> None:
        """Give the graph back; freeing twice is allowed."""
        if self._executable is not None:
            executable, self._executable = self._executable, None
            call("cudaGraphExecDestroy", executable)


class Stream:
    """A queue of work on the device. It is never the default stream, which cannot be captured."""

    def __init__(self) -> None:
        self.handle: Any = call("cudaStreamCreateWithFlags", api().cudaStreamNonBlocking)

    def to_device(self, target: DeviceMemory, source: PinnedArray) -> None:
        """Queue a copy of the whole of ``source``."""
        kind = api().cudaMemcpyKind.cudaMemcpyHostToDevice
        call("cudaMemcpyAsync", target.address, source.address, source.array.nbytes, kind, self.handle)

    def to_host(self, target: PinnedArray, source: DeviceMemory) -> None:
        """Queue a copy that fills ``target``."""
        kind = api().cudaMemcpyKind.cudaMemcpyDeviceToHost
        call("cudaMemcpyAsync", target.address, source.address, target.array.nbytes, kind, self.handle)

    def zero(self, target: DeviceMemory) -> None:
        """Queue filling ``target`` with zero bytes."""
        call("cudaMemsetAsync", target.address, 0, target.size, self.handle)

    def wait(self) -> None:
        """Wait for everything queued; errors of the work surface here."""
        call("cudaStreamSynchronize", self.handle)

    @contextmanager
    def capture(self) -> Iterator[list[Graph]]:
        """Record what the block queues in place of running it; the list holds the graph afterwards."""
        recorded: list[Graph] = []
        call("cudaStreamBeginCapture", self.handle, api().cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal)
        try:
            yield recorded
        except BaseException:
            # Ends the capture, so that the stream can be used again; it has no graph where CUDA itself failed.
            code, graph = api().cudaStreamEndCapture(self.handle)
            if int(code) == 0:
                call("cudaGraphDestroy", graph)
            raise
        recorded.append(Graph(call("cudaStreamEndCapture", self.handle)))

    def free(self) -> None:
        """Give the stream back; freeing twice is allowed."""
        if self.handle is not None:
            handle, self.handle = self.handle, None
            call("cudaStreamDestroy", handle)
