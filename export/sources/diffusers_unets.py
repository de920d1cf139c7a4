"""diffusers' UNets with positional inputs: a class for each set of conditions, in the order of the manifest.

``any_size``: latents of every size are taken, by upsampling to the size that was halved; else only those that can be
halved as often as the UNet halves them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from latentedge.export.sources.diffusers_modules import made_exportable


class UnconditionalUNet(nn.Module):
    """``UNet2DModel``: sample [batch, channels, height, width] and timestep [batch] to out_sample."""

    def __init__(self, unet: Any, *, any_size: bool) -> None:
        super().__init__()
        self.sizes: list[torch.Size] = []
        self.whole_timesteps = unet.config.time_embedding_type == "learned"
        self.unet = made_exportable(unet, self.sizes if any_size else None)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        """The predicted noise, velocity or sample, as large as the latent."""
        self.sizes.clear()
        if self.whole_timesteps:
            timestep = timestep.round().to(torch.int64)
        result: Tensor = self.unet(sample, timestep, return_dict=False)[0]
        return result


class ConditionalUNet(nn.Module):
    """``UNet2DConditionModel`` with a text; the subclasses take what further models need."""

    def __init__(self, unet: Any, *, any_size: bool) -> None:
        super().__init__()
        self.sizes: list[torch.Size] = []
        # diffusers compares the latent's size with 2**num_upsamplers to choose how to upsample. Here the upsampling
        # knows its size, and no comparison may fix a dynamic axis.
        unet.num_upsamplers = 0
        self.unet = made_exportable(unet, self.sizes if any_size else None)

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        """[batch, channels, height, width], [batch] and [batch, tokens, width] to the model's output."""
        return self._evaluate(sample, timestep, encoder_hidden_states)

    def _evaluate(self, sample: Tensor, timestep: Tensor, hidden: Tensor, **conditions: Any) -> Tensor:
        self.sizes.clear()
        result: Tensor = self.unet(sample, timestep, encoder_hidden_states=hidden, return_dict=False, **conditions)[0]
        return result


class GuidanceEmbeddedUNet(ConditionalUNet):
    """A latent consistency model: ``timestep_cond`` [batch, width] embeds the guidance scale."""

    def forward(  # type: ignore[override]
        self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, timestep_cond: Tensor
    ) -> Tensor:
        """As the parent's, with the guidance embedding."""
        return self._evaluate(sample, timestep, encoder_hidden_states, timestep_cond=timestep_cond)


class ExtendedUNet(ConditionalUNet):
    """SDXL: pooled ``text_embeds`` [batch, width] and ``time_ids`` [batch, 6] in pixels."""

    def forward(  # type: ignore[override]
        self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, text_embeds: Tensor, time_ids: Tensor
    ) -> Tensor:
        """As the parent's, with SDXL's added conditions."""
        added = {"text_embeds": text_embeds, "time_ids": time_ids}
        return self._evaluate(sample, timestep, encoder_hidden_states, added_cond_kwargs=added)


class GuidanceEmbeddedExtendedUNet(ConditionalUNet):
    """A latent consistency model made of SDXL."""

    def forward(  # type: ignore[override]
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        text_embeds: Tensor,
        time_ids: Tensor,
        timestep_cond: Tensor,
    ) -> Tensor:
        """As SDXL's, with the guidance embedding."""
        added = {"text_embeds": text_embeds, "time_ids": time_ids}
        return self._evaluate(
            sample, timestep, encoder_hidden_states, added_cond_kwargs=added, timestep_cond=timestep_cond
        )


#: Which class takes which inputs after ``sample`` and ``timestep``.
UNETS: dict[tuple[str, ...], Callable[..., nn.Module]] = {
    (): UnconditionalUNet,
    ("encoder_hidden_states",): ConditionalUNet,
    ("encoder_hidden_states", "timestep_cond"): GuidanceEmbeddedUNet,
    ("encoder_hidden_states", "text_embeds", "time_ids"): ExtendedUNet,
    ("encoder_hidden_states", "text_embeds", "time_ids", "timestep_cond"): GuidanceEmbeddedExtendedUNet,
}
