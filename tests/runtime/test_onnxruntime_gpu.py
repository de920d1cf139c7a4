"""The GPU's providers: what can be told without a GPU, and the device-bound engine on a device that is here, the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnxruntime")
pytest.importorskip("onnx")

import onnxruntime
from onnx import TensorProto, helper

from latentedge.runtime.bundle import Axis, Bundle, Component, TensorSpec
from latentedge.runtime.engines import EngineOptions, onnxruntime_gpu, open_engine
from latentedge.runtime.engines.onnxruntime_gpu import DeviceEngine
from latentedge.runtime.errors import EngineError, MissingDependencyError, UsageError
from tests import tiny_bundles

SHAPE = ("batch", 3, "latent_height")
HERE = onnxruntime.get_available_providers()


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    """out_sample = 2 * sample + timestep, reshaped by the input's own shape, so that the graph computes with shapes."""
    nodes = [
        helper.make_node("Shape", ["sample"], ["shape"]),
        helper.make_node("Add", ["sample", "sample"], ["twice"]),
        helper.make_node("Constant", [], ["axes"], value_ints=[1, 2]),
        helper.make_node("Unsqueeze", ["timestep", "axes"], ["column"]),
        helper.make_node("Add", ["twice", "column"], ["sum"]),
        helper.make_node("Reshape", ["sum", "shape"], ["out_sample"]),
    ]
    tensors = {name: helper.make_tensor_value_info(name, TensorProto.FLOAT, SHAPE) for name in ("sample", "out_sample")}
    timestep = helper.make_tensor_value_info("timestep", TensorProto.FLOAT, SHAPE[:1])
    graph = helper.make_graph(nodes, "double", [tensors["sample"], timestep], [tensors["out_sample"]])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    variant = tiny_bundles.write_graph(tmp_path, "unet/model.onnx", model.SerializeToString())
    component = Component(
        "unet",
        (TensorSpec("sample", "float32", SHAPE), TensorSpec("timestep", "float32", SHAPE[:1])),
        (TensorSpec("out_sample", "float32", SHAPE),),
        {"batch": Axis(1, 2, 8), "latent_height": Axis(1, 4, 64)},
        {"fp32": variant},
    )
    return tiny_bundles.write_bundle(tmp_path, component)


def on_cpu(bundle: Bundle, **options: Any) -> DeviceEngine:
    graph = bundle.variant("unet", "fp32")
    providers = [("CPUExecutionProvider", {})]
    return DeviceEngine(bundle.component("unet"), "fp32", graph, providers, ("cpu", 0), EngineOptions(**options))


def inputs(batch: int, height: int) -> dict[str, Any]:
    generator = np.random.default_rng(batch)
    return {
        "sample": generator.standard_normal((batch, 3, height)).astype(np.float32),
        "timestep": generator.standard_normal(batch).astype(np.float32),
    }


def expected(arrays: dict[str, Any]) -> Any:
    return 2 * arrays["sample"] + arrays["timestep"][:, None, None]


@pytest.mark.parametrize("cuda_graph", [False, True])
def test_values_stay_bound_and_follow_the_axes(bundle: Bundle, cuda_graph: bool) -> None:
    with on_cpu(bundle, cuda_graph=cuda_graph) as engine:
        for batch, height in ((2, 4), (2, 4), (3, 5), (2, 4)):
            arrays = inputs(batch, height)
            np.testing.assert_array_equal(engine.run(arrays)["out_sample"], expected(arrays))
        arrays["timestep"] = arrays["timestep"] + 1
        engine.write("timestep", arrays["timestep"])
        addresses = {name: value.data_ptr() for name, value in engine._values.items()}
        engine.run()
        result = engine.read("out_sample")
        np.testing.assert_array_equal(result, expected(arrays))
        kept = result.copy()
        engine.run(inputs(2, 4) | {"timestep": np.zeros(2, np.float32)})
        np.testing.assert_array_equal(result, kept)
        assert {name: value.data_ptr() for name, value in engine._values.items()} == addresses


def test_with_a_cuda_graph_the_axes_are_fixed_in_the_session(bundle: Bundle) -> None:
    with on_cpu(bundle, cuda_graph=True) as engine:
        engine.run(inputs(2, 4))
        assert [value.shape for value in engine._session.get_inputs()] == [[2, 3, 4], [2]]
        engine.run(inputs(3, 4))
        assert [value.shape for value in engine._session.get_inputs()] == [[3, 3, 4], [3]]


