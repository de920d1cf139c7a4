from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from latentedge.calibration import smoothing
from latentedge.calibration.graph import block_name, constant, find_layers, name_nodes, node_by_name, value_by_name
from latentedge.calibration.lint import lint
from latentedge.calibration.metrics import sqnr
from latentedge.calibration.observers import TensorStatistics
from latentedge.calibration.placement import SHORTCUTS, place
from latentedge.calibration.plan import ActivationPlan, BlockPlan, Plan
from latentedge.calibration.quantise import Evidence, quantise
from latentedge.calibration.weights import quantise_weight
from latentedge.runtime.errors import LatentEdgeError
from tests.calibration.graphs import SIZE, WIDTH, chain, denoiser


def graph(outlier: float = 1.0) -> ir.Model:
    model = ir.from_proto(denoiser(outlier=outlier))
    name_nodes(model)
    return model


def run(model: ir.Model, names: list[str] | None = None) -> Any:
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 3
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), settings)
    random = np.random.default_rng(5)
    inputs = {
        "sample": random.standard_normal((2, 4, SIZE, SIZE)).astype(np.float32),
        "timestep": np.array([10.0, 900.0], np.float32),
    }
    return session.run(names, inputs)


def evidence(model: ir.Model) -> Evidence:
    taps = {entry.layer.activation: entry.layer.feature_axis for entry in place(model) if entry.kept is None}
    taps |= {"mid.0.attn.0_output": 1, "conv_in_output": 1}
    model = ir.from_proto(ir.to_proto(model))
    values = value_by_name(model)
    model.graph.outputs.extend(values[name] for name in taps)
    statistics = {}
    for (name, axis), array in zip(taps.items(), run(model, list(taps)), strict=True):
        statistics[name] = TensorStatistics.empty(array.shape[axis])
        statistics[name].observe(array, axis, 1.0)
    return Evidence(statistics)


def plan_for(model: ir.Model, found: Evidence, **changes: Any) -> Plan:
    blocks: dict[str, list[str]] = {}
    for entry in place(model):
        if entry.kept is None:
            blocks.setdefault(entry.block, []).append(entry.layer.name)
    activations = {name: ActivationPlan(entry.largest, "absmax") for name, entry in found.statistics.items()}
    plan = Plan(
        "unet", "openvino", "int8", 30.0,
        tuple(BlockPlan(name, "int8", "", tuple(layers)) for name, layers in blocks.items()), activations,
    )  # fmt: skip
    return dataclasses.replace(plan, **changes)


@pytest.mark.parametrize(
    ("layer", "block"),
    [
        ("unet.down_blocks.0.resnets.1.conv1", "unet.down_blocks.0.resnets.1"),
        ("mid_block.attentions.0.transformer_blocks.0.attn1.to_q", "mid_block.attentions.0"),
        ("unet.mid_block.attentions.0.to_out.0", "unet.mid_block.attentions.0"),
        ("middle_block.0.in_layers.2", "middle_block.0"),
        ("input_blocks.4.1.transformer_blocks.0.ff.net.0.proj", "input_blocks.4.1"),
        ("conv_in", None),
    ],
)
def test_blocks_by_name(layer: str, block: str | None) -> None:
    assert block_name(layer) == block


def test_placement_knows_the_parts() -> None:
    placed = {entry.layer.name: entry for entry in place(graph())}
    assert placed["conv_in"].kept == "first convolution"
    assert placed["conv_out"].kept == "last convolution"
    assert placed["down.0.res.0.emb"].kept == "time or vector embedding"
    assert placed["up.0.res.0.shortcut"].block == SHORTCUTS
    assert placed["up.0.res.0.shortcut"].split == ("mid.0.attn.0_output", "conv_in_output")
    quantised = {name for name, entry in placed.items() if entry.kept is None}
    assert quantised == {
        "down.0.res.0.conv1", "down.0.res.0.conv2", "mid.0.attn.0.to_q", "mid.0.attn.0.to_k", "mid.0.attn.0.to_v",
        "mid.0.attn.0.to_out", "up.0.res.0.conv1", "up.0.res.0.conv2", "up.0.res.0.shortcut",
    }  # fmt: skip
    # Products of two activations are no layers at all.
    assert not any("logits" in layer.node or "mixed" in layer.node for layer in find_layers(graph()))


