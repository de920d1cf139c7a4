"""FP16: what overflows is found and kept in float32, and nothing else is."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("torch")
pytest.importorskip("onnxscript")

import onnx
import onnx_ir as ir
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn
from torch.nn import functional

from latentedge.export.errors import ExportError
from latentedge.export.exporter import ExportOptions, export_source
from latentedge.export.onnx_files import save_model
from latentedge.export.parity import Case, measure
from latentedge.export.passes.cleanup import infer_shapes
from latentedge.export.passes.half_precision import cast_to_half, half_tensor, needs_float32
from latentedge.export.precision import group_by_module, half_from_onnx, measure_ranges, smallest_passing
from latentedge.export.session import HostSession
from latentedge.runtime.engines import EngineOptions, open_engine
from latentedge.runtime.errors import ParityError
from tests.export.tiny import DECODER, TinyDecoder, component, tiny_model


class LoudBlock(nn.Module):
    """A convolution whose output passes 65504, and one that brings it back."""

    def __init__(self, gain: float) -> None:
        super().__init__()
        self.up = nn.Conv2d(8, 8, 3, padding=1)
        self.down = nn.Conv2d(8, 8, 3, padding=1)
        with torch.no_grad():
            self.up.weight.mul_(gain)
            self.down.weight.div_(gain)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x))


class LoudDecoder(nn.Module):
    def __init__(self, gain: float = 1e6) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(4, 8, 3, padding=1)
        self.quiet = nn.Conv2d(8, 8, 3, padding=1)
        self.loud = LoudBlock(gain)
        self.conv_out = nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, latent_sample: Tensor) -> Tensor:
        hidden = functional.silu(self.quiet(functional.silu(self.conv_in(latent_sample))))
        hidden = hidden + self.loud(hidden)
        return self.conv_out(functional.interpolate(hidden, scale_factor=2.0, mode="nearest"))


def test_overflow_is_found_and_kept_in_float32(tmp_path: Path) -> None:
    messages: list[str] = []
    options = ExportOptions(("fp32", "fp16"), notify=messages.append)
    bundle = export_source(tiny_model(component(DECODER, LoudDecoder)), tmp_path / "loud.bundle", options)
    path, variant = bundle.variant("vae_decoder", "fp16")
    parity, kept = variant.measured
    assert parity["psnr_db"] > 60
    # The loud output, and its weights of up to 2e5 and 2e-7 / 1e6; nothing of the quiet half.
    assert set(kept["reasons"]) == {"loud.up/Conv", "loud.down/Conv"}
    assert len(messages) == 1
    assert "loud.up" in messages[0]
    weights = {array.name: array.data_type for array in onnx.load(path).graph.initializer}
    assert weights["loud.up.weight"] == TensorProto.FLOAT
    assert weights["quiet.weight_fp16"] == TensorProto.FLOAT16
    inputs = {"latent_sample": np.random.default_rng(0).standard_normal((2, 4, 6, 6)).astype(np.float32)}
    outputs = []
    for precision in ("fp32", "fp16"):
        with open_engine(bundle, "vae_decoder", "onnxruntime", precision, EngineOptions()) as engine:
            outputs.append(engine.run(inputs)["sample"])
    assert np.isfinite(outputs[1]).all()
    assert np.abs(outputs[0] - outputs[1]).max() < 5e-3 < np.abs(outputs[0]).max()


def test_without_overflow_nothing_is_kept(tmp_path: Path) -> None:
    options = ExportOptions(("fp32", "fp16"))
    bundle = export_source(tiny_model(component(DECODER, TinyDecoder)), tmp_path / "quiet.bundle", options)
    assert bundle.variant("vae_decoder", "fp16")[1].measured[1]["float32"] == 0


class Cancelling(nn.Module):
    """Subtracts nearly equal numbers in one block: no overflow, but float16 loses everything there."""

    def __init__(self) -> None:
        super().__init__()
        self.quiet = nn.Conv2d(4, 8, 3, padding=1)
        self.cancel = Cancel()
        self.conv_out = nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, latent_sample: Tensor) -> Tensor:
        hidden = self.cancel(functional.silu(self.quiet(latent_sample)))
        return self.conv_out(functional.interpolate(hidden, scale_factor=2.0, mode="nearest"))


class Cancel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.offset = nn.Parameter(torch.linspace(3000.0, 4000.0, 8).reshape(1, 8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(x + self.offset) - self.offset


def test_lossy_block_is_searched_and_kept(tmp_path: Path) -> None:
    messages: list[str] = []
    options = ExportOptions(("fp32", "fp16"), notify=messages.append)
    bundle = export_source(tiny_model(component(DECODER, Cancelling)), tmp_path / "lossy.bundle", options)
    parity, kept = bundle.variant("vae_decoder", "fp16")[1].measured
    assert parity["psnr_db"] > 45
    assert {name.split("/")[0] for name in kept["reasons"]} == {"cancel"}
    assert any("cancel" in message for message in messages)


def run_graph(path: Path, **inputs: np.ndarray) -> dict[str, np.ndarray]:
    with HostSession(path) as session:
        return session.run(inputs)


def cast(tmp_path: Path, nodes: list[onnx.NodeProto], initialisers: list[onnx.TensorProto], opset: int = 20) -> Path:
    """``x`` [n, 4] to ``y`` through ``nodes``, cast to float16 except where it must not be."""
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        initialisers,
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    onnx.save(proto, tmp_path / "model.onnx")
    model = ir.load(tmp_path / "model.onnx")
    infer_shapes(model)
    cast_to_half(model, needs_float32(model))
    save_model(model, tmp_path / "half.onnx")
    return tmp_path / "half.onnx"


X = np.array([[0.5, -1.0, 2.0, 3.0], [100.0, 0.001, -7.5, 1e-3]], np.float32)


def both(tmp_path: Path, nodes: list[onnx.NodeProto], initialisers: list[onnx.TensorProto]) -> tuple[np.ndarray, ...]:
    half = cast(tmp_path, nodes, initialisers)
    onnx.checker.check_model(onnx.load(half), full_check=True)
    return run_graph(tmp_path / "model.onnx", x=X)["y"], run_graph(half, x=X)["y"]


def constant(name: str, value: object, dtype: type = np.float32) -> onnx.TensorProto:
    return numpy_helper.from_array(np.array(value, dtype), name)


def test_masks_stay_masks(tmp_path: Path) -> None:
    lowest = float(np.finfo(np.float32).min)
    mask = constant("mask", [0.0, -math.inf, lowest, 0.0])
    nodes = [helper.make_node("Add", ["x", "mask"], ["z"]), helper.make_node("Softmax", ["z"], ["y"])]
    expected, found = both(tmp_path, nodes, [mask])
    assert np.isfinite(found).all()
    assert np.abs(expected - found).max() < 1e-3
    assert found[0, 1] == found[0, 2] == 0


def test_vanishing_constant_keeps_its_node_in_float32(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Mul", ["x", "zero"], ["z"]),
        helper.make_node("Add", ["z", "epsilon"], ["e"]),
        helper.make_node("Div", ["e", "epsilon"], ["y"]),
    ]
    expected, found = both(tmp_path, nodes, [constant("zero", 0.0), constant("epsilon", 1e-9)])
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found, expected, rtol=1e-3)


def test_choice_of_the_nearest_keeps_float32_distances(tmp_path: Path) -> None:
    # Two code words nearer to each other than float16 can tell.
    book = constant("book", [100.01, 100.02, 50.0])
    nodes = [
        helper.make_node("Unsqueeze", ["x", "axes"], ["z"]),
        helper.make_node("Sub", ["z", "book"], ["d"]),
        helper.make_node("Abs", ["d"], ["a"]),
        helper.make_node("ArgMin", ["a"], ["i"], axis=-1, keepdims=0),
        helper.make_node("Cast", ["i"], ["y"], to=TensorProto.FLOAT),
    ]
    half = cast(tmp_path, nodes, [book, constant("axes", [-1], np.int64)])
    x = np.array([[100.013, 100.018, 51.0, 0.0]], np.float32)
    assert run_graph(half, x=x)["y"].tolist() == [[0.0, 1.0, 2.0, 2.0]]


def test_operators_with_mixed_types(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Shape", ["x"], ["shape"]),
        helper.make_node("ConstantOfShape", ["shape"], ["ones"], value=constant("value", [1.0])),
        helper.make_node("Greater", ["x", "ones"], ["large"]),
        helper.make_node("Where", ["large", "x", "ones"], ["w"]),
        helper.make_node("Clip", ["w", "", "top"], ["c"]),
        helper.make_node("Pow", ["c", "two"], ["p"]),
        helper.make_node("Unsqueeze", ["p", "axes"], ["u"]),
        helper.make_node("Resize", ["u", "", "scales"], ["r"], mode="nearest"),
        helper.make_node("ReduceMean", ["r", "axes"], ["y"], keepdims=0),
    ]
    initialisers = [
        constant("top", 5.0),
        constant("two", 2.0),
        constant("axes", [0, 1], np.int64),
        constant("scales", [1.0, 1.0, 1.0, 2.0]),
    ]
    expected, found = both(tmp_path, nodes, initialisers)
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(found, expected, rtol=2e-3)
    scales = {array.name: array.data_type for array in onnx.load(tmp_path / "half.onnx").graph.initializer}
    assert scales["scales"] == TensorProto.FLOAT


def test_weights_beyond_float16_are_an_error() -> None:
    with pytest.raises(ExportError, match="1 values beyond float16, up to 7e\\+04"):
        half_tensor(ir.tensor(np.array([1.0, 7e4], np.float32)), "weight")


def test_ranges_are_the_largest_magnitudes(tmp_path: Path) -> None:
    cast(tmp_path, [helper.make_node("Neg", ["x"], ["z"]), helper.make_node("Exp", ["z"], ["y"])], [])
    ranges = measure_ranges(tmp_path / "model.onnx", [Case({}, {"x": X})])
    assert ranges == pytest.approx({"z": 100.0, "y": math.exp(7.5)}, rel=1e-6)
    assert not (tmp_path / "model.probe.onnx").exists()


def test_nothing_that_may_be_half_is_an_error(tmp_path: Path) -> None:
    nodes = [helper.make_node("Add", ["x", "big"], ["z"]), helper.make_node("Sub", ["z", "big"], ["y"])]
    cast(tmp_path, nodes, [constant("big", 3e4)])
    case = Case({}, {"x": X}, {"y": X})
    with HostSession(tmp_path / "model.onnx") as session:
        assert measure(session.run, [case]).psnr_db > 80
    with pytest.raises(ParityError, match="no part of it may be float16"):
        half_from_onnx(tmp_path / "model.onnx", tmp_path / "out.onnx", "unet", [case], lambda message: None)


@given(st.integers(1, 30), st.data())
def test_search_finds_exactly_the_needed_items(count: int, data: st.DataObject) -> None:
    items = [str(index) for index in range(count)]
    needed = data.draw(st.sets(st.sampled_from(items), min_size=1))
    assert set(smallest_passing(items, lambda kept: needed <= set(kept))) == needed


def test_groups_are_modules_down_to_a_depth() -> None:
    names = [f"unet.blocks.{index}.conv/Conv" for index in range(60)] + ["unet.out/Conv", "/Add"]
    assert list(group_by_module(names)) == ["unet.blocks", "unet.out", ""]
    assert len(group_by_module(names[:10])) == 10
