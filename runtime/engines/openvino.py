"""OpenVINO on CPU and Intel GPU. Shapes are fixed at ``bind``, which its kernels are faster for."""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from latentedge.runtime.bundle import Array, Bundle, Component, TensorSpec, Variant
from latentedge.runtime.engines.base import Engine, EngineOptions
from latentedge.runtime.engines.mapped import giving_back
from latentedge.runtime.errors import EngineError, PrecisionError, UsageError
from latentedge.runtime.machine import usable_cores

#: Compiled shapes that an engine keeps: guidance with an interval alternates between one and two branches.
KEPT_SHAPES = 2


@dataclass(frozen=True)
class Precision:
    """A precision: the graph that holds it, the type that floats are computed in, and what the device must offer."""

    graph: str
    floats: str
    needs: tuple[str, ...]


#: OpenVINO computes a graph's floats in the type that it is told, whatever type the weights are stored in.
PRECISIONS: dict[str, Precision] = {
    "fp32": Precision("fp32", "f32", ("FP32",)),
    "bf16": Precision("fp32", "bf16", ("BF16",)),
    "fp16": Precision("fp16", "f16", ("FP16",)),
    "int8": Precision("int8", "f32", ("INT8",)),
    "int8+bf16": Precision("int8", "bf16", ("INT8", "BF16")),
    "int8+fp16": Precision("int8", "f16", ("INT8", "FP16")),
}


def open_engine(bundle: Bundle, component: Component, precision: str, options: EngineOptions) -> OpenVINOEngine:
    """Load a component; raises where the device or the precision is not there on this machine."""
    if precision not in PRECISIONS:
        raise UsageError(f"openvino has no precision {precision!r}; choose one of: {', '.join(PRECISIONS)}.")
    path, variant = bundle.variant(component.name, PRECISIONS[precision].graph)
    cache = cache_folder(options.cache or bundle.path / "engines", variant)
    weights = tuple(bundle.path / name for name in variant.external_data)
    kept = cache if options.cache or cache.is_dir() else None
    return OpenVINOEngine(component, precision, path, options, kept, weights)


@functools.cache
def _core() -> Any:
    """The process's one instance of OpenVINO.

    Its CPU plugin gives the calling thread another stack for signals and puts the former one back when it goes. Several
    plugins that go in another order than they came leave a stack that is freed, and then Ctrl-C ends the process with a
    segmentation fault (seen with 2026.4.1).
    """
    import openvino

    return openvino.Core()


def cache_folder(root: Path, variant: Variant) -> Path:
    """Where compiled models of a graph lie. OpenVINO's own key does not tell two weight files of one graph apart."""
    weights = "".join(sorted(variant.external_data.values()))
    digest = hashlib.sha256(f"{variant.sha256}{weights}".encode()).hexdigest()
    return root / f"openvino-{version('openvino')}-{digest[:16]}"


def device_name(asked: str | None, available: list[str]) -> str:
    """OpenVINO's name for the asked device ("cpu", "gpu", "gpu:1"); :class:`EngineError` where it is not there."""
    name = (asked or "cpu").upper().replace(":", ".")
    name = "GPU" if name == "GPU.0" and "GPU" in available else name
    if name not in available and not (name == "GPU" and "GPU.0" in available):
        raise EngineError(
            f"openvino has no device {asked!r} on this machine; it has: {', '.join(available).lower()}.",
            hint="Intel GPUs need the compute runtime of your distribution (intel-opencl-icd)",
        )
    return name


