"""Translation to ONNX by target, clean-up, and what is refused."""

from __future__ import annotations

import collections
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("onnxscript")

import onnx
import onnx_ir as ir
from onnx import TensorProto, helper, numpy_helper

from latentedge.export import onnx_files
from latentedge.export.errors import ExportError
from latentedge.export.onnx_files import external_files, remove_model, save_model, variant_of
from latentedge.export.onnx_from_torch import onnx_from_torch
from latentedge.export.passes import cleanup
from latentedge.export.session import HostSession
from latentedge.export.targets import Target, target, targets
from latentedge.runtime.errors import UsageError
from tests.export.tiny import DECODER, TinyDecoder, sample_inputs, seeded

AXES = {"batch": 2, "latent_height": 8, "latent_width": 12}


@pytest.mark.parametrize("name", ["generic", "jetpack6", "tensorrt"])
def test_group_normalization_by_target(name: str, tmp_path: Path) -> None:
    import torch

    chosen = target(name)
    inputs = sample_inputs(DECODER)(AXES, np.random.default_rng(0))
    module = seeded(TinyDecoder)().eval()
    model = onnx_from_torch(module, DECODER, inputs, chosen)
    cleanup.clean_up(model)
    cleanup.check("vae_decoder", model, chosen)
    found = collections.Counter(node.op_type for node in model.graph)
    assert found["GroupNormalization"] == (1 if chosen.group_normalization else 0)
    assert found["InstanceNormalization"] == (0 if chosen.group_normalization else 1)
    assert model.opset_imports[""] == chosen.opset
    save_model(model, tmp_path / "model.onnx")
    with torch.no_grad():
        expected = module(torch.from_numpy(inputs["latent_sample"])).numpy()
    with HostSession(tmp_path / "model.onnx") as session:
        assert np.abs(session.run(inputs)["sample"] - expected).max() < 1e-5 < np.abs(expected).max()


def test_jetpack6_takes_no_group_normalization() -> None:
    assert "GroupNormalization" in target("jetpack6").refused
    assert target("jetpack6").opset <= 20


def test_every_target_is_complete_and_unknown_ones_are_listed() -> None:
    for name, found in targets().items():
        assert found.name == name
        assert found.group_normalization != ("GroupNormalization" in found.refused)
        assert not found.group_normalization or found.opset >= 21
    with pytest.raises(UsageError, match="generic, jetpack6"):
        target("jetpack5")


def graph_of(nodes: list[onnx.NodeProto], *initialisers: onnx.TensorProto, opset: int = 20, width: int = 4) -> ir.Model:
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", width]) for name in ("x", "y"))
    graph = helper.make_graph(nodes, "g", [x], [y], initialisers)
    imports = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    return ir.serde.deserialize_model(helper.make_model(graph, opset_imports=imports, ir_version=10))


def test_clean_up_removes_what_does_nothing() -> None:
    one = numpy_helper.from_array(np.ones(4, np.float32), "one")
    same = numpy_helper.from_array(np.ones(4, np.float32), "same")
    model = graph_of(
        [
            helper.make_node("Identity", ["x"], ["a"]),
            helper.make_node("Cast", ["a"], ["b"], to=TensorProto.FLOAT),
            helper.make_node("Add", ["one", "same"], ["two"]),
            helper.make_node("Mul", ["b", "two"], ["c"]),
            helper.make_node("Exp", ["c"], ["unused"]),
            helper.make_node("Add", ["c", "same"], ["y"]),
        ],
        one,
        same,
    )
    cleanup.infer_shapes(model)
    cleanup.clean_up(model)
    assert [node.op_type for node in model.graph] == ["Mul", "Add"]
    assert len(model.graph.initializers) == 2


def check(model: ir.Model, chosen: Target | None = None) -> None:
    cleanup.check("unet", model, chosen or target("generic"))


def test_refused_graphs() -> None:
    with pytest.raises(ExportError, match=r"outside of ONNX's standard: com\.microsoft"):
        check(graph_of([helper.make_node("FusedGelu", ["x"], ["y"], domain="com.microsoft")]))
    scale = numpy_helper.from_array(np.ones(4, np.float32), "scale")
    normalised = helper.make_node("GroupNormalization", ["x", "scale", "scale"], ["y"], num_groups=2)
    with pytest.raises(ExportError, match="generic does not take: GroupNormalization"):
        check(graph_of([normalised], scale, opset=21))
    with pytest.raises(ExportError, match="opset 21; the target generic takes at most 20"):
        check(graph_of([helper.make_node("Neg", ["x"], ["y"])], opset=21))
    with pytest.raises(ExportError, match="not valid ONNX"):
        check(graph_of([helper.make_node("Softmax", ["x"], ["y"], axiss=1)]))


def test_large_weights_lie_beside_the_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_files, "EXTERNAL_DATA_LIMIT", 1000)
    weight = numpy_helper.from_array(np.random.default_rng(0).random((4, 400)).astype(np.float32), "weight")
    reduced = helper.make_node("ReduceSum", ["weight", "axis"], ["sum"], keepdims=0)
    axis = numpy_helper.from_array(np.array([1], np.int64), "axis")
    model = graph_of([reduced, helper.make_node("Add", ["x", "sum"], ["y"])], weight, axis)
    path = tmp_path / "unet" / "model.onnx"
    save_model(model, path)
    assert external_files(path) == [path.with_name("model.onnx.data")]
    variant = variant_of(tmp_path, path)
    assert list(variant.external_data) == ["unet/model.onnx.data"]
    assert variant.size == path.stat().st_size + 6400
    x = np.ones((2, 4), np.float32)
    with HostSession(path) as session:
        np.testing.assert_allclose(session.run({"x": x})["y"], x + numpy_helper.to_array(weight).sum(1), rtol=1e-5)
    remove_model(path)
    assert list(path.parent.iterdir()) == []


def test_weights_of_another_graph_are_taken_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph that was read from external weights and became small does not need them."""
    monkeypatch.setattr(onnx_files, "EXTERNAL_DATA_LIMIT", 2000)
    shift = numpy_helper.from_array(np.arange(400, dtype=np.float32), "shift")
    large = numpy_helper.from_array(np.ones(400, np.float32), "large")
    added = [helper.make_node("Add", ["x", "shift"], ["moved"]), helper.make_node("Mul", ["moved", "large"], ["y"])]
    large_path, small_path = tmp_path / "model.onnx", tmp_path / "model.fp16.onnx"
    save_model(graph_of(added, shift, large, width=400), large_path)
    small = ir.load(large_path)
    one = small.graph.initializers["large"]
    one.const_value, one.shape = ir.tensor(np.ones(1, np.float32), name="large"), ir.Shape([1])
    save_model(small, small_path)
    remove_model(large_path)
    assert external_files(small_path) == []
    with HostSession(small_path) as session:
        found = session.run({"x": np.zeros((2, 400), np.float32)})["y"]
    np.testing.assert_array_equal(found, np.tile(np.arange(400, dtype=np.float32), (2, 1)))
