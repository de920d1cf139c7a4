"""The arrows between packages, and what a device loads."""

from __future__ import annotations

import ast
import io
import re
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest

from latentedge.runtime.cli import COMMANDS
from latentedge.runtime.engines import BACKENDS

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
CORE_LINES = 3400
COMMAND_MODULES = (
    "cli.py",
    "doctor.py",
    "generate_command.py",
    "inspect.py",
    "parity.py",
    "picture_files.py",
    "sections.py",
    "tradeoffs.py",
    "verify.py",
)


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


def code_lines(path: Path) -> int:
    """Lines that hold code: neither blank, nor comment, nor docstring."""
    source = path.read_text(encoding="utf-8")
    documentation: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node, clean=False):
            documentation |= set(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    layout = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    code: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in layout:
            code |= set(range(token.start[0], token.end[0] + 1))
    return len(code - documentation)


def test_the_core_that_every_device_loads_stays_small() -> None:
    """Without the engines, of which a device loads one, and without the commands."""
    core = [path for path in modules("runtime") if path.parent.name != "engines" and path.name not in COMMAND_MODULES]
    lines = sum(code_lines(path) for path in core)
    assert lines <= CORE_LINES, f"the core has {lines} lines of code"


def test_every_extra_that_a_hint_names_exists() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    section = text.partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    known = set(re.findall(r"^(\w+) = \[", section, re.MULTILINE))
    named = {extra for _, _, extra in COMMANDS.values() if extra} | {backend.extra for backend in BACKENDS.values()}
    for package in PACKAGES:
        for path in modules(package):
            for extras in re.findall(r"latentedge\[([\w,]+)\]", path.read_text(encoding="utf-8")):
                named |= set(extras.split(","))
    assert {"cpu", "build", "calibration", "gpu"} <= named
    assert named <= known, f"no such extra: {sorted(named - known)}"


def test_the_distribution_lists_every_package() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for package in PACKAGES:
        for path in (ROOT / package).rglob("__init__.py"):
            name = "latentedge." + ".".join(path.parent.relative_to(ROOT).parts)
            assert f'"{name}"' in text, f"{name} is not packaged"
