from __future__ import annotations

import ctypes
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from latentedge.runtime import doctor
from latentedge.runtime.cli import run
from latentedge.runtime.engines import BACKENDS
from latentedge.runtime.machine import machine_fingerprint

ORIN = {"name": "Orin", "compute_capability": "8.7", "memory": "7.4 GiB"}
ADA = {"name": "RTX 4070", "compute_capability": "8.9", "memory": "12.0 GiB"}
ALL = dict.fromkeys(BACKENDS, True)
NONE = dict.fromkeys(BACKENDS, False)


def facts(**changes: Any) -> dict[str, Any]:
    common: dict[str, Any] = {"jetson": None, "driver": "CUDA 12.6", "gpus": [], "libraries": {}, "providers": None}
    return {**common, **changes}


def judged(found: dict[str, Any], installed: dict[str, bool]) -> dict[str, doctor.Finding]:
    return {finding.backend: finding for finding in doctor.judge(found, installed)}


def test_every_backend_is_judged_and_what_is_missing_can_be_installed() -> None:
    for finding in doctor.judge(facts(gpus=[ADA]), NONE):
        assert not finding.runs
        assert f"latentedge[{BACKENDS[finding.backend].extra}]" in str(finding.hint)
        assert BACKENDS[finding.backend].requires in finding.why


def test_without_a_gpu_only_the_processors_backends_run() -> None:
    found = judged(facts(driver=None), ALL)
    assert {name for name, finding in found.items() if finding.runs} == {"onnxruntime", "openvino"}
    assert "no NVIDIA driver is installed" in found["tensorrt"].why
    assert "latentedge build --check" in found["tensorrt-rtx"].why
    assert "latentedge build --check" not in judged(facts(driver=None), NONE)["tensorrt-rtx"].why


def test_on_a_jetson_tensorrt_comes_from_jetpack_and_rtx_does_not_run() -> None:
    jetson = {"L4T": "36.4.3", "JetPack": "6"}
    found = judged(facts(gpus=[ORIN], jetson=jetson), {**ALL, "tensorrt": False})
    assert "comes with JetPack" in str(found["tensorrt"].hint)
    assert found["tensorrt-rtx"].why == "TensorRT-RTX does not run compute capability 8.7"
    with_bindings = facts(gpus=[ORIN], jetson=jetson, libraries={"cuda-bindings": "12.6.2"})
    assert judged(with_bindings, ALL)["tensorrt"].runs


def test_cuda_bindings_of_the_drivers_version_are_asked_for() -> None:
    found = judged(facts(gpus=[ADA]), ALL)
    for name in ("tensorrt", "tensorrt-rtx"):
        assert (found[name].runs, found[name].hint) == (False, "pip install 'cuda-bindings==12.*'")


def test_onnxruntime_says_which_providers_reach_the_gpu() -> None:
    cpu = judged(facts(gpus=[ADA], providers="CPUExecutionProvider"), ALL)["onnxruntime"]
    assert (cpu.runs, cpu.why) == (True, "on the processor")
    assert "onnxruntime-gpu" in str(cpu.hint)
    both = facts(gpus=[ADA], providers="TensorrtExecutionProvider, CUDAExecutionProvider, CPUExecutionProvider")
    assert judged(both, ALL)["onnxruntime"].why == "on the processor, and with CUDA and Tensorrt on the GPU"


