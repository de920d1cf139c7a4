"""Each family, drawn by the runtime, gives the latents of the original's sampling loop in torch.

Once with the source's networks as engines, which checks how conditions are made, joined and guided; once through ONNX.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("yaml")
pytest.importorskip("onnxruntime")

from latentedge.export.exporter import ExportOptions, export_source  # noqa: E402
from latentedge.export.model import SourceOptions  # noqa: E402
from latentedge.export.models.clip_text import ClipTextConfig  # noqa: E402
from latentedge.export.sources import compvis  # noqa: E402
from latentedge.runtime import Pipeline  # noqa: E402
from tests.export.sources import compvis_models  # noqa: E402

STEPS = 4
TOLERANCE = 1e-3
GUIDANCE = 3.0

#: A model of a noisy latent (with what is concatenated), a timestep and a context.
Denoise = Callable[[Any, Any, Any], Any]


def ddim(denoise: Denoise, noise: Any, alphas: Any, steps: int = STEPS) -> Any:
    """DDIM at eta 0 with CompVis's timesteps: every (1000 // steps)-th, plus one; the last step ends at alphas[0]."""
    timesteps = list(range(1, 1001, 1000 // steps))
    latents = noise
    for index in reversed(range(len(timesteps))):
        now = alphas[timesteps[index]]
        before = alphas[timesteps[index - 1]] if index else alphas[0]
        predicted = denoise(latents, torch.full((len(latents),), float(timesteps[index])), None)
        clean = (latents - (1 - now).sqrt() * predicted) / now.sqrt()
        latents = before.sqrt() * clean + (1 - before).sqrt() * predicted
    return latents


class Drawn:
    """A tiny family: its networks in torch, and its bundle."""

    def __init__(self, family: str, folder: Path, exported: bool) -> None:
        self.model = compvis_models.DIFFUSION[family]
        clip = ClipTextConfig.from_mapping(compvis_models.CLIP_CONFIG)
        self.networks = compvis_models.networks(self.model, clip)
        state = compvis_models.state_dict(self.model, self.networks)
        compvis_models.write(folder / "source", self.model, state)
        (folder / "source" / "clip_text_config.json").write_text(json.dumps(compvis_models.CLIP_CONFIG))
        self.alphas = state["alphas_cumprod"]
        self.scale_factor = float(state.get("scale_factor", self.model["params"].get("scale_factor", 1.0)))
        source = compvis.load(folder / "source", SourceOptions())
        if exported:
            export_source(source, folder / "bundle", ExportOptions())
            self.pipeline = Pipeline.open(folder / "bundle", backend="auto", precision="fp32")
        else:
            self.pipeline = compvis_models.torch_pipeline(source)
        self.unet = self.networks["unet_config"]
        self.first_stage = self.networks["first_stage_config"]
        self.condition = self.networks.get("cond_stage_config")
        rng = np.random.default_rng(5)
        channels = self.model["params"]["channels"]
        self.noise = rng.standard_normal((2, channels, 8, 8), np.float32)
        self.rng = rng

    def compare(self, denoise: Denoise, start: Any = None, **request: Any) -> Any:
        """Draw with the runtime and with the loop above; return the runtime's result."""
        start = self.noise if start is None else start
        expected = ddim(denoise, torch.from_numpy(start), self.alphas)
        result = self.pipeline.generate(latents=start, steps=STEPS, sampler="ddim", eta=0.0, **request)
        assert float(expected.std()) > 0.1
        assert np.abs(result.latents - expected.numpy()).max() < TOLERANCE * max(1.0, float(expected.abs().max()))
        # The picture is decoded from the runtime's own latents: a codebook may turn a last bit into another codeword.
        unscaled = torch.from_numpy(result.latents) / self.scale_factor
        picture = ((self.first_stage.decode(unscaled) + 1) / 2).clamp(0, 1).permute(0, 2, 3, 1)
        if self.pipeline.bundle.task != "inpainting":
            assert np.abs(result.array - picture.numpy()).mean() < 1e-4
        return result

    def guided(self, conditional: Any, unconditional: Any) -> Denoise:
        def denoise(x: Any, t: Any, _: Any) -> Any:
            without, with_it = self.unet(x, t, unconditional), self.unet(x, t, conditional)
            return without + GUIDANCE * (with_it - without)

        return denoise

    def concatenated(self, condition: Any) -> Denoise:
        return lambda x, t, _: self.unet(torch.cat([x, condition], dim=1), t, None)


def unconditional(drawn: Drawn) -> None:
    drawn.compare(drawn.unet)


def class_alone(drawn: Drawn) -> None:
    context = drawn.condition(torch.tensor([7, 700]))
    drawn.compare(lambda x, t, _: drawn.unet(x, t, context), class_label=[7, 700])


def class_guided(drawn: Drawn) -> None:
    denoise = drawn.guided(drawn.condition(torch.tensor([7, 700])), drawn.condition(torch.tensor([1000, 1000])))
    drawn.compare(denoise, class_label=[7, 700], guidance_scale=GUIDANCE)


def class_in_unet(drawn: Drawn) -> None:
    def denoise(x: Any, t: Any, _: Any) -> Any:
        without = drawn.unet(x, t, None, torch.tensor([10, 10]))
        return without + GUIDANCE * (drawn.unet(x, t, None, torch.tensor([7, 2])) - without)

    drawn.compare(denoise, class_label=[7, 2], guidance_scale=GUIDANCE)
    drawn.compare(lambda x, t, _: drawn.unet(x, t, None, torch.tensor([3, 3])), class_label=3, guidance_scale=1.0)


def text(drawn: Drawn) -> None:
    ids = drawn.rng.integers(0, 64, (2, 77))
    empty = np.zeros((2, 77), np.int64)
    denoise = drawn.guided(drawn.condition(torch.from_numpy(ids)), drawn.condition(torch.from_numpy(empty)))
    drawn.compare(denoise, prompt_ids=ids, negative_prompt_ids=empty, guidance_scale=GUIDANCE)


def layout(drawn: Drawn) -> None:
    objects = [{"category": 3, "box": [0.0, 0.25, 0.5, 1.0]}, {"category": 40, "box": [0.5, 0.0, 1.0, 0.5]}]
    # 90 sections a side: round(y * 89) * 90 + round(x * 89), halves to even.
    first = [3, 22 * 90 + 0, 89 * 90 + 44]
    second = [40, 0 * 90 + 44, 44 * 90 + 89]
    tokens = torch.tensor([[*first, *second, *[8191] * 84, 0, 8099]])
    context = drawn.condition(tokens).expand(2, -1, -1)
    drawn.compare(lambda x, t, _: drawn.unet(x, t, context), layout=objects, batch_size=2)


def semantic(drawn: Drawn) -> None:
    labels = drawn.rng.integers(0, 7, (2, 32, 32))
    one_hot = torch.nn.functional.one_hot(torch.from_numpy(labels), 7).permute(0, 3, 1, 2).float()
    halved = torch.nn.functional.interpolate(one_hot, scale_factor=0.5, mode="bilinear")
    halved = torch.nn.functional.interpolate(halved, scale_factor=0.5, mode="bilinear")
    drawn.compare(drawn.concatenated(drawn.condition.channel_mapper(halved)), semantic_map=labels)


def super_resolution(drawn: Drawn) -> None:
    for height, width in ((8, 8), (12, 10)):
        small = drawn.rng.integers(0, 256, (2, height, width, 3), np.uint8)
        condition = torch.from_numpy(small).permute(0, 3, 1, 2).float() / 255 * 2 - 1
        noise = drawn.rng.standard_normal((2, 3, height, width), np.float32)
        result = drawn.compare(drawn.concatenated(condition), noise, image=small)
        assert result.array.shape == (2, 4 * height, 4 * width, 3)


def inpainting(drawn: Drawn) -> None:
    picture = drawn.rng.integers(0, 256, (2, 32, 32, 3), np.uint8)
    mask = np.zeros((2, 32, 32), np.float32)
    mask[:, 6:20, 9:30] = 1
    image = torch.from_numpy(picture).permute(0, 3, 1, 2).float() / 255
    hole = torch.from_numpy(mask)[:, None]
    masked = drawn.first_stage.encoded((1 - hole) * image * 2 - 1)
    condition = torch.cat([masked, torch.nn.functional.interpolate(hole * 2 - 1, size=(8, 8))], dim=1)
    result = drawn.compare(drawn.concatenated(condition), image=picture, mask=mask)
    predicted = drawn.first_stage.decode(torch.from_numpy(result.latents))
    expected = (1 - hole) * image + hole * ((predicted + 1) / 2).clamp(0, 1)
    assert np.abs(result.array - expected.permute(0, 2, 3, 1).numpy()).mean() < 1e-4
    # The original takes the kept picture to -1..1 and back before it truncates, which moves some values by one.
    kept = ((image * 2 - 1 + 1) / 2 * 255).permute(0, 2, 3, 1).to(torch.uint8).numpy()
    drawn_bytes = np.stack([np.asarray(one) for one in result.images])
    assert (drawn_bytes[mask == 0] == kept[mask == 0]).all()
    assert (kept != picture).any()


def inpainting_text(drawn: Drawn) -> None:
    picture = drawn.rng.integers(0, 256, (2, 64, 64, 3), np.uint8)
    mask = np.zeros((2, 64, 64), np.float32)
    mask[:, 6:40, 9:50] = 1
    hole = torch.from_numpy(mask)[:, None]
    ids, empty = drawn.rng.integers(0, 64, (2, 77)), np.zeros((2, 77), np.int64)
    noise = drawn.rng.standard_normal((1, 2, 4, 8, 8), np.float32)
    masked = (torch.from_numpy(picture).permute(0, 3, 1, 2).float() / 127.5 - 1) * (1 - hole)
    posterior = drawn.first_stage.encode(masked)
    encoded = drawn.scale_factor * (posterior.mean + posterior.std * torch.from_numpy(noise[0]))
    condition = torch.cat([torch.nn.functional.interpolate(hole, size=(8, 8)), encoded], dim=1)
    guided = drawn.guided(drawn.condition(torch.from_numpy(ids)), drawn.condition(torch.from_numpy(empty)))
    words = {"prompt_ids": ids, "negative_prompt_ids": empty, "guidance_scale": GUIDANCE}

    def denoise(x: Any, t: Any, _: Any) -> Any:
        return guided(torch.cat([x, condition], dim=1), t, None)

    result = drawn.compare(denoise, image=picture, mask=mask, noise=noise, **words)
    # Inpainting by text gives the whole picture as it was decoded; nothing of the original is put back.
    decoded = drawn.first_stage.decode(torch.from_numpy(result.latents) / drawn.scale_factor)
    assert np.abs(result.array - ((decoded + 1) / 2).clamp(0, 1).permute(0, 2, 3, 1).numpy()).max() < 1e-3


def retrieval(drawn: Drawn) -> None:
    embeddings = drawn.rng.standard_normal((2, 3, 16), np.float32)
    embeddings /= np.linalg.norm(embeddings, axis=-1, keepdims=True)
    context = torch.from_numpy(embeddings)
    drawn.compare(drawn.guided(context, torch.zeros_like(context)), embeddings=embeddings, guidance_scale=GUIDANCE)


CASES: dict[str, Callable[[Drawn], None]] = {
    "unconditional-vq": unconditional,
    "unconditional-kl": unconditional,
    "class": class_alone,
    "class-null": class_guided,
    "class-in-unet": class_in_unet,
    "text-bert": text,
    "layout": layout,
    "semantic": semantic,
    "super-resolution": super_resolution,
    "inpainting": inpainting,
    "inpainting-text": inpainting_text,
    "retrieval": retrieval,
    "stable-diffusion": text,
}


def test_every_family_is_drawn() -> None:
    assert set(CASES) == set(compvis_models.DIFFUSION)


@pytest.mark.parametrize("family", CASES)
@torch.no_grad()
def test_conditions_are_those_of_the_original(family: str, tmp_path: Path) -> None:
    CASES[family](Drawn(family, tmp_path, exported=False))


@pytest.mark.slow
@pytest.mark.parametrize("family", CASES)
@torch.no_grad()
def test_drawn_like_the_original(family: str, tmp_path: Path) -> None:
    CASES[family](Drawn(family, tmp_path, exported=True))
