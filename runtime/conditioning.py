"""From what the caller gives (prompts, classes, boxes, pictures) to what the UNet takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from latentedge.runtime.autoencoder import encode
from latentedge.runtime.bundle import Array, Bundle, ConcatInput, TextEncoder
from latentedge.runtime.denoiser import Branch
from latentedge.runtime.engines.base import Engine
from latentedge.runtime.errors import UsageError
from latentedge.runtime.images import labels_from, resize_nearest
from latentedge.runtime.layout import read_layouts, tokens_from_layout
from latentedge.runtime.noise import Draws
from latentedge.runtime.request import Request
from latentedge.runtime.tokenizer import PromptTokenizer

#: Aesthetic scores that diffusers gives SDXL's refiner, with the prompt and without.
AESTHETIC_SCORE, NEGATIVE_AESTHETIC_SCORE = 6.0, 2.5
#: Gives the loaded engine of a component.
EngineOf = Callable[[str], Engine]


class Conditioner:
    """Runs the bundle's text, class and picture encoders for one request of ``count`` pictures."""

    def __init__(self, bundle: Bundle, engine_of: EngineOf, request: Request, count: int) -> None:
        self._bundle = bundle
        self._manifest = bundle.manifest
        self._conditioning = bundle.manifest.conditioning
        self._engine_of = engine_of
        self._request = request
        self._count = count

    def conditional(self) -> dict[str, Array]:
        """UNet inputs of the conditional branch, by name."""
        request, kind = self._request, self._conditioning.cross_attention
        if request.encoder_hidden_states is not None:
            return self._given(request.encoder_hidden_states, request.text_embeds, "encoder_hidden_states")
        if kind == "text":
            return self._text(request.prompt, request.prompt_ids)
        if kind == "class":
            return self._classes(request.class_label)
        if kind == "layout":
            return self._layout()
        if kind == "embeddings":
            return {"encoder_hidden_states": self._embeddings()}
        return {}

    def unconditional(self, conditional: dict[str, Array]) -> dict[str, Array]:
        """UNet inputs of the unconditional branch; :class:`UsageError` where the model has none."""
        request, kind = self._request, self._conditioning.unconditional
        if request.negative_encoder_hidden_states is not None:
            return self._given(
                request.negative_encoder_hidden_states, request.negative_text_embeds, "negative_encoder_hidden_states"
            )
        if request.negative_prompt is not None or request.negative_prompt_ids is not None:
            return self._text(request.negative_prompt, request.negative_prompt_ids)
        if kind == "empty_text":
            return self._text("", None)
        if kind == "null_class":
            return self._classes(self._conditioning.null_class)
        if kind == "zeros":
            return {name: np.zeros_like(array) for name, array in conditional.items()}
        raise UsageError(
            "this model has no unconditional input, so guidance_scale must be 1.",
            hint="leave guidance_scale out, or pass negative_encoder_hidden_states",
        )

    def with_sizes(
        self, inputs: dict[str, Array], height: int, width: int, given: Array | None, score: float
    ) -> dict[str, Array]:
        """``inputs`` with the time ids that SDXL takes: original size, crop corner, then target size or, five in all, a score.

        Sizes are in pixels; ``score`` is the refiner's aesthetic score.
        """
        length = self._conditioning.time_ids
        if length is None:
            return inputs
        if given is None and length not in (5, 6):
            raise UsageError(f"this model takes {length} time ids, which cannot be made here.", hint="pass time_ids")
        last = [height, width] if length == 6 else [score]
        ids = np.array([[height, width, 0, 0, *last]], np.float32) if given is None else np.atleast_2d(given)
        return {**inputs, "time_ids": repeated(ids.astype(np.float32), self._count, "time_ids")}

    def branch(self, inputs: dict[str, Array], concat: Array | None) -> Branch:
        """One branch of guidance, with the UNet inputs that are declared and no others."""
        unet = self._bundle.component("unet")
        return Branch({name: array for name, array in inputs.items() if unet.has_input(name)}, concat)

    def _given(self, hidden: Array, pooled: Array | None, name: str) -> dict[str, Array]:
        inputs = {"encoder_hidden_states": self._repeated(np.asarray(hidden), name)}
        if pooled is not None:
            inputs["text_embeds"] = self._repeated(np.asarray(pooled), "text_embeds")
        return inputs

    def _text(self, prompt: str | Sequence[str] | None, ids: Any) -> dict[str, Array]:
        encoders = self._conditioning.encoders
        if not encoders:
            raise UsageError("this bundle has no text encoder.", hint="pass encoder_hidden_states")
        hidden: list[Array] = []
        inputs: dict[str, Array] = {}
        for encoder, tokens in zip(encoders, self._token_ids(encoders, prompt, ids), strict=True):
            outputs = self._engine_of(encoder.component).run({"input_ids": tokens})
            hidden.append(outputs[encoder.output])
            if encoder.pooled_output is not None:
                inputs["text_embeds"] = self._repeated(outputs[encoder.pooled_output], "text_embeds")
        inputs["encoder_hidden_states"] = self._repeated(np.concatenate(hidden, axis=-1), "prompt")
        return inputs

    def _token_ids(self, encoders: Sequence[TextEncoder], prompt: str | Sequence[str] | None, ids: Any) -> list[Array]:
        if ids is not None:
            several = isinstance(ids, (list, tuple, np.ndarray)) and len(ids) > 0 and np.ndim(ids[0]) == 2
            arrays = [np.asarray(item) for item in (ids if several else [ids])]
            if len(arrays) != len(encoders):
                raise UsageError(
                    f"this model has {len(encoders)} text encoders, found {len(arrays)} arrays of token ids.",
                    hint="pass a list with one array [N, length] for each text encoder",
                )
            return [_as_ids(array) for array in arrays]
        prompts = [prompt] if isinstance(prompt, str) else list(prompt or [])
        return [PromptTokenizer(self._bundle, encoder.tokenizer or "tokenizer").encode(prompts) for encoder in encoders]

    def _classes(self, label: int | Sequence[int] | None) -> dict[str, Array]:
        labels = np.atleast_1d(np.asarray(label))
        classes = self._conditioning.classes
        if labels.dtype.kind not in "iu" or labels.ndim != 1:
            raise UsageError(f"class_label must be a class number, found {label!r}.")
        if classes is not None and (labels.min() < 0 or labels.max() >= classes):
            raise UsageError(
                f"class labels go from 0 to {classes - 1}, found {', '.join(map(str, labels))}.",
                hint="a label is the number of a class in the data that the model was trained on, counted from 0",
            )
        if self._bundle.component("unet").has_input("class_labels"):
            return {"class_labels": repeated(labels.astype(np.int64), self._count, "class_label")}
        outputs = self._engine_of("cond_encoder").run({"class_labels": labels.astype(np.int64)})
        return {"encoder_hidden_states": self._repeated(outputs["encoder_hidden_states"], "class_label")}

    def _layout(self) -> dict[str, Array]:
        layout = self._conditioning.layout
        if self._request.prompt_ids is not None:
            tokens = _as_ids(np.asarray(self._request.prompt_ids))
        elif layout is None:
            raise UsageError("this bundle does not say how boxes become tokens.", hint="pass the tokens as prompt_ids")
        else:
            tokens = np.concatenate([tokens_from_layout(one, layout) for one in read_layouts(self._request.layout)])
        encoder = self._conditioning.encoders[0]
        hidden = self._engine_of(encoder.component).run({"input_ids": tokens})[encoder.output]
        return {"encoder_hidden_states": self._repeated(hidden, "layout")}

    def _embeddings(self) -> Array:
        array = given = np.asarray(self._request.embeddings, np.float32)
        array = array[None, None] if array.ndim == 1 else array[:, None] if array.ndim == 2 else array
        width = self._conditioning.embedding_width
        if array.ndim != 3 or array.shape[-1] != width:
            raise UsageError(
                f"embeddings must be [N, k, {width}], [N, {width}] or [{width}], found {list(given.shape)}.",
                hint=f"this model takes the embeddings of a CLIP that gives {width} numbers",
            )
        lengths = np.linalg.norm(array, axis=-1)
        if np.abs(lengths - 1).max() > 1e-2:
            raise UsageError(
                f"embeddings must be of unit length, found {lengths.min():g} to {lengths.max():g}.",
                hint="divide each CLIP embedding by its norm",
            )
        return self._repeated(array, "embeddings")

    def _repeated(self, array: Array, name: str) -> Array:
        return repeated(array.astype(np.float32, copy=False), self._count, name)


