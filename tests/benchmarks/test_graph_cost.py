"""Operations and bytes of graphs small enough to count by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from latentedge.runtime.errors import BundleError

onnx = pytest.importorskip("onnx")

from latentedge.benchmarks.graph_cost import graph_cost  # noqa: E402


def save(path: Path, nodes: list[object], inputs: dict[str, list[object]], weights: dict[str, np.ndarray]) -> Path:  # type: ignore[type-arg]
    helper = onnx.helper
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info(name, 1, shape) for name, shape in inputs.items()],
        [helper.make_tensor_value_info("y", 1, None)],
        [onnx.numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


def test_a_convolution(tmp_path: Path) -> None:
    node = onnx.helper.make_node("Conv", ["x", "w"], ["y"], pads=[1, 1, 1, 1], strides=[2, 2], group=2)
    weight = np.zeros((6, 2, 3, 3), np.float32)
    cost = graph_cost(save(tmp_path / "g.onnx", [node], {"x": ["n", 4, "h", "w"]}, {"w": weight}), {"x": (2, 4, 8, 10)})
    assert cost.flops == 2 * (2 * 6 * 4 * 5) * (2 * 3 * 3)
    assert cost.weight_bytes == 4 * weight.size
    assert cost.io_bytes == 4 * (2 * 4 * 8 * 10 + 2 * 6 * 4 * 5)
    assert cost.peak_activation_bytes == cost.io_bytes


def test_a_dynamic_reshape_before_a_product(tmp_path: Path) -> None:
    """The batch goes through Shape, Slice and Concat into a Reshape: its value decides the product's shape."""
    make = onnx.helper.make_node
    nodes = [
        make("Shape", ["x"], ["s"], start=0, end=1),
        make("Concat", ["s", "rest"], ["target"], axis=0),
        make("Reshape", ["x", "target"], ["r"]),
        make("MatMul", ["r", "w"], ["m"]),
        make("Softmax", ["m"], ["y"], axis=-1),
    ]
    weights = {"rest": np.array([-1, 4], np.int64), "w": np.zeros((4, 5), np.float32)}
    cost = graph_cost(save(tmp_path / "g.onnx", nodes, {"x": ["n", 24]}, weights), {"x": (3, 24)})
    assert cost.by_operator["MatMul"] == 2 * (3 * 6 * 5) * 4
    assert cost.by_operator["Softmax"] == 5 * (3 * 6 * 5)
    assert cost.by_operator["Reshape"] == 0
    # alive at once: the product's input and output beside nothing else, or its output and the softmax's
    assert cost.peak_activation_bytes == 4 * max(3 * 24 * 2, 3 * 24 + 3 * 30, 2 * 3 * 30) + 2 * 8 - 2 * 8


def test_shapes_that_do_not_fit_are_an_error(tmp_path: Path) -> None:
    node = onnx.helper.make_node("MatMul", ["x", "w"], ["y"])
    path = save(tmp_path / "g.onnx", [node], {"x": ["n", "k"]}, {"w": np.zeros((4, 5), np.float32)})
    with pytest.raises(BundleError, match="does not take these shapes"):
        graph_cost(path, {"x": (2, 3)})