@pytest.mark.parametrize("split", [(), ("up.0.res.0.shortcut",)])
def test_the_quantised_graph_is_close_and_clean(split: tuple[str, ...], tmp_path: Path) -> None:
    model = graph()
    found = evidence(model)
    reference = run(model)[0]
    plan = plan_for(model, found, split=split)
    done = quantise(model, plan, found)
    assert len(done) == 9
    assert lint(model) == []
    ir.save(model, tmp_path / "q.onnx")
    onnx.checker.check_model(str(tmp_path / "q.onnx"), full_check=True)
    computed = run(model)[0]
    assert not np.array_equal(computed, reference)
    assert sqnr(reference, computed) > 25
    names = {node.name for node in model.graph}
    assert ("node_up.0.res.0.shortcut_output_part1" in names) == bool(split)


def test_one_pair_for_each_tensor_and_int8_weights() -> None:
    model = graph()
    found = evidence(model)
    quantise(model, plan_for(model, found), found)
    quantizers = [node for node in model.graph if node.op_type == "QuantizeLinear"]
    assert len(quantizers) == len({node.inputs[0].name for node in quantizers})  # type: ignore[union-attr]
    weights = [
        node
        for node in model.graph
        if node.op_type == "DequantizeLinear" and node.inputs[0].producer() is None  # type: ignore[union-attr]
    ]
    assert len(weights) == 9
    assert all(constant(node.inputs[0]).dtype == np.int8 for node in weights)  # type: ignore[union-attr]
    assert "mid.0.attn.0.to_q.weight" not in model.graph.initializers


def test_a_block_left_out_is_untouched() -> None:
    model = graph()
    found = evidence(model)
    plan = plan_for(model, found)
    plan = plan.with_blocks(frozenset({"mid.0.attn.0"}))
    assert set(quantise(model, plan, found)) == {f"mid.0.attn.0.to_{kind}" for kind in ("q", "k", "v", "out")}


def test_balancing_does_not_change_the_float_graph() -> None:
    model = graph(outlier=50.0)
    reference = run(model)[0]
    nodes, values = node_by_name(model), value_by_name(model)
    layers = [layer for layer in find_layers(model) if layer.activation == "mid.0.attn.0.norm_output"]
    affine = smoothing.affine_of(values["mid.0.attn.0.norm_output"], layers)
    assert affine is not None
    weights = [(constant(nodes[layer.node].inputs[1]), layer.input_axis) for layer in layers]
    largest = smoothing.weight_amax(weights)  # type: ignore[arg-type]
    factor = smoothing.factors(np.linspace(0.1, 80, 32).astype(np.float32), largest, 0.5)
    assert factor.max() / factor.min() > 5
    smoothing.divide(model.graph, affine, factor)
    for layer in layers:
        node = nodes[layer.node]
        weight = smoothing.multiplied(constant(node.inputs[1]), layer.input_axis, factor)  # type: ignore[arg-type]
        node.replace_input_with(1, ir.Value(name=f"{layer.name}.new", const_value=ir.tensor(weight)))
        model.graph.register_initializer(node.inputs[1])  # type: ignore[arg-type]
    np.testing.assert_allclose(run(model)[0], reference, atol=2e-5)


def test_balancing_helps_with_an_outlier_channel() -> None:
    model = graph(outlier=60.0)
    reference = run(model)[0]
    found = evidence(graph(outlier=60.0))
    plain = graph(outlier=60.0)
    attention = frozenset({"mid.0.attn.0"})
    quantise(plain, plan_for(plain, found).with_blocks(attention), found)
    balanced = graph(outlier=60.0)
    plan = plan_for(balanced, found).with_blocks(attention)
    tensor = "mid.0.attn.0.norm_output"
    statistics = found.statistics[tensor]
    layers = [layer for layer in find_layers(balanced) if layer.activation == tensor]
    nodes = node_by_name(balanced)
    weights = [(constant(nodes[layer.node].inputs[1]), layer.input_axis) for layer in layers]
    factor = smoothing.factors(statistics.channel_amax, smoothing.weight_amax(weights), 0.65)  # type: ignore[arg-type]
    amax = float((statistics.channel_amax / factor).max())
    plan = dataclasses.replace(plan, activations={**plan.activations, tensor: ActivationPlan(amax, "balanced", 0.65)})
    quantise(balanced, plan, found)
    assert sqnr(reference, run(balanced)[0]) > sqnr(reference, run(plain)[0]) + 2


