"""Every name of TensorRT's Python interface that the project uses is there in 10.3, in 11.1 and in TensorRT-RTX."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = (
    ROOT / "runtime/engines/tensorrt.py",
    ROOT / "runtime/engines/kernel_cache.py",
    *sorted((ROOT / "export/tensorrt").glob("*.py")),
)
RECORDED = json.loads((ROOT / "tests/golden/tensorrt_names.json").read_text(encoding="utf-8"))["versions"]

#: TensorRT's class by the name that the sources give to a variable or attribute which holds one.
CLASSES = {
    "builder": "Builder",
    "config": "IBuilderConfig",
    "network": "INetworkDefinition",
    "parser": "OnnxParser",
    "error": "ParserError",
    "profile": "IOptimizationProfile",
    "runtime": "Runtime",
    "engine": "ICudaEngine",
    "context": "IExecutionContext",
    "refitter": "Refitter",
    "cache": "ITimingCache",
    "runtime_config": "IRuntimeConfig",
    "_kernel_cache": "IRuntimeCache",
    "content": "IHostMemory",
    "flags": "BuilderFlag",
    "value": "ITensor",
}
#: Files in which a name of the table holds something else as well.
ELSEWHERE = {("engine", "drop_graph"), ("error", "complaints"), ("profile", "items"), ("cache", "loaded")}
#: The same variable name for another class: by file and attribute.
OTHER_CLASS = {("parser", "refit_from_file"): "OnnxParserRefitter"}
#: Only TensorRT-RTX compiles for another GPU than the one that is here, and kernels when a plan runs.
RTX_ONLY = {
    ("ICudaEngine", "create_runtime_config"),
    ("IRuntimeConfig", "set_execution_context_allocation_strategy"),
    ("IRuntimeConfig", "dynamic_shapes_kernel_specialization_strategy"),
    ("IRuntimeConfig", "create_runtime_cache"),
    ("IRuntimeConfig", "set_runtime_cache"),
    ("IRuntimeCache", "serialize"),
    ("IRuntimeCache", "deserialize"),
    ("", "DynamicShapesKernelSpecializationStrategy"),
    ("DynamicShapesKernelSpecializationStrategy", "EAGER"),
    ("IBuilderConfig", "num_compute_capabilities"),
    ("IBuilderConfig", "set_compute_capability"),
    ("", "ComputeCapability"),
    ("ComputeCapability", "__members__"),
}


def uses() -> set[tuple[str, str]]:
    """(class, attribute) of every use; the class is "" for names of the module itself."""
    found: set[tuple[str, str]] = set()
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute):
                found.update(_use(node))
    return {use for use in found if use[1] not in ("__version__", "__init__")}


def _use(node: ast.Attribute) -> Iterator[tuple[str, str]]:
    base = node.value
    if isinstance(base, ast.Attribute) and _holder(base.value) in ("library", "_library", "trt"):
        yield base.attr, node.attr
    holder = _holder(base)
    if holder in ("library", "_library", "trt"):
        yield "", node.attr
    elif holder in CLASSES and (holder, node.attr) not in ELSEWHERE:
        yield OTHER_CLASS.get((holder, node.attr), CLASSES[holder]), node.attr


def _holder(node: ast.expr) -> str:
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def test_the_uses_are_found() -> None:
    found = uses()
    assert len(found) > 50
    for expected in (
        ("", "Runtime"),
        ("BuilderFlag", "TF32"),
        ("IBuilderConfig", "set_memory_pool_limit"),
        ("IExecutionContext", "execute_async_v3"),
        ("ICudaEngine", "get_tensor_mode"),
        ("TensorIOMode", "INPUT"),
        ("OnnxParserRefitter", "refit_from_file"),
        ("ParserError", "node_name"),
    ):
        assert expected in found


@pytest.mark.parametrize("version", ["10.3", "11.1"])
def test_every_used_name_is_in_tensorrt(version: str) -> None:
    assert {use for use in uses() - RTX_ONLY if not is_recorded(RECORDED[version], *use)} == set()


def is_recorded(recorded: dict[str, list[str]], owner: str, name: str) -> bool:
    if not owner or (owner, name) == ("ILogger", "Severity"):  # the enumeration is defined inside of the class
        return name in recorded
    return name in recorded[owner]


def test_every_used_name_is_in_tensorrt_rtx() -> None:
    rtx = pytest.importorskip("tensorrt_rtx")
    # On the class itself, without an object: none of these needs a GPU.
    missing = {use for use in uses() if not hasattr(getattr(rtx, use[0]) if use[0] else rtx, use[1])}
    assert not missing


def test_names_that_11_removed_would_be_found() -> None:
    assert "device_memory_size" in RECORDED["10.3"]["ICudaEngine"]
    assert "device_memory_size" not in RECORDED["11.1"]["ICudaEngine"]
    assert {"FP16", "INT8"} <= set(RECORDED["10.3"]["BuilderFlag"]) - set(RECORDED["11.1"]["BuilderFlag"])
