"""Linear layers that are cut into pieces: one layer for each piece gives the same numbers."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper

from latentedge.export.passes.splitting import split_linear_layers
from latentedge.runtime.bundle import Array


def gated(
    width: int = 4,
    pieces: tuple[int, ...] = (6, 6),
    *,
    axis: int = -1,
    biased: bool = True,
    bias_first: bool = False,
    stated: bool = False,
    read_twice: bool = False,
    output: bool = False,
) -> ir.Model:
    """x [batch, tokens, width], MatMul, Add, Split; the pieces' GELUs are added up with their own widths joined."""
    generator = np.random.default_rng(0)
    constants = {"ff.weight": generator.standard_normal((width, sum(pieces))).astype(np.float32)}
    if biased:
        constants["ff.bias"] = generator.standard_normal(sum(pieces)).astype(np.float32)
    if stated:
        constants["sides"] = np.array(pieces, np.int64)
    names = [f"piece_{index}" for index in range(len(pieces))]
    joined = "added" if biased else "product"
    attributes = {"axis": axis} if stated else {"axis": axis, "num_outputs": len(pieces)}
    nodes = [helper.make_node("MatMul", ["x", "ff.weight"], ["product"], name="ff/MatMul")]
    if biased:
        inputs = ["ff.bias", "product"] if bias_first else ["product", "ff.bias"]
        nodes.append(helper.make_node("Add", inputs, ["added"], name="ff/Add"))
    nodes.append(helper.make_node("Split", [joined, *(["sides"] if stated else [])], names, name="Split", **attributes))
    nodes += [helper.make_node("Gelu", [name], [f"gelu_{name}"], name=f"Gelu_{name}") for name in names]
    nodes.append(helper.make_node("Concat", [f"gelu_{name}" for name in names], ["y"], name="Concat", axis=-1))
    outputs = ["y", *(["product"] if read_twice else []), *(names[:1] if output else [])]
    graph = helper.make_graph(
        nodes,
        "gated",
        [helper.make_tensor_value_info("x", 1, ["batch", "tokens", width])],
        [helper.make_tensor_value_info(name, 1, ["batch", "tokens", None]) for name in outputs],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
        value_info=[helper.make_tensor_value_info(joined, 1, ["batch", "tokens", sum(pieces)])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    onnx.checker.check_model(model)
    return ir.from_proto(model)


def run(model: ir.Model, tokens: Array) -> Array:
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(["y"], {"x": tokens})[0])


@settings(deadline=None, max_examples=30)
@given(
    width=st.integers(1, 9),
    pieces=st.lists(st.integers(1, 8), min_size=2, max_size=3).map(tuple),
    biased=st.booleans(),
    bias_first=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_gives_what_cutting_afterwards_gives(
    width: int, pieces: tuple[int, ...], biased: bool, bias_first: bool, seed: int
) -> None:
    model = gated(width, pieces, biased=biased, bias_first=bias_first, stated=True)
    tokens = np.random.default_rng(seed).standard_normal((2, 5, width)).astype(np.float32)
    wanted = run(model, tokens)
    assert split_linear_layers(model) == 1
    assert "Split" not in {node.op_type for node in model.graph}
    # Dot products of up to 9 numbers of order 1; a wrong column is off by order 1.
    np.testing.assert_allclose(run(model, tokens), wanted, atol=1e-5, rtol=0)


def test_names_and_weights_follow_the_layer() -> None:
    model = gated()
    whole = model.graph.initializers["ff.weight"].const_value
    assert whole is not None
    assert split_linear_layers(model) == 1
    assert [node.name for node in model.graph][:4] == ["ff/MatMul_0", "ff/Add_0", "ff/MatMul_1", "ff/Add_1"]
    assert set(model.graph.initializers) == {"ff.weight_0", "ff.weight_1", "ff.bias_0", "ff.bias_1"}
    halves = [model.graph.initializers[f"ff.weight_{index}"].const_value for index in (0, 1)]
    np.testing.assert_array_equal(
        np.concatenate([half.numpy() for half in halves if half is not None], axis=1), whole.numpy()
    )


@pytest.mark.parametrize("options", [{"axis": 1}, {"read_twice": True}, {"output": True}])
def test_what_others_read_or_is_cut_elsewhere_stays(options: dict[str, bool]) -> None:
    pieces = (6, 6)
    model = gated(12, pieces, **options) if "axis" not in options else gated(12, pieces, axis=1)  # type: ignore[arg-type]
    before = [node.op_type for node in model.graph]
    assert split_linear_layers(model) == 0
    assert [node.op_type for node in model.graph] == before


def test_every_index_of_an_axis_counts_from_either_end() -> None:
    assert split_linear_layers(gated(axis=2)) == 1
