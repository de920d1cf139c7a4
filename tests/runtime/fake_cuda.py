# ruff: noqa: N802, N815, C901 - CUDA's and TensorRT's names; one fake module
"""A CUDA runtime in host memory that records calls, and a TensorRT whose plans are small JSON programs.

Work put on a stream runs only when the stream is waited for, as on a device: a buffer that is reused too early, read
too early, or freed too early gives wrong numbers or an error here too.
"""

from __future__ import annotations

import ctypes
import enum
import json
import math
import types
from collections.abc import Callable
from typing import Any

import numpy as np

DTYPES = {"FLOAT": np.float32, "HALF": np.float16, "INT64": np.int64}


class FakeStream(int):
    """A stream's handle."""


class FakeCuda:
    """The functions that ``runtime/engines/cuda.py`` calls, over host memory."""

    cudaStreamNonBlocking = 1
    cudaMemcpyKind = enum.IntEnum("cudaMemcpyKind", {"cudaMemcpyHostToDevice": 1, "cudaMemcpyDeviceToHost": 2})
    cudaStreamCaptureMode = enum.IntEnum("cudaStreamCaptureMode", {"cudaStreamCaptureModeThreadLocal": 1})
    cudaDeviceAttr = enum.IntEnum(
        "cudaDeviceAttr", {"cudaDevAttrComputeCapabilityMajor": 75, "cudaDevAttrComputeCapabilityMinor": 76}
    )

    def __init__(self, compute_capability: tuple[int, int] = (8, 7)) -> None:
        self.compute_capability = compute_capability
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        #: Error codes by function: the next call of it gives this code.
        self.failures: dict[str, int] = {}
        self.memory: dict[int, Any] = {}
        self.queue: list[Callable[[], None]] = []
        self.captured: list[Callable[[], None]] | None = None
        self.graphs: set[int] = set()
        self._graph_work: dict[int, list[Callable[[], None]]] = {}
        self._handles = 0

    def __getattr__(self, name: str) -> Any:
        implementation = getattr(type(self), f"_{name}", None)
        if implementation is None:
            raise AttributeError(name)

        def call(*arguments: Any) -> tuple[Any, ...]:
            self.calls.append((name, arguments))
            code = self.failures.pop(name, 0)
            if code:
                return (code, None)
            return (0, implementation(self, *arguments))

        return call

    def names(self) -> list[str]:
        return [name for name, _ in self.calls]

    def live(self) -> int:
        """Allocations and graphs that were not given back."""
        return len(self.memory) + len(self.graphs)

    def check(self, address: int, size: int) -> None:
        assert any(start <= address and address + size <= start + len(block) for start, block in self.memory.items()), (
            f"{size} bytes at {address} were freed or never allocated"
        )

    def put(self, work: Callable[[], None]) -> None:
        (self.queue if self.captured is None else self.captured).append(work)

    def cudaGetErrorString(self, code: int) -> tuple[int, bytes]:
        return 0, f"fake error {int(code)}".encode()

    def _cudaSetDevice(self, index: int) -> None:
        assert index >= 0

    def _cudaDeviceGetAttribute(self, attribute: int, device: int) -> int:
        return self.compute_capability[0 if attribute == 75 else 1]

    def _cudaMalloc(self, size: int) -> int:
        # Never zeros: whoever relies on fresh memory being zero fails.
        block = (ctypes.c_ubyte * size)(*([0xA5] * min(size, 1 << 16)))
        self.memory[ctypes.addressof(block)] = block
        return ctypes.addressof(block)

    _cudaMallocHost = _cudaMalloc

    def _cudaFree(self, address: int) -> None:
        assert not self.queue, "memory was freed while work was queued"
        del self.memory[address]

    _cudaFreeHost = _cudaFree

    def _cudaStreamCreateWithFlags(self, flags: int) -> FakeStream:
        assert flags == self.cudaStreamNonBlocking
        self._handles += 1
        return FakeStream(self._handles)

    def _cudaStreamDestroy(self, stream: FakeStream) -> None:
        assert not self.queue

    def _cudaStreamSynchronize(self, stream: FakeStream) -> None:
        assert self.captured is None, "a stream must not be waited for while it is captured"
        while self.queue:
            self.queue.pop(0)()

    def _cudaMemcpyAsync(self, target: int, source: int, size: int, kind: int, stream: FakeStream) -> None:
        def copy() -> None:
            self.check(target, size)
            self.check(source, size)
            ctypes.memmove(target, source, size)

        self.put(copy)

    def _cudaMemsetAsync(self, target: int, value: int, size: int, stream: FakeStream) -> None:
        self.put(lambda: ctypes.memset(target, value, size) and None)

    def _cudaStreamBeginCapture(self, stream: FakeStream, mode: int) -> None:
        assert self.captured is None
        self.captured = []

    def _cudaStreamEndCapture(self, stream: FakeStream) -> int:
        work, self.captured = self.captured, None
        return self._graph(work or [])

    def _graph(self, work: list[Callable[[], None]]) -> int:
        self._handles += 1
        self.graphs.add(self._handles)
        self._graph_work[self._handles] = work
        return self._handles

    def _cudaGraphInstantiate(self, graph: int, flags: int) -> int:
        return self._graph(self._graph_work[graph])

    def _cudaGraphDestroy(self, graph: int) -> None:
        self.graphs.remove(graph)

    _cudaGraphExecDestroy = _cudaGraphDestroy

    def _cudaGraphLaunch(self, graph: int, stream: FakeStream) -> None:
        assert graph in self.graphs, "a graph was launched after it was given back"
        for work in self._graph_work[graph]:
            self.put(work)


