"""``latentedge doctor``: what is on this machine, which backends run here, and what to install for the others.

Reads the system itself and the driver's library: it needs none of the engine libraries, and works on a Jetson.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.metadata
import importlib.util
import json
import platform
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click

from latentedge.runtime.engines import BACKENDS
from latentedge.runtime.machine import machine, machine_fingerprint, memory_limit

#: JetPack by the major version of its Linux for Tegra.
JETPACKS = {"35": "5", "36": "6", "38": "7.0 or 7.1", "39": "7.2 or newer"}
#: Compute capabilities that TensorRT-RTX 1.7 runs on.
RTX_CAPABILITIES = ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")
_CUDA_MAJOR, _CUDA_MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*


@dataclass(frozen=True)
class Finding:
    """Whether a backend runs here, why, and what to do where it does not."""

    backend: str
    runs: bool
    why: str
    hint: str | None = None


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Write facts and findings to stdout as JSON.")
def doctor(as_json: bool) -> None:
    """Show what this machine can run, and what to install for the rest."""
    facts = gather()
    findings = judge(facts)
    if as_json:
        click.echo(json.dumps({**facts, "backends": [asdict(finding) for finding in findings]}, indent=2))
        return
    for name, value in facts.items():
        for line in _lines(value):
            click.echo(f"{name.replace('_', ' '):16}{line}")
    click.echo()
    for finding in findings:
        click.echo(f"{finding.backend:16}{'runs' if finding.runs else 'does not run'}: {finding.why}")
        if finding.hint:
            click.echo(f"{'':16}hint: {finding.hint}")


def _lines(value: Any) -> list[str]:
    if isinstance(value, Mapping):
        return [f"{name} {item}" for name, item in value.items()] or ["none"]
    if isinstance(value, list):
        return [", ".join(f"{name} {item}" for name, item in entry.items()) for entry in value] or ["none"]
    return ["none" if value is None else str(value)]


def gather(root: Path = Path("/")) -> dict[str, Any]:
    """Facts by name: python, system, machine, memory, jetson, driver, GPUs, libraries and ONNX Runtime's providers."""
    driver, gpus = read_gpus()
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "machine": f"{machine()['processor']}, fingerprint {machine_fingerprint()}",
        "memory": read_memory(root),
        "jetson": read_jetson(root),
        "driver": driver,
        "gpus": gpus,
        "libraries": read_libraries(),
        "providers": ", ".join(read_providers()) or None,
    }


def read_memory(root: Path = Path("/")) -> dict[str, str]:
    """Memory that this process may use, what of it is free, and swap, in GiB."""
    text = _read(root / "proc/meminfo")
    kib = {match[1]: int(match[2]) for match in re.finditer(r"^(\w+):\s+(\d+) kB", text, re.MULTILINE)}
    limit = memory_limit() if root == Path("/") else None
    total = min(size for size in (kib.get("MemTotal", 0) * 1024, limit) if size is not None)
    sizes = {"total": total, "available": kib.get("MemAvailable", 0) * 1024, "swap": kib.get("SwapTotal", 0) * 1024}
    return {name: f"{size / 2**30:.1f} GiB" for name, size in sizes.items()}


def read_jetson(root: Path = Path("/")) -> dict[str, str] | None:
    """Board, Linux for Tegra, JetPack and power mode, or ``None`` where this is no Jetson."""
    release = re.search(r"R(\d+) \(release\), REVISION: ([\d.]+)", _read(root / "etc/nv_tegra_release"))
    if release is None:
        return None
    mode = _output("nvpmodel", "-q") if root == Path("/") else ""
    named = re.search(r"NV Power Mode: *(\S+)", mode)
    return {
        "board": _read(root / "proc/device-tree/model").strip("\0\n") or "unknown",
        "L4T": f"{release[1]}.{release[2]}",
        "JetPack": JETPACKS.get(release[1], "unknown"),
        "power mode": named[1] if named else "unknown (nvpmodel did not tell)",
    }


