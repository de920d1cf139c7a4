import dataclasses
from pathlib import Path

import pytest

from latentedge.export.build_commands import parse_size
from latentedge.export.builders import BuildRequest, Range
from latentedge.export.tensorrt.profiles import engine_axes
from latentedge.runtime.bundle import Axis, Bundle, Component, Defaults, TensorSpec
from latentedge.runtime.errors import UsageError
from latentedge.runtime.tradeoffs import parse_bytes
from tests.tiny_bundles import manifest_of

AXES = {"batch": Axis(1, 2, 16), "latent_height": Axis(8, 64, 128, 8), "latent_width": Axis(8, 64, 128, 8)}
UNET = Component("unet", (TensorSpec("sample", "float32", ("batch", 4, *list(AXES)[1:])),), (), AXES)
DECODER = dataclasses.replace(UNET, name="vae_decoder", axes={**AXES, "batch": Axis(1, 1, 8)})


def request(task: str = "text-to-image", **settings: object) -> BuildRequest:
    manifest = manifest_of(UNET, task=task, defaults=Defaults(512, 512))
    return BuildRequest(Bundle(Path("x.bundle"), manifest), "tensorrt", **settings)


def ends(axis: Axis) -> tuple[int, int, int]:
    return axis.min, axis.opt, axis.max


@pytest.mark.parametrize(
    ("settings", "batch", "height", "width"),
    [
        ({}, (2, 2, 2), (64, 64, 64), (64, 64, 64)),
        ({"low_memory": True}, (1, 1, 1), (64, 64, 64), (64, 64, 64)),
        ({"batch": Range(3, 3)}, (6, 6, 6), (64, 64, 64), (64, 64, 64)),
        ({"batch": Range(1, 4)}, (1, 2, 8), (64, 64, 64), (64, 64, 64)),
        ({"size": (Range(256, 768), Range(256, 768))}, (2, 2, 2), (32, 64, 96), (32, 64, 96)),
        ({"size": (Range(768, 1024), Range(128, 256))}, (2, 2, 2), (96, 96, 128), (16, 32, 32)),
    ],
)
def test_a_denoisers_profile(settings: dict[str, object], batch: object, height: object, width: object) -> None:
    axes = engine_axes(request(**settings), UNET)
    assert (ends(axes["batch"]), ends(axes["latent_height"]), ends(axes["latent_width"])) == (batch, height, width)


def test_only_the_denoiser_evaluates_the_branches_of_guidance() -> None:
    encoder = dataclasses.replace(UNET, name="text_encoder", axes=AXES)
    assert ends(engine_axes(request(), encoder)["batch"]) == (1, 1, 2)
    assert ends(engine_axes(request(), DECODER)["batch"]) == (1, 1, 1)
    assert ends(engine_axes(request(batch=Range(2, 3)), DECODER)["batch"]) == (2, 2, 3)


def test_a_super_resolution_models_size_is_its_low_resolution_pictures() -> None:
    axes = engine_axes(request("super-resolution", size=(Range(64, 128), Range(64, 128))), UNET)
    assert ends(axes["latent_height"]) == (64, 64, 128)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"size": (Range(500, 500), Range(512, 512))}, "multiples of 64, found 500..500"),
        ({"size": (Range(512, 2048), Range(512, 512))}, r"exported for latent_height 8\.\.128, asked for: 64\.\.256"),
        ({"batch": Range(1, 9)}, r"exported for batch 1\.\.16, asked for: 1\.\.18"),
    ],
)
def test_what_the_network_was_not_exported_for_is_an_error(settings: dict[str, object], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        engine_axes(request(**settings), UNET)


@pytest.mark.parametrize("text", ["", "0", "4..1", "1..", "..4", "a", "1...4", "-1", "1.5"])
def test_a_range_that_cannot_be_read_is_an_error(text: str) -> None:
    with pytest.raises(UsageError, match="expected a length such as 2"):
        Range.parse(text)


def test_ranges_are_read() -> None:
    assert Range.parse("2") == Range(2, 2)
    assert Range.parse("256..768") == Range(256, 768)


@pytest.mark.parametrize(
    ("text", "height", "width"),
    [
        ("512", Range(512, 512), Range(512, 512)),
        ("768x512", Range(512, 512), Range(768, 768)),
        ("256..768", Range(256, 768), Range(256, 768)),
        ("256..768x512", Range(512, 512), Range(256, 768)),
    ],
)
def test_a_size_is_width_times_height_as_for_generate(text: str, height: Range, width: Range) -> None:
    assert parse_size(text) == (height, width)


@pytest.mark.parametrize(("text", "size"), [("1GiB", 2**30), ("1.5 GiB", 3 * 2**29), ("512MiB", 2**29), ("7", 7)])
def test_sizes_in_bytes_are_read(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["1GB", "0", "-1GiB", "much", ""])
def test_sizes_in_bytes_that_cannot_be_read_are_errors(text: str) -> None:
    with pytest.raises(UsageError, match="expected a size such as 1GiB"):
        parse_bytes(text)
