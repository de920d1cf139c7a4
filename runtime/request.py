"""What a caller asks of ``generate``, checked against the bundle before anything is computed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

from latentedge.runtime.bundle import Array, Manifest
from latentedge.runtime.errors import UsageError
from latentedge.runtime.images import Picture

#: Smaller tiles would not overlap.
SMALLEST_TILE = 4


@dataclass(frozen=True)
class Request:
    """The arguments of ``Pipeline.generate``; their meaning is described there. ``None``: the bundle's default."""

    prompt: str | Sequence[str] | None = None
    negative_prompt: str | Sequence[str] | None = None
    seed: int | Sequence[int] | None = None
    batch_size: int | None = None
    height: int | None = None
    width: int | None = None
    steps: int | None = None
    sampler: str | None = None
    eta: float | None = None
    guidance_scale: float | None = None
    guidance_rescale: float = 0.0
    guidance_interval: tuple[float, float] | None = None
    guidance_every: int | Sequence[int] = 1
    image_guidance_scale: float | None = None
    image: Picture = None
    mask: Picture = None
    strength: float | None = None
    class_label: int | Sequence[int] | None = None
    layout: Any = None
    semantic_map: Any = None
    embeddings: Array | None = None
    schedule: dict[str, Any] | None = None
    rng: str = "torch"
    tile: int | None = None
    callback: Callable[[Any], object] | None = None
    latents: Array | None = None
    noise: Array | None = None
    prompt_ids: Any = None
    negative_prompt_ids: Any = None
    encoder_hidden_states: Array | None = None
    negative_encoder_hidden_states: Array | None = None
    text_embeds: Array | None = None
    negative_text_embeds: Array | None = None
    time_ids: Array | None = None
    negative_time_ids: Array | None = None
    start: Any = None

    @classmethod
    def of(cls, prompt: str | Sequence[str] | None, options: dict[str, Any]) -> Request:
        """A request from keyword arguments; :class:`UsageError` lists the names where one is unknown."""
        known = [entry.name for entry in fields(cls)]
        unknown = [name for name in options if name not in known]
        if unknown:
            raise UsageError(f"generate has no argument {', '.join(unknown)}; it takes: {', '.join(known)}.")
        return cls(prompt, **options)

    def check(self, manifest: Manifest) -> None:
        """:class:`UsageError` where a value is out of range or does not fit the bundle's task."""
        if self.steps is not None and self.steps < 1:
            raise UsageError(
                f"steps must be at least 1, found {self.steps}.", f"this bundle's default is {manifest.defaults.steps}"
            )
        if self.batch_size is not None and self.batch_size < 1:
            raise UsageError(f"batch_size must be at least 1, found {self.batch_size}.")
        every = self.guidance_every
        if every < 1 if isinstance(every, int) else not every or min(every) < 0:
            raise UsageError(
                f"guidance_every is a number from 1 on, or a list of evaluations counted from 0; found {every!r}."
            )
        if self.strength is not None and not 0 <= self.strength <= 1:
            raise UsageError(
                f"strength goes from 0 to 1, found {self.strength:g}.", "0 keeps the picture, 1 draws it anew"
            )
        if self.tile is not None and (self.tile < 0 or 0 < self.tile < SMALLEST_TILE):
            raise UsageError(
                f"tile is a side of at least {SMALLEST_TILE} latent pixels, or 0 for none; found {self.tile}."
            )
        if self.mask is not None and self.image is None:
            raise UsageError("a mask needs the image that it belongs to.")
        if self.strength is not None and self.image is None:
            raise UsageError("strength needs an image to start from.")
        for name in _NEEDED_BY_TASK.get(manifest.task, ()):
            if all(getattr(self, choice) is None for choice in name.split("|")):
                raise UsageError(
                    f"this bundle's task is {manifest.task}, which needs {name.replace('|', ' or ')}.",
                    hint=f"on the command line: {_OPTIONS[name.split('|')[0]]}",
                )
        self._check_allowed(manifest)

    def _check_allowed(self, manifest: Manifest) -> None:
        kind = manifest.conditioning.cross_attention
        allowed = {
            "prompt": kind == "text",
            "negative_prompt": kind == "text",
            "class_label": kind == "class",
            "layout": kind == "layout",
            "embeddings": kind == "embeddings",
            "semantic_map": any(entry.source == "segmentation" for entry in manifest.conditioning.concat),
            "image": "vae_encoder" in manifest.components or manifest.task == "super-resolution",
        }
        for name, fits in allowed.items():
            if getattr(self, name) is not None and not fits:
                raise UsageError(f"this bundle's task is {manifest.task}; it takes no {name}.")


#: How the command line gives what a task needs.
_OPTIONS = {
    "prompt": 'latentedge generate BUNDLE "a prompt"',
    "class_label": "--class NUMBER",
    "layout": "--layout FILE.json",
    "semantic_map": "--semantic-map FILE.png",
    "embeddings": "--embeddings FILE.npy",
    "image": "--image FILE",
    "mask": "--mask FILE, white where the picture is painted anew",
}

#: Arguments that a task cannot do without; alternatives are joined by "|".
_NEEDED_BY_TASK: dict[str, tuple[str, ...]] = {
    "text-to-image": ("prompt|prompt_ids|encoder_hidden_states",),
    "class-to-image": ("class_label|encoder_hidden_states",),
    "layout-to-image": ("layout|prompt_ids|encoder_hidden_states",),
    "semantic-to-image": ("semantic_map",),
    "embeddings-to-image": ("embeddings|encoder_hidden_states",),
    "super-resolution": ("image",),
    "inpainting": ("image", "mask"),
    "instruct-pix2pix": ("image", "prompt|prompt_ids|encoder_hidden_states"),
    "reconstruction": ("image",),
}
