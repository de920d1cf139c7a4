"""What a CompVis model does, and how its condition is made: one function for each kind of condition.

The rules are those of CompVis/latent-diffusion: ``conditioning_key`` says where the condition enters,
``cond_stage_config`` what makes it, ``cond_stage_key`` what it is made from.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from latentedge.export.model import ComponentSource, TokenizerSource
from latentedge.export.sources import compvis_components as components
from latentedge.export.sources.compvis_config import FIRST_STAGE, IDENTITY, DiffusionConfig, NetworkConfig
from latentedge.export.sources.compvis_tokenizer import TokenizerNeed
from latentedge.export.sources.compvis_weights import Network
from latentedge.runtime.bundle import ConcatInput, Conditioning, Latent, Layout, TextEncoder
from latentedge.runtime.errors import LatentEdgeError, UsageError

#: ImageNet with one class more: the last one means "no class" (cin256-v2).
IMAGENET_AND_NONE = 1001
IMAGENET = 1000


@dataclass(frozen=True)
class Situation:
    """What a task is told apart by."""

    config: DiffusionConfig
    latent: Latent
    #: Channels of the U-Net's input beyond the latent's.
    extra_channels: int
    context_width: int | None
    #: Classes that the U-Net itself knows.
    label_classes: int | None
    condition: Network | None
    size: tuple[int, int]
    extras: dict[str, Any]
    #: Finds the tokenizer of a text encoder; ``None`` when there is none.
    tokenizer: Callable[[TokenizerNeed], TokenizerSource | None]

    @property
    def target(self) -> str:
        """What makes the condition."""
        config = self.config.cond_stage_config
        return config if isinstance(config, str) else config.target.rsplit(".", 1)[-1]

    @property
    def parameters(self) -> dict[str, Any]:
        """Parameters of what makes the condition."""
        config = self.config.cond_stage_config
        return config.params if isinstance(config, NetworkConfig) else {}


@dataclass(frozen=True)
class Task:
    """A task, its conditioning, its encoders, and (tokens, width) of the U-Net's context."""

    name: str
    conditioning: Conditioning
    components: tuple[ComponentSource, ...] = ()
    context: tuple[int | str, int] | None = None
    tokenizers: dict[str, TokenizerSource] = field(default_factory=dict)
    messages: tuple[str, ...] = ()
    #: Classes that the U-Net itself takes.
    label_classes: int | None = None

    @property
    def guided(self) -> bool:
        """Whether classifier-free guidance is possible."""
        return self.conditioning.unconditional != "none"


def task_of(situation: Situation) -> Task:
    """The task of a diffusion model; ``UsageError`` where the condition is of a kind that is not supported."""
    way = situation.config.conditioning
    if way is None:
        _expect_extra(situation, 0)
        return Task("unconditional", Conditioning())
    makers = {"crossattn": CROSS_ATTENTION, "concat": CONCAT, "hybrid": HYBRID, "adm": ADM}.get(way)
    if makers is None:
        raise UsageError(
            f"conditioning_key {way!r} is not supported.", hint="supported are concat, crossattn, hybrid and adm."
        )
    maker = makers.get(situation.target)
    if maker is None:
        raise UsageError(
            f"a condition made by {situation.target} and passed on by {way} is not supported.",
            hint=f"with {way}, supported are {', '.join(makers)}.",
        )
    if way in ("crossattn", "adm"):
        _expect_extra(situation, 0)
    if way == "crossattn":
        _context_width(situation)
    return maker(situation)


def _expect_extra(situation: Situation, expected: int) -> None:
    if situation.extra_channels != expected:
        channels = situation.latent.channels
        raise LatentEdgeError(
            f"the U-Net takes {channels + situation.extra_channels} channels; with {channels} latent channels and this "
            f"condition, {channels + expected} were expected.",
            hint="first stage, conditioning_key and unet_config.in_channels of the YAML do not belong together.",
        )


def _context_width(situation: Situation) -> int:
    if situation.context_width is None:
        raise LatentEdgeError(
            "the condition enters by cross-attention, but the U-Net has none.",
            hint="set use_spatial_transformer and context_dim in unet_config, or another conditioning_key.",
        )
    return situation.context_width


def _condition(situation: Situation) -> Network:
    assert situation.condition is not None
    return situation.condition


def _assumed(situation: Situation, **defaults: object) -> tuple[str, ...]:
    """A message for each parameter of the condition that the YAML leaves to its default."""
    absent = {name: value for name, value in defaults.items() if name not in situation.parameters}
    return tuple(
        f"{situation.target}: {name} is not in the YAML and is {value} by default" for name, value in absent.items()
    )


