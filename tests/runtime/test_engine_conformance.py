"""One suite for every engine that this machine has. What is skipped, and why, is in pytest's summary."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from latentedge.runtime import doctor
from latentedge.runtime.bundle import Axis, Bundle, Component, TensorSpec
from latentedge.runtime.engines import BACKENDS, EngineOptions, cuda, open_engine, tensorrt
from latentedge.runtime.engines.base import Engine
from latentedge.runtime.engines.null import NullEngine
from latentedge.runtime.errors import EngineError, MissingDependencyError, UsageError
from tests import tiny_bundles
from tests.runtime.fake_cuda import FakeCuda, fake_tensorrt

SAMPLE = ("batch", 4, "latent_height", 4)
COMPONENT = Component(
    "unet",
    (
        TensorSpec("sample", "float32", SAMPLE),
        TensorSpec("timestep", "float32", ("batch",)),
        TensorSpec("class_labels", "int64", ("batch",)),
        TensorSpec("encoder_hidden_states", "float32", ("batch", 3, 2)),
    ),
    (TensorSpec("out_sample", "float32", SAMPLE),),
    {"batch": Axis(1, 2, 4), "latent_height": Axis(4, 4, 16)},
)
Arrays = dict[str, Any]
Opener = Callable[[Path, pytest.MonkeyPatch], Engine]


def compute(arrays: Any) -> Arrays:
    """``2 * (sample + timestep + class_labels + sum(encoder_hidden_states)) + 1``, the sums by picture."""
    total = arrays["timestep"] + arrays["class_labels"] + arrays["encoder_hidden_states"].sum(axis=(1, 2))
    return {"out_sample": (2 * (arrays["sample"] + total[:, None, None, None]) + 1).astype(np.float32)}


def onnx_graph() -> bytes:
    from onnx import TensorProto, helper

    kinds = {"float32": TensorProto.FLOAT, "int64": TensorProto.INT64}
    nodes = [
        helper.make_node("Cast", ["class_labels"], ["labels"], "labels/Cast", to=TensorProto.FLOAT),
        helper.make_node("Constant", [], ["axes_12"], value_ints=[1, 2]),
        helper.make_node("Constant", [], ["axes_123"], value_ints=[1, 2, 3]),
        helper.make_node("Constant", [], ["two"], value_float=2.0),
        helper.make_node("Constant", [], ["one"], value_float=1.0),
        helper.make_node("ReduceSum", ["encoder_hidden_states", "axes_12"], ["context"], keepdims=0),
        helper.make_node("Add", ["timestep", "labels"], ["first"]),
        helper.make_node("Add", ["first", "context"], ["total"]),
        helper.make_node("Unsqueeze", ["total", "axes_123"], ["total_4d"]),
        helper.make_node("Add", ["sample", "total_4d"], ["sum"]),
        helper.make_node("Mul", ["sum", "two"], ["twice"]),
        helper.make_node("Add", ["twice", "one"], ["out_sample"]),
    ]
    values = [
        [helper.make_tensor_value_info(spec.name, kinds[spec.dtype], spec.shape) for spec in specs]
        for specs in (COMPONENT.inputs, COMPONENT.outputs)
    ]
    model = helper.make_model(
        helper.make_graph(nodes, "conformance", *values), opset_imports=[helper.make_opsetid("", 20)], ir_version=10
    )
    content: bytes = model.SerializeToString()
    return content


def write_bundle(folder: Path, content: bytes) -> Bundle:
    variant = tiny_bundles.write_graph(folder, "unet/model.onnx", content)
    return tiny_bundles.write_bundle(folder, dataclasses.replace(COMPONENT, variants={"fp32": variant}))


def open_null(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Engine:
    return NullEngine(COMPONENT, compute)


def opener(backend: str, options: EngineOptions) -> Opener:
    def open_backend(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Engine:
        pytest.importorskip("onnx")
        finding = next(finding for finding in doctor.judge(doctor.gather()) if finding.backend == backend)
        if not finding.runs:
            pytest.skip(f"{backend} does not run here: {finding.why}")
        if doctor.read_gpus()[1] == [] and (options.device or options.cuda_graph):
            pytest.skip(f"{backend} on {options.device or 'gpu'} does not run here: no NVIDIA GPU is visible")
        bundle = write_bundle(folder, onnx_graph())
        if backend.startswith("tensorrt"):
            from latentedge.export.builders import BuildRequest, Range, builder_of

            sizes = (Range(32, 128), Range(32, 32))
            builder_of(backend)(BuildRequest(bundle, backend, batch=Range(1, 2), size=sizes))
        try:
            return open_engine(bundle, "unet", backend, "fp32", options)
        except MissingDependencyError as error:
            pytest.skip(f"{backend} on {options.device or 'gpu'} does not run here: {error.message}")

    return open_backend


def open_on_fake_gpu(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Engine:
    """TensorRT's engine over a CUDA and a TensorRT in host memory."""
    from latentedge.runtime.engines.plans import Plan, PlanFile, PlanKey

    fake = getattr(cuda, "fake", None)
    if fake is None:
        fake = FakeCuda()
        monkeypatch.setattr(cuda, "fake", fake, raising=False)
        monkeypatch.setattr(cuda, "api", lambda: fake)
        monkeypatch.setattr(tensorrt, "_devices", {})
    library = fake_tensorrt(fake)
    program = {
        "name": "unet",
        "inputs": {spec.name: {"float32": "FLOAT", "int64": "INT64"}[spec.dtype] for spec in COMPONENT.inputs},
        "outputs": {"out_sample": "FLOAT"},
        "shape": "sample",
        "scale": 2,
        "offset": 1,
        "scratch": 100,
    }
    content = json.dumps(program).encode()
    (folder / "0.plan").write_bytes(content)
    key = PlanKey("tensorrt", "10.3.0", "unet", "fp32", {}, COMPONENT.axes, ("8.7",), "Linux-test")
    plan = Plan(folder, key, (PlanFile("0.plan", len(content), ""),), 0.0)
    options = EngineOptions(cuda_graph=True)
    return tensorrt.TensorRTEngine(
        Bundle(folder, None), COMPONENT, [plan], library, tensorrt.open_device(0), options  # type: ignore[arg-type]
    )  # fmt: skip


