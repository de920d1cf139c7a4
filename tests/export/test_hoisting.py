"""A denoiser in parts gives what the whole one gives, and each part runs only when it has to."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st

from latentedge.export import hoisting
from latentedge.export.errors import ExportError
from latentedge.export.exporter import ExportOptions, export_source
from latentedge.export.hoisting import axis_lengths, dimension, hoist_bundle, split
from latentedge.runtime.bundle import Array, Axis, Bundle, Component, TensorSpec, file_sha256
from latentedge.runtime.engines import EngineOptions, open_engine
from latentedge.runtime.engines.base import Engine
from latentedge.runtime.engines.hoisted import HoistedEngine
from latentedge.runtime.engines.null import NullEngine
from latentedge.runtime.errors import ParityError
from tests.export.tiny import UNET, TinyDenoiser, component, tiny_model

AXES = {"batch": 2, "latent_height": 8, "latent_width": 12}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny denoiser as a bundle in fp32 and fp16, split."""
    path = tmp_path_factory.mktemp("hoisting") / "tiny.bundle"
    model = tiny_model(component(UNET, TinyDenoiser))
    export_source(model, path, ExportOptions(precisions=("fp32", "fp16")))
    assert hoist_bundle(path) == ("unet.conditioning", "unet.timestep", "unet.step")
    return path


def inputs(timestep: float = 500, seed: int = 0) -> dict[str, Array]:
    generator = np.random.default_rng(seed)
    arrays: dict[str, Array] = {
        spec.name: generator.standard_normal(spec.resolve(AXES)).astype(np.float32) for spec in UNET.inputs
    }
    return {**arrays, "timestep": np.full(2, timestep, np.float32)}


def names(specs: tuple[TensorSpec, ...]) -> set[str]:
    return {spec.name for spec in specs}


def test_every_part_takes_what_it_depends_on(bundle: Path) -> None:
    parts = Bundle.open(bundle).manifest.components
    conditioning, timestep, step = (parts[f"unet.{name}"] for name in ("conditioning", "timestep", "step"))
    assert names(conditioning.inputs) == {"encoder_hidden_states"}
    assert len(conditioning.outputs) == 2  # keys and values
    assert names(timestep.inputs) == {"timestep"}
    assert names(step.inputs) == {"sample"} | names(conditioning.outputs) | names(timestep.outputs)
    assert all(spec.shape[0] == "batch" for part in (conditioning, timestep, step) for spec in part.inputs)
    assert step.parity["fp32"]["psnr_db"] >= 100
    assert set(step.variants) == {"fp32", "fp16"}
    assert set(conditioning.variants) == set(timestep.variants) == {"fp32"}


def test_digests_cover_the_parts(bundle: Path) -> None:
    for part in Bundle.open(bundle).manifest.components.values():
        for variant in part.variants.values():
            assert file_sha256(bundle / variant.path) == variant.sha256


@pytest.mark.parametrize(
    ("backend", "precision"), [("onnxruntime", "fp32"), ("onnxruntime", "fp16"), ("openvino", "fp32")]
)
def test_the_parts_give_what_the_whole_gives(bundle: Path, backend: str, precision: str) -> None:
    pytest.importorskip(backend)
    opened = Bundle.open(bundle)
    whole = open_engine(opened, "unet", backend, precision, EngineOptions(threads=1, hoisting=False))
    parts = open_engine(opened, "unet", backend, precision, EngineOptions(threads=1))
    assert isinstance(parts, HoistedEngine)
    assert not isinstance(whole, HoistedEngine)
    with whole, parts:
        for timestep, seed in ((999, 0), (500.25, 1), (0, 2)):
            expected = whole.run(inputs(timestep, seed))["out_sample"]
            found = parts.run(inputs(timestep, seed))["out_sample"]
            scale = float(np.abs(expected).max())
            np.testing.assert_allclose(found, expected, rtol=0, atol=scale * (2e-3 if precision == "fp16" else 1e-5))


def test_splitting_twice_changes_nothing(bundle: Path) -> None:
    before = Bundle.open(bundle).manifest
    hoist_bundle(bundle)
    assert Bundle.open(bundle).manifest == before