def _classes(situation: Situation) -> Task:
    width = _context_width(situation)
    classes = int(situation.parameters.get("n_classes", IMAGENET))
    messages = list(_assumed(situation, n_classes=IMAGENET))
    conditioning = _class_conditioning(situation, classes, messages)
    embedder = components.class_component(_condition(situation), classes, width)
    return Task("class-to-image", conditioning, (embedder,), (1, width), messages=tuple(messages))


def _labels(situation: Situation) -> Task:
    """Class numbers that the U-Net embeds itself."""
    if situation.label_classes is None:
        raise UsageError(
            "a U-Net that takes a vector of labels (num_classes: sequential) is not supported in a CompVis YAML.",
            hint="with conditioning_key adm, num_classes must be the number of classes.",
        )
    messages: list[str] = []
    conditioning = _class_conditioning(situation, situation.label_classes, messages)
    classes = situation.label_classes
    return Task("class-to-image", conditioning, messages=tuple(messages), label_classes=classes)


def _class_conditioning(situation: Situation, classes: int, messages: list[str]) -> Conditioning:
    null = _null_class(situation, classes, messages)
    return Conditioning(
        cross_attention="class",
        unconditional="none" if null is None else "null_class",
        classes=classes,
        null_class=null,
    )


def _null_class(situation: Situation, classes: int, messages: list[str]) -> int | None:
    """The class number that means "no class"; neither YAML nor weights tell, so ``latentedge: null_class`` may."""
    if "null_class" in situation.extras:
        null = situation.extras["null_class"]
        if null is not None and not (isinstance(null, int) and 0 <= null < classes):
            raise UsageError(f"latentedge.null_class must be a class from 0 to {classes - 1} or null, found {null!r}.")
        return null
    if classes == IMAGENET:
        return None
    if classes != IMAGENET_AND_NONE:
        messages.append(
            f'class {classes - 1}, the last of {classes}, is taken as "no class" when guidance is asked for; set '
            "`latentedge: {null_class: ...}` in the YAML if it is another one, or null if there is none"
        )
    return classes - 1


def _text(situation: Situation) -> Task:
    _context_width(situation)
    encoder = _condition(situation).skeleton()
    if not encoder.use_tokenizer:
        return _tokens(situation, encoder)
    messages = _assumed(situation, vocab_size=encoder.vocab_size, max_seq_len=encoder.max_seq_len)
    need = TokenizerNeed("bert", encoder.max_seq_len, encoder.vocab_size)
    return _text_task(situation, need, encoder.width, messages)


def _clip_text(situation: Situation) -> Task:
    encoder = _condition(situation).skeleton()
    length = min(encoder.max_length, encoder.config.max_position_embeddings)
    kind = "clip" if situation.target == "FrozenCLIPEmbedder" else "open_clip"
    need = TokenizerNeed(kind, length, encoder.config.vocab_size)
    return _text_task(situation, need, encoder.config.hidden_size, ())


def _text_task(situation: Situation, need: TokenizerNeed, width: int, messages: tuple[str, ...]) -> Task:
    if width != situation.context_width:
        raise LatentEdgeError(
            f"the text encoder gives vectors of {width}, the U-Net takes {situation.context_width}.",
            hint="cond_stage_config and unet_config.context_dim do not belong together.",
        )
    tokenizer = situation.tokenizer(need)
    if tokenizer is None:
        messages = (*messages, "there is no tokenizer: the bundle takes token ids only; --tokenizer DIR|ID names one")
    conditioning = Conditioning(
        cross_attention="text",
        encoders=(TextEncoder("text_encoder", None if tokenizer is None else "tokenizer"),),
        unconditional="empty_text",
    )
    encoder = components.token_component(_condition(situation), need.length, need.vocabulary, width, guided=True)
    tokenizers = {} if tokenizer is None else {"tokenizer": tokenizer}
    return Task("text-to-image", conditioning, (encoder,), (need.length, width), tokenizers, messages)


def _tokens(situation: Situation, encoder: Any) -> Task:
    """A transformer over tokens that are not words: a layout's boxes."""
    layout = layout_of(encoder.max_seq_len, encoder.vocab_size, situation.extras.get("layout_classes"))
    messages: tuple[str, ...] = ()
    if layout is None:
        messages = (f"{encoder.max_seq_len} tokens are no whole number of boxes: the bundle takes token ids only",)
    conditioning = Conditioning(cross_attention="layout", encoders=(TextEncoder("text_encoder", None),), layout=layout)
    component = components.token_component(
        _condition(situation), encoder.max_seq_len, encoder.vocab_size, encoder.width, guided=False
    )
    context = (encoder.max_seq_len, encoder.width)
    return Task("layout-to-image", conditioning, (component,), context, messages=messages)


