"""Conditions other than text: class labels, label maps, and what is passed through as it is."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from latentedge.export.models.parameters import refuse_unknown, require_value


class ClassEmbedder(nn.Module):
    """One vector for each class. With guidance, one class number stands for "no class"."""

    def __init__(self, *, embed_dim: int, n_classes: int = 1000, key: str = "class", **training_only: object) -> None:
        super().__init__()
        refuse_unknown("ClassEmbedder", training_only)
        self.key = key
        self.embedding = nn.Embedding(n_classes, embed_dim)

    def forward(self, class_labels: Tensor) -> Tensor:
        """Class numbers int64 [batch] to [batch, 1, embed_dim]."""
        result: Tensor = self.embedding(class_labels[:, None])
        return result


class SpatialRescaler(nn.Module):
    """Resizes a map ``n_stages`` times by ``multiplier``, then maps its channels with a 1x1 convolution."""

    def __init__(
        self,
        *,
        n_stages: int = 1,
        method: str = "bilinear",
        multiplier: float = 0.5,
        in_channels: int = 3,
        out_channels: int | None = None,
        bias: bool = False,
        **training_only: object,
    ) -> None:
        super().__init__()
        refuse_unknown("SpatialRescaler", training_only)
        require_value("SpatialRescaler", "method", method, "nearest", "bilinear", "bicubic", "area")
        self.n_stages = n_stages
        self.method = method
        self.multiplier = multiplier
        self.in_channels = in_channels
        self.out_channels = in_channels if out_channels is None else out_channels
        if out_channels is not None:
            self.channel_mapper: nn.Module = nn.Conv2d(in_channels, out_channels, 1, bias=bias)
        else:
            self.channel_mapper = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """[batch, in_channels, height, width] to [batch, out_channels, ...] of multiplier**n_stages the size."""
        for _ in range(self.n_stages):
            # Bilinear halving samples the middle of each 2x2 square: its mean.
            if self.multiplier == 0.5 and self.method == "bilinear":
                x = functional.avg_pool2d(x, 2)
            else:
                x = functional.interpolate(x, scale_factor=self.multiplier, mode=self.method)
        result: Tensor = self.channel_mapper(x)
        return result
