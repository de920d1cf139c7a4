"""What the caller asks of calibration, where its messages go, and the engine that it measures on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from latentedge.calibration.scene import Target
from latentedge.calibration.search import SearchSettings
from latentedge.runtime.engines import BACKENDS, backend


@dataclass(frozen=True)
class Options:
    """What the caller of :func:`calibrate` may say."""

    samples: int = 32
    steps: int | None = None
    prompts: tuple[str, ...] = ()
    floor_db: float = 30.0
    backend: str = "auto"
    #: Held-out pictures behind the gate's decision.
    pictures: int = 16
    threads: int | None = None
    #: What the rest computes in, "fp32" or "fp16"; ``None``: by the backend.
    floats: str | None = None
    component: str = "unet"
    search: SearchSettings = field(default_factory=SearchSettings)


@dataclass(frozen=True)
class Reporter:
    """Where progress and messages go."""

    progress: Callable[[str, int, int], None] = lambda stage, done, total: None
    notify: Callable[[str], None] = lambda message: None


def target_of(options: Options) -> Target:
    """The engine to measure on: the one asked for, else OpenVINO where it is installed, else ONNX Runtime.

    TensorRT's graph is judged with ONNX Runtime where TensorRT is not there, and its gain stays unknown.
    """
    name = options.backend
    if name == "auto":
        name = "openvino" if BACKENDS["openvino"].installed() else "onnxruntime"
    if name.startswith("tensorrt"):
        return Target("onnxruntime", "int8", "fp32", options.threads, timed=False)
    backend(name)
    return Target(name, "int8", "fp32", options.threads)
