"""The classes that configurations name, by their target string. Nothing outside this table is ever built."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from latentedge.export.models.autoencoder import AutoencoderKL, VQModel, VQModelInterface
from latentedge.export.models.clip_text import FrozenCLIPEmbedder
from latentedge.export.models.conditioning import ClassEmbedder, SpatialRescaler
from latentedge.export.models.open_clip_text import FrozenOpenCLIPEmbedder
from latentedge.export.models.text_encoder import BERTEmbedder, TransformerEmbedder
from latentedge.export.models.unet import UNetModel
from latentedge.runtime.errors import UsageError

TARGETS: dict[str, type[nn.Module]] = {
    "ldm.models.autoencoder.AutoencoderKL": AutoencoderKL,
    "ldm.models.autoencoder.VQModel": VQModel,
    "ldm.models.autoencoder.VQModelInterface": VQModelInterface,
    "ldm.modules.diffusionmodules.openaimodel.UNetModel": UNetModel,
    "ldm.modules.encoders.modules.BERTEmbedder": BERTEmbedder,
    "ldm.modules.encoders.modules.ClassEmbedder": ClassEmbedder,
    "ldm.modules.encoders.modules.FrozenCLIPEmbedder": FrozenCLIPEmbedder,
    "ldm.modules.encoders.modules.FrozenOpenCLIPEmbedder": FrozenOpenCLIPEmbedder,
    "ldm.modules.encoders.modules.SpatialRescaler": SpatialRescaler,
    "ldm.modules.encoders.modules.TransformerEmbedder": TransformerEmbedder,
}


def network_class(target: str) -> type[nn.Module]:
    """The class that stands for a configuration's ``target``; ``UsageError`` names the known ones."""
    try:
        return TARGETS[target]
    except KeyError:
        raise UsageError(
            f"no network is known for the target {target!r}; known are {', '.join(sorted(TARGETS))}.",
            hint="targets are looked up in a fixed table and never imported: correct the YAML's target.",
        ) from None


def build_network(target: str, parameters: Mapping[str, Any]) -> nn.Module:
    """A network from a configuration's ``target`` and ``params``, with its initial weights."""
    network = network_class(target)
    try:
        return network(**parameters)
    except (TypeError, KeyError, ValueError, AttributeError, IndexError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise UsageError(
            f"the parameters of {target} do not fit: {reason}.",
            hint="compare the YAML's params with the published configuration of this model.",
        ) from error
