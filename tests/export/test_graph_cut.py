"""Cut graphs compute what the whole one did, whatever the cut."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnx_ir")
pytest.importorskip("onnxruntime")

import onnx_ir as ir
import onnxruntime
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from latentedge.export.errors import ExportError
from latentedge.export.graph_cut import CutGraph, block_of, cut, cut_positions

Arrays = Mapping[str, Any]


def run(model: ir.Model, inputs: Arrays) -> dict[str, Any]:
    """Outputs of a graph, with no fusion across nodes: cut and uncut graphs run the same kernels."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    content = ir.to_proto(model).SerializeToString()
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_outputs()]
    feed = {value.name: inputs[value.name] for value in session.get_inputs()}
    return dict(zip(names, session.run(names, feed), strict=True))


def run_chain(parts: list[ir.Model], inputs: Arrays) -> dict[str, Any]:
    values = dict(inputs)
    for part in parts:
        values.update(run(part, values))
    return values


def skip_model(opset: int = 20) -> ir.Model:
    """Two levels down and up with skip connections, a time embedding, and a reshape by the input's shape."""
    generator = np.random.default_rng(0)
    nodes: list[Any] = []
    weights: list[Any] = []

    def add(operator: str, inputs: list[str], output: str, module: str, **attributes: Any) -> str:
        nodes.append(helper.make_node(operator, inputs, [output], f"{module}/{operator}_{len(nodes)}", **attributes))
        return output

    def conv(value: str, module: str, channels: tuple[int, int], **attributes: Any) -> str:
        name = f"{module}.weight"
        weights.append(numpy_helper.from_array(generator.standard_normal((*channels, 3, 3)).astype(np.float32), name))
        return add("Conv", [value, name], module, module, pads=[1, 1, 1, 1], **attributes)

    constants = {"axes": [2, 3], "scales": [1.0, 1.0, 2.0, 2.0], "width": [4]}
    for name, values in constants.items():
        array = np.array(values, np.float32 if name == "scales" else np.int64)
        weights.append(numpy_helper.from_array(array, name))
    batch = add("Shape", ["sample"], "batch", "", start=0, end=1)
    shape = add("Concat", [batch, "width"], "shape", "", axis=0)
    skips = [conv("sample", "input_blocks.0.0", (4, 4))]
    embedding = add("Reshape", ["timestep", shape], "embedding", "time_embed")
    embedding = add("Unsqueeze", [embedding, "axes"], "embedding_4d", "time_embed")
    for level in (1, 2):
        hidden = conv(skips[-1], f"input_blocks.{level}.0", (4, 4), strides=[level, level])
        skips.append(add("Add", [hidden, embedding], f"down.{level}", f"input_blocks.{level}.1"))
    hidden = conv(skips[-1], "middle_block.0", (4, 4))
    for level in (0, 1, 2):
        hidden = add("Concat", [hidden, skips.pop()], f"joined.{level}", "", axis=1)
        hidden = conv(hidden, f"output_blocks.{level}.0", (4, 8))
        if level == 0:
            hidden = add("Resize", [hidden, "", "scales"], "up", "output_blocks.0.1", mode="nearest")
        hidden = add("Add", [hidden, embedding], f"up.{level}", f"output_blocks.{level}.2")
    conv(hidden, "out_sample", (4, 4))
    sides = ("batch", 4, "latent_height", "latent_width")
    graph = helper.make_graph(
        nodes,
        "skips",
        [
            helper.make_tensor_value_info("sample", TensorProto.FLOAT, sides),
            helper.make_tensor_value_info("timestep", TensorProto.FLOAT, ("batch", 4)),
        ],
        [helper.make_tensor_value_info("out_sample", TensorProto.FLOAT, sides)],
        weights,
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    return ir.from_proto(proto)


def skip_inputs(batch: int = 3) -> dict[str, Any]:
    generator = np.random.default_rng(1)
    shapes = {"sample": (batch, 4, 8, 12), "timestep": (batch, 4)}
    return {name: generator.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


@settings(deadline=None, max_examples=8, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_parts_compute_what_the_whole_graph_does(data: st.DataObject) -> None:
    model = skip_model()
    graph = CutGraph.of(model)
    possible = [index for index in range(1, len(graph.nodes)) if graph.can_cut(index)]
    positions = sorted(data.draw(st.sets(st.sampled_from(possible), max_size=5)))
    parts = cut(graph, positions)
    assert len(parts) == len(positions) + 1
    inputs = skip_inputs()
    np.testing.assert_array_equal(run_chain(parts, inputs)["out_sample"], run(model, inputs)["out_sample"])


def test_skip_connections_and_the_time_embedding_are_passed_on() -> None:
    graph = CutGraph.of(skip_model())
    middle = next(index for index, node in enumerate(graph.nodes) if node.name.startswith("middle_block"))
    first, second = cut(graph, [middle])
    passed = {"input_blocks.0.0", "down.1", "down.2", "embedding_4d"}
    assert {value.name for value in first.graph.outputs} == passed
    assert {value.name for value in second.graph.inputs} == passed
    assert [value.name for value in second.graph.outputs] == ["out_sample"]


def test_shapes_are_computed_again_and_not_passed_on() -> None:
    graph = CutGraph.of(skip_model())
    before = next(index for index, node in enumerate(graph.nodes) if node.op_type == "Reshape")
    _, second = cut(graph, [before])
    assert {value.name for value in second.graph.inputs} == {"sample", "timestep", "input_blocks.0.0"}
    assert {"Shape", "Concat"} <= {node.op_type for node in second.graph}


@pytest.mark.parametrize("parts", [2, 3, 5])
def test_no_part_holds_more_weights_than_the_limit_and_blocks_stay_whole(parts: int) -> None:
    graph = CutGraph.of(skip_model())
    whole = graph.weight(0, len(graph.nodes))
    limit = whole // parts + 8 * 4 * 9 * 4
    positions = cut_positions(graph, limit)
    assert 1 <= len(positions) <= parts
    ends = [0, *positions, len(graph.nodes)]
    assert all(graph.weight(begin, end) <= limit for begin, end in itertools.pairwise(ends))
    for position in positions:
        assert block_of(graph.nodes[position - 1], 1) != block_of(graph.nodes[position], 1)
    inputs = skip_inputs(batch=1)
    chain = run_chain(cut(graph, positions), inputs)
    np.testing.assert_array_equal(chain["out_sample"], run(graph.model, inputs)["out_sample"])


def test_a_graph_within_the_limit_is_not_cut() -> None:
    graph = CutGraph.of(skip_model())
    assert cut_positions(graph, graph.weight(0, len(graph.nodes))) == []
    assert len(cut(graph, [])) == 1


def test_a_layer_over_the_limit_is_an_error() -> None:
    with pytest.raises(ExportError, match="at most 100 bytes of weights: one of its layers alone holds 1152 bytes"):
        cut_positions(CutGraph.of(skip_model()), 100)


def test_a_part_that_would_compute_only_shapes_is_refused() -> None:
    graph = CutGraph.of(skip_model())
    assert not graph.can_cut(2)
    with pytest.raises(ExportError, match="computes nothing for the others"):
        cut(graph, [2])


def test_quantised_values_are_not_passed_on() -> None:
    weights = [numpy_helper.from_array(np.array(0.1, np.float32), "scale"),
               numpy_helper.from_array(np.array(0, np.int8), "zero")]  # fmt: skip
    nodes = [
        helper.make_node("QuantizeLinear", ["sample", "scale", "zero"], ["q"], "a.0/QuantizeLinear"),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["d"], "b.0/DequantizeLinear"),
        helper.make_node("Relu", ["d"], ["out_sample"], "b.0/Relu"),
    ]
    tensors = [helper.make_tensor_value_info(name, TensorProto.FLOAT, (1, 4)) for name in ("sample", "out_sample")]
    proto = helper.make_graph(nodes, "quantised", tensors[:1], tensors[1:], weights)
    model = ir.from_proto(helper.make_model(proto, opset_imports=[helper.make_opsetid("", 20)], ir_version=10))
    graph = CutGraph.of(model)
    assert [graph.can_cut(index) for index in (1, 2)] == [False, True]
    with pytest.raises(ExportError, match="quantised values would be passed on"):
        cut(graph, [1])


@pytest.mark.parametrize(
    ("name", "depth", "block"),
    [
        ("input_blocks.4.1.transformer_blocks.0.attn1/MatMul", 1, ("input_blocks", "4")),
        ("input_blocks.4.1.transformer_blocks.0.attn1/MatMul", 2, ("input_blocks", "4", "1")),
        ("/down_blocks.1/resnets.0/conv1/Conv", 2, ("down_blocks", "1", "resnets", "0")),
        ("/Concat", 1, ()),
        ("time_embed/Gemm", 1, ("time_embed",)),
    ],
)
def test_a_nodes_block_comes_from_its_module_path(name: str, depth: int, block: tuple[str, ...]) -> None:
    assert block_of(ir.Node("", "Identity", [], name=name), depth) == block


def test_a_real_unet_in_parts(tmp_path: Path) -> None:
    """A U-Net with attention and a skip connection, exported by torch, in the parts of a small board."""
    pytest.importorskip("torch")
    pytest.importorskip("onnxscript")
    from latentedge.export.exporter import ExportOptions, export_source
    from tests.export.tiny import UNET, TinyDenoiser, component, tiny_model

    model = tiny_model(component(UNET, TinyDenoiser))
    bundle = export_source(model, tmp_path / "tiny.bundle", ExportOptions(("fp32", "fp16")))
    generator = np.random.default_rng(2)
    shapes = {"sample": (2, 4, 12, 8), "timestep": (2,), "encoder_hidden_states": (2, 7, 16)}
    inputs = {name: generator.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    for precision in ("fp32", "fp16"):
        path, _ = bundle.variant("unet", precision)
        graph = CutGraph.of(ir.load(path))
        positions = cut_positions(graph, int(0.75 * graph.weight(0, len(graph.nodes))))
        assert positions
        chain = run_chain(cut(graph, positions), inputs)
        whole = run(graph.model, inputs)["out_sample"]
        # ONNX Runtime computes fp16 on the CPU in fp32 and rounds where a graph ends: 2 ** -11 of a value, in each part.
        tolerance = {"fp32": 0.0, "fp16": 2e-3}[precision]
        np.testing.assert_allclose(chain["out_sample"], whole, rtol=0, atol=tolerance * np.abs(whole).max())
