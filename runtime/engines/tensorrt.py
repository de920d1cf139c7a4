"""TensorRT and TensorRT-RTX without torch: plans built by ``latentedge build``, run from fixed buffers on one stream.

A component is a chain of one or more plans. Tensors are buffers by name, so what one plan writes is what the next one
reads. Scratch memory is shared by all engines of a device, which therefore run one at a time.
"""

from __future__ import annotations

import importlib
import mmap
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from latentedge.runtime.bundle import Array, Bundle, Component, TensorSpec
from latentedge.runtime.engines import cuda
from latentedge.runtime.engines.base import Engine, EngineOptions
from latentedge.runtime.engines.kernel_cache import KernelCache, open_kernel_cache
from latentedge.runtime.engines.plans import Plan, Target, choose_plan, rebuild_command, this_platform, usable_plans
from latentedge.runtime.errors import EngineError, MissingDependencyError, UsageError

if TYPE_CHECKING:
    import tensorrt as trt

#: Python module by backend. Both have the same interface as far as this project uses it.
LIBRARIES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}

#: numpy dtype name by TensorRT's name of an input's or output's type.
DTYPES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "INT64": "int64",
    "INT32": "int32",
    "INT8": "int8",
    "UINT8": "uint8",
    "BOOL": "bool",
}


def load_library(backend: str) -> Any:
    """The Python module of a backend; :class:`MissingDependencyError` with the loader's own words where it fails."""
    try:
        return importlib.import_module(LIBRARIES[backend])
    except (ImportError, OSError) as error:
        raise MissingDependencyError(
            f"{backend} cannot be loaded: {error}.", hint="`latentedge doctor` shows what is here and what to install"
        ) from error


class Log:
    """TensorRT's log: errors are kept for the message of the exception, every line goes to ``listener`` with its level."""

    def __init__(self, library: Any, listener: Callable[[str, str], None] | None = None) -> None:
        self.errors: list[str] = []
        severity = library.ILogger.Severity
        log = self

        class Logger(library.ILogger):  # type: ignore[misc]  # the class to derive from is known when the library is
            def __init__(self) -> None:
                library.ILogger.__init__(self)

            def log(self, level: Any, message: str) -> None:
                if level in (severity.INTERNAL_ERROR, severity.ERROR):
                    log.errors.append(message.strip())
                if listener is not None:
                    listener(level.name, message)

        self.logger: trt.ILogger = Logger()

    def fault(self, what: str, hint: str | None = None) -> EngineError:
        """An error for ``what`` with the lines that TensorRT logged about it."""
        lines, self.errors = self.errors, []
        return EngineError(what + (": " + "; ".join(lines) if lines else "."), hint=hint)


class Device:
    """A GPU as its engines share it: one stream, one scratch memory, and which engines hold memory."""

    def __init__(self, index: int) -> None:
        self.index = index
        self._lock = threading.RLock()
        self.engines: list[TensorRTEngine] = []
        with self.use():
            self.stream = cuda.Stream()
            self.scratch = cuda.DeviceMemory(0)

    @contextmanager
    def use(self) -> Iterator[None]:
        """Hold the device for one engine, and make it this thread's current one."""
        with self._lock:
            cuda.call("cudaSetDevice", self.index)
            yield

    def reserve(self, size: int) -> None:
        """Let the scratch memory hold at least ``size`` bytes; when it moves, recorded graphs are dropped."""
        if size > self.scratch.size:
            for engine in self.engines:
                engine.drop_graph()
            self.scratch.free()
            self.scratch = cuda.DeviceMemory(size)

    def join(self, engine: TensorRTEngine) -> None:
        """Count ``engine`` among those that use this device."""
        self.engines.append(engine)

    def leave(self, engine: TensorRTEngine) -> None:
        """Free the stream and the scratch memory with the last engine."""
        self.engines.remove(engine)
        if not self.engines:
            self.scratch.free()
            self.stream.free()


