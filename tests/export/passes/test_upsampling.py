"""Convolutions computed before a doubling: the same values, fewer products."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper

from latentedge.export.passes.upsampling import convolve_before_doubling, kernel
from latentedge.runtime.bundle import Array

PLAIN = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}


def graph_of(
    weight: Array,
    bias: Array | None = None,
    *,
    resize: dict[str, Any] | None = None,
    conv: dict[str, Any] | None = None,
    scales: tuple[float, ...] = (1, 1, 2, 2),
    read_twice: bool = False,
) -> ir.Model:
    """Resize and Conv, both declared for any batch, height and width."""
    outputs = ["y", "doubled"] if read_twice else ["y"]
    constants = {"scales": np.asarray(scales, np.float32), "up.conv.weight": weight}
    if bias is not None:
        constants["up.conv.bias"] = bias
    attributes = {"kernel_shape": list(weight.shape[2:]), "pads": [1, 1, 1, 1]} | (conv or {})
    inputs = ["doubled", "up.conv.weight", *(["up.conv.bias"] if bias is not None else [])]
    nodes = [
        helper.make_node("Resize", ["x", "", "scales"], ["doubled"], name="up/Resize", **(resize or PLAIN)),
        helper.make_node("Conv", inputs, ["y"], name="up.conv/Conv", **attributes),
    ]
    channels = weight.shape[1] * attributes.get("group", 1)
    graph = helper.make_graph(
        nodes,
        "up",
        [helper.make_tensor_value_info("x", 1, ["batch", channels, "height", "width"])],
        [helper.make_tensor_value_info(name, 1, ["batch", None, None, None]) for name in outputs],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    onnx.checker.check_model(model)
    return ir.from_proto(model)


def run(model: ir.Model, image: Array) -> Array:
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(["y"], {"x": image})[0])


@settings(deadline=None, max_examples=30)
@given(
    seed=st.integers(0, 2**16),
    sides=st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 6), st.integers(1, 7), st.integers(1, 7)),
    rounding=st.sampled_from(
        [("asymmetric", "floor"), ("half_pixel", "round_prefer_floor"), ("half_pixel", "round_prefer_ceil")]
    ),
    biased=st.booleans(),
)
def test_gives_what_doubling_first_gives(
    seed: int, sides: tuple[int, int, int, int, int], rounding: tuple[str, str], biased: bool
) -> None:
    batch, channels, outputs, height, width = sides
    generator = np.random.default_rng(seed)
    weight = generator.standard_normal((outputs, channels, 3, 3)).astype(np.float32)
    bias = generator.standard_normal(outputs).astype(np.float32) if biased else None
    image = generator.standard_normal((batch, channels, height, width)).astype(np.float32)
    resize = {"mode": "nearest", "coordinate_transformation_mode": rounding[0], "nearest_mode": rounding[1]}
    model = graph_of(weight, bias, resize=resize)
    wanted = run(model, image)
    assert convolve_before_doubling(model) == 1
    assert [node.op_type for node in model.graph] == ["Conv"] * 4 + ["Concat", "DepthToSpace"]
    # Sums of up to 45 products of order 1 in float32; a wrong pixel or entry is off by order 1.
    np.testing.assert_allclose(run(model, image), wanted, atol=2e-5, rtol=0)


def test_the_four_kernels_hold_each_entry_once() -> None:
    weight = np.random.default_rng(1).standard_normal((2, 3, 3, 3)).astype(np.float32)
    for row in (0, 1):
        for column in (0, 1):
            found = kernel(weight, row, column)
            assert found.shape == (2, 3, 2, 2)
            np.testing.assert_allclose(found.sum(axis=(2, 3)), weight.sum(axis=(2, 3)), atol=1e-5)


def test_names_say_where_a_convolution_came_from() -> None:
    model = graph_of(np.ones((4, 4, 3, 3), np.float32), np.ones(4, np.float32))
    convolve_before_doubling(model)
    names = [node.name for node in model.graph if node.op_type == "Conv"]
    assert names == ["up.conv/Conv_00", "up.conv/Conv_01", "up.conv/Conv_10", "up.conv/Conv_11"]
    weights = [f"up.conv.weight_{place}" for place in ("00", "01", "10", "11")]
    assert sorted(model.graph.initializers) == ["up.conv.bias", *weights]
    assert model.graph.outputs[0].name == "y"


@pytest.mark.parametrize(
    "changed",
    [
        {"resize": {**PLAIN, "mode": "linear"}},
        {"resize": {**PLAIN, "nearest_mode": "ceil"}},
        {"resize": {**PLAIN, "coordinate_transformation_mode": "align_corners"}},
        {"scales": (1, 1, 2, 3)},
        {"scales": (1, 1, 4, 4)},
        {"conv": {"strides": [2, 2]}},
        {"conv": {"dilations": [2, 2], "pads": [2, 2, 2, 2]}},
        {"conv": {"pads": [1, 1, 0, 0]}},
        {"conv": {"group": 2}},
        {"read_twice": True},
    ],
)
def test_others_stay_as_they_are(changed: dict[str, Any]) -> None:
    channels = 2 if "group" in changed.get("conv", {}) else 4
    model = graph_of(np.ones((4, channels, 3, 3), np.float32), **changed)
    assert convolve_before_doubling(model) == 0
    assert [node.op_type for node in model.graph] == ["Resize", "Conv"]


def test_a_5x5_kernel_stays() -> None:
    model = graph_of(np.ones((4, 4, 5, 5), np.float32), conv={"pads": [2, 2, 2, 2]})
    assert convolve_before_doubling(model) == 0