def test_a_wrong_part_is_an_error(bundle: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One hoisted weight is changed after the split: the comparison must see it."""
    write = hoisting.write_part

    def damaged(graph: ir.Graph, model: ir.Model, part: str, path: Path) -> Path:
        if part == "conditioning":
            for value in graph.initializers.values():
                array = value.const_value.numpy() if value.const_value is not None else np.zeros(0)
                if array.ndim == 2:
                    value.const_value = ir.tensor(array * np.float32(1.01), name=value.name)
                    break
        return write(graph, model, part, path)

    monkeypatch.setattr(hoisting, "write_part", damaged)
    whole = Bundle.open(bundle).component("unet")
    target = tmp_path / "unet"
    target.mkdir()
    (target / "model.onnx").write_bytes((bundle / "unet" / "model.onnx").read_bytes())
    with pytest.raises(ParityError, match="in parts does not give"):
        hoisting.hoist(tmp_path, whole)


def test_a_precision_that_lost_a_hoisted_value_is_an_error(bundle: Path) -> None:
    step = Bundle.open(bundle).component("unet.step")
    lost = dataclasses.replace(step, inputs=(*step.inputs, TensorSpec("gone", "float32", ("batch",))))
    with pytest.raises(ExportError, match="gone"):
        hoisting.cut_step(ir.load(bundle / "unet" / "model.onnx").graph, lost)


def test_a_graph_without_invariants_stays_whole() -> None:
    sample, output = ir.Value(name="sample"), ir.Value(name="out_sample")
    graph = ir.Graph([sample], [output], nodes=[ir.Node("", "Neg", [sample], outputs=[output])], opset_imports={"": 20})
    assert set(split(graph)) == {"step"}


def test_the_shape_of_the_sample_is_not_its_data() -> None:
    """A time embedding that is expanded to the sample's batch is hoisted, with ``sample`` as its shape's source."""
    sample, timestep, output = (ir.Value(name=name) for name in ("sample", "timestep", "out_sample"))
    shape = ir.node("Shape", [sample], attributes={"start": 0, "end": 1})
    expand = ir.node("Expand", [timestep, shape.outputs[0]])
    add = ir.Node("", "Add", [sample, expand.outputs[0]], outputs=[output])
    for name, value in (("shape", shape.outputs[0]), ("expanded", expand.outputs[0])):
        value.name = name
    graph = ir.Graph([sample, timestep], [output], nodes=[shape, expand, add], opset_imports={"": 20})
    parts = split(graph)
    assert set(parts) == {"timestep", "step"}
    assert [node.op_type for node in parts["timestep"]] == ["Shape", "Expand"]
    assert [node.op_type for node in parts["step"]] == ["Add"]
    assert [value.name for value in parts["step"].inputs] == ["sample", "expanded"]


axis = st.builds(
    lambda low, span, multiple: Axis(low * multiple, low * multiple, (low + span) * multiple, multiple),
    st.integers(1, 4),
    st.sampled_from([0, 7, 30]),
    st.sampled_from([1, 2, 8]),
)


@given(st.lists(axis, min_size=1, max_size=5), st.integers(1, 12))
def test_sides_are_solved_from_lengths(found: list[Axis], factor: int) -> None:
    axes = {f"axis_{index}": entry for index, entry in enumerate(found)}
    cases = axis_lengths(axes)
    for name, entry in axes.items():
        for lengths in cases:
            assert entry.min <= lengths[name] <= entry.max
            assert lengths[name] % entry.multiple == 0
        side = dimension([factor * lengths[name] for lengths in cases], cases)
        varies = entry.max > entry.min
        assert side == ((name if factor == 1 else f"{factor}*{name}") if varies else factor * entry.min)


def test_a_product_of_two_axes_is_no_side() -> None:
    cases = axis_lengths({"batch": Axis(1, 2, 8), "latent_height": Axis(8, 32, 64, 8)})
    assert dimension([case["batch"] * case["latent_height"] for case in cases], cases) is None


class Counting(NullEngine):
    """A null engine that counts its runs."""

    def __init__(self, spec: Component, scale: float) -> None:
        self.runs = 0

        def function(arrays: Mapping[str, Array]) -> dict[str, Array]:
            self.runs += 1
            total = sum(array.mean() for array in arrays.values())
            return {out.name: np.full(out.resolve(self.axes), scale * total, np.float32) for out in spec.outputs}

        super().__init__(spec, function)


def counting_engine(*also: str) -> tuple[HoistedEngine, dict[str, Counting]]:
    """An engine in parts; the part of the timestep reads the inputs named in ``also`` as well."""
    vector, batch = ("batch",), {"batch": Axis(1, 2, 8)}
    key, time = TensorSpec("key", "float32", vector), TensorSpec("time", "float32", vector)
    sample, timestep, context = (TensorSpec(name, "float32", vector) for name in ("sample", "timestep", "context"))
    output = TensorSpec("out_sample", "float32", vector)
    read = tuple(spec for spec in (key, context) if spec.name in also)
    parts = {
        "conditioning": Counting(Component("unet.conditioning", (sample, context), (key,), batch), 1.0),
        "timestep": Counting(Component("unet.timestep", (timestep, *read), (time,), batch), 10.0),
        "step": Counting(Component("unet.step", (sample, key, time), (output,), batch), 1.0),
    }
    whole = Component("unet", (sample, timestep, context), (output,), batch)
    engines: dict[str, Engine] = dict(parts)
    return HoistedEngine(whole, "fp32", engines), parts


@pytest.mark.parametrize("also", [(), ("key",), ("context",)])
def test_parts_run_only_when_their_inputs_changed(also: tuple[str, ...]) -> None:
    engine, parts = counting_engine(*also)
    runs = dict.fromkeys(parts, 0)

    def step(sample: float, timestep: float) -> float:
        engine.write("sample", np.full(2, sample, np.float32))
        engine.write("timestep", np.full(2, timestep, np.float32))
        engine.run()
        return float(engine.read("out_sample")[0])

    def expected(context: float, timestep: float) -> float:
        # "key" is the mean of a context and of zeros in place of the sample's data, which it takes the shape of.
        return 0.5 + context + 10 * (timestep + context * len(also))

    engine.bind(batch=2)
    for index, context in enumerate((1.0, 2.0, 1.0)):
        engine.write("context", np.full(2, context, np.float32))
        for timestep in (9.0, 5.0, 5.0, 9.0):
            assert step(0.5, timestep) == expected(context, timestep)
        # Two timesteps: anew for each context where they depend on it, otherwise kept from the first.
        anew = 2 if index == 0 or also else 0
        runs = {"conditioning": runs["conditioning"] + 1, "timestep": runs["timestep"] + anew, "step": runs["step"] + 4}
        assert {name: part.runs for name, part in parts.items()} == runs
    engine.bind(batch=3)
    engine.bind(batch=2)
    engine.write("context", np.full(2, 3.0, np.float32))
    assert step(0.5, 9.0) == expected(3.0, 9.0)
    assert parts["timestep"].runs == runs["timestep"] + len(also)


def test_each_binding_keeps_its_timesteps() -> None:
    engine, parts = counting_engine()
    for batch, runs in ((2, 1), (1, 2), (2, 2), (1, 2)):
        engine.bind(batch=batch)
        for name in ("sample", "context"):
            engine.write(name, np.zeros(batch, np.float32))
        engine.write("timestep", np.full(batch, 9.0, np.float32))
        engine.run()
        assert engine.read("out_sample").tolist() == [90.0] * batch
        assert parts["timestep"].runs == runs


@pytest.mark.parametrize("also", [(), ("key",), ("context",)])
def test_each_binding_keeps_its_conditioning(also: tuple[str, ...]) -> None:
    """Guidance in a part of the steps goes from one batch to another and back, with a prompt that stays."""
    engine, parts = counting_engine(*also)

    def step(batch: int, context: float, timestep: float) -> None:
        engine.bind(batch=batch)
        engine.write("sample", np.full(batch, 0.5, np.float32))
        engine.write("context", np.full(batch, context, np.float32))
        engine.write("timestep", np.full(batch, timestep, np.float32))
        engine.run()
        expected = 0.5 + context + 10 * (timestep + context * len(also))
        assert engine.read("out_sample").tolist() == [expected] * batch

    def runs() -> tuple[int, int]:
        return parts["conditioning"].runs, parts["timestep"].runs

    for timestep in (9.0, 5.0, 9.0):
        for batch in (2, 1):
            step(batch, 1.0, timestep)
    assert runs() == (2, 4)
    # Another prompt, then the first one, which is no longer kept; the other batch has it still.
    step(2, 3.0, 9.0)
    step(2, 1.0, 9.0)
    assert runs() == (4, 6 if also else 4)
    step(1, 1.0, 5.0)
    assert runs() == (4, 6 if also else 4)
    step(2, 1.0, 9.0)
    assert runs() == (4, 6 if also else 4)
    # What is written is the caller's to change.
    context = np.full(1, 1.0, np.float32)
    engine.bind(batch=1)
    engine.write("context", context)
    context[:] = 7
    engine.write("sample", np.zeros(1, np.float32))
    engine.write("timestep", np.full(1, 5.0, np.float32))
    engine.run()
    assert engine.read("out_sample").tolist() == [1 + 10 * (5 + len(also))]


def test_timesteps_are_kept_up_to_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("latentedge.runtime.engines.hoisted.KEPT_TIMESTEPS", 2)
    engine, parts = counting_engine()
    engine.bind(batch=1)
    engine.write("sample", np.zeros(1, np.float32))
    engine.write("context", np.zeros(1, np.float32))
    for timestep, runs in ((9.0, 1), (5.0, 2), (9.0, 2), (1.0, 3), (5.0, 3), (9.0, 4)):  # 9 was the oldest of three
        engine.write("timestep", np.full(1, timestep, np.float32))
        engine.run()
        assert engine.read("out_sample").item() == 10 * timestep
        assert parts["timestep"].runs == runs