def read_gpus() -> tuple[str | None, list[dict[str, str]]]:
    """The CUDA version that the driver takes, and name, compute capability and memory of each GPU."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None, []
    version, count = ctypes.c_int(), ctypes.c_int()
    if cuda.cuInit(0) or cuda.cuDriverGetVersion(ctypes.byref(version)) or cuda.cuDeviceGetCount(ctypes.byref(count)):
        return "the driver's library does not start", []
    driver = f"CUDA {version.value // 1000}.{version.value % 1000 // 10}"
    return driver, [_gpu(cuda, index) for index in range(count.value)]


def _gpu(cuda: Any, index: int) -> dict[str, str]:
    name, device, size = ctypes.create_string_buffer(128), ctypes.c_int(), ctypes.c_size_t()
    major, minor = ctypes.c_int(), ctypes.c_int()
    cuda.cuDeviceGet(ctypes.byref(device), index)
    cuda.cuDeviceGetName(name, len(name), device)
    cuda.cuDeviceTotalMem_v2(ctypes.byref(size), device)
    cuda.cuDeviceGetAttribute(ctypes.byref(major), _CUDA_MAJOR, device)
    cuda.cuDeviceGetAttribute(ctypes.byref(minor), _CUDA_MINOR, device)
    return {
        "name": name.value.decode(),
        "compute_capability": f"{major.value}.{minor.value}",
        "memory": f"{size.value / 2**30:.1f} GiB",
    }


def read_libraries() -> dict[str, str]:
    """Version of each engine library that is installed, and of what drives a GPU."""
    packages = ("numpy", "onnxruntime", "onnxruntime-gpu", "openvino", "tensorrt", "tensorrt_rtx", "cuda-bindings")
    found = {}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def read_providers() -> list[str]:
    """ONNX Runtime's execution providers, or none where it is not installed."""
    if not BACKENDS["onnxruntime"].installed():
        return []
    return list(importlib.import_module("onnxruntime").get_available_providers())


def judge(facts: Mapping[str, Any], installed: Mapping[str, bool] | None = None) -> list[Finding]:
    """What the facts mean for each backend."""
    if installed is None:
        installed = {name: backend.installed() for name, backend in BACKENDS.items()}
    return [JUDGES.get(name, _judge_cpu)(name, facts, installed[name]) for name in BACKENDS]


def _missing(name: str, facts: Mapping[str, Any]) -> Finding:
    backend = BACKENDS[name]
    hint = f"pip install 'latentedge[{backend.extra}]'"
    if name == "tensorrt" and facts["jetson"]:
        hint = "TensorRT comes with JetPack: apt install nvidia-jetpack, and a venv with --system-site-packages"
    return Finding(name, False, f"{backend.requires} is not installed", hint)


def _judge_cpu(name: str, facts: Mapping[str, Any], installed: bool) -> Finding:
    return Finding(name, True, "on the processor") if installed else _missing(name, facts)


def _judge_onnxruntime(name: str, facts: Mapping[str, Any], installed: bool) -> Finding:
    if not installed:
        return _missing(name, facts)
    on_gpu = [
        provider for provider in ("CUDA", "Tensorrt") if f"{provider}ExecutionProvider" in (facts["providers"] or "")
    ]
    if on_gpu:
        return Finding(name, True, f"on the processor, and with {' and '.join(on_gpu)} on the GPU")
    hint = "for the GPU: pip uninstall onnxruntime; pip install onnxruntime-gpu" if facts["gpus"] else None
    return Finding(name, True, "on the processor", hint)


def _judge_tensorrt(name: str, facts: Mapping[str, Any], installed: bool) -> Finding:
    rtx = name == "tensorrt-rtx"
    if not facts["gpus"]:
        why = facts["driver"] or "no NVIDIA driver is installed"
        able = "; it compiles here for other GPUs: latentedge build --check" if rtx and installed else ""
        return Finding(name, False, f"no NVIDIA GPU is visible ({why}){able}", "it needs an NVIDIA GPU and its driver")
    if not installed:
        return _missing(name, facts)
    capability = facts["gpus"][0]["compute_capability"]
    if rtx and capability not in RTX_CAPABILITIES:
        return Finding(name, False, f"TensorRT-RTX does not run compute capability {capability}", "use tensorrt")
    if "cuda-bindings" not in facts["libraries"]:
        wanted = facts["driver"].removeprefix("CUDA ").partition(".")[0]
        hint = f"pip install 'cuda-bindings=={wanted}.*'"
        return Finding(name, False, "cuda-bindings is not installed", hint)
    return Finding(name, True, f"on {facts['gpus'][0]['name']}, with engines from latentedge build --backend {name}")


JUDGES = {"onnxruntime": _judge_onnxruntime, "tensorrt": _judge_tensorrt, "tensorrt-rtx": _judge_tensorrt}


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _output(program: str, *arguments: str) -> str:
    found = shutil.which(program)
    if found is None:
        return ""
    try:
        return subprocess.run([found, *arguments], capture_output=True, text=True, timeout=5, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""
