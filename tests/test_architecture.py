"""The arrows between packages, and what a device loads."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("export", "calibration", "runtime", "benchmarks")
#: What each package may import of the others.
ARROWS = {
    "runtime": set(),
    "export": {"runtime"},
    "calibration": {"runtime"},
    "benchmarks": {"runtime", "export", "calibration"},
}
NOT_ON_A_DEVICE = {"torch", "onnx", "onnxscript", "onnx_ir", "diffusers", "transformers", "scipy", "matplotlib"}
RUNTIME_LINES = 3000


def modules(package: str) -> list[Path]:
    return sorted(path for path in (ROOT / package).rglob("*.py") if "__pycache__" not in path.parts)


def imported_names(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
    return names


@pytest.mark.parametrize("package", PACKAGES)
def test_arrows_go_one_way(package: str) -> None:
    allowed = ARROWS[package] | {package}
    for path in modules(package):
        for name in imported_names(path):
            parts = name.split(".")
            assert parts[0] not in PACKAGES, f"{path} imports {name} without its full name"
            if parts[0] == "latentedge" and len(parts) > 1:
                assert parts[1] in allowed, f"{path} imports {name}"


def test_the_runtime_names_nothing_that_a_device_lacks() -> None:
    for path in modules("runtime"):
        roots = {name.split(".")[0] for name in imported_names(path)}
        assert not roots & NOT_ON_A_DEVICE, f"{path} imports {sorted(roots & NOT_ON_A_DEVICE)}"


def test_calibration_does_not_need_torch() -> None:
    for path in modules("calibration"):
        assert "torch" not in {name.split(".")[0] for name in imported_names(path)}, path


def test_every_runtime_module_imports_without_host_libraries() -> None:
    """In a fresh process; backends whose own library is not here are left out by name, nothing else is."""
    names = [
        "latentedge." + ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in modules("runtime")
    ]
    program = f"""
import importlib, sys
for name in {names!r}:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name not in ("onnxruntime", "openvino", "tensorrt", "tensorrt_rtx", "cuda"):
            raise
loaded = sorted({sorted(NOT_ON_A_DEVICE)!r} & sys.modules.keys())
print(",".join(loaded))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd="/", check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ""


def test_the_runtime_stays_small() -> None:
    lines = sum(len(path.read_text(encoding="utf-8").splitlines()) for path in modules("runtime"))
    assert lines <= RUNTIME_LINES, f"runtime/ has {lines} lines"


def test_the_distribution_lists_every_package() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for package in PACKAGES:
        for path in (ROOT / package).rglob("__init__.py"):
            name = "latentedge." + ".".join(path.parent.relative_to(ROOT).parts)
            assert f'"{name}"' in text, f"{name} is not packaged"
