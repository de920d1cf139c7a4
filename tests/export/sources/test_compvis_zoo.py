"""The published models at full size, without weights: every key list fits, and is understood as its README row says."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("yaml")

from latentedge.export.model import SourceModel, SourceOptions  # noqa: E402
from latentedge.export.sources.checkpoint import Checkpoint  # noqa: E402
from latentedge.export.sources.compvis_config import parse_config  # noqa: E402
from latentedge.export.sources.compvis_model import model_from  # noqa: E402
from latentedge.runtime.errors import LatentEdgeError  # noqa: E402
from tests.export.models.test_zoo_keys import CONFIGS, MODELS, recorded_keys  # noqa: E402

#: task, downscale, latent side, scale factor, averaged weights, U-Net heads at its deepest attention.
ROWS: dict[str, tuple[str, int, int, float, bool, int]] = {
    "celeba256": ("unconditional", 4, 64, 1.0, True, 28),
    "ffhq256": ("unconditional", 4, 64, 1.0, True, 28),
    "lsun_beds256": ("unconditional", 4, 64, 1.0, True, 28),
    "lsun_churches256": ("unconditional", 8, 32, 0.5, True, 8),
    "cin256": ("class-to-image", 8, 32, 1.0, True, 32),
    "cin256-v2": ("class-to-image", 4, 64, 1.0, False, 1),
    "text2img256": ("text-to-image", 4, 64, 1.0, True, 30),
    "txt2img-1p4B": ("text-to-image", 8, 32, 0.18215, False, 8),
    "layout2img-openimages256": ("layout-to-image", 4, 64, 1.0, True, 16),
    "semantic_synthesis256": ("semantic-to-image", 4, 64, 1.0, True, 8),
    "semantic_synthesis512": ("semantic-to-image", 4, 128, 1.0, True, 8),
    "bsr_sr": ("super-resolution", 4, 64, 1.0, True, 20),
    "inpainting_big": ("inpainting", 4, 64, 1.0, True, 8),
    "rdm768": ("embeddings-to-image", 16, 48, 0.22765929, True, 56),
    "sd-v1": ("text-to-image", 8, 64, 0.18215, False, 8),
}


def checkpoint(name: str) -> Checkpoint:
    """A checkpoint of the recorded shapes; only tables and scalars can be read from it."""
    keys = recorded_keys(name)
    params = CONFIGS[name]["model"]["params"]

    def read(names: Iterable[str]) -> dict[str, Any]:
        tensors = {}
        for key in names:
            if key == "alphas_cumprod":
                start, end = params["linear_start"], params["linear_end"]
                betas = np.linspace(start**0.5, end**0.5, 1000) ** 2
                tensors[key] = torch.from_numpy(np.cumprod(1 - betas)).float()
            else:
                assert key == "scale_factor"
                tensors[key] = torch.tensor(0.5)
        return tensors

    shapes = {key: shape for key, (_, shape) in keys.items()}
    dtypes = {key: getattr(torch, dtype) for key, (dtype, _) in keys.items()}
    return Checkpoint(Path(f"{name}.ckpt"), "0" * 64, shapes, dtypes, read)


def read_model(name: str, change: dict[str, Any] | None = None) -> SourceModel:
    config = {"model": {**CONFIGS[name]["model"]}}
    config["model"]["params"] = {**config["model"]["params"], **(change or {})}
    return model_from(checkpoint(name), parse_config(config, f"{name}.yaml"), SourceOptions(), None)


def attention_heads(model: SourceModel) -> int:
    unet = next(component for component in model.components if component.spec.name == "unet")
    assert unet.build is not None
    network = unet.build.__self__.skeleton()  # type: ignore[attr-defined]
    middle = network.middle_block[1]
    heads: int = middle.heads if hasattr(middle, "heads") else middle.transformer_blocks[0].attn1.heads
    return heads


def test_every_model_has_its_row() -> None:
    assert set(MODELS) == {*ROWS, *(name for name in MODELS if name.startswith(("vq-", "kl-")))}


@pytest.mark.parametrize("name", ROWS)
def test_published_model(name: str) -> None:
    task, downscale, side, scale_factor, averaged, heads = ROWS[name]
    model = read_model(name)
    assert model.task == task
    assert (model.latent.downscale, model.latent.scale_factor) == (downscale, pytest.approx(scale_factor))
    assert (model.defaults.height, model.defaults.width) == (downscale * side, downscale * side)
    assert any("averaged U-Net weights are exported" in message for message in model.messages) is averaged
    assert "trained_betas" not in model.schedule
    assert attention_heads(model) == heads


@pytest.mark.parametrize("name", [name for name in MODELS if name.startswith(("vq-", "kl-"))])
def test_published_first_stage(name: str) -> None:
    model = read_model(name)
    assert model.task == "reconstruction"
    assert model.latent.encoding == name[:2]
    assert model.latent.downscale == int(name.split("-")[1].removeprefix("f"))


def test_a_published_configuration_of_another_model() -> None:
    other = CONFIGS["cin256-v2"]["model"]["params"]["unet_config"]
    with pytest.raises(LatentEdgeError, match=r"the weights of celeba256\.ckpt do not fit celeba256\.yaml"):
        read_model("celeba256", {"unet_config": other})