def test_weights_are_clipped_where_it_lowers_the_output_error() -> None:
    random = np.random.default_rng(0)
    weight = random.standard_t(3, (16, 64)).astype(np.float32)
    power = np.exp(2 * random.standard_normal(64))
    clipped = quantise_weight(weight, 0, 1, power)
    plain = quantise_weight(weight, 0, 1, power, clip=False)

    def error(levels: Any) -> Any:
        return (np.square(levels.dequantised() - weight) * power).sum(axis=1)

    assert (error(clipped) <= error(plain) + 1e-9).all()
    assert error(clipped).sum() < 0.97 * error(plain).sum()


def test_zero_and_broken_weights() -> None:
    weight = np.zeros((2, 3), np.float32)
    weight[1] = 0.5
    quantised = quantise_weight(weight, 0, 1)
    assert (quantised.scales > 0).all()
    np.testing.assert_allclose(quantised.dequantised(), weight, atol=1e-6)
    weight[0, 0] = np.nan
    with pytest.raises(LatentEdgeError, match="NaN"):
        quantise_weight(weight, 0, 1)


def test_a_plan_of_another_model_is_refused() -> None:
    model = graph()
    found = evidence(model)
    plan = plan_for(model, found)
    plan = dataclasses.replace(plan, blocks=(*plan.blocks, BlockPlan("down.9.res.0", "int8", "", ())))
    with pytest.raises(LatentEdgeError, match=r"down\.9\.res\.0"):
        quantise(model, plan, found)


def test_a_missing_range_is_named() -> None:
    model = graph()
    found = evidence(model)
    plan = plan_for(model, found)
    del plan.activations["mid.0.attn.0.norm_output"]
    with pytest.raises(LatentEdgeError, match=r"mid\.0\.attn\.0\.norm_output"):
        quantise(model, plan, found)


def test_plan_round_trip(tmp_path: Path) -> None:
    model = graph()
    plan = plan_for(model, evidence(model), split=("a",), kept={"b": "why"})
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    text = (
        (tmp_path / "plan.json")
        .read_text()
        .replace('"precision": "int8",\n      "reason"', '"precision": "int4",\n      "reason"')
    )
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(LatentEdgeError, match="int4"):
        Plan.load(tmp_path / "plan.json")


@pytest.mark.parametrize("amax", ["-1.0", "NaN", "Infinity", '"wide"'])
def test_a_range_that_is_no_magnitude_is_named(tmp_path: Path, amax: str) -> None:
    model = graph()
    plan = plan_for(model, evidence(model))
    tensor = next(iter(plan.activations))
    edited = json.loads(plan.to_text())
    edited["activations"][tensor]["amax"] = json.loads(amax)
    (tmp_path / "plan.json").write_text(json.dumps(edited))
    with pytest.raises(LatentEdgeError, match=re.escape(tensor)) as error:
        Plan.load(tmp_path / "plan.json")
    assert "manifest" not in error.value.message


def small(model: ir.Model, conv: ir.Node, dequantized: ir.Node) -> ir.Node:
    stored = conv.inputs[1].producer().inputs[0]  # type: ignore[union-attr]
    stored.const_value = ir.tensor(np.asarray(stored.const_value.numpy())[:, :8])  # type: ignore[union-attr]
    return conv


def one_row(model: ir.Model, conv: ir.Node, dequantized: ir.Node) -> ir.Node:
    linear = next(node for node in model.graph if node.op_type == "MatMul" and node.inputs[1].producer() is not None)
    linear.inputs[0].shape = ir.Shape([1, 32])  # type: ignore[union-attr]
    return linear


