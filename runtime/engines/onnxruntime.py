"""ONNX Runtime, with inputs and outputs bound to fixed buffers; the GPU's providers are in ``onnxruntime_gpu.py``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from latentedge.runtime.bundle import Array, Bundle, Component, TensorSpec, Variant, file_sha256
from latentedge.runtime.engines import onnxruntime_gpu
from latentedge.runtime.engines.base import Engine, EngineOptions
from latentedge.runtime.engines.plans import (
    KEY_NAME,
    PlanKey,
    engines_folder,
    read_plan,
    this_platform,
    variant_digests,
)
from latentedge.runtime.errors import BundleError, EngineError, UsageError
from latentedge.runtime.machine import machine_fingerprint, usable_cores

#: Provider by the device that the caller asks for.
PROVIDERS = {"cpu": "CPUExecutionProvider"}


def open_engine(bundle: Bundle, component: Component, precision: str, options: EngineOptions) -> Engine:
    """Open one component of ``bundle`` in ``precision``; :class:`EngineError` if ONNX Runtime refuses the graph."""
    if onnxruntime_gpu.is_gpu(options.device):
        return onnxruntime_gpu.open_on_gpu(bundle, component, precision, options)
    if options.cuda_graph:
        raise UsageError(
            "ONNX Runtime has CUDA graphs on a GPU only.",
            hint="choose the device: onnxruntime:device=cuda,cuda_graph=on",
        )
    path, variant = bundle.variant(component.name, precision)
    kept = kept_graph(bundle, component, precision, variant, options)
    session = open_session(kept or path, options, variant, optimise=kept is None)
    return OnnxRuntimeEngine(component, precision, session)


def graph_key(component: Component, precision: str, variant: Variant, *, low_memory: bool) -> PlanKey:
    """What the library's own copy of a graph depends on: the graph, the library, and the processor it was laid out for."""
    return PlanKey(
        backend="onnxruntime",
        library_version=onnxruntime.__version__,
        component=component.name,
        precision=precision,
        weights=variant_digests(variant),
        axes=component.axes,
        compute_capabilities=(),
        platform=f"{this_platform()} {machine_fingerprint()}",
        options={"low_memory": low_memory},
    )


def kept_graph(
    bundle: Bundle, component: Component, precision: str, variant: Variant, options: EngineOptions
) -> Path | None:
    """The copy of a graph that ``latentedge build`` kept for exactly this machine, library and weights, if it did.

    With ``low_memory`` the one that was kept for its memory, where there is one. :class:`BundleError` for a damaged copy.
    """
    for low_memory in (True, False) if options.low_memory else (False,):
        key = graph_key(component, precision, variant, low_memory=low_memory)
        folder = engines_folder(bundle, options.cache) / key.folder_name()
        if (folder / KEY_NAME).is_file():
            plan = read_plan(folder)
            for file in plan.files:
                path = folder / file.path
                graph = file.path.endswith(".onnx")
                size = path.stat().st_size if path.is_file() else -1
                if plan.key != key or size != file.size or (graph and file_sha256(path) != file.sha256):
                    raise BundleError(
                        f"{path} is damaged: {file.size} bytes of SHA-256 {file.sha256[:8]} were recorded, {size} found.",
                        hint=f"build it again: latentedge build {bundle.path} --backend onnxruntime",
                    )
            return folder / next(file.path for file in plan.files if file.path.endswith(".onnx"))
    return None


def open_session(
    path: Path, options: EngineOptions, variant: Variant | None = None, *, optimise: bool = True
) -> onnxruntime.InferenceSession:
    """An inference session on the asked-for device, and on no other; a kept copy is not optimised again."""
    device = options.device or "cpu"
    if device not in PROVIDERS:
        choices = ", ".join([*PROVIDERS, *onnxruntime_gpu.PROVIDERS])
        raise UsageError(f"ONNX Runtime has no device {device!r} here; choose one of: {choices}.")
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = options.threads or usable_cores()
    settings.log_severity_level = 3
    if not optimise:
        settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    if options.low_memory:
        # A buffer that is not needed goes back to the system.
        settings.enable_cpu_mem_arena = False
    try:
        session = onnxruntime.InferenceSession(str(path), settings, providers=[PROVIDERS[device]])
    except Exception as error:
        size = path.stat().st_size
        expected = f"; {variant.size} bytes recorded, {size} found" if variant and variant.size != size else ""
        raise EngineError(
            f"ONNX Runtime cannot load {path}{expected}: {error}", hint="`latentedge verify BUNDLE` names damaged files"
        ) from error
    if session.get_providers()[0] != PROVIDERS[device]:
        raise EngineError(f"ONNX Runtime fell back from {PROVIDERS[device]} to {session.get_providers()[0]}.")
    return session


class OnnxRuntimeEngine(Engine):
    """A session whose inputs and outputs are numpy buffers that keep their address between two ``bind`` calls."""

    backend = "onnxruntime"

    def __init__(self, component: Component, precision: str, session: onnxruntime.InferenceSession) -> None:
        super().__init__(component, precision)
        self._session: Any = session
        self._buffers: dict[str, Array] = {}
        self._binding: Any = None

    def _bind(self) -> None:
        binding = self._session.io_binding()
        self._buffers = {}
        for spec in (*self.component.inputs, *self.component.outputs):
            self._buffers[spec.name] = np.zeros(spec.resolve(self.axes), np.dtype(spec.dtype))
        for spec in self.component.inputs:
            _bind(binding.bind_input, spec.name, self._buffers[spec.name])
        for spec in self.component.outputs:
            _bind(binding.bind_output, spec.name, self._buffers[spec.name])
        self._binding = binding

    def _write(self, spec: TensorSpec, array: Array) -> None:
        np.copyto(self._buffers[spec.name], array)

    def _run(self) -> None:
        try:
            self._session.run_with_iobinding(self._binding)
        except Exception as error:
            raise EngineError(f"ONNX Runtime failed in {self.component.name} with {self.axes}: {error}") from error

    def _read(self, spec: TensorSpec) -> Array:
        return self._buffers[spec.name].copy()

    def _close(self) -> None:
        self._binding = None
        self._session = None
        self._buffers.clear()


def _bind(bind: Any, name: str, buffer: Array) -> None:
    bind(name, "cpu", 0, buffer.dtype.type, buffer.shape, buffer.ctypes.data)