def test_a_run_that_fails_names_the_component(bundle: Bundle) -> None:
    with on_cpu(bundle) as engine:
        engine.bind(batch=2, latent_height=4)
        wrong = onnxruntime.OrtValue.ortvalue_from_shape_and_type([3], np.float32, "cpu", 0)
        engine._binding.bind_ortvalue_input("timestep", wrong)
        engine._written.update({"sample", "timestep"})
        with pytest.raises(EngineError, match=r"failed in unet with \{'batch': 2, 'latent_height': 4\}"):
            engine.run()


@pytest.mark.parametrize(
    ("device", "provider"),
    [("cuda", "CUDAExecutionProvider"), ("gpu:1", "CUDAExecutionProvider"), ("tensorrt", "TensorrtExecutionProvider")],
)
def test_a_provider_that_this_build_lacks_is_an_error(bundle: Bundle, device: str, provider: str) -> None:
    if provider in HERE:
        pytest.skip(f"this ONNX Runtime has {provider}")
    with pytest.raises(MissingDependencyError, match=f"without {provider}; it has: .*CPUExecutionProvider") as error:
        open_engine(bundle, "unet", "onnxruntime", "fp32", EngineOptions(device=device))
    assert "onnxruntime-gpu" in str(error.value.hint)


def test_a_provider_that_does_not_load_is_an_error_and_not_a_fallback(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Session:
        """What ONNX Runtime gives when a provider's library does not load: a session on the CPU, and a log line."""

        def __init__(self, *arguments: Any, **options: Any) -> None: ...

        def disable_fallback(self) -> None: ...

        def get_providers(self) -> list[str]:
            return ["CPUExecutionProvider"]

    monkeypatch.setattr(onnxruntime_gpu, "require", lambda provider: None)
    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    with pytest.raises(EngineError, match=r"CUDAExecutionProvider .* cannot be loaded; loaded: CPUExecutionProvider"):
        open_engine(bundle, "unet", "onnxruntime", "fp32", EngineOptions(device="cuda"))


def test_cudas_libraries_are_loaded_once_and_nothing_is_printed_to_stdout(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(onnxruntime_gpu, "require", lambda provider: None)
    monkeypatch.setattr(DeviceEngine, "_open", lambda engine, sides: None)
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: print("Failed to load libcudnn.so.9"), raising=False)  # noqa: T201
    onnxruntime_gpu.load_cuda.cache_clear()
    for _ in range(2):
        open_engine(bundle, "unet", "onnxruntime", "fp32", EngineOptions(device="cuda"))
    assert capsys.readouterr() == ("", "Failed to load libcudnn.so.9\n")
    onnxruntime_gpu.load_cuda.cache_clear()


@pytest.mark.parametrize(
    ("device", "options", "expected_settings"),
    [
        (
            "cuda:1",
            {"cuda_graph": True},
            {"CUDAExecutionProvider": {"device_id": "1", "enable_cuda_graph": "1", "use_tf32": "0"}},
        ),
        ("gpu", {}, {"CUDAExecutionProvider": {"device_id": "0", "enable_cuda_graph": "0"}}),
        (
            "tensorrt",
            {"cuda_graph": True},
            {"TensorrtExecutionProvider": {"device_id": "0", "trt_cuda_graph_enable": "1", "trt_fp16_enable": "0"}},
        ),
    ],
)
def test_what_the_providers_are_told(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, device: str, options: Any, expected_settings: Any
) -> None:
    monkeypatch.setattr(onnxruntime_gpu, "require", lambda provider: None)
    monkeypatch.setattr(DeviceEngine, "_open", lambda engine, sides: None)
    engine = open_engine(bundle, "unet", "onnxruntime", "fp32", EngineOptions(device=device, **options))
    assert isinstance(engine, DeviceEngine)
    name, settings = engine._providers[0]
    assert expected_settings[name].items() <= settings.items()
    if device == "tensorrt":
        digest = bundle.component("unet").variants["fp32"].sha256[:16]
        assert digest in settings["trt_engine_cache_path"]
        assert engine._providers[1][0] == "CUDAExecutionProvider"


def test_unknown_devices_are_errors(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="no device 'npu' here; choose one of: cpu, gpu, cuda, tensorrt"):
        open_engine(bundle, "unet", "onnxruntime", "fp32", EngineOptions(device="npu"))
    with pytest.raises(UsageError, match="a second GPU is cuda:1"):
        open_engine(bundle, "unet", "onnxruntime", "fp32", EngineOptions(device="cuda:x"))


def test_a_cuda_graph_on_the_processor_is_an_error(bundle: Bundle) -> None:
    with pytest.raises(UsageError, match="on a GPU only"):
        open_engine(bundle, "unet", "onnxruntime", "fp32", EngineOptions(cuda_graph=True))
    pytest.importorskip("openvino")
    with pytest.raises(UsageError, match="openvino has no CUDA graphs"):
        open_engine(bundle, "unet", "openvino", "fp32", EngineOptions(cuda_graph=True))