#: Every engine by the name that the tests show.
ENGINES: dict[str, Opener] = {
    "null": open_null,
    "tensorrt-on-a-fake-gpu": open_on_fake_gpu,
    **{name: opener(name, EngineOptions(threads=1)) for name in BACKENDS},
    "onnxruntime-cuda": opener("onnxruntime", EngineOptions(device="cuda")),
    "onnxruntime-cuda-graph": opener("onnxruntime", EngineOptions(device="cuda", cuda_graph=True)),
    "onnxruntime-tensorrt": opener("onnxruntime", EngineOptions(device="tensorrt")),
    "tensorrt-graph": opener("tensorrt", EngineOptions(cuda_graph=True)),
    "tensorrt-rtx-graph": opener("tensorrt-rtx", EngineOptions(cuda_graph=True)),
}


@pytest.fixture(params=list(ENGINES))
def engine(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    opened = ENGINES[request.param](tmp_path, monkeypatch)
    yield opened
    opened.close()


def inputs(batch: int = 2, height: int = 4, seed: int = 0) -> Arrays:
    generator = np.random.default_rng(seed)
    axes = {"batch": batch, "latent_height": height}
    arrays = {}
    for spec in COMPONENT.inputs:
        shape = spec.resolve(axes)
        integer = spec.dtype == "int64"
        arrays[spec.name] = generator.integers(0, 9, shape) if integer else generator.standard_normal(shape)
        arrays[spec.name] = arrays[spec.name].astype(spec.dtype)
    return arrays


def check(result: Any, arrays: Arrays) -> None:
    assert result.dtype == np.float32
    np.testing.assert_allclose(result, compute(arrays)["out_sample"], rtol=1e-5, atol=1e-4)


def test_every_backend_of_the_registry_is_in_the_suite() -> None:
    assert set(BACKENDS) <= set(ENGINES)


def test_it_computes(engine: Engine) -> None:
    for seed in range(3):
        arrays = inputs(seed=seed)
        outputs = engine.run(arrays)
        assert list(outputs) == ["out_sample"]
        check(outputs["out_sample"], arrays)


def test_written_inputs_stay_written(engine: Engine) -> None:
    arrays = inputs()
    engine.bind(batch=2, latent_height=4)
    for name, array in arrays.items():
        engine.write(name, array)
    engine.run()
    check(engine.read("out_sample"), arrays)
    for step in range(3):
        arrays["sample"] = inputs(seed=step + 5)["sample"]
        engine.bind(batch=2, latent_height=4)
        engine.write("sample", arrays["sample"])
        engine.run()
        check(engine.read("out_sample"), arrays)


def test_the_callers_arrays_are_copied_both_ways(engine: Engine) -> None:
    arrays = inputs()
    given = {name: array.copy() for name, array in arrays.items()}
    engine.bind(batch=2, latent_height=4)
    for name, array in given.items():
        engine.write(name, array)
        array[...] = 99
    engine.run()
    first = engine.read("out_sample")
    check(first, arrays)
    first[...] = -1
    check(engine.read("out_sample"), arrays)
    second = engine.read("out_sample")
    engine.run(inputs(seed=4))
    check(second, arrays)


def test_arrays_need_not_be_contiguous(engine: Engine) -> None:
    arrays = inputs()
    turned = np.ascontiguousarray(arrays["sample"].transpose(0, 1, 3, 2)).transpose(0, 1, 3, 2)
    assert not turned.flags.c_contiguous
    check(engine.run({**arrays, "sample": turned})["out_sample"], arrays)


def test_other_axes_may_be_bound_and_the_first_again(engine: Engine) -> None:
    for batch, height in ((2, 4), (1, 8), (4, 16), (2, 4)):
        arrays = inputs(batch, height)
        check(engine.run(arrays)["out_sample"], arrays)


def test_binding_other_axes_forgets_the_inputs(engine: Engine) -> None:
    engine.run(inputs())
    engine.bind(batch=1, latent_height=4)
    engine.write("sample", inputs(batch=1)["sample"])
    with pytest.raises(UsageError, match="inputs not written: timestep, class_labels, encoder_hidden_states"):
        engine.run()


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((2, 4, 4, 4), np.float64),
        np.zeros((2, 4, 4, 4), np.float16),
        np.zeros((1, 4, 4, 4), np.float32),
        np.zeros((2, 4, 4), np.float32),
    ],
)
def test_what_is_written_must_have_the_declared_dtype_and_shape(engine: Engine, array: Any) -> None:
    engine.bind(batch=2, latent_height=4)
    with pytest.raises(UsageError, match=r"input sample: expected float32 \[2, 4, 4, 4\], found"):
        engine.write("sample", array)