def repeated(array: Array, count: int, name: str) -> Array:
    """``array`` with ``count`` rows: as it is, or each of its rows repeated; :class:`UsageError` if it cannot be."""
    if len(array) < 1 or count % len(array):
        raise UsageError(f"{name}: {len(array)} rows do not fit {count} pictures.")
    return np.repeat(array, count // len(array), axis=0)


def _as_ids(array: Array) -> Array:
    if array.ndim != 2 or array.dtype.kind not in "iu":
        raise UsageError(f"token ids must be integers [N, length], found {array.dtype} {list(array.shape)}.")
    if array.size and array.min() < 0:  # which graphs would count from the end of their table
        raise UsageError(f"token ids are counted from 0, found {array.min()}.")
    return array.astype(np.int64)


def concat_input(
    entry: ConcatInput,
    bundle: Bundle,
    engine_of: EngineOf,
    pictures: Array | None,
    mask: Array | None,
    semantic_map: Any,
    latent_size: tuple[int, int],
    draws: Draws,
) -> Array:
    """One conditioning picture, float32 ``[n, entry.channels, h, w]``, as it is appended to the UNet's sample."""
    manifest = bundle.manifest
    if entry.source == "segmentation":
        if manifest.conditioning.labels is None:
            raise UsageError("this bundle does not say how many labels a semantic map has.")
        labels = labels_from(semantic_map, manifest.conditioning.labels)
        one_hot = (labels[:, None] == np.arange(manifest.conditioning.labels)[:, None, None]).astype(np.float32)
        return engine_of("cond_encoder").run({"segmentation": one_hot})["latent_condition"]
    if entry.source == "mask":
        assert mask is not None
        keep, paint = entry.mask_values
        small = resize_nearest(mask, *latent_size)[:, None]
        return np.where(small > 0, np.float32(paint), np.float32(keep)).astype(np.float32)
    assert pictures is not None
    if entry.source == "low_resolution_image":
        return np.ascontiguousarray(pictures.transpose(0, 3, 1, 2) * np.float32(2) - np.float32(1))
    if entry.source == "masked_image_latent":
        assert mask is not None
        hole = np.float32((entry.hole_value + 1) / 2)
        pictures = np.where(mask[..., None] > 0, hole, pictures).astype(np.float32)
    posterior = draws if entry.posterior == "sample" else None
    return encode(engine_of("vae_encoder"), manifest.latent, pictures, posterior, scaled=entry.scaled)