class OpenVINOEngine(Engine):
    """One component compiled for the bound axes; bound inputs are read in place, outputs are copied out."""

    backend = "openvino"

    def __init__(
        self,
        component: Component,
        precision: str,
        path: Path,
        options: EngineOptions,
        cache: Path | None = None,
        weights: tuple[Path, ...] = (),
    ) -> None:
        super().__init__(component, precision)
        import openvino

        self._openvino = openvino
        self._core = _core()
        self._path = path
        self._device = device_name(options.device, list(self._core.available_devices))
        self._floats = PRECISIONS[precision].floats
        offered = list(self._core.get_property(self._device, "OPTIMIZATION_CAPABILITIES"))
        absent = [name for name in PRECISIONS[precision].needs if name not in offered]
        if absent:
            raise PrecisionError(
                f"{self._device.lower()} does not compute in {precision} with openvino: it lacks {', '.join(absent)}, "
                f"and offers {', '.join(sorted(offered))}.",
                hint="choose --precision auto, or fp32",
            )
        self._properties = self._configure(options)
        self._cache = cache
        self._weights = weights
        self._compiled: dict[tuple[tuple[str, int], ...], tuple[Any, dict[str, Array]]] = {}
        self._buffers: dict[str, Array] = {}
        self._request: Any = None

    def _configure(self, options: EngineOptions) -> dict[str, Any]:
        properties: dict[str, Any] = {
            "INFERENCE_PRECISION_HINT": self._floats,
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
        }
        if self._device == "CPU":
            properties["INFERENCE_NUM_THREADS"] = options.threads or usable_cores()
        return {**properties, **options.extra}

    def _bind(self) -> None:
        key = tuple(sorted(self.axes.items()))
        if key not in self._compiled:
            if len(self._compiled) >= KEPT_SHAPES:
                self._request, self._buffers = None, {}
                del self._compiled[next(iter(self._compiled))]
            self._compiled[key] = self._compile()
        self._request, self._buffers = self._compiled[key]

    def _compile(self) -> tuple[Any, dict[str, Array]]:
        """An inference request for the bound axes, and the arrays that it reads its inputs from and writes outputs to."""
        shapes = {spec.name: spec.resolve(self.axes) for spec in self.component.inputs}
        try:
            with giving_back([*self._weights, *(self._cache.glob("*.blob") if self._cache else ())]):
                model = self._core.read_model(self._path)
                model.reshape({name: list(shape) for name, shape in shapes.items()})
                compiled = self._core.compile_model(model, self._device, self._compile_properties())
        except RuntimeError as error:
            raise EngineError(f"openvino refused {self._path.name} of {self.component.name}: {error}") from error
        floats = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
        if floats != self._floats:
            raise PrecisionError(
                f"openvino computes {self.component.name} in {floats}, asked for was {self._floats} ({self.precision})."
            )
        request = compiled.create_infer_request()
        tensors = (*self.component.inputs, *self.component.outputs)
        buffers = {spec.name: np.zeros(spec.resolve(self.axes), np.dtype(spec.dtype)) for spec in tensors}
        for spec in self.component.outputs:
            self._check_output(compiled.output(spec.name), spec.name, buffers[spec.name])
        for name, buffer in buffers.items():
            request.set_tensor(name, self._openvino.Tensor(buffer, shared_memory=True))
        return request, buffers

    def _check_output(self, port: Any, name: str, buffer: Array) -> None:
        """The library writes into ``buffer``, so it must be what the graph computes."""
        shape, dtype = port.partial_shape, port.element_type.to_dtype()
        if shape.is_dynamic or tuple(shape.to_shape()) != buffer.shape or dtype != buffer.dtype:
            raise EngineError(
                f"{self.component.name} output {name}: declared {buffer.dtype} {list(buffer.shape)}, "
                f"computed {dtype} {shape}."
            )

    def _compile_properties(self) -> dict[str, Any]:
        if self._cache is None:
            return self._properties
        self._cache.mkdir(parents=True, exist_ok=True)
        return {**self._properties, "CACHE_DIR": str(self._cache)}

    def _write(self, spec: TensorSpec, array: Array) -> None:
        np.copyto(self._buffers[spec.name], array)

    def _run(self) -> None:
        try:
            self._request.start_async()
            self._request.wait()
        except RuntimeError as error:
            raise EngineError(f"openvino failed in {self.component.name}: {error}") from error

    def _read(self, spec: TensorSpec) -> Array:
        return self._buffers[spec.name].copy()

    def _close(self) -> None:
        self._request = None
        self._buffers = {}
        self._compiled.clear()