_devices: dict[int, Device] = {}


def open_device(index: int) -> Device:
    """The device ``index``, shared by the engines that use it."""
    if index not in _devices or not _devices[index].engines:
        _devices[index] = Device(index)
    return _devices[index]


def device_index(name: str | None) -> int:
    """``None``, "gpu", "cuda" or "cuda:1" as a device's number."""
    kind, _, number = (name or "gpu").partition(":")
    if kind not in ("gpu", "cuda") or not (number or "0").isdigit():
        raise UsageError(f"TensorRT has no device {name!r}; choose gpu, or gpu:1 for the second one.")
    return int(number or "0")


def open_engine(bundle: Bundle, component: Component, precision: str, options: EngineOptions) -> Engine:
    """Open a component's engines built by TensorRT; an error says which are missing, stale or for another GPU."""
    return _open("tensorrt", bundle, component, precision, options)


def open_engine_rtx(bundle: Bundle, component: Component, precision: str, options: EngineOptions) -> Engine:
    """Open a component's engines built by TensorRT-RTX; errors as :func:`open_engine`."""
    return _open("tensorrt-rtx", bundle, component, precision, options)


def _open(backend: str, bundle: Bundle, component: Component, precision: str, options: EngineOptions) -> Engine:
    library = load_library(backend)
    index = device_index(options.device)
    target = Target(backend, library.__version__, cuda.compute_capability(index), this_platform())
    plans = usable_plans(bundle, component, precision, target, options.cache)
    return TensorRTEngine(bundle, component, plans, library, open_device(index), options)


class Step:
    """One plan of a chain, loaded, with its execution context; TensorRT-RTX's also with the kernels that it compiles."""

    def __init__(
        self, engine: trt.ICudaEngine, context: trt.IExecutionContext, kernels: KernelCache | None, library: Any
    ) -> None:
        self.engine = engine
        self.context = context
        self.kernels = kernels
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        is_input = library.TensorIOMode.INPUT
        self.inputs = [name for name in names if engine.get_tensor_mode(name) == is_input]
        self.outputs = [name for name in names if engine.get_tensor_mode(name) != is_input]

    def dtype(self, name: str) -> np.dtype[Any]:
        """numpy dtype of an input or output; :class:`EngineError` for one that numpy does not have."""
        kind = self.engine.get_tensor_dtype(name).name
        if kind not in DTYPES:
            raise EngineError(f"the engine's tensor {name} is {kind}, which cannot be passed in or out.")
        return np.dtype(DTYPES[kind])


