"""Step caching with a backend that compiles plans: TensorRT-RTX compiles the parts, and the runtime finds each."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("tensorrt_rtx")

import tensorrt_rtx as rtx

from latentedge.export.builders import BuildRequest
from latentedge.export.exporter import ExportOptions, export_source
from latentedge.export.tensorrt.builder import build
from latentedge.runtime.bundle import Bundle
from latentedge.runtime.engines.plans import Target, this_platform, usable_plans
from latentedge.runtime.errors import UsageError
from tests.export.tiny import UNET, TinyDenoiser, component, tiny_model

#: What is opened beside the whole denoiser: parts before the step in fp32, the two steps in the precision.
OPENED = {"unet.conditioning": "fp32", "unet.timestep": "fp32", "unet.full": "fp16", "unet.shallow": "fp16"}


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    path = tmp_path / "tiny.bundle"
    export_source(tiny_model(component(UNET, TinyDenoiser)), path, ExportOptions(precisions=("fp32", "fp16")))
    return Bundle.open(path)


def request(bundle: Bundle, *, check: bool = False) -> BuildRequest:
    return BuildRequest(
        bundle, "tensorrt-rtx", ("fp16",), check, compute_capabilities=("8.9",), step_caching=True,
        notify=lambda message: None,
    )  # fmt: skip


def test_the_parts_are_compiled_and_found(bundle: Bundle) -> None:
    rows = build(request(bundle))
    assert {row.component: row.precision for row in rows} == {"unet": "fp16", **OPENED}
    assert not [row.errors for row in rows if row.errors]
    opened = Bundle.open(bundle.path)
    target = Target("tensorrt-rtx", rtx.__version__, "8.9", this_platform())
    for name, precision in OPENED.items():
        assert usable_plans(opened, opened.component(name), precision, target, None)


def test_a_check_compiles_what_is_cut_and_writes_nothing(bundle: Bundle) -> None:
    before = (bundle.path / "latentedge.json").read_bytes()
    with pytest.raises(UsageError, match="has no graphs for step caching, and --check writes none"):
        build(request(bundle, check=True))
    assert (bundle.path / "latentedge.json").read_bytes() == before
    build(request(bundle))
    written = (bundle.path / "latentedge.json").read_bytes()
    rows = build(request(Bundle.open(bundle.path), check=True))
    assert set(OPENED) < {row.component for row in rows}
    assert (bundle.path / "latentedge.json").read_bytes() == written
