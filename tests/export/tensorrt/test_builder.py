"""Real builds with TensorRT-RTX's compiler, which needs no GPU, and what happens when they fail."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

pytest.importorskip("onnx")
pytest.importorskip("tensorrt_rtx")

import tensorrt_rtx as rtx
from onnx import helper

from latentedge.export.build_commands import build as build_command
from latentedge.export.builders import BUILDERS, BuildRequest, Range, builder_of
from latentedge.export.tensorrt import engine_from_onnx
from latentedge.export.tensorrt.builder import build
from latentedge.export.tensorrt.engine_from_onnx import complaint, known_capabilities
from latentedge.runtime.bundle import Bundle
from latentedge.runtime.cli import run
from latentedge.runtime.engines.plans import KEY_NAME, Target, read_plans, this_platform, usable_plans
from latentedge.runtime.errors import BundleError, EngineError, Interrupted, UsageError
from tests.export.tensorrt.tiny_graphs import graph, write_bundle


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle whose fp16 engine is built for compute capability 8.9; not to be changed."""
    bundle = write_bundle(tmp_path_factory.mktemp("built"), fp16=graph(dtype=np.float16))
    rows = build(request(bundle))
    assert [(row.component, row.precision, row.reused) for row in rows] == [("unet", "fp16", False)]
    return bundle


def request(bundle: Bundle, **settings: Any) -> BuildRequest:
    settings = {"compute_capabilities": ("8.9",), "notify": lambda message: None, **settings}
    return BuildRequest(bundle, "tensorrt-rtx", **settings)


def target(**changes: str) -> Target:
    return dataclasses.replace(Target("tensorrt-rtx", rtx.__version__, "8.9", this_platform()), **changes)


def test_a_built_engine_is_found_for_its_gpu_and_for_no_other(built: Bundle) -> None:
    unet = built.component("unet")
    plans = usable_plans(built, unet, "fp16", target(), None)
    assert [file.path for file in plans[0].files] == ["0.plan"]
    assert plans[0].files[0].size == (plans[0].folder / "0.plan").stat().st_size > 1000
    with pytest.raises(EngineError, match=r"built for compute capability 8\.9, this GPU has 8\.6"):
        usable_plans(built, unet, "fp16", target(compute_capability="8.6"), None)


def test_the_same_request_builds_nothing_and_any_other_builds_anew(built: Bundle, tmp_path: Path) -> None:
    bundle = Bundle.open(shutil.copytree(built.path, tmp_path / "copy"))
    assert build(request(bundle))[0].reused
    for settings in (
        {"batch": Range(1, 2)},
        {"compute_capabilities": ("8.6",)},
        {"optimization_level": 1},
        {"memory_limit": 1 << 30},
    ):
        row = build(request(bundle, **settings))[0]
        assert not row.reused, settings
        assert row.folder is not None
        assert row.plan_size is not None
    keys = {plan.folder.name for plan in read_plans(bundle.path / "engines")}
    assert len(keys) == 5
    assert not list((bundle.path / "engines").glob(".*.partial"))


def test_the_settings_reach_the_builder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class StoppedError(Exception):
        """Ends the build once it is configured."""

    found: list[Any] = []

    def keep(library: Any, config: Any, settings: Any) -> None:
        configure(library, config, settings)
        found.append(config)
        raise StoppedError

    configure = engine_from_onnx._configure
    monkeypatch.setattr(engine_from_onnx, "_configure", keep)
    bundle = write_bundle(tmp_path, fp32=graph())
    flags, pools = rtx.BuilderFlag, rtx.MemoryPoolType
    for settings in (
        {},
        {"stripped": True, "version_compatible": True, "memory_limit": 1 << 28, "optimization_level": 2},
    ):
        with pytest.raises(StoppedError):
            build(request(bundle, compute_capabilities=("8.9", "12.0"), **settings))
    plain, full = found
    assert [plain.get_flag(flag) for flag in (flags.TF32, flags.STRIP_PLAN, flags.VERSION_COMPATIBLE)] == [False] * 3
    assert not full.get_flag(flags.TF32), "fp32 is fp32"
    assert all(full.get_flag(flag) for flag in (flags.STRIP_PLAN, flags.REFIT_IDENTICAL, flags.VERSION_COMPATIBLE))
    assert {full.get_memory_pool_limit(pool) for pool in (pools.WORKSPACE, pools.TACTIC_DRAM)} == {1 << 28}
    assert full.builder_optimization_level == 2
    capabilities = [full.get_compute_capability(index) for index in range(full.num_compute_capabilities)]
    assert capabilities == [rtx.ComputeCapability.SM89, rtx.ComputeCapability.SM120]