class TensorRTEngine(Engine):
    """The plans of one component. The plan whose profile lies closest to the bound axes is loaded on ``bind``."""

    def __init__(
        self,
        bundle: Bundle,
        component: Component,
        plans: list[Plan],
        library: Any,
        device: Device,
        options: EngineOptions,
    ) -> None:
        super().__init__(component, plans[0].key.precision)
        self.backend = plans[0].key.backend
        self._bundle, self._plans, self._library, self._device = bundle, plans, library, device
        self._log = Log(library)
        self._cuda_graph = options.cuda_graph
        self._plan: Plan | None = None
        self._steps: list[Step] = []
        self._buffers: dict[str, cuda.DeviceMemory] = {}
        self._staging: dict[str, cuda.PinnedArray] = {}
        self._memory = ExitStack()
        self._scratch_address = 0
        self._graph: cuda.Graph | None = None
        self._kernels_kept = False
        device.join(self)

    def _bind(self) -> None:
        with self._device.use():
            self.drop_graph()
            self._free_buffers()
            command = (
                rebuild_command(self._bundle, self.backend, self.precision) + ", with --batch, --size or --low-memory"
            )
            plan = choose_plan(self._plans, self.axes, command)
            if plan is not self._plan:
                self._load(plan)
            shapes = self._set_shapes()
            for step in self._steps:
                self._allocate(step, shapes)
            # Runs before the buffers are freed: queued work may still use them.
            self._memory.callback(self._device.stream.wait)
            self._set_scratch()
            self._kernels_kept = False
            if self._cuda_graph:
                self._warm_up()
                self._record()

    def _load(self, plan: Plan) -> None:
        self._steps.clear()
        self._plan = None
        runtime: trt.Runtime = self._library.Runtime(self._log.logger)
        # A version-compatible plan brings the lean runtime that it was built with.
        runtime.engine_host_code_allowed = bool(plan.key.options.get("version_compatible"))
        for file in plan.files:
            path = plan.folder / file.path
            engine = self._deserialize(runtime, path, file.size)
            if plan.key.options.get("stripped"):
                self._refit(engine)
            kernels, made_with = None, self._library.ExecutionContextAllocationStrategy.USER_MANAGED
            if self.backend == "tensorrt-rtx":
                kernels = open_kernel_cache(self._library, engine, path, self._device.index, self._log.errors)
                made_with = kernels.runtime_config
            context = engine.create_execution_context(made_with)
            if context is None:
                raise self._log.fault(f"TensorRT gave no execution context for {self.component.name}")
            self._steps.append(Step(engine, context, kernels, self._library))
        self._check_tensors()
        self._plan = plan

    def _deserialize(self, runtime: trt.Runtime, path: Path, size: int) -> trt.ICudaEngine:
        hint = rebuild_command(self._bundle, self.backend, self.precision)
        found = path.stat().st_size if path.is_file() else 0
        if found != size or not size:
            raise EngineError(f"{path} is damaged: expected {size} bytes, found {found}.", hint=hint)
        # Mapped, so that the plan's bytes are the page cache's and are not held beside the loaded engine.
        with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
            engine = runtime.deserialize_cuda_engine(content)
        if engine is None:
            raise self._log.fault(f"{self.backend} cannot load {path}", hint)
        return engine

    def _refit(self, engine: trt.ICudaEngine) -> None:
        path, _ = self._bundle.variant(self.component.name, self.precision)
        refitter: trt.Refitter = self._library.Refitter(engine, self._log.logger)
        parser: trt.OnnxParserRefitter = self._library.OnnxParserRefitter(refitter, self._log.logger)
        if not parser.refit_from_file(str(path)) or not refitter.refit_cuda_engine():
            raise self._log.fault(f"{self.backend} cannot fill the stripped engine with the weights of {path}")

    def _check_tensors(self) -> None:
        made = {name: step for step in self._steps for name in step.outputs}
        taken = {name: step for step in self._steps for name in step.inputs if name not in made}
        for specs, there, what in ((self.component.inputs, taken, "input"), (self.component.outputs, made, "output")):
            for spec in specs:
                found = str(there[spec.name].dtype(spec.name)) if spec.name in there else "none"
                if found != spec.dtype:
                    raise EngineError(
                        f"{self.component.name} {what} {spec.name}: declared {spec.dtype}, the engine has {found}.",
                        hint=rebuild_command(self._bundle, self.backend, self.precision),
                    )
        unknown = [name for name in taken if not self.component.has_input(name)]
        if unknown:
            raise EngineError(f"the engine for {self.component.name} asks for undeclared inputs: {', '.join(unknown)}.")

    def _set_shapes(self) -> dict[str, tuple[int, ...]]:
        shapes = {spec.name: spec.resolve(self.axes) for spec in self.component.inputs}
        for step in self._steps:
            for name in step.inputs:
                if not step.context.set_input_shape(name, shapes[name]):
                    raise self._log.fault(f"{self.component.name}: the engine refuses {name} {list(shapes[name])}")
            unresolved = step.context.infer_shapes()
            if unresolved:
                raise self._log.fault(f"{self.component.name}: the engine cannot infer {', '.join(unresolved)}")
            for name in step.outputs:
                sides = step.context.get_tensor_shape(name)
                shapes[name] = tuple(int(sides[axis]) for axis in range(len(sides)))
        for spec in self.component.outputs:
            if shapes[spec.name] != spec.resolve(self.axes):
                expected = list(spec.resolve(self.axes))
                raise EngineError(
                    f"{self.component.name} output {spec.name}: declared {expected}, found {list(shapes[spec.name])}."
                )
        return shapes

    def _allocate(self, step: Step, shapes: dict[str, tuple[int, ...]]) -> None:
        outside = {spec.name for spec in (*self.component.inputs, *self.component.outputs)}
        for name in (*step.inputs, *step.outputs):
            if name not in self._buffers:
                dtype = step.dtype(name)
                size = int(np.prod(shapes[name], dtype=np.int64)) * dtype.itemsize
                self._buffers[name] = self._own(cuda.DeviceMemory(size))
                if name in outside:
                    self._staging[name] = self._own(cuda.PinnedArray(shapes[name], dtype))
            if not step.context.set_tensor_address(name, self._buffers[name].address):
                raise self._log.fault(f"{self.component.name}: the engine refuses the buffer of {name}")

    def _own(self, memory: Any) -> Any:
        self._memory.callback(memory.free)
        return memory

    def _set_scratch(self) -> None:
        sizes = [step.context.update_device_memory_size_for_shapes() for step in self._steps]
        self._device.reserve(max(sizes))
        scratch = self._device.scratch
        for step in self._steps:
            step.context.set_device_memory(scratch.address, scratch.size)
        self._scratch_address = scratch.address

    def _warm_up(self) -> None:
        # Zeros are valid token ids; the first run lets the library allocate what a recording must not.
        for buffer in self._buffers.values():
            self._device.stream.zero(buffer)
        self._enqueue()
        self._device.stream.wait()

    def _record(self) -> None:
        with self._device.stream.capture() as recorded:
            self._enqueue()
        self._graph = recorded[0]

    def _enqueue(self) -> None:
        for step in self._steps:
            if not step.context.execute_async_v3(int(self._device.stream.handle)):
                raise self._log.fault(f"{self.backend} failed in {self.component.name} with {self.axes}")

    def _write(self, spec: TensorSpec, array: Array) -> None:
        with self._device.use():
            staging = self._staging[spec.name]
            np.copyto(staging.array, array)
            self._device.stream.to_device(self._buffers[spec.name], staging)
            # The staging buffer may be overwritten by the next write only after it was copied.
            self._device.stream.wait()

    def _run(self) -> None:
        with self._device.use():
            if self._scratch_address != self._device.scratch.address:
                self._set_scratch()
            if self._graph is None:
                self._enqueue()
            else:
                self._graph.launch(self._device.stream)
            self._device.stream.wait()
            if self._log.errors:
                raise self._log.fault(f"{self.backend} failed in {self.component.name} with {self.axes}")
            if self._cuda_graph and self._graph is None:
                # Another engine's larger scratch memory had dropped it; this run was the warm-up of the next one.
                self._record()
            self._keep_kernels()

    def _keep_kernels(self) -> None:
        """After the first run with new shapes, which compiles them."""
        if not self._kernels_kept:
            self._kernels_kept = True
            for step in self._steps:
                if step.kernels is not None:
                    step.kernels.save()

    def _read(self, spec: TensorSpec) -> Array:
        with self._device.use():
            staging = self._staging[spec.name]
            self._device.stream.to_host(staging, self._buffers[spec.name])
            self._device.stream.wait()
            return staging.array.copy()

    def drop_graph(self) -> None:
        """Forget the recorded graph: its addresses or shapes no longer hold."""
        if self._graph is not None:
            graph, self._graph = self._graph, None
            graph.free()

    def _free_buffers(self) -> None:
        self._buffers.clear()
        self._staging.clear()
        self._memory.close()

    def _close(self) -> None:
        with self._device.use():
            self.drop_graph()
            self._free_buffers()
            self._steps.clear()
            self._device.leave(self)
