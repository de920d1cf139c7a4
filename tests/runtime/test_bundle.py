"""The manifest: what is read is what was written, and damage is named."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from latentedge.runtime.bundle import (
    Axis,
    Bundle,
    Component,
    ConcatInput,
    Conditioning,
    Defaults,
    Latent,
    Layout,
    Manifest,
    Source,
    TensorSpec,
    TextEncoder,
    TokenizerFile,
    Variant,
    contained_path,
    file_sha256,
    split_dimension,
)
from latentedge.runtime.errors import BundleError, UsageError

UNET = Component(
    "unet",
    (
        TensorSpec("sample", "float32", ("batch", 4, "latent_height", "latent_width")),
        TensorSpec("timestep", "float32", ("batch",)),
    ),
    (TensorSpec("out_sample", "float32", ("batch", 4, "latent_height", "latent_width")),),
    {"batch": Axis(1, 2, 8), "latent_height": Axis(8, 32, 64, 8), "latent_width": Axis(8, 32, 64, 8)},
    {"fp32": Variant("unet/model.onnx", "0" * 64, 3, measured=({"kind": "parity", "psnr_db": 120.5},))},
)
MANIFEST = Manifest(
    family="ldm",
    task="text-to-image",
    source=Source("compvis", {"model.ckpt": "1" * 64}),
    created_with={"latentedge": "0.1.0"},
    latent=Latent(4, 8, 0.18215, preview=((0.1, 0.2, 0.3), (0.5, 0.5, 0.5))),
    conditioning=Conditioning(
        "layout",
        (TextEncoder("text_encoder", None),),
        (ConcatInput("mask", 1, mask_values=(-1.0, 1.0)),),
        layout=Layout(92, 30, 8192, 8191, True),
    ),
    schedule={"_class_name": "DDIMScheduler", "dialect": "compvis"},
    defaults=Defaults(256, 256, "ddim"),
    components={"unet": UNET},
    tokenizers={"tokenizer": TokenizerFile("tokenizer/tokenizer.json", "2" * 64, 77, {"a cat": (1, 2)})},
)


def write(folder: Path, data: object) -> Path:
    (folder / "latentedge.json").write_text(json.dumps(data))
    return folder


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    assert Bundle.open(write(tmp_path, MANIFEST.to_json())).manifest == MANIFEST


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "version 2; this runtime reads version 1"),
        ({"format": "other"}, "not a latentedge-bundle"),
        ({"task": 3}, "task is int, expected str"),
        ({"surprise": 1}, "unknown fields: surprise"),
        ({"latent": {"channels": 4}}, "latent is incomplete.*downscale"),
        ({"latent": {"channels": True, "downscale": 8}}, "latent.channels is bool, expected int"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path: Path, change: dict[str, object], message: str) -> None:
    with pytest.raises(BundleError, match=message):
        Bundle.open(write(tmp_path, {**MANIFEST.to_json(), **change}))


def test_damage_and_absence_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="is not a bundle"):
        Bundle.open(tmp_path)
    (tmp_path / "latentedge.json").write_bytes(b"\xff{")
    with pytest.raises(BundleError, match="is damaged"):
        Bundle.open(tmp_path)


@pytest.mark.parametrize("path", ["/etc/passwd", "../x", "a/../../x", "a\\..\\x"])
def test_paths_stay_inside(tmp_path: Path, path: str) -> None:
    with pytest.raises(BundleError, match="outside"):
        contained_path(path)
    variant = dataclasses.replace(UNET.variants["fp32"], path=path)
    component = dataclasses.replace(UNET, variants={"fp32": variant})
    data = dataclasses.replace(MANIFEST, components={"unet": component}).to_json()
    with pytest.raises(BundleError, match="outside"):
        Bundle.open(write(tmp_path, data))


def test_axes_are_solved_and_checked() -> None:
    good = {"sample": np.zeros((2, 4, 8, 16), np.float32), "timestep": np.zeros(2, np.float32)}
    assert UNET.axes_of(good) == {"batch": 2, "latent_height": 8, "latent_width": 16}
    for name, array, message in (
        ("timestep", np.zeros(3, np.float32), "found \\[3\\]"),
        ("timestep", np.zeros(2, np.int64), "expected float32, found int64"),
        ("sample", np.zeros((2, 3, 8, 8), np.float32), "found \\[2, 3, 8, 8\\]"),
        ("sample", np.zeros((2, 4, 8), np.float32), "found \\[2, 4, 8\\]"),
    ):
        with pytest.raises(UsageError, match=message):
            UNET.axes_of({**good, name: array})
    with pytest.raises(UsageError, match="missing \\['timestep'\\], unknown \\['time'\\]"):
        UNET.axes_of({"sample": good["sample"], "time": good["timestep"]})


def test_dimensions() -> None:
    assert split_dimension("8*latent_height") == (8, "latent_height")
    assert split_dimension("batch") == (1, "batch")
    for wrong in ("8*", "latent-height", "2*3", ""):
        with pytest.raises(BundleError, match="no dimension"):
            split_dimension(wrong)


def test_an_absent_precision_lists_those_that_are_there(tmp_path: Path) -> None:
    bundle = Bundle.open(write(tmp_path, MANIFEST.to_json()))
    with pytest.raises(UsageError, match="not in this bundle in int8; it is there in: fp32"):
        bundle.variant("unet", "int8")
    with pytest.raises(BundleError, match="missing from the bundle"):
        bundle.variant("unet", "fp32")


def test_a_flipped_byte_is_found_before_a_graph_runs(tmp_path: Path) -> None:
    (tmp_path / "unet").mkdir()
    graph = tmp_path / "unet" / "model.onnx"
    graph.write_bytes(b"graph")
    weights = tmp_path / "unet" / "model.onnx.data"
    weights.write_bytes(b"weights")
    known = {"unet/model.onnx.data": file_sha256(weights)}
    variant = dataclasses.replace(UNET.variants["fp32"], sha256=file_sha256(graph), size=12, external_data=known)
    part = dataclasses.replace(UNET, name="unet.step", variants={"fp32": variant})
    manifest = dataclasses.replace(MANIFEST, components={"unet.step": part})
    bundle = Bundle.open(write(tmp_path, manifest.to_json()))
    bundle.check_graphs("unet", "bf16")
    graph.write_bytes(b"grapi")
    bundle.check_graphs("vae_decoder", "fp32")
    with pytest.raises(BundleError, match="is damaged: its SHA-256"):
        bundle.check_graphs("unet", "bf16")
    graph.write_bytes(b"graph")
    weights.write_bytes(b"weigh")
    with pytest.raises(BundleError, match="holds 10 bytes, the manifest says 12"):
        bundle.check_graphs("unet", "bf16")