def test_a_damaged_plan_is_built_again(built: Bundle, tmp_path: Path) -> None:
    bundle = Bundle.open(shutil.copytree(built.path, tmp_path / "copy"))
    plan = next((bundle.path / "engines").glob("*/0.plan"))
    content = plan.read_bytes()
    plan.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert not build(request(bundle))[0].reused
    assert build(request(bundle))[0].reused


def test_changed_weights_make_the_engine_stale(built: Bundle, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(built.path / "engines", folder / "engines")
    bundle = write_bundle(folder, fp16=graph("Tanh", np.float16))
    with pytest.raises(EngineError, match="the component's graph or weights changed") as error:
        usable_plans(bundle, bundle.component("unet"), "fp16", target(), None)
    assert f"latentedge build {folder} --backend tensorrt-rtx --precision fp16" in str(error.value.hint)


def test_a_graph_that_is_not_the_proven_one_is_not_built(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path, fp32=graph())
    path = bundle.path / "unet/model.fp32.onnx"
    path.write_bytes(graph("Tanh").SerializeToString())
    with pytest.raises(BundleError, match="is not the file that was proven"):
        build(request(bundle))


def test_a_second_build_of_the_same_engine_waits_for_the_first(built: Bundle, tmp_path: Path) -> None:
    bundle = Bundle.open(shutil.copytree(built.path, tmp_path / "copy"))
    lock = next((bundle.path / "engines").glob(".*.lock"))
    said: list[str] = []
    with lock.open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        rows: list[Any] = []
        thread = threading.Thread(target=lambda: rows.extend(build(request(bundle, notify=said.append))))
        thread.start()
        deadline = time.monotonic() + 30
        while not said and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not rows
        fcntl.flock(stream, fcntl.LOCK_UN)
        thread.join(30)
    assert "waiting" in said[0]
    assert rows[0].reused


def test_a_build_that_dies_leaves_no_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = write_bundle(tmp_path, fp32=graph())
    write_text = Path.write_text

    def fail(path: Path, *arguments: Any, **options: Any) -> int:
        if path.name == KEY_NAME:
            raise OSError(28, "No space left on device")
        return write_text(path, *arguments, **options)

    monkeypatch.setattr(Path, "write_text", fail)
    with pytest.raises(OSError, match="No space left"):
        build(request(bundle))
    monkeypatch.undo()
    assert read_plans(bundle.path / "engines") == []
    assert not build(request(bundle))[0].reused


def test_ctrl_c_stops_the_builder_and_keeps_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = write_bundle(tmp_path, fp32=graph(layers=30))
    monitor = engine_from_onnx.progress_monitor

    def interrupting(library: Any, stop: Any, bars: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        return monitor(library, stop, bars)

    monkeypatch.setattr(engine_from_onnx, "progress_monitor", interrupting)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted):
        build(request(bundle))
    assert signal.getsignal(signal.SIGINT) is before
    assert read_plans(bundle.path / "engines") == []


def test_the_progress_monitor_hears_of_every_phase(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Bars:
        def __init__(self) -> None:
            self.added: list[str] = []
            self.removed: list[int] = []
            self.updates = 0

        def __enter__(self) -> Bars:
            return self

        def __exit__(self, *_: object) -> None: ...

        def add_task(self, name: str, total: int) -> int:
            self.added.append(name)
            return len(self.added)

        def update(self, task: int, completed: int) -> None:
            self.updates += 1

        def remove_task(self, task: int) -> None:
            self.removed.append(task)

    bars = Bars()
    monkeypatch.setattr(engine_from_onnx, "progress_bars", lambda: bars)
    build(request(write_bundle(tmp_path, fp32=graph()), check=True))
    assert "Building engine" in bars.added
    assert bars.updates > 5
    assert sorted(bars.removed) == list(range(1, len(bars.added) + 1))


@pytest.fixture
def refused(tmp_path: Path) -> Bundle:
    """fp32 holds an operator that no parser knows, fp16 compiles."""
    return write_bundle(tmp_path, fp32=graph("Bernoulli"), fp16=graph(dtype=np.float16))


def test_check_names_the_node_and_its_module_and_goes_on(refused: Bundle) -> None:
    rows = build(request(refused, check=True))
    assert [(row.precision, bool(row.errors)) for row in rows] == [("fp32", True), ("fp16", False)]
    assert any(
        "Bernoulli blocks.0.act/Bernoulli of torch module blocks.0.act" in line for row in rows for line in row.errors
    )
    assert rows[1].plan_size > rows[1].weight_memory > 2 * 8 * 8 * 9 * 2 - 1
    assert rows[1].scratch_memory is not None
    assert not (refused.path / "engines").exists()


def test_check_compiles_for_every_target_and_tells_them_apart_when_one_fails(
    refused: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = build(request(refused, check=True, compute_capabilities=(), precisions=("fp16",)))
    assert [row.target for row in rows] == ["8.6, 8.9, 12.0"]
    rows = build(request(refused, check=True, compute_capabilities=(), precisions=("fp32",)))
    assert [row.target for row in rows] == ["8.6", "8.9", "12.0"]
    assert all(row.errors for row in rows)


def test_the_command_prints_a_table_and_fails_when_a_graph_does(
    refused: Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["build", str(refused.path), "--backend", "tensorrt-rtx", "--check", "--compute-capability", "8.9"]
    assert run([*arguments, "--precision", "fp16"], debug=False) == 0
    assert "fp16       8.9     yes" in capsys.readouterr().out
    assert run(arguments, debug=False) == 1
    out, err = capsys.readouterr()
    assert "blocks.0.act/Bernoulli of torch module blocks.0.act" in out
    assert "1 of 2 do not compile: unet fp32" in err


def test_the_table_as_json(refused: Bundle) -> None:
    arguments = [str(refused.path), "--backend", "tensorrt-rtx", "--check", "--precision", "fp16", "--json"]
    result = CliRunner().invoke(build_command, arguments)
    rows = json.loads(result.stdout)
    assert [(row["compiles"], row["component"], row["target"]) for row in rows] == [(True, "unet", "8.6, 8.9, 12.0")]


@pytest.mark.parametrize(("dtype", "compiles"), [(np.float32, False), (np.float16, True)])
def test_attention_as_one_node_compiles_in_fp16_only(tmp_path: Path, dtype: type, compiles: bool) -> None:
    """Why the exporter writes attention as MatMul and Softmax: one graph has to serve fp32 too."""
    shape, kind = (1, 8, 64, 40), helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    tensors = [helper.make_tensor_value_info(name, kind, shape) for name in ("query", "key", "value", "out")]
    node = helper.make_node("Attention", ["query", "key", "value"], ["out"], "attn/Attention")
    model = helper.make_graph([node], "attention", tensors[:3], tensors[3:])
    opset = [helper.make_opsetid("", 23)]
    path = tmp_path / "attention.onnx"
    path.write_bytes(helper.make_model(model, opset_imports=opset, ir_version=11).SerializeToString())
    settings = engine_from_onnx.BuilderSettings(compute_capabilities=("8.9",))
    profile = dict.fromkeys(("query", "key", "value"), (shape,) * 3)
    if compiles:
        assert engine_from_onnx.engine_from_onnx(rtx, path, profile, settings).plan_size > 1000
    else:
        with pytest.raises(EngineError, match=r"does not compile:\n.*Attention operation was not supported"):
            engine_from_onnx.engine_from_onnx(rtx, path, profile, settings)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"compute_capabilities": ("8.7",)}, r"does not compile for compute capability 8\.7; it knows: .*8\.9"),
        ({"stripped": True, "max_engine_memory": 1 << 20}, "cannot be combined"),
        ({"precisions": ("int8",)}, "unet is not in this bundle in int8"),
    ],
)
def test_what_cannot_be_built_is_an_error(built: Bundle, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        build(request(built, **settings))


def test_without_a_gpu_a_build_for_this_machine_says_so(built: Bundle) -> None:
    runtime = pytest.importorskip("cuda.bindings.runtime")
    if int(runtime.cudaGetDeviceCount()[0]) == 0:
        pytest.skip("there is a GPU")
    with pytest.raises(EngineError, match="cudaDeviceGetAttribute failed"):
        build(request(built, compute_capabilities=()))


def test_a_build_needs_neither_torch_nor_onnx_nor_rich(built: Bundle, tmp_path: Path) -> None:
    blocked = ["torch", "onnx", "onnx_ir", "onnxscript", "onnxruntime", "rich", "safetensors", "yaml"]
    arguments = ["build", str(built.path), "--backend", "tensorrt-rtx", "--check", "--compute-capability", "8.9"]
    script = (
        "import sys, importlib.abc\n"
        "class Block(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.split('.')[0] in {blocked}: raise ModuleNotFoundError(name=name)\n"
        "sys.meta_path.insert(0, Block())\n"
        "from latentedge.runtime.cli import run\n"
        f"sys.exit(run({arguments}, debug=False))\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    assert "unet" in result.stdout


def test_every_known_capability_is_named_as_major_and_minor() -> None:
    assert {"8.6", "8.9", "12.0"} <= set(known_capabilities(rtx))


def test_complaints_name_what_is_known() -> None:
    assert complaint("a.b/Conv_1", "Conv", "bad") == "Conv a.b/Conv_1 of torch module a.b: bad"
    assert complaint("/Concat", "Concat", "bad") == "Concat /Concat: bad"
    assert complaint("", "", "no input") == "no input"


def test_every_builder_can_be_loaded_and_an_unknown_one_is_an_error() -> None:
    for backend in BUILDERS:
        assert callable(builder_of(backend))
    with pytest.raises(UsageError, match="nothing to build for the backend 'null'"):
        builder_of("null")


def test_a_denoiser_over_the_limit_is_built_as_a_chain(tmp_path: Path) -> None:
    # The compiler's own scratch memory is 8 MiB, so weights have to be larger for a limit to divide them.
    bundle = write_bundle(tmp_path, fp16=graph(dtype=np.float16, layers=6, channels=640))
    weights = 6 * 640 * 640 * 9 * 2
    row = build(request(bundle, max_engine_memory=int(0.6 * weights), batch=Range(1, 2)))[0]
    assert row.parts == 3
    plan = read_plans(bundle.path / "engines")[0]
    assert [file.path for file in plan.files] == ["0.plan", "1.plan", "2.plan"]
    assert all(file.size > weights // 6 for file in plan.files)
    assert abs(row.weight_memory - weights) < weights // 100
    with pytest.raises(EngineError, match=r"part0 takes \d+ bytes \(.*scratch memory \d+.*\), more than the asked-for"):
        build(request(bundle, max_engine_memory=int(0.24 * weights), check=True))


@pytest.mark.filterwarnings("ignore:.*no-ops in TensorRT-RTX:DeprecationWarning")
def test_timings_are_kept_for_the_next_build(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path, fp32=graph())
    cache = tmp_path / "timings.cache"
    settings = engine_from_onnx.BuilderSettings(compute_capabilities=("8.9",), timing_cache=cache)
    path, _ = bundle.variant("unet", "fp32")
    profile = {"sample": ((2, 8, 4, 4),) * 3}
    engine_from_onnx.engine_from_onnx(rtx, path, profile, settings)
    assert cache.stat().st_size > 0
    assert not list(tmp_path.glob("*.partial"))
