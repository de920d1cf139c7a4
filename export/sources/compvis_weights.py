"""Which tensors of a CompVis checkpoint belong to which network: prefixes, averaged weights, what is ignored."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from latentedge.export.models.registry import build_network
from latentedge.export.sources.checkpoint import Checkpoint, Shape, check_fit, load_network
from latentedge.export.sources.compvis_config import FIRST_STAGE, IDENTITY, DiffusionConfig, ModelConfig, NetworkConfig
from latentedge.runtime.errors import LatentEdgeError

UNET = "model.diffusion_model."
FIRST = "first_stage_model."
CONDITION = "cond_stage_model."
AVERAGED = "model_ema."

#: Tables that Lightning modules register beside their networks.
BUFFERS = frozenset(
    {
        "betas",
        "alphas_cumprod",
        "alphas_cumprod_prev",
        "sqrt_alphas_cumprod",
        "sqrt_one_minus_alphas_cumprod",
        "log_one_minus_alphas_cumprod",
        "sqrt_recip_alphas_cumprod",
        "sqrt_recipm1_alphas_cumprod",
        "posterior_variance",
        "posterior_log_variance_clipped",
        "posterior_mean_coef1",
        "posterior_mean_coef2",
        "scale_factor",
        "logvar",
        "lvlb_weights",
        "colorize",
        "cond_ids",
        "global_step",
    }
)
IGNORED_PREFIXES = ("loss.", AVERAGED, f"{FIRST}loss.", f"{CONDITION}loss.", f"{FIRST}{AVERAGED}", f"{FIRST}colorize")
#: CLIP's positions, and the codewords in use that a VQ model with ``remap`` lists.
IGNORED_ENDINGS = ("position_ids", "quantize.used")


@dataclass(frozen=True)
class Network:
    """A network of the model: how it is built, and the checkpoint's name of each of its tensors."""

    build: Callable[[], nn.Module]
    shapes: dict[str, Shape]
    names: dict[str, str]
    checkpoint: Checkpoint

    def load(self) -> Any:
        """The network with its weights, in float32 and evaluation mode."""
        return load_network(self.build, self.checkpoint, self.names)

    def skeleton(self) -> Any:
        """The network without memory for its weights."""
        with torch.device("meta"):
            return self.build()


@dataclass(frozen=True)
class Networks:
    """All networks of a checkpoint, and what should be said about their weights."""

    first_stage: Network
    unet: Network | None = None
    condition: Network | None = None
    messages: tuple[str, ...] = ()


def networks_of(config: ModelConfig, checkpoint: Checkpoint, clip_text: object | None) -> Networks:
    """Match a checkpoint with its YAML; ``LatentEdgeError`` lists keys and shapes that do not fit.

    ``clip_text`` is the ``ClipTextConfig`` of a CLIP text encoder that is not ViT-L/14.
    """
    if config.diffusion is None:
        first_stage = _network(config.first_stage, "", checkpoint)
        _check([first_stage], checkpoint, config)
        return Networks(first_stage)
    diffusion = config.diffusion
    first_stage = _network(diffusion.first_stage_config, _first_stage_prefix(diffusion, checkpoint), checkpoint)
    unet = _network(diffusion.unet_config, UNET, checkpoint)
    condition = None
    cond = diffusion.cond_stage_config
    if isinstance(cond, NetworkConfig) and cond.target != IDENTITY:
        if cond.target.endswith("CLIPEmbedder") and clip_text is not None:
            cond = NetworkConfig(cond.target, {**cond.params, "text_config": clip_text})
        condition = _network(cond, CONDITION, checkpoint)
    _check([first_stage, unet, *([condition] if condition else [])], checkpoint, config)
    unet, messages = _averaged(diffusion, unet)
    return Networks(first_stage, unet, condition, messages)


def _first_stage_prefix(diffusion: DiffusionConfig, checkpoint: Checkpoint) -> str:
    """Where the first stage's tensors are: a file that stores none twice may hold them as the condition's only."""
    twice = diffusion.cond_stage_config == FIRST_STAGE
    return CONDITION if twice and not any(name.startswith(FIRST) for name in checkpoint.shapes) else FIRST