def layout_of(length: int, tokens: int, classes: int | None) -> Layout | None:
    """How boxes become ``length`` tokens: three for each object, and two for the crop if they are left over."""
    objects, rest = divmod(length, 3)
    if rest == 1 or objects == 0:
        return None
    return Layout(length, objects, tokens, tokens - 1, crop=rest == 2, classes=classes)


def _embeddings(situation: Situation) -> Task:
    width = _context_width(situation)
    conditioning = Conditioning(cross_attention="embeddings", unconditional="zeros", embedding_width=width)
    return Task("embeddings-to-image", conditioning, context=("tokens", width))


def _masked_image(situation: Situation) -> Task:
    """The masked picture through the first stage, not quantised and not scaled, then the mask as -1 and 1."""
    channels = situation.latent.channels
    _expect_extra(situation, channels + 1)
    concat = (
        ConcatInput("masked_image_latent", channels, hole_value=-1.0),
        ConcatInput("mask", 1, mask_values=(-1.0, 1.0)),
    )
    return Task("inpainting", Conditioning(concat=concat))


def _low_resolution(situation: Situation) -> Task:
    concat = (ConcatInput("low_resolution_image", situation.extra_channels),)
    key = situation.config.cond_stage_key
    messages = () if key == "LR_image" else (f"cond_stage_key is {key!r}: taken as a low-resolution picture",)
    conditioning = Conditioning(concat=concat, upscale=situation.latent.downscale)
    return Task("super-resolution", conditioning, messages=messages)


def _segmentation(situation: Situation) -> Task:
    rescaler = _condition(situation).skeleton()
    _expect_extra(situation, rescaler.out_channels)
    factor = (1 / rescaler.multiplier) ** rescaler.n_stages
    if factor != int(factor):
        raise UsageError(
            f"SpatialRescaler resizes by {rescaler.multiplier} {rescaler.n_stages} times: no whole factor."
        )
    component = components.rescaler_component(
        _condition(situation), rescaler.in_channels, rescaler.out_channels, int(factor), situation.size
    )
    concat = (ConcatInput("segmentation", rescaler.out_channels),)
    conditioning = Conditioning(concat=concat, labels=rescaler.in_channels)
    return Task("semantic-to-image", conditioning, (component,))


def _text_and_picture(situation: Situation) -> Task:
    """Stable Diffusion with a picture beside its latent: as many channels are a picture to edit, one more an inpainting."""
    edits = situation.extra_channels == situation.latent.channels
    return _text_and_edited_image(situation) if edits else _text_and_masked_image(situation)


def _text_and_edited_image(situation: Situation) -> Task:
    """InstructPix2Pix (Brooks et al. 2023): the picture's mode, not scaled; guided by text and picture apart."""
    text = CROSS_ATTENTION[situation.target](situation)
    concat = (ConcatInput("image_latent", situation.latent.channels, scaled=False, posterior="mode"),)
    conditioning = replace(text.conditioning, concat=concat, image_guidance=True)
    return replace(text, name="instruct-pix2pix", conditioning=conditioning)


def _text_and_masked_image(situation: Situation) -> Task:
    """Stable Diffusion's inpainting: mask as 0 and 1, then the masked picture (grey hole), sampled and scaled."""
    channels = situation.latent.channels
    _expect_extra(situation, channels + 1)
    text = CROSS_ATTENTION[situation.target](situation)
    concat = (
        ConcatInput("mask", 1, mask_values=(0.0, 1.0)),
        ConcatInput("masked_image_latent", channels, scaled=True, posterior="sample", hole_value=0.0),
    )
    conditioning = Conditioning(
        cross_attention="text", encoders=text.conditioning.encoders, unconditional="empty_text", concat=concat
    )
    return Task("inpainting", conditioning, text.components, text.context, text.tokenizers, text.messages)


Maker = Callable[[Situation], Task]
#: What makes the condition -> the task, by where the condition enters.
CROSS_ATTENTION: dict[str, Maker] = {
    "ClassEmbedder": _classes,
    "BERTEmbedder": _text,
    "TransformerEmbedder": _text,
    "FrozenCLIPEmbedder": _clip_text,
    "FrozenOpenCLIPEmbedder": _clip_text,
    IDENTITY.rsplit(".", 1)[-1]: _embeddings,
}
CONCAT: dict[str, Maker] = {
    FIRST_STAGE: _masked_image,
    IDENTITY.rsplit(".", 1)[-1]: _low_resolution,
    "SpatialRescaler": _segmentation,
}
HYBRID: dict[str, Maker] = dict.fromkeys(
    ("FrozenCLIPEmbedder", "FrozenOpenCLIPEmbedder", "BERTEmbedder"), _text_and_picture
)
ADM: dict[str, Maker] = {IDENTITY.rsplit(".", 1)[-1]: _labels}
