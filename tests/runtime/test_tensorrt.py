import dataclasses
import hashlib
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from latentedge.runtime import engines
from latentedge.runtime.bundle import Axis, Bundle, Component, TensorSpec, Variant
from latentedge.runtime.engines import EngineOptions, cuda, tensorrt
from latentedge.runtime.engines.plans import KEY_NAME, PlanFile, PlanKey, this_platform
from latentedge.runtime.errors import BundleError, EngineError, UsageError
from tests import tiny_bundles
from tests.runtime.fake_cuda import FakeCuda, fake_tensorrt

GPU = EngineOptions()
STATIC = {"batch": Axis(2, 2, 2), "latent_height": Axis(4, 4, 4)}
WIDE = {"batch": Axis(1, 2, 4), "latent_height": Axis(4, 8, 16)}
#: out_sample = 2 * (sample + sum of timestep and of encoder_hidden_states) + 1
PROGRAM = {
    "name": "unet",
    "inputs": {"sample": "FLOAT", "timestep": "FLOAT", "encoder_hidden_states": "FLOAT"},
    "outputs": {"out_sample": "FLOAT"},
    "shape": "sample",
    "scale": 2,
    "offset": 1,
    "scratch": 1000,
}


class World:
    """A bundle in a temporary folder, a fake GPU and a fake TensorRT."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
        self.backend = backend
        self.cuda = FakeCuda()
        self.library = fake_tensorrt(self.cuda)
        monkeypatch.setattr(cuda, "api", lambda: self.cuda)
        monkeypatch.setattr(tensorrt, "load_library", lambda name: self.library)
        monkeypatch.setattr(tensorrt, "_devices", {})
        monkeypatch.setattr(engines.Backend, "installed", lambda self: True)
        self.bundle = write_bundle(folder)

    def plan(self, *programs: dict[str, Any], axes: dict[str, Axis] = STATIC, **changes: Any) -> Path:
        """Put a built engine of the chained programs into the bundle."""
        component = changes.get("component", "unet")
        variant = self.bundle.component(component).variants["fp16"]
        fields: dict[str, Any] = {
            "backend": self.backend,
            "library_version": self.library.__version__,
            "component": component,
            "precision": "fp16",
            "weights": {variant.path: variant.sha256},
            "axes": axes,
            "compute_capabilities": ("8.7",),
            "platform": this_platform(),
        }
        key = PlanKey(**{**fields, **changes})
        folder = self.bundle.path / "engines" / key.folder_name()
        folder.mkdir(parents=True)
        files = []
        for index, program in enumerate(programs or (PROGRAM,)):
            content = json.dumps(program).encode()
            (folder / f"{index}.plan").write_bytes(content)
            files.append(PlanFile(f"{index}.plan", len(content), hashlib.sha256(content).hexdigest()))
        record = {"key": dataclasses.asdict(key), "files": [dataclasses.asdict(f) for f in files], "built": time.time()}
        (folder / KEY_NAME).write_text(json.dumps(record))
        return folder

    def open(self, component: str = "unet", options: EngineOptions = GPU) -> tensorrt.TensorRTEngine:
        engine = engines.open_engine(self.bundle, component, self.backend, "fp16", options)
        assert isinstance(engine, tensorrt.TensorRTEngine)
        return engine


def write_bundle(folder: Path) -> Bundle:
    variant = Variant("unet/model.fp16.onnx", "ab" * 32, 1)
    unet = Component(
        "unet",
        (
            TensorSpec("sample", "float32", ("batch", 4, "latent_height", 4)),
            TensorSpec("timestep", "float32", ("batch",)),
            TensorSpec("encoder_hidden_states", "float32", ("batch", 3, 2)),
        ),
        (TensorSpec("out_sample", "float32", ("batch", 4, "latent_height", 4)),),
        {"batch": Axis(1, 2, 8), "latent_height": Axis(1, 4, 64)},
        {"fp16": variant},
    )
    decoder = Component(
        "vae_decoder",
        (TensorSpec("latent_sample", "float32", ("batch", 4, 4, 4)),),
        (TensorSpec("sample", "float32", ("batch", 4, 4, 4)),),
        {"batch": Axis(1, 1, 8)},
        {"fp16": Variant("vae_decoder/model.fp16.onnx", "cd" * 32, 1)},
    )
    for component in (unet, decoder):
        tiny_bundles.write_graph(folder, component.variants["fp16"].path, b"0")
    return tiny_bundles.write_bundle(folder, unet, decoder)


@pytest.fixture(params=["tensorrt", "tensorrt-rtx"])
def world(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    return World(tmp_path, monkeypatch, request.param)


def inputs(batch: int = 2, height: int = 4, seed: int = 0) -> dict[str, Any]:
    generator = np.random.default_rng(seed)
    shapes = {"sample": (batch, 4, height, 4), "timestep": (batch,), "encoder_hidden_states": (batch, 3, 2)}
    return {name: generator.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def expected(arrays: dict[str, Any], scale: float = 2, offset: float = 1) -> Any:
    total = arrays["timestep"] + arrays["encoder_hidden_states"].sum(axis=(1, 2))
    return scale * (arrays["sample"] + total[:, None, None, None]) + offset


@pytest.mark.parametrize("cuda_graph", [False, True])
def test_a_component_computes_and_gives_everything_back(world: World, cuda_graph: bool):
    world.plan()
    engine = world.open(options=EngineOptions(cuda_graph=cuda_graph))
    for seed in range(3):
        arrays = inputs(seed=seed)
        outputs = engine.run(arrays)
        np.testing.assert_allclose(outputs["out_sample"], expected(arrays), rtol=1e-5)
    assert world.cuda.names().count("cudaGraphLaunch") == (3 if cuda_graph else 0)
    # With a graph: once to warm up, then one replay for each run.
    assert len(world.library.executed) == (4 if cuda_graph else 3)
    engine.close()
    engine.close()
    assert world.cuda.live() == 0
    assert world.cuda.names().count("cudaStreamDestroy") == 1


def test_a_written_input_stays_written_and_buffers_keep_their_address(world: World):
    world.plan()
    with world.open(options=EngineOptions(cuda_graph=True)) as engine:
        arrays = inputs()
        engine.run(arrays)
        allocations = world.cuda.names().count("cudaMalloc")
        copies = world.cuda.names().count("cudaMemcpyAsync")
        arrays["sample"] = arrays["sample"] * 3
        engine.bind(batch=2, latent_height=4)
        engine.write("sample", arrays["sample"])
        engine.run()
        np.testing.assert_allclose(engine.read("out_sample"), expected(arrays), rtol=1e-5)
        assert world.cuda.names().count("cudaMalloc") == allocations
        assert world.cuda.names().count("cudaMemcpyAsync") == copies + 2, "one input up, one output down"


def test_what_read_returns_is_the_callers_own(world: World):
    world.plan()
    with world.open() as engine:
        first = engine.run(inputs(seed=1))["out_sample"]
        kept = first.copy()
        engine.run(inputs(seed=2))
        np.testing.assert_array_equal(first, kept)


def test_binding_other_axes_drops_the_graph_and_frees_the_buffers(world: World):
    world.plan(axes=WIDE)
    with world.open(options=EngineOptions(cuda_graph=True)) as engine:
        engine.run(inputs())
        graphs, memory = set(world.cuda.graphs), set(world.cuda.memory)
        arrays = inputs(batch=3, height=8)
        np.testing.assert_allclose(engine.run(arrays)["out_sample"], expected(arrays), rtol=1e-5)
        assert len(world.cuda.graphs) == 1
        assert not graphs & world.cuda.graphs
        assert len(set(world.cuda.memory)) == len(memory)
        engine.bind(batch=2, latent_height=4)
        with pytest.raises(UsageError, match="inputs not written"):
            engine.run()


def test_a_chain_passes_tensors_on_the_device(world: World):
    first = {**PROGRAM, "name": "first", "outputs": {"hidden": "HALF", "skip": "FLOAT"}, "scale": 1, "offset": 0}
    second = {
        **PROGRAM, "name": "second", "inputs": {"skip": "FLOAT", "timestep": "FLOAT"}, "shape": "skip", "scratch": 5000,
    }  # fmt: skip
    world.plan(first, second)
    arrays = inputs()
    with world.open(options=EngineOptions(cuda_graph=True)) as engine:
        copies = world.cuda.names().count("cudaMemcpyAsync")
        result = engine.run(arrays)["out_sample"]
        # second adds the timestep once more
        hidden = {**arrays, "sample": expected(arrays, 1, 0), "encoder_hidden_states": np.zeros((2, 3, 2), np.float32)}
        np.testing.assert_allclose(result, expected(hidden), rtol=1e-5)
        assert world.cuda.names().count("cudaMemcpyAsync") == copies + 4, "nothing in between passes through the host"
        assert world.library.executed[-2:] == ["first", "second"]
    assert world.cuda.live() == 0


def test_components_share_scratch_memory_and_a_larger_one_drops_recorded_graphs(world: World):
    world.plan()
    decoder = {
        **PROGRAM, "name": "decoder", "inputs": {"latent_sample": "FLOAT"}, "outputs": {"sample": "FLOAT"},
        "shape": "latent_sample", "scratch": 9000,
    }  # fmt: skip
    world.plan(decoder, component="vae_decoder", axes={"batch": Axis(1, 1, 1)},
               weights={"vae_decoder/model.fp16.onnx": "cd" * 32})  # fmt: skip
    unet = world.open(options=EngineOptions(cuda_graph=True))
    arrays = inputs()
    unet.run(arrays)
    vae = world.open("vae_decoder")
    latents = np.ones((1, 4, 4, 4), np.float32)
    np.testing.assert_array_equal(vae.run({"latent_sample": latents})["sample"], 2 * latents + 1)
    assert not world.cuda.graphs, "the graph held the address of the smaller scratch memory"
    launches = world.cuda.names().count("cudaGraphLaunch")
    np.testing.assert_allclose(unet.run(arrays)["out_sample"], expected(arrays), rtol=1e-5)
    assert len(world.cuda.graphs) == 1, "recorded anew with the larger scratch memory"
    arrays = inputs(seed=1)
    np.testing.assert_allclose(unet.run(arrays)["out_sample"], expected(arrays), rtol=1e-5)
    assert world.cuda.names().count("cudaGraphLaunch") == launches + 1, "and replayed from then on"
    assert unet._device is vae._device
    assert [len(block) for block in world.cuda.memory.values()].count(9000) == 1
    assert [len(block) for block in world.cuda.memory.values()].count(1000) == 0
    unet.close()
    np.testing.assert_array_equal(vae.run({"latent_sample": latents})["sample"], 2 * latents + 1)
    vae.close()
    assert world.cuda.live() == 0


def test_the_engine_tuned_closest_to_the_shapes_runs(world: World):
    world.plan({**PROGRAM, "name": "wide"}, axes=WIDE)
    world.plan({**PROGRAM, "name": "static"}, axes=STATIC)
    with world.open() as engine:
        engine.run(inputs())
        assert world.library.executed == ["static"]
        engine.run(inputs(batch=4))
        assert world.library.executed == ["static", "wide"]
        engine.run(inputs())
        assert world.library.executed == ["static", "wide", "static"]


def test_shapes_that_no_engine_covers_are_an_error_with_ranges_and_command(world: World):
    world.plan()
    with world.open() as engine:
        engine.run(inputs())
        with pytest.raises(
            UsageError, match=r"built for batch 2\.\.2, latent_height 4\.\.4; asked for: batch 1"
        ) as error:
            engine.run(inputs(batch=1))
        assert f"latentedge build {world.bundle.path} --backend {world.backend} --precision fp16" in error.value.hint
        # The failed bind must not leave the engine bound to buffers that are gone.
        with pytest.raises(UsageError, match="bind the axes"):
            engine.write("sample", inputs()["sample"])
        arrays = inputs()
        np.testing.assert_allclose(engine.run(arrays)["out_sample"], expected(arrays), rtol=1e-5)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"weights": {"unet/model.fp16.onnx": "00" * 32}}, "the component's graph or weights changed"),
        ({"library_version": "10.7.0"}, r"built with \S+ 10\.7\.0, here is 10\.3\.0"),
        ({"compute_capabilities": ("8.9", "12.0")}, r"built for compute capability 8\.9, 12\.0, this GPU has 8\.7"),
        ({"platform": "Linux-other"}, "built on Linux-other, here is"),
        ({"library_version": "10.9.0", "options": {"version_compatible": True}}, r"built with \S+ 10\.9\.0"),
        ({"version": 0}, "its key is of version 0, expected 1"),
    ],
)
def test_an_engine_is_loaded_only_if_all_of_its_key_holds(world: World, changes: dict[str, Any], words: str):
    world.plan(**changes)
    with pytest.raises(EngineError, match=words) as error:
        world.open()
    assert f"latentedge build {world.bundle.path} --backend {world.backend}" in error.value.hint


@pytest.mark.parametrize("compatible", [False, True])
def test_only_a_version_compatible_plan_may_bring_code(world: World, compatible: bool):
    world.plan(options={"version_compatible": compatible})
    with world.open() as engine:
        engine.run(inputs())
    assert [runtime.engine_host_code_allowed for runtime in world.library.runtimes] == [compatible]


def test_a_version_compatible_engine_runs_on_a_newer_library(world: World):
    world.plan(library_version="10.1.0", options={"version_compatible": True})
    with world.open() as engine:
        arrays = inputs()
        np.testing.assert_allclose(engine.run(arrays)["out_sample"], expected(arrays), rtol=1e-5)


def test_engines_of_another_backend_or_precision_are_not_taken(world: World):
    world.plan(backend="tensorrt" if world.backend == "tensorrt-rtx" else "tensorrt-rtx")
    world.plan(precision="int8")
    with pytest.raises(EngineError, match="holds no"):
        world.open()


def test_a_plan_of_the_wrong_size_and_one_that_does_not_load_are_errors(world: World):
    folder = world.plan()
    (folder / "0.plan").write_bytes(b"short")
    with world.open() as engine, pytest.raises(EngineError, match=r"0\.plan is damaged: expected \d+ bytes, found 5"):
        engine.run(inputs())
    size = json.loads((folder / KEY_NAME).read_text())["files"][0]["size"]
    (folder / "0.plan").write_bytes(b"x" * size)
    with world.open() as engine, pytest.raises(EngineError, match=r"cannot load .*: \[fake\] magic tag does not match"):
        engine.run(inputs())
    assert world.cuda.live() == 0


def test_an_engine_that_is_being_written_is_not_seen(world: World):
    folder = world.plan()
    folder.rename(folder.with_name(f".{folder.name}.partial"))
    with pytest.raises(EngineError, match="holds no"):
        world.open()


def test_a_damaged_key_file_is_an_error_that_names_it(world: World):
    folder = world.plan()
    (folder / KEY_NAME).write_text("{}")
    with pytest.raises(BundleError, match=r"key\.json is damaged"):
        world.open()


@pytest.mark.parametrize(
    "call", ["set_input_shape", "set_tensor_address", "execute_async_v3", "create_execution_context"]
)
@pytest.mark.parametrize("cuda_graph", [False, True])
def test_what_tensorrt_logged_is_the_text_of_the_error(world: World, call: str, cuda_graph: bool):
    world.plan({**PROGRAM, "fails": call})
    engine = world.open(options=EngineOptions(cuda_graph=cuda_graph))
    with engine, pytest.raises(EngineError, match=r"unet.*: \[fake\] "):
        engine.run(inputs())
    assert world.cuda.live() == 0


@pytest.mark.parametrize("name", ["cudaMalloc", "cudaMallocHost", "cudaMemcpyAsync", "cudaStreamSynchronize"])
def test_a_cuda_error_frees_everything_on_close(world: World, name: str):
    world.plan()
    engine = world.open(options=EngineOptions(cuda_graph=True))
    world.cuda.failures[name] = 2
    with pytest.raises(EngineError, match=f"{name} failed"):
        engine.run(inputs())
    world.cuda.queue.clear()
    engine.close()
    assert world.cuda.live() == 0


@pytest.mark.parametrize(
    ("program", "words"),
    [
        ({"inputs": {**PROGRAM["inputs"], "sample": "HALF"}}, "input sample: declared float32, the engine has float16"),
        ({"outputs": {"other": "FLOAT"}}, "output out_sample: declared float32, the engine has none"),
        ({"inputs": {**PROGRAM["inputs"], "mask": "FLOAT"}}, "undeclared inputs: mask"),
        ({"outputs": {"out_sample": "BF16"}}, "out_sample is BF16"),
        ({"shape": "timestep"}, r"output out_sample: declared \[2, 4, 4, 4\], found \[2\]"),
    ],
)
def test_tensors_that_differ_from_the_manifest_are_errors(world: World, program: dict[str, Any], words: str):
    world.plan({**PROGRAM, **program})
    with world.open() as engine, pytest.raises(EngineError, match=words):
        engine.run(inputs())


def test_a_stripped_engine_is_filled_with_the_bundles_weights(world: World):
    world.plan(options={"stripped": True})
    with world.open() as engine:
        engine.run(inputs())
    assert world.library.refitted == [str(world.bundle.path / "unet/model.fp16.onnx")]


def test_stripped_weights_that_do_not_fit_are_an_error(world: World):
    world.plan({**PROGRAM, "fails": "refit_cuda_engine"}, options={"stripped": True})
    with world.open() as engine, pytest.raises(EngineError, match="cannot fill the stripped engine"):
        engine.run(inputs())


def test_the_devices_name_chooses_the_gpu(world: World):
    world.plan()
    with world.open(options=EngineOptions(device="cuda:1")) as engine:
        engine.run(inputs())
    assert ("cudaSetDevice", (1,)) in world.cuda.calls
    assert ("cudaSetDevice", (0,)) not in world.cuda.calls
    with pytest.raises(UsageError, match="no device 'cpu'"):
        world.open(options=EngineOptions(device="cpu"))


def test_with_low_memory_one_engine_is_freed_before_the_next_is_loaded(world: World):
    from latentedge.runtime.pipeline import Pipeline

    world.plan()
    decoder = {**PROGRAM, "name": "decoder", "inputs": {"latent_sample": "FLOAT"}, "outputs": {"sample": "FLOAT"},
               "shape": "latent_sample"}  # fmt: skip
    world.plan(decoder, component="vae_decoder", axes={"batch": Axis(1, 1, 1)},
               weights={"vae_decoder/model.fp16.onnx": "cd" * 32})  # fmt: skip
    with Pipeline(world.bundle, world.backend, "fp16", EngineOptions(low_memory=True)) as pipe:
        pipe.engine("unet").run(inputs())
        start = len(world.cuda.calls)
        held = len(world.cuda.memory)
        pipe.engine("vae_decoder").run({"latent_sample": np.ones((1, 4, 4, 4), np.float32)})
    names = world.cuda.names()[start:]
    freed = [index for index, name in enumerate(names) if name in ("cudaFree", "cudaFreeHost")][:held]
    assert len(freed) == held
    assert freed[-1] < min(index for index, name in enumerate(names) if name.startswith("cudaMalloc"))
    assert world.cuda.live() == 0


@pytest.fixture
def rtx(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    return World(tmp_path, monkeypatch, "tensorrt-rtx")


def run_once(world: World, batch: int = 2, **options: Any) -> list[str]:
    """Open, run and close; gives the kernels that were compiled."""
    before = len(world.library.compiled)
    arrays = inputs(batch)
    with world.open(options=EngineOptions(**options)) as engine:
        np.testing.assert_allclose(engine.run(arrays)["out_sample"], expected(arrays), rtol=1e-5, atol=1e-6)
    return list(world.library.compiled[before:])


@pytest.mark.parametrize("cuda_graph", [False, True])
def test_kernels_that_rtx_compiled_are_kept_beside_the_plan(rtx: World, cuda_graph: bool):
    folder = rtx.plan(axes=WIDE)
    assert len(run_once(rtx, cuda_graph=cuda_graph)) == 1
    kept = folder / "0-8.7.kernels"
    first = kept.read_bytes()
    assert run_once(rtx, cuda_graph=cuda_graph) == [], "the next process loads them"
    assert len(run_once(rtx, batch=3)) == 1
    assert len(kept.read_bytes()) > len(first), "kernels for other shapes are added"
    assert run_once(rtx) == run_once(rtx, batch=3) == []
    assert sorted(path.name for path in folder.iterdir()) == ["0-8.7.kernels", "0.plan", KEY_NAME]


def test_each_plan_of_a_chain_and_each_gpu_has_kernels_of_its_own(rtx: World):
    first = {**PROGRAM, "name": "first", "outputs": {"skip": "FLOAT"}, "scale": 1, "offset": 0}
    second = {**PROGRAM, "name": "second", "inputs": {"skip": "FLOAT"}, "shape": "skip"}
    folder = rtx.plan(first, second, compute_capabilities=("8.7", "8.9"))
    run_once(rtx)
    rtx.cuda.compute_capability = (8, 9)
    run_once(rtx)
    names = ["0-8.7.kernels", "0-8.9.kernels", "1-8.7.kernels", "1-8.9.kernels"]
    assert sorted(path.name for path in folder.glob("*.kernels")) == names
    assert json.loads((folder / names[2]).read_bytes())[1][0].startswith("second ")


@pytest.mark.parametrize("content", [b"damaged", b'["driver 0", ["unet"]]'])
def test_kernels_that_the_library_refuses_are_compiled_again_and_replaced(rtx: World, content: bytes):
    kept = rtx.plan() / "0-8.7.kernels"
    kept.write_bytes(content)
    assert len(run_once(rtx)) == 1, "and what was logged about the file is no error of the run"
    assert run_once(rtx) == []
    rtx.library.driver = "driver 2"
    assert len(run_once(rtx)) == 1
    assert json.loads(kept.read_bytes())[0] == "driver 2"


def test_kernels_that_are_not_new_are_not_written_again(rtx: World, monkeypatch: pytest.MonkeyPatch):
    rtx.plan()
    run_once(rtx)
    monkeypatch.setattr(Path, "write_bytes", lambda path, content: pytest.fail(f"{path} was written"))
    run_once(rtx)


def test_a_folder_that_cannot_be_written_to_is_a_warning_and_the_picture_is_drawn(
    rtx: World, monkeypatch: pytest.MonkeyPatch
):
    rtx.plan()

    def refuse(path: Path, content: bytes) -> int:
        raise PermissionError(30, "Read-only file system")

    monkeypatch.setattr(Path, "write_bytes", refuse)
    with pytest.warns(UserWarning, match="compiled kernels are not kept.*Read-only file system"):
        run_once(rtx)


def test_tensorrt_itself_compiles_nothing_at_run_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    world = World(tmp_path, monkeypatch, "tensorrt")
    folder = world.plan()
    assert run_once(world) == []
    assert sorted(path.name for path in folder.iterdir()) == ["0.plan", KEY_NAME]
