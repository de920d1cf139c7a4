"""The codebook of VQ autoencoders."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class VectorQuantiser(nn.Module):
    """Replaces each latent vector by its nearest codeword (arXiv:1711.00937)."""

    def __init__(self, codewords: int, width: int, commitment: float = 0.25) -> None:
        super().__init__()
        self.commitment = commitment
        self.embedding = nn.Embedding(codewords, width)
        nn.init.uniform_(self.embedding.weight, -1.0 / codewords, 1.0 / codewords)

    def nearest(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Nearest codewords, shaped as ``z`` [batch, width, height, width], and their numbers [batch, height, width].

        The squared distance is |z|^2 + |e|^2 - 2 z.e; |z|^2 is the same for every codeword and left out.
        """
        vectors = z.permute(0, 2, 3, 1)
        codebook = self.embedding.weight
        distances = codebook.square().sum(dim=1) - 2.0 * (vectors @ codebook.t())
        indices = torch.argmin(distances, dim=-1)
        return self.embedding(indices).permute(0, 3, 1, 2), indices

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Codewords with a straight-through gradient, codebook loss (a scalar), and codeword numbers."""
        codewords, indices = self.nearest(z)
        loss = (codewords - z.detach()).square().mean() + self.commitment * (codewords.detach() - z).square().mean()
        return z + (codewords - z).detach(), loss, indices