def resize(model: ir.Model, conv: ir.Node, dequantized: ir.Node) -> ir.Node:
    model.graph.insert_after(dequantized, ir.node("Resize", [dequantized.outputs[0]], name="upsampled"))
    return dequantized


def opset(model: ir.Model, conv: ir.Node, dequantized: ir.Node) -> ir.Node:
    model.opset_imports[""] = 12
    return dequantized


#: Changes of shapes, operators and versions; each gives the node at fault.
CHANGED = {"small": small, "one row": one_row, "resize": resize, "opset": opset}


def broken(change: str) -> tuple[ir.Model, str]:
    """A quantised graph with one rule broken, and the node at fault."""
    model = graph()
    found = evidence(model)
    quantise(model, plan_for(model, found), found)
    nodes = node_by_name(model)
    values = value_by_name(model)
    pair = nodes["mid.0.attn.0.norm_output_quantized"], nodes["mid.0.attn.0.norm_output_dequantized"]
    if change == "zero scale":
        scale = ir.Value(name="bad", const_value=ir.tensor(np.float32(0)))
        model.graph.register_initializer(scale)
        for node in pair:
            node.replace_input_with(1, scale)
        return model, pair[0].name or ""
    if change == "attention":
        softmax = values["mid.0.attn.0_weights"]
        q = ir.node("QuantizeLinear", [softmax, *pair[0].inputs[1:]], name="bad_q")
        dq = ir.node("DequantizeLinear", [q.outputs[0], *pair[0].inputs[1:]], name="bad_dq")
        model.graph.insert_before(nodes["node_mid.0.attn.0_mixed"], [q, dq])
        nodes["node_mid.0.attn.0_mixed"].replace_input_with(0, dq.outputs[0])
        return model, "bad_dq"
    if change == "bias":
        conv = nodes["node_down.0.res.0.conv1_output"]
        dq = ir.node("DequantizeLinear", list(conv.inputs[1].producer().inputs), name="bad_dq")  # type: ignore[union-attr]
        model.graph.insert_before(conv, dq)
        conv.replace_input_with(2, dq.outputs[0])
        return model, "bad_dq"
    if change == "half a layer":
        conv = nodes["node_down.0.res.0.conv1_output"]
        source = conv.inputs[0].producer().inputs[0].producer().inputs[0]  # type: ignore[union-attr]
        conv.replace_input_with(0, source)
        return model, "node_down.0.res.0.conv1_output"
    if change == "output":
        conv = nodes["node_down.0.res.0.conv1_output"]
        add = nodes["node_down.0.res.0.shifted"]
        q = ir.node("QuantizeLinear", [conv.outputs[0], *pair[0].inputs[1:]], name="bad_q")
        dq = ir.node("DequantizeLinear", [q.outputs[0], *pair[0].inputs[1:]], name="bad_dq")
        model.graph.insert_before(add, [q, dq])
        add.replace_input_with(0, dq.outputs[0])
        return model, "bad_q"
    if change == "other scale":
        scale = ir.Value(name="bad", const_value=ir.tensor(np.float32(0.123)))
        model.graph.register_initializer(scale)
        pair[1].replace_input_with(1, scale)
        return model, pair[1].name or ""
    conv = nodes["node_down.0.res.0.conv1_output"]
    if change in CHANGED:
        return model, CHANGED[change](model, conv, pair[1]).name or ""
    assert change == "axis"
    dq = conv.inputs[1].producer()  # type: ignore[union-attr]
    dq.attributes["axis"] = ir.AttrInt64("axis", 1)  # type: ignore[union-attr]
    return model, conv.name or ""


