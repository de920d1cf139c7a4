"""What is drawn for calibration and for quality: real conditioning of the kind that the bundle's model takes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from latentedge.calibration.graph import ancestors, load_graph
from latentedge.runtime.bundle import Array, Bundle
from latentedge.runtime.errors import UsageError

#: General captions for models that bring none.
CAPTIONS = Path(__file__).with_name("captions.json")
#: Seeds of calibration start at 0, those of the held-out pictures here.
HELD_OUT_SEED = 1_000_000


def read_prompts(path: Path) -> list[str]:
    """Prompts of a text file, one a line; empty lines are left out."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"the prompts {path} cannot be read: {error}.") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UsageError(f"{path} holds no prompts.")
    return prompts


def captions(bundle: Bundle, *, held_out: bool) -> list[str]:
    """The bundle's own captions, or general ones; calibration and held-out captions are disjoint."""
    recorded = bundle.manifest.calibration
    own, apart = recorded.get("prompts"), recorded.get("held_out_prompts")
    if own and apart:
        return [str(text) for text in (apart if held_out else own)]
    prompts = [str(text) for text in own] if own else json.loads(CAPTIONS.read_text(encoding="utf-8"))
    return list(prompts[1::2] if held_out else prompts[0::2])


def requests(
    bundle: Bundle, count: int, steps: int | None, prompts: Sequence[str] | None = None, *, held_out: bool = False
) -> list[dict[str, Any]]:
    """Arguments of ``Pipeline.generate`` for ``count`` pictures, the same at every call.

    ``held_out`` gives pictures that calibration never sees. :class:`UsageError` for a bundle without a denoiser.
    """
    manifest = bundle.manifest
    if "unet" not in manifest.components:
        raise UsageError(
            f"{bundle.path} has no denoiser; its task is {manifest.task}.",
            hint="calibrate a bundle with a denoiser; an autoencoder alone runs in fp32, fp16 or bf16",
        )
    texts = list(prompts) if prompts else captions(bundle, held_out=held_out)
    made = []
    for index in range(count):
        seed = index + (HELD_OUT_SEED if held_out else 0)
        generator = np.random.default_rng(seed)
        request: dict[str, Any] = {"seed": seed, **_steering(bundle, texts[index % len(texts)], index, generator)}
        request.update(_pictures(bundle, generator))
        if steps is not None:
            request["steps"] = steps
        made.append(request)
    return made


def _steering(bundle: Bundle, text: str, index: int, generator: np.random.Generator) -> dict[str, Any]:
    """Prompt, class, boxes or embeddings."""
    conditioning = bundle.manifest.conditioning
    kind = conditioning.cross_attention
    if kind == "text":
        if all(encoder.tokenizer is not None for encoder in conditioning.encoders) and conditioning.encoders:
            return {"prompt": text}
        # The unconditional branch of a guided model needs ids as well.
        return {
            name: [_random_ids(bundle, encoder.component, generator) for encoder in conditioning.encoders]
            for name in ("prompt_ids", "negative_prompt_ids")
        }
    if kind == "class":
        return {"class_label": int(generator.integers(conditioning.classes or 1))}
    if kind == "layout":
        if conditioning.layout is None:
            return {"prompt_ids": _random_ids(bundle, conditioning.encoders[0].component, generator)}
        return {"layout": _boxes(conditioning.layout.max_objects, conditioning.layout.classes or 1, generator)}
    if kind == "embeddings":
        vector = generator.standard_normal(conditioning.embedding_width or 1)
        return {"embeddings": (vector / np.linalg.norm(vector)).astype(np.float32)}
    return {}


def _random_ids(bundle: Bundle, component: str, generator: np.random.Generator) -> Array:
    """Token ids of a text encoder without a tokenizer, drawn from its whole vocabulary, int64 [1, length]."""
    spec = bundle.component(component)
    length = spec.input("input_ids").shape[1]
    if not isinstance(length, int):
        length = spec.axes[length].opt
    return generator.integers(0, vocabulary(bundle, component), (1, length), dtype=np.int64)


def vocabulary(bundle: Bundle, component: str) -> int:
    """Number of tokens that a text encoder's embedding table holds."""
    path, _ = bundle.variant(component, "fp32")
    for node in load_graph(path).graph:
        table = node.inputs[0].const_value if node.op_type == "Gather" and node.inputs[0] is not None else None
        if table is not None and len(table.shape) == 2 and "input_ids" in ancestors([node.inputs[1]]):
            return int(table.shape.numpy()[0])
    raise UsageError(f"{component} has neither a tokenizer nor an embedding table.", hint="pass --prompts")


def _boxes(most: int, classes: int, generator: np.random.Generator) -> list[dict[str, Any]]:
    boxes = []
    for _ in range(int(generator.integers(1, most + 1))):
        corners = np.sort(generator.random((2, 2)), axis=0)
        boxes.append({"category": int(generator.integers(classes)), "box": [float(v) for v in corners.reshape(-1)]})
    return boxes


def _pictures(bundle: Bundle, generator: np.random.Generator) -> dict[str, Any]:
    """Picture, mask and semantic map, for the tasks that take them."""
    manifest = bundle.manifest
    sources = {entry.source for entry in manifest.conditioning.concat}
    height, width = manifest.defaults.height, manifest.defaults.width
    made: dict[str, Any] = {}
    if "low_resolution_image" in sources:
        factor = manifest.conditioning.upscale or manifest.latent.downscale
        made["image"] = picture(height // factor, width // factor, generator)
    elif sources & {"masked_image_latent", "image_latent"}:
        made["image"] = picture(height, width, generator)
    if sources & {"mask", "masked_image_latent"}:
        made["mask"] = _mask(height, width, generator)
    if "segmentation" in sources:
        made["semantic_map"] = _labels(height, width, manifest.conditioning.labels or 1, generator)
    return made


def picture(height: int, width: int, generator: np.random.Generator) -> Array:
    """A picture with structure at every size, float32 [1, H, W, 3] in 0..1: random fields of falling amplitude."""
    total = np.full((height, width, 3), 0.5, np.float32)
    cells, amplitude = 2, 0.25
    while cells <= max(height, width) // 2:
        for channel in range(3):
            field = generator.standard_normal((cells, cells)).astype(np.float32) * amplitude
            total[..., channel] += np.asarray(Image.fromarray(field).resize((width, height), Image.Resampling.BICUBIC))
        cells, amplitude = cells * 2, amplitude * 0.6
    return np.clip(total, 0, 1)[None]


def _mask(height: int, width: int, generator: np.random.Generator) -> Array:
    mask = np.zeros((1, height, width), np.float32)
    top, left = int(generator.integers(height // 2)), int(generator.integers(width // 2))
    mask[:, top : top + height // 2, left : left + width // 2] = 1
    return mask


def _labels(height: int, width: int, labels: int, generator: np.random.Generator) -> Array:
    """A map of large patches, int64 [1, H, W]."""
    patches = Image.fromarray(generator.integers(0, labels, (6, 6)).astype(np.int32))
    return np.asarray(patches.resize((width, height), Image.Resampling.NEAREST)).astype(np.int64)[None]
