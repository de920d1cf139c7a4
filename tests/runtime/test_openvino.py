"""The OpenVINO engine on a small convolution whose result numpy can compute."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from latentedge.runtime.bundle import Array, Axis, Bundle, Component, TensorSpec, Variant
from latentedge.runtime.engines.base import EngineOptions
from latentedge.runtime.errors import EngineError, PrecisionError, UsageError
from tests import tiny_bundles

onnx = pytest.importorskip("onnx")
openvino = pytest.importorskip("openvino")

from latentedge.runtime.engines.openvino import cache_folder, device_name, open_engine  # noqa: E402

WEIGHT = np.random.default_rng(5).standard_normal((48, 32)).astype(np.float32)
OPTIONS = EngineOptions(threads=1)


def graph(weight: Array) -> bytes:
    """``y = x @ weight`` with x [batch, 48]."""
    helper = onnx.helper
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "matmul",
        [helper.make_tensor_value_info("x", 1, ["batch", 48])],
        [helper.make_tensor_value_info("y", 1, ["batch", 32])],
        [onnx.numpy_helper.from_array(weight, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    content: bytes = model.SerializeToString()
    return content


def make_bundle(folder: Path, weight: Array = WEIGHT) -> tuple[Bundle, Component]:
    variant = tiny_bundles.write_graph(folder, "net/model.onnx", graph(weight))
    component = Component(
        "net",
        (TensorSpec("x", "float32", ("batch", 48)),),
        (TensorSpec("y", "float32", ("batch", 32)),),
        {"batch": Axis(1, 2, 8)},
        {"fp32": variant},
    )
    bundle = tiny_bundles.write_bundle(folder, component)
    return bundle, bundle.component("net")


@pytest.mark.parametrize("batch", [1, 3])
def test_fp32_equals_numpy(tmp_path: Path, batch: int) -> None:
    bundle, component = make_bundle(tmp_path)
    x = np.random.default_rng(1).standard_normal((batch, 48)).astype(np.float32)
    with open_engine(bundle, component, "fp32", OPTIONS) as engine:
        y = engine.run({"x": x})["y"]
    np.testing.assert_allclose(y, x @ WEIGHT, rtol=0, atol=1e-5 * float(np.abs(x @ WEIGHT).max()))


def test_outputs_are_copies_and_inputs_stay_written(tmp_path: Path) -> None:
    bundle, component = make_bundle(tmp_path)
    x = np.ones((2, 48), np.float32)
    with open_engine(bundle, component, "fp32", OPTIONS) as engine:
        engine.bind(batch=2)
        engine.write("x", x)
        engine.run()
        first = engine.read("y")
        kept = first.copy()
        engine.run()
        np.testing.assert_array_equal(engine.read("y"), kept)
        engine.write("x", -x)
        engine.run()
        np.testing.assert_array_equal(first, kept)
        np.testing.assert_allclose(engine.read("y"), -kept, rtol=0, atol=1e-5)


def test_bf16_is_bf16_or_an_error(tmp_path: Path) -> None:
    bundle, component = make_bundle(tmp_path)
    x = np.random.default_rng(2).standard_normal((2, 48)).astype(np.float32)
    exact = x @ WEIGHT
    if "BF16" not in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        with pytest.raises(EngineError, match="lacks BF16"):
            open_engine(bundle, component, "bf16", OPTIONS)
        return
    with open_engine(bundle, component, "bf16", OPTIONS) as engine:
        error = np.abs(engine.run({"x": x})["y"] - exact).max() / np.abs(exact).max()
    assert 1e-4 < error < 2e-2  # eight bits of mantissa: not fp32 under another name, and not worse than bf16


def test_fp16_is_never_bf16_under_another_name(tmp_path: Path) -> None:
    bundle, component = make_bundle(tmp_path)
    variants = {**component.variants, "fp16": component.variants["fp32"]}
    component.variants.update(variants)
    if "FP16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        pytest.skip("this processor computes in fp16")
    with pytest.raises(EngineError, match="lacks FP16"):
        open_engine(bundle, component, "fp16", OPTIONS)


def test_a_device_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    bundle, component = make_bundle(tmp_path)
    with pytest.raises(EngineError, match="no device 'gpu:7'"):
        open_engine(bundle, component, "fp32", EngineOptions(device="gpu:7"))


@pytest.mark.parametrize(
    ("asked", "available", "found"),
    [(None, ["CPU"], "CPU"), ("gpu", ["CPU", "GPU.0", "GPU.1"], "GPU"), ("gpu:1", ["CPU", "GPU.0", "GPU.1"], "GPU.1")],
)
def test_device_names(asked: str | None, available: list[str], found: str) -> None:
    assert device_name(asked, available) == found


def test_an_unknown_precision_lists_the_known_ones(tmp_path: Path) -> None:
    bundle, component = make_bundle(tmp_path)
    with pytest.raises(UsageError, match="int8"):
        open_engine(bundle, component, "fp8", OPTIONS)
    with pytest.raises(UsageError, match="not in this bundle in int8"):
        open_engine(bundle, component, "int8", OPTIONS)


def test_the_cache_tells_two_weight_files_apart(tmp_path: Path) -> None:
    options = EngineOptions(threads=1, cache=tmp_path / "cache")
    x = np.ones((2, 48), np.float32)
    for weight in (WEIGHT, 2 * WEIGHT, WEIGHT):
        bundle, component = make_bundle(tmp_path / "bundle", weight)
        with open_engine(bundle, component, "fp32", options) as engine:
            np.testing.assert_allclose(engine.run({"x": x})["y"], x @ weight, rtol=0, atol=1e-4)
    assert len(list((tmp_path / "cache").iterdir())) == 2
    assert list((tmp_path / "cache").rglob("*.blob"))


def test_a_damaged_graph_is_an_error(tmp_path: Path) -> None:
    bundle, component = make_bundle(tmp_path)
    path = tmp_path / "net" / "model.onnx"
    path.write_bytes(path.read_bytes()[:100])
    with open_engine(bundle, component, "fp32", OPTIONS) as engine, pytest.raises(EngineError, match="refused"):
        engine.bind(batch=1)


def test_the_cache_tells_precisions_apart(tmp_path: Path) -> None:
    if "BF16" not in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        pytest.skip("this processor does not compute in bf16")
    options = EngineOptions(threads=1, cache=tmp_path / "cache")
    bundle, component = make_bundle(tmp_path / "bundle")
    x = np.random.default_rng(2).standard_normal((2, 48)).astype(np.float32)
    exact = x @ WEIGHT
    for precision, low, high in (("fp32", 0.0, 1e-5), ("bf16", 1e-4, 2e-2), ("fp32", 0.0, 1e-5), ("bf16", 1e-4, 2e-2)):
        with open_engine(bundle, component, precision, options) as engine:
            error = np.abs(engine.run({"x": x})["y"] - exact).max() / np.abs(exact).max()
        assert low <= error < high, precision


def test_the_cache_tells_weights_beside_equal_graphs_apart(tmp_path: Path) -> None:
    folders = {
        cache_folder(tmp_path, Variant("unet/model.onnx", graph, 1, weights))
        for graph in ("a" * 64, "b" * 64)
        for weights in ({}, {"unet/model.onnx.data": "c" * 64}, {"unet/model.onnx.data": "d" * 64})
    }
    assert len(folders) == 6


def test_another_arithmetic_than_asked_for_is_an_error(tmp_path: Path) -> None:
    if "BF16" not in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        pytest.skip("this processor does not compute in bf16")
    bundle, component = make_bundle(tmp_path)
    options = EngineOptions(threads=1, extra={"INFERENCE_PRECISION_HINT": "bf16"})
    with (
        open_engine(bundle, component, "fp32", options) as engine,
        pytest.raises(PrecisionError, match="in bf16, asked"),
    ):
        engine.bind(batch=1)


INTERRUPTED = """
import os, signal, sys
from pathlib import Path
import numpy as np
from latentedge.runtime.bundle import Bundle
from latentedge.runtime.engines.base import EngineOptions
from latentedge.runtime.engines.openvino import open_engine

bundle = Bundle.open(Path(sys.argv[1]))
component, options = bundle.component("net"), EngineOptions(threads=1)
x = np.ones((2, 48), np.float32)
engines = [open_engine(bundle, component, "fp32", options) for _ in range(3)]
for engine in engines:
    engine.run({"x": x})
del engine
while engines:
    engines.pop(0).close()
heard = []
signal.signal(signal.SIGINT, lambda number, frame: heard.append(number))
os.kill(os.getpid(), signal.SIGINT)
assert heard == [signal.SIGINT]
"""


def test_ctrl_c_is_heard_after_engines_closed_in_the_order_they_came(tmp_path: Path) -> None:
    make_bundle(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, str(tmp_path)], capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
