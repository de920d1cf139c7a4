"""TensorRT-RTX compiles the graphs of tiny models of every kind, in every precision, for three generations of GPUs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("tensorrt_rtx")
pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from latentedge.export.builders import BuildRequest, Range
from latentedge.export.exporter import ExportOptions, export_source
from latentedge.export.model import SourceOptions
from latentedge.export.sources import load_source
from latentedge.export.tensorrt.builder import CHECKED_CAPABILITIES, build
from latentedge.runtime.bundle import Bundle
from tests.export.sources import diffusers_models
from tests.export.tensorrt.quantised import with_int8
from tests.export.tiny import tiny_model

DEFAULT_MODEL = Path(__file__).parents[3] / "examples/emoji"
#: The default model, Stable Diffusion 1.5, SDXL, inpainting with nine channels, and an LDM with a codebook.
FAMILIES = ("emoji", "sd", "sdxl", "inpaint9", "ldm-uncond")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Bundle]:
    """The bundle of a family in FP32, FP16 and INT8, exported once."""

    @functools.cache
    def export(family: str) -> Bundle:
        folder = tmp_path_factory.mktemp(family)
        source = DEFAULT_MODEL
        if family != DEFAULT_MODEL.name:
            source = folder / "source"
            diffusers_models.save(family, source)
        model = load_source(str(source), SourceOptions())
        bundle = export_source(model, folder / "tiny.bundle", ExportOptions(("fp32", "fp16")))
        return with_int8(bundle, folder / "capture")

    return export


def test_a_denoiser_and_a_decoder_compile(tmp_path: Path) -> None:
    bundle = export_source(tiny_model(), tmp_path / "tiny.bundle", ExportOptions(("fp32", "fp16")))
    rows = build(BuildRequest(bundle, "tensorrt-rtx", check=True, notify=lambda message: None))
    assert [(row.component, row.precision, row.errors) for row in rows] == [
        (component, precision, ()) for precision in ("fp32", "fp16") for component in ("unet", "vae_decoder")
    ]


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_compiles(family: str, exported: Callable[[str], Bundle]) -> None:
    bundle = exported(family)
    rows = build(BuildRequest(bundle, "tensorrt-rtx", check=True, notify=lambda message: None))
    assert {row.target for row in rows} == {", ".join(CHECKED_CAPABILITIES)}
    assert [(row.component, row.precision, row.errors) for row in rows if row.errors] == []
    compiled = {(row.component, row.precision) for row in rows}
    assert compiled >= {("unet", "fp32"), ("unet", "fp16"), ("unet", "int8"), ("vae_decoder", "fp16")}
    sizes = {row.precision: row.weight_memory or 0 for row in rows if row.component == "unet"}
    assert sizes["int8"] < sizes["fp32"]
    assert sizes["fp16"] < 0.6 * sizes["fp32"]


@pytest.mark.slow
def test_ranges_of_batch_and_size_compile(exported: Callable[[str], Bundle]) -> None:
    bundle = exported("ldm-uncond")
    side = bundle.manifest.defaults.height
    size = Range(side, 2 * side)
    request = BuildRequest(
        bundle, "tensorrt-rtx", ("fp16",), check=True, batch=Range(1, 4), size=(size, size), notify=lambda message: None
    )
    rows = build(request)
    assert {row.component for row in rows} == {"unet", "vae_encoder", "vae_decoder"}
    assert [row.errors for row in rows if row.errors] == []
