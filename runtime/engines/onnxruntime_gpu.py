"""ONNX Runtime with its CUDA or TensorRT provider: inputs and outputs stay on the device between runs."""

from __future__ import annotations

import contextlib
import functools
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from latentedge.runtime.bundle import Array, Bundle, Component, TensorSpec, Variant
from latentedge.runtime.engines.base import Engine, EngineOptions
from latentedge.runtime.engines.plans import engines_folder
from latentedge.runtime.errors import EngineError, MissingDependencyError, UsageError

#: Provider by what ``EngineOptions.device`` begins with; "cuda:1" is the second GPU.
PROVIDERS = {"gpu": "CUDAExecutionProvider", "cuda": "CUDAExecutionProvider", "tensorrt": "TensorrtExecutionProvider"}


def is_gpu(device: str | None) -> bool:
    """Whether a device's name asks for one of these providers."""
    return (device or "").partition(":")[0] in PROVIDERS


def open_on_gpu(bundle: Bundle, component: Component, precision: str, options: EngineOptions) -> Engine:
    """Open a component on the asked-for provider; an error says why that is not to be had, never another provider."""
    path, variant = bundle.variant(component.name, precision)
    kind, _, number = str(options.device).partition(":")
    if not (number or "0").isdigit():
        raise UsageError(f"ONNX Runtime has no device {options.device!r}; a second GPU is {kind}:1.")
    provider, index = PROVIDERS[kind], int(number or "0")
    require(provider)
    load_cuda()
    settings = {"device_id": str(index)}
    graph = "1" if options.cuda_graph else "0"
    # The provider would compute fp32 in TF32 otherwise.
    providers: list[tuple[str, dict[str, str]]] = [("CUDAExecutionProvider", {**settings, "use_tf32": "0"})]
    if provider == "TensorrtExecutionProvider":
        cache = engines_folder(bundle, options.cache) / f"onnxruntime-{onnxruntime.__version__}-{variant.sha256[:16]}"
        settings |= tensorrt_settings(precision, cache) | {"trt_cuda_graph_enable": graph}
        providers.insert(0, (provider, settings))
    else:
        providers[0][1]["enable_cuda_graph"] = graph
    return DeviceEngine(component, precision, (path, variant), providers, ("cuda", index), options)


def tensorrt_settings(precision: str, cache: Path) -> dict[str, str]:
    """Options of the TensorRT provider. It builds weakly typed networks, so it has to be told the graph's precision."""
    return {
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": str(cache),
        "trt_timing_cache_enable": "1",
        "trt_fp16_enable": str(int(precision == "fp16")),
        "trt_int8_enable": str(int(precision == "int8")),
    }


def require(provider: str) -> None:
    """:class:`MissingDependencyError` when this build of ONNX Runtime does not have ``provider``."""
    available = onnxruntime.get_available_providers()
    if provider not in available:
        raise MissingDependencyError(
            f"ONNX Runtime {onnxruntime.__version__} is installed without {provider}; it has: {', '.join(available)}.",
            hint="pip uninstall onnxruntime, then pip install onnxruntime-gpu (for a Jetson see docs/jetson.md)",
        )


@functools.cache
def load_cuda() -> None:
    """Load CUDA and cuDNN from NVIDIA's Python packages, where ONNX Runtime's providers do not look by themselves.

    What is not there may be in the system; a provider that misses it is an error of the session. ONNX Runtime prints
    what it misses, which goes to stderr.
    """
    preload = getattr(onnxruntime, "preload_dlls", None)  # since 1.21
    if preload is not None:
        with contextlib.redirect_stdout(sys.stderr):
            preload()


class DeviceEngine(Engine):
    """A session whose inputs and outputs are bound to memory of ``place``: (device type, number).

    A recorded CUDA graph needs fixed shapes and every operator on the device, so with ``cuda_graph`` the session is
    made on ``bind``, with the axes fixed in the graph: what follows from the shapes is then folded away.
    """

    backend = "onnxruntime"

    def __init__(
        self,
        component: Component,
        precision: str,
        graph: tuple[Path, Variant],
        providers: list[tuple[str, dict[str, str]]],
        place: tuple[str, int],
        options: EngineOptions,
    ) -> None:
        super().__init__(component, precision)
        self._path, self._variant = graph
        self._providers = providers
        self._place = place
        self._fixed = options.cuda_graph
        self._values: dict[str, Any] = {}
        self._binding: Any = None
        self._session: Any = None if self._fixed else self._open({})

    def _open(self, sides: dict[str, int]) -> Any:
        settings = onnxruntime.SessionOptions()
        settings.log_severity_level = 3
        for side, length in sides.items():
            settings.add_free_dimension_override_by_name(side, length)
        try:
            session = onnxruntime.InferenceSession(str(self._path), settings, providers=self._providers)
        except Exception as error:
            raise EngineError(f"ONNX Runtime cannot load {self._path}: {error}") from error
        session.disable_fallback()
        asked, found = self._providers[0][0], session.get_providers()
        if asked not in found:
            raise EngineError(
                f"{asked} is part of this ONNX Runtime but cannot be loaded; loaded: {', '.join(found)}.",
                hint="the NVIDIA driver, CUDA or cuDNN is missing or of another version; see `latentedge doctor`",
            )
        return session

    def _bind(self) -> None:
        if self._fixed:
            self._session = None
            named = {side for spec in self.component.inputs for side in spec.shape if isinstance(side, str)}
            self._session = self._open({side: TensorSpec("", "", (side,)).resolve(self.axes)[0] for side in named})
        binding = self._session.io_binding()
        self._values = {}
        for specs, bind in (
            (self.component.inputs, binding.bind_ortvalue_input),
            (self.component.outputs, binding.bind_ortvalue_output),
        ):
            for spec in specs:
                shape, dtype = list(spec.resolve(self.axes)), np.dtype(spec.dtype).type
                value = onnxruntime.OrtValue.ortvalue_from_shape_and_type(shape, dtype, *self._place)
                self._values[spec.name] = value
                bind(spec.name, value)
        self._binding = binding

    def _write(self, spec: TensorSpec, array: Array) -> None:
        self._values[spec.name].update_inplace(np.ascontiguousarray(array))

    def _run(self) -> None:
        try:
            self._session.run_with_iobinding(self._binding)
            self._binding.synchronize_outputs()
        except Exception as error:
            raise EngineError(f"ONNX Runtime failed in {self.component.name} with {self.axes}: {error}") from error

    def _read(self, spec: TensorSpec) -> Array:
        return np.array(self._values[spec.name].numpy())

    def _close(self) -> None:
        self._binding = None
        self._session = None
        self._values.clear()