def test_names_and_axes_that_are_not_there_are_errors(engine: Engine) -> None:
    with pytest.raises(UsageError, match="bind the axes"):
        engine.write("sample", inputs()["sample"])
    with pytest.raises(UsageError, match="has the axes"):
        engine.bind(batch=2)
    engine.run(inputs())
    with pytest.raises(UsageError, match="has no input 'other'"):
        engine.write("other", np.zeros(1, np.float32))
    with pytest.raises(UsageError, match="has no output 'other'"):
        engine.read("other")


def test_a_closed_engine_is_closed(engine: Engine) -> None:
    engine.run(inputs())
    engine.close()
    engine.close()
    with pytest.raises(EngineError, match="closed"):
        engine.run(inputs())


@pytest.mark.parametrize("name", list(ENGINES))
def test_two_engines_do_not_disturb_each_other(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    first, second = ENGINES[name](tmp_path / "a", monkeypatch), ENGINES[name](tmp_path / "b", monkeypatch)
    with first, second:
        arrays = [inputs(seed=1), inputs(seed=2)]
        for engine, given in zip((first, second), arrays, strict=True):
            engine.bind(batch=2, latent_height=4)
            for key, array in given.items():
                engine.write(key, array)
        for engine, given in zip((first, second), arrays, strict=True):
            engine.run()
            check(engine.read("out_sample"), given)
        check(first.read("out_sample"), arrays[0])
