"""Attention is found in a graph, and fused or sliced without a change of what the graph computes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from latentedge.export import attention
from latentedge.export.onnxruntime_graphs import fuse_skips
from latentedge.export.session import HostSession
from latentedge.runtime.bundle import Array
from latentedge.runtime.parity import compare

onnx = pytest.importorskip("onnx")

Rewrite = Callable[[ir.Model], int]


def four_sided(path: Path, *, masked: bool = False, hoisted: bool = False) -> Path:
    """Attention of three heads of eight, as exporters write it; ``hoisted``: keys and values arrive with heads."""
    helper, numbers = onnx.helper, onnx.numpy_helper
    generator = np.random.default_rng(0)
    constants = {name: generator.standard_normal((24, 24)).astype(np.float32) for name in ("wq", "wk", "wv")}
    constants |= {"scale": np.float32(8**-0.5), "mask": np.float32([[[[0]]]])}
    heads = np.array([0, 0, 3, 8], np.int64)
    nodes = [
        helper.make_node("MatMul", ["x", "wq"], ["q"]),
        helper.make_node("Reshape", ["q", "heads"], ["q_heads"]),
        helper.make_node("Transpose", ["q_heads"], ["q_first"], perm=[0, 2, 1, 3]),
        helper.make_node("Mul", ["q_first", "scale"], ["q_scaled"]),
    ]
    if not hoisted:
        nodes += [
            helper.make_node("MatMul", ["y", "wk"], ["k"]),
            helper.make_node("Reshape", ["k", "heads"], ["k_heads"]),
            helper.make_node("Transpose", ["k_heads"], ["keys"], perm=[0, 2, 3, 1]),
            helper.make_node("MatMul", ["y", "wv"], ["v"]),
            helper.make_node("Reshape", ["v", "heads"], ["v_heads"]),
            helper.make_node("Transpose", ["v_heads"], ["values"], perm=[0, 2, 1, 3]),
        ]
    scores = "masked" if masked else "scores"
    nodes += [
        helper.make_node("MatMul", ["q_scaled", "keys"], ["scores"]),
        *([helper.make_node("Add", ["scores", "y_mask"], ["masked"])] if masked else []),
        helper.make_node("Softmax", [scores], ["weights"], axis=-1),
        helper.make_node("MatMul", ["weights", "values"], ["attended"]),
        helper.make_node("Transpose", ["attended"], ["joined"], perm=[0, 2, 1, 3]),
        helper.make_node("Reshape", ["joined", "flat"], ["out"]),
    ]
    kind = onnx.TensorProto.FLOAT
    inputs = [helper.make_tensor_value_info("x", kind, ["batch", "tokens", 24])]
    if hoisted:
        inputs += [
            helper.make_tensor_value_info("keys", kind, ["batch", 3, 8, "words"]),
            helper.make_tensor_value_info("values", kind, ["batch", 3, "words", 8]),
        ]
    else:
        inputs.append(helper.make_tensor_value_info("y", kind, ["batch", "words", 24]))
    if masked:
        inputs.append(helper.make_tensor_value_info("y_mask", kind, [1, 1, "tokens", "words"]))
    used = {name for node in nodes for name in node.input}
    initializers = [numbers.from_array(value, name) for name, value in constants.items() if name in used]
    initializers += [numbers.from_array(heads, "heads"), numbers.from_array(np.array([0, 0, 24], np.int64), "flat")]
    output = helper.make_tensor_value_info("out", kind, ["batch", "tokens", 24])
    graph = helper.make_graph(nodes, "attention", inputs, [output], initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    onnx.save(onnx.shape_inference.infer_shapes(model), path)
    return path


def inputs(*, hoisted: bool = False, tokens: int = 21, words: int = 5) -> dict[str, Array]:
    shapes = {"x": (2, tokens, 24)}
    shapes |= {"keys": (2, 3, 8, words), "values": (2, 3, words, 8)} if hoisted else {"y": (2, words, 24)}
    generator = np.random.default_rng(1)
    return {name: generator.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def rewritten(path: Path, rewrite: Rewrite) -> tuple[ir.Model, Path]:
    model = ir.load(path)
    assert rewrite(model) == 1
    target = path.with_name("rewritten.onnx")
    ir.save(model, target)
    return model, target


@pytest.mark.parametrize("rewrite", [attention.fuse, attention.slice_queries])
@pytest.mark.parametrize("hoisted", [False, True])
@pytest.mark.parametrize("tokens", [21, 3])
def test_a_rewritten_graph_gives_what_the_graph_gives(
    tmp_path: Path, rewrite: Rewrite, hoisted: bool, tokens: int
) -> None:
    path = four_sided(tmp_path / "model.onnx", hoisted=hoisted)
    known = inputs(hoisted=hoisted, tokens=tokens)
    _, target = rewritten(path, rewrite)
    with HostSession(path) as plain, HostSession(target) as changed:
        found = compare(plain.run(known)["out"], changed.run(known)["out"])
    assert found.psnr_db > 120


def test_a_fused_graph_holds_no_scores(tmp_path: Path) -> None:
    model, _ = rewritten(four_sided(tmp_path / "model.onnx"), attention.fuse)
    operators = [node.op_type for node in model.graph]
    assert "Softmax" not in operators
    assert operators.count("MultiHeadAttention") == 1
    fused = next(node for node in model.graph if node.op_type == "MultiHeadAttention")
    assert fused.attributes["num_heads"].as_int() == 3
    assert fused.attributes["scale"].as_float() == pytest.approx(8**-0.5)


def test_a_sliced_graph_computes_as_many_softmaxes_as_it_has_slices(tmp_path: Path) -> None:
    model, _ = rewritten(four_sided(tmp_path / "model.onnx"), attention.slice_queries)
    assert [node.op_type for node in model.graph].count("Softmax") == attention.SLICES


def test_masked_attention_is_left_alone(tmp_path: Path) -> None:
    model = ir.load(four_sided(tmp_path / "model.onnx", masked=True))
    assert attention.attentions(model.graph) == []


@pytest.mark.parametrize("is_output", [False, True])
def test_a_sum_that_is_normalised_is_one_operator(tmp_path: Path, is_output: bool) -> None:
    """The sum is read again, by the next addition."""
    helper, numbers = onnx.helper, onnx.numpy_helper
    generator = np.random.default_rng(0)
    parameters = [
        numbers.from_array(generator.standard_normal(24).astype(np.float32), name) for name in ("scale", "bias")
    ]
    outputs = ["normalised", "again"] if is_output else ["again"]
    nodes = [
        helper.make_node("Add", ["x", "y"], ["sum"]),
        helper.make_node("LayerNormalization", ["sum", "scale", "bias"], ["normalised"], axis=-1, epsilon=1e-5),
        helper.make_node("Add", ["sum", "normalised"], ["again"]),
    ]
    sides = ["batch", "tokens", 24]
    values = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, sides) for name in ("x", "y", *outputs)]
    graph = helper.make_graph(nodes, "skip", values[:2], values[2:], parameters)
    path = tmp_path / "model.onnx"
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    onnx.save(onnx.shape_inference.infer_shapes(model), path)
    changed, target = rewritten(path, fuse_skips)
    assert sorted(node.op_type for node in changed.graph) == ["Add", "SkipLayerNormalization"]
    known = {name: generator.standard_normal((2, 7, 24)).astype(np.float32) for name in ("x", "y")}
    with HostSession(path) as plain, HostSession(target) as one:
        expected, found = plain.run(known), one.run(known)
    assert set(found) == set(outputs)
    assert all(compare(expected[name], found[name]).psnr_db > 120 for name in outputs)