#: What is done to a clean graph, and the rule that it breaks.
CHANGES = {
    "zero scale": "positive finite scale",
    "attention": "attention in float",
    "bias": "float bias",
    "half a layer": "both sides or none",
    "output": "float output",
    "other scale": "equal scales",
    "small": "small shapes in float",
    "one row": "small shapes in float",
    "resize": "no Q/DQ before Resize",
    "opset": "opset 13 or later",
    "axis": "scales by output channel",
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_linter_names_the_node_that_breaks_a_rule(change: str) -> None:
    model, node = broken(change)
    findings = lint(model)
    assert (node, CHANGES[change]) in {(finding.node, finding.rule) for finding in findings}, list(map(str, findings))


def test_a_float_layer_may_read_an_output_that_is_quantised() -> None:
    """A downsampling convolution in INT8 for ONNX Runtime, and a shortcut that stays float behind it."""
    model = ir.from_proto(chain())
    name_nodes(model)
    names = ["conv_in_output", "down.0.res.0.conv_output"]
    statistics = {name: TensorStatistics.empty(WIDTH) for name in names}
    for entry in statistics.values():
        entry.observe(np.random.default_rng(0).standard_normal((1, WIDTH, SIZE, SIZE)).astype(np.float32), 1, 1.0)
    ranges = {name: ActivationPlan(4.0, "absmax") for name in names}
    blocks = tuple(BlockPlan(f"down.{index}.res.0", kind, "", ()) for index, kind in enumerate(("int8", "float")))
    plan = Plan("unet", "onnxruntime", "int8", 30.0, blocks, ranges, quantise_outputs=True)
    assert quantise(model, plan, Evidence(statistics)) == ("down.0.res.0.conv",)
    assert lint(model, quantised_outputs=True) == []
    assert [finding.rule for finding in lint(model)] == ["both sides or none"]


def test_quantised_outputs_are_allowed_where_asked() -> None:
    model = graph()
    found = evidence(model)
    plan = plan_for(model, found, quantise_outputs=True)
    source = graph()
    nodes = node_by_name(source)
    extra = {}
    for entry in place(source):
        if entry.kept is None and entry.layer.kind == "Conv":
            extra[str(nodes[entry.layer.node].outputs[0].name)] = ActivationPlan(8.0, "absmax")
    plan = dataclasses.replace(plan, activations={**plan.activations, **extra})
    quantise(model, plan, found)
    assert lint(model, quantised_outputs=True) == []
    assert any(finding.rule == "float output" for finding in lint(model))


def test_the_float16_graph_is_quantised_with_the_fp32_plan() -> None:
    half_precision = pytest.importorskip("latentedge.export.passes.half_precision")
    original = graph(outlier=60.0)
    found = evidence(original)
    plan = plan_for(original, found)
    tensor = "mid.0.attn.0.norm_output"
    layers = [layer for layer in find_layers(original) if layer.activation == tensor]
    nodes = node_by_name(original)
    weights = [(constant(nodes[layer.node].inputs[1]), layer.input_axis) for layer in layers]
    factor = smoothing.factors(found.statistics[tensor].channel_amax, smoothing.weight_amax(weights), 0.65)  # type: ignore[arg-type]
    amax = float((found.statistics[tensor].channel_amax / factor).max())
    plan = dataclasses.replace(
        plan, activations={**plan.activations, tensor: ActivationPlan(amax, "balanced", 0.65)}, floats="fp16"
    )
    reference = run(original)[0]
    model = ir.from_proto(onnx.shape_inference.infer_shapes(ir.to_proto(original)))
    # The norm stays float32, so that its output reaches the layers through a Cast.
    keep = [node for node in model.graph if node.op_type in ("Sin", "LayerNormalization")]
    half_precision.cast_to_half(model, keep)
    model = ir.from_proto(ir.to_proto(model))
    done = quantise(model, plan, found, original)
    assert len(done) == 9
    assert lint(model) == []
    scales = [
        value.const_value.numpy().dtype  # type: ignore[union-attr]
        for name, value in model.graph.initializers.items()
        if str(name).endswith("_scale")
    ]
    assert set(scales) == {np.dtype(np.float16)}
    single = graph(outlier=60.0)
    quantise(single, dataclasses.replace(plan, floats="fp32"), found)
    expected = sqnr(reference, run(single)[0])
    assert sqnr(reference, run(model)[0]) == pytest.approx(expected, abs=1.5)