def test_a_jetson_is_read_from_its_files(tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    (tmp_path / "proc/device-tree").mkdir(parents=True)
    (tmp_path / "etc/nv_tegra_release").write_text("# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic")
    (tmp_path / "proc/device-tree/model").write_text("NVIDIA Jetson Orin Nano Engineering Reference Developer Kit\0")
    (tmp_path / "proc/meminfo").write_text("MemTotal:  7802036 kB\nMemAvailable: 5242880 kB\nSwapTotal: 16777216 kB\n")
    found = doctor.read_jetson(tmp_path)
    assert found is not None
    assert (found["L4T"], found["JetPack"]) == ("36.4.3", "6")
    assert found["board"] == "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit"
    assert doctor.read_memory(tmp_path) == {"total": "7.4 GiB", "available": "5.0 GiB", "swap": "16.0 GiB"}


def test_elsewhere_there_is_no_jetson(tmp_path: Path) -> None:
    assert doctor.read_jetson(tmp_path) is None


@pytest.mark.parametrize(("release", "jetpack"), [("35", "5"), ("36", "6"), ("38", "7.0 or 7.1"), ("99", "unknown")])
def test_jetpack_follows_from_linux_for_tegra(tmp_path: Path, release: str, jetpack: str) -> None:
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/nv_tegra_release").write_text(f"# R{release} (release), REVISION: 2.1, GCID: 1")
    found = doctor.read_jetson(tmp_path)
    assert found is not None
    assert found["JetPack"] == jetpack


class FakeDriver:
    """The driver's library with two GPUs; ``starts`` False: no device answers."""

    def __init__(self, starts: bool = True) -> None:
        self.starts = starts

    def cuInit(self, flags: int) -> int:  # noqa: N802 - the driver's name
        return 0 if self.starts else 100

    def cuDriverGetVersion(self, version: Any) -> int:  # noqa: N802
        version._obj.value = 12060
        return 0

    def cuDeviceGetCount(self, count: Any) -> int:  # noqa: N802
        count._obj.value = 2
        return 0

    def cuDeviceGet(self, device: Any, index: int) -> int:  # noqa: N802
        device._obj.value = index
        return 0

    def cuDeviceGetName(self, name: Any, size: int, device: ctypes.c_int) -> int:  # noqa: N802
        name.value = f"GPU {device.value}".encode()
        return 0

    def cuDeviceTotalMem_v2(self, size: Any, device: ctypes.c_int) -> int:  # noqa: N802
        size._obj.value = (device.value + 1) << 33
        return 0

    def cuDeviceGetAttribute(self, value: Any, attribute: int, device: ctypes.c_int) -> int:  # noqa: N802
        value._obj.value = {75: 8, 76: 7}[attribute]
        return 0


def test_gpus_are_read_from_the_drivers_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: FakeDriver())
    assert doctor.read_gpus() == (
        "CUDA 12.6",
        [
            {"name": "GPU 0", "compute_capability": "8.7", "memory": "8.0 GiB"},
            {"name": "GPU 1", "compute_capability": "8.7", "memory": "16.0 GiB"},
        ],
    )
    monkeypatch.setattr(ctypes, "CDLL", lambda name: FakeDriver(starts=False))
    assert doctor.read_gpus() == ("the driver's library does not start", [])


def test_the_command_tells_facts_and_findings(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["doctor"], debug=False) == 0
    text = capsys.readouterr().out
    assert f"python          {sys.version.split()[0]}" in text
    for backend in BACKENDS:
        assert f"\n{backend}" in text
    assert run(["doctor", "--json"], debug=False) == 0
    data = json.loads(capsys.readouterr().out)
    assert [entry["backend"] for entry in data["backends"]] == list(BACKENDS)
    assert data["libraries"]["numpy"]


def test_it_needs_no_engine_library() -> None:
    blocked = ["onnxruntime", "openvino", "tensorrt", "tensorrt_rtx", "torch", "onnx", "cuda"]
    script = (
        "import sys, importlib.abc\n"
        "class Block(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.split('.')[0] in {blocked}: raise ModuleNotFoundError(name=name)\n"
        "sys.meta_path.insert(0, Block())\n"
        "import importlib.util; importlib.util.find_spec = lambda name: None\n"
        "from latentedge.runtime.cli import run\n"
        "sys.exit(run(['doctor'], debug=False))\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stderr
    assert "onnxruntime is not installed" in result.stdout


def test_the_fingerprint_is_the_one_that_records_are_filed_under() -> None:
    assert doctor.gather()["machine"].endswith(f"fingerprint {machine_fingerprint()}")