def fake_tensorrt(cuda: FakeCuda, version: str = "10.3.0") -> types.SimpleNamespace:
    """A module with the part of TensorRT's interface that the runtime uses.

    A plan is JSON: ``inputs`` and ``outputs`` (dtype name by tensor), ``shape`` (the output shape's input),
    ``scale`` and ``offset`` of ``output = scale * sum(inputs) + offset``, ``scratch`` bytes, and ``fails``: the call
    that fails with a logged error.
    """
    library = types.SimpleNamespace(__version__=version)
    severity = enum.IntEnum("Severity", {"INTERNAL_ERROR": 0, "ERROR": 1, "WARNING": 2, "INFO": 3, "VERBOSE": 4})
    library.ILogger = type("ILogger", (), {"Severity": severity, "__init__": lambda self: None})
    library.TensorIOMode = enum.Enum("TensorIOMode", ["NONE", "INPUT", "OUTPUT"])
    library.ExecutionContextAllocationStrategy = enum.Enum("Strategy", ["STATIC", "ON_PROFILE_CHANGE", "USER_MANAGED"])
    library.DynamicShapesKernelSpecializationStrategy = enum.Enum("Specialization", ["LAZY", "EAGER", "NONE"])
    library.DataType = enum.Enum("DataType", [*DTYPES, "BF16"])
    library.executed = []
    #: (plan, shapes) of every kernel that was compiled; and what a runtime cache of this driver begins with.
    library.compiled = []
    library.driver = "driver 1"
    library.refitted = []
    library.runtimes = []

    class RuntimeCache:
        """Kernels by name, of which ``deserialize`` takes only those of the same driver."""

        def __init__(self, logger: Any) -> None:
            self.logger, self.kernels = logger, []

        def serialize(self) -> bytes:
            return json.dumps([library.driver, self.kernels]).encode()

        def deserialize(self, blob: bytes) -> bool:
            try:
                driver, kernels = json.loads(blob)
            except ValueError:
                driver, kernels = None, []
            if driver != library.driver:
                self.logger.log(severity.ERROR, "[fake] the cache is of another driver")
                return False
            self.kernels = kernels
            return True

    class RuntimeConfig:
        dynamic_shapes_kernel_specialization_strategy = library.DynamicShapesKernelSpecializationStrategy.LAZY

        def __init__(self, logger: Any) -> None:
            self.logger, self.strategy, self.cache = logger, None, RuntimeCache(logger)

        def set_execution_context_allocation_strategy(self, strategy: Any) -> None:
            self.strategy = strategy

        def create_runtime_cache(self) -> RuntimeCache:
            return RuntimeCache(self.logger)

        def set_runtime_cache(self, cache: RuntimeCache) -> bool:
            self.cache = cache
            return True

    class Context:
        def __init__(self, program: dict[str, Any], logger: Any, config: RuntimeConfig | None) -> None:
            self.program, self.logger, self.config = program, logger, config
            self.shapes: dict[str, tuple[int, ...]] = {}
            self.addresses: dict[str, int] = {}
            self.scratch: tuple[int, int] | None = None

        def _fails(self, call: str) -> bool:
            if self.program.get("fails") != call:
                return False
            self.logger.log(severity.ERROR, f"[fake] {call} is not possible")
            return True

        def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
            self.shapes[name] = tuple(shape)
            return not self._fails("set_input_shape")

        def infer_shapes(self) -> list[str]:
            missing = [name for name in self.program["inputs"] if name not in self.shapes]
            for name in self.program["outputs"]:
                self.shapes[name] = self.shapes[self.program["shape"]]
            return missing

        def get_tensor_shape(self, name: str) -> tuple[int, ...]:
            return self.shapes[name]

        def set_tensor_address(self, name: str, address: int) -> bool:
            self.addresses[name] = address
            return not self._fails("set_tensor_address")

        def update_device_memory_size_for_shapes(self) -> int:
            return int(self.program["scratch"])

        def set_device_memory(self, address: int, size: int) -> None:
            assert size >= self.program["scratch"]
            self.scratch = (address, size)

        def execute_async_v3(self, stream: int) -> bool:
            if self._fails("execute_async_v3"):
                return False
            addresses, shapes, scratch = dict(self.addresses), dict(self.shapes), self.scratch
            assert scratch is not None
            self._compile(shapes)

            def array(name: str, kind: str) -> Any:
                dtype = np.dtype(DTYPES[kind])
                size = math.prod(shapes[name]) * dtype.itemsize
                cuda.check(addresses[name], size)
                block = (ctypes.c_ubyte * size).from_address(addresses[name])
                return np.frombuffer(block, dtype).reshape(shapes[name])

            def work() -> None:
                cuda.check(*scratch)
                library.executed.append(self.program["name"])
                total = sum(
                    array(name, kind).astype(np.float64).reshape(len(array(name, kind)), -1).sum(axis=1)
                    for name, kind in self.program["inputs"].items()
                    if name != self.program["shape"]
                )
                base = array(self.program["shape"], self.program["inputs"][self.program["shape"]]).astype(np.float64)
                base = base + np.reshape(total, (-1, *[1] * (base.ndim - 1)))
                for name, kind in self.program["outputs"].items():
                    array(name, kind)[...] = self.program["scale"] * base + self.program["offset"]

            cuda.put(work)
            return True

        def _compile(self, shapes: dict[str, tuple[int, ...]]) -> None:
            kernel = f"{self.program['name']} {sorted(shapes.items())}"
            if self.config is not None and kernel not in self.config.cache.kernels:
                assert cuda.captured is None, "a kernel cannot be compiled while a graph is recorded"
                self.config.cache.kernels.append(kernel)
                library.compiled.append(kernel)

    class Engine:
        def __init__(self, program: dict[str, Any], logger: Any) -> None:
            self.program, self.logger = program, logger
            self.names = [*program["inputs"], *program["outputs"]]
            self.num_io_tensors = len(self.names)

        def get_tensor_name(self, index: int) -> str:
            return self.names[index]

        def get_tensor_mode(self, name: str) -> Any:
            return library.TensorIOMode["INPUT" if name in self.program["inputs"] else "OUTPUT"]

        def get_tensor_dtype(self, name: str) -> Any:
            return library.DataType[{**self.program["inputs"], **self.program["outputs"]}[name]]

        def create_runtime_config(self) -> RuntimeConfig:
            return RuntimeConfig(self.logger)

        def create_execution_context(self, strategy: Any) -> Context | None:
            config = strategy if isinstance(strategy, RuntimeConfig) else None
            if config is not None:
                assert config.dynamic_shapes_kernel_specialization_strategy.name == "EAGER"
                strategy = config.strategy
            assert strategy is library.ExecutionContextAllocationStrategy.USER_MANAGED
            if self.program.get("fails") == "create_execution_context":
                self.logger.log(severity.ERROR, "[fake] no memory for a context")
                return None
            return Context(self.program, self.logger, config)

    class Runtime:
        engine_host_code_allowed = False

        def __init__(self, logger: Any) -> None:
            self.logger = logger
            library.runtimes.append(self)

        def deserialize_cuda_engine(self, content: Any) -> Engine | None:
            try:
                return Engine(json.loads(bytes(content)), self.logger)
            except ValueError:
                self.logger.log(severity.ERROR, "[fake] magic tag does not match")
                return None

    class Refitter:
        def __init__(self, engine: Engine, logger: Any) -> None:
            self.engine = engine

        def refit_cuda_engine(self) -> bool:
            return self.engine.program.get("fails") != "refit_cuda_engine"

    class OnnxParserRefitter:
        def __init__(self, refitter: Refitter, logger: Any) -> None:
            self.refitter = refitter

        def refit_from_file(self, path: str) -> bool:
            library.refitted.append(path)
            return True

    library.Runtime, library.Refitter, library.OnnxParserRefitter = Runtime, Refitter, OnnxParserRefitter
    return library