def _network(config: NetworkConfig, prefix: str, checkpoint: Checkpoint) -> Network:
    return network_of(lambda: build_network(config.target, config.params), prefix, checkpoint)


def network_of(build: Callable[[], nn.Module], prefix: str, checkpoint: Checkpoint) -> Network:
    """The network that ``build`` makes, with the names that its tensors have in the checkpoint under ``prefix``."""
    with torch.device("meta"):
        state = build().state_dict()
    names = {name: _stored_name(f"{prefix}{name}", checkpoint) for name in state}
    optional = {name for name in names if name.endswith("position_ids")}
    return Network(
        build,
        {names[name]: tuple(value.shape) for name, value in state.items() if name not in optional},
        {own: name for own, name in names.items() if own not in optional},
        checkpoint,
    )


def ignored(name: str) -> bool:
    """Whether a checkpoint's tensor belongs to training or is a table that is computed here."""
    return name in BUFFERS or name.startswith(IGNORED_PREFIXES) or name.endswith(IGNORED_ENDINGS)


def _stored_name(name: str, checkpoint: Checkpoint) -> str:
    # transformers 5 writes CLIP's text model without the level "text_model".
    shorter = name.replace("transformer.text_model.", "transformer.", 1)
    return shorter if name not in checkpoint.shapes and shorter in checkpoint.shapes else name


def _check(networks: Iterable[Network], checkpoint: Checkpoint, config: ModelConfig) -> None:
    expected: dict[str, Shape] = {}
    for network in networks:
        expected |= network.shapes
    found = {name: shape for name, shape in checkpoint.shapes.items() if not ignored(name)}
    if config.diffusion is not None and config.diffusion.cond_stage_config == FIRST_STAGE:
        # The first stage is registered a second time as its own condition.
        copies = {name for name in found if name.startswith(CONDITION)} - expected.keys()
        expected |= {name: expected.get(name.replace(CONDITION, FIRST, 1), (-1,)) for name in copies}
    check_fit(expected, found, checkpoint.path.name, config.name)


def averaged_names(names: Mapping[str, str]) -> dict[str, str]:
    """The average's name of each U-Net tensor: that inside DiffusionWrapper, with every dot removed."""
    return {own: AVERAGED + f"diffusion_model.{own}".replace(".", "") for own in names}


def _averaged(config: DiffusionConfig, unet: Network) -> tuple[Network, tuple[str, ...]]:
    """The U-Net with the weights that the original samples with.

    ``use_ema`` true samples from the moving average. The file may hold none of it (pruned files; some keep only the
    counters): then the raw weights are what the file has. ``use_ema`` false means the raw weights, average or not.
    """
    names = averaged_names(unet.names)
    there = [name for name in names.values() if name in unet.checkpoint.shapes]
    if not config.use_ema:
        left = "use_ema is false: the raw weights are exported, the average in the file is not used"
        return unet, (left,) if there else ()
    if not there:
        return unet, ("use_ema is true, but the file holds no averaged U-Net weights: its raw weights are exported",)
    if len(there) < len(names):
        missing = sorted(name for name in names.values() if name not in unet.checkpoint.shapes)
        raise LatentEdgeError(
            f"the averaged weights in {unet.checkpoint.path.name} are incomplete: {len(missing)} of {len(names)} are "
            f"missing, for example {missing[0]}.",
            hint="use another copy of the checkpoint, or set use_ema: false in the YAML to export the raw weights.",
        )
    shapes = {names[own]: unet.shapes[stored] for own, stored in unet.names.items()}
    found = {name: unet.checkpoint.shapes[name] for name in shapes}
    check_fit(shapes, found, unet.checkpoint.path.name, "the U-Net whose average they are")
    assumed = ("use_ema",) if "use_ema" in config.assumed else ()
    said = tuple(f"{name} is true by default: the averaged U-Net weights are exported" for name in assumed)
    return Network(unet.build, shapes, names, unet.checkpoint), said
