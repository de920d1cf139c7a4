"""What the autoencoder is trained on: reconstruction, smoothness of the latent, and a patch discriminator.

As in arXiv:2112.10752 (appendix G), with the perceptual network, whose weights are not free to use here, replaced by
the difference of gradients.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


def gradient_difference(drawn: Tensor, wanted: Tensor) -> Tensor:
    """Mean absolute difference of horizontal and vertical neighbour differences: punishes blurred edges."""
    across = (drawn.diff(dim=-1) - wanted.diff(dim=-1)).abs().mean()
    down = (drawn.diff(dim=-2) - wanted.diff(dim=-2)).abs().mean()
    return across + down


def reconstruction_loss(drawn: Tensor, wanted: Tensor) -> Tensor:
    """L1, five times the squared error and the gradient difference; pictures [batch, 3, height, width] in [-1, 1]."""
    difference = drawn - wanted
    return difference.abs().mean() + 5.0 * difference.square().mean() + gradient_difference(drawn, wanted)


class PatchDiscriminator(nn.Module):
    """Says for each patch of about 22 pixels whether it is drawn (negative) or true (positive) (arXiv:1611.07004)."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, width, 4, stride=2, padding=1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(width, 2 * width, 4, stride=2, padding=1),
            nn.GroupNorm(8, 2 * width),
            nn.LeakyReLU(0.2),
            nn.Conv2d(2 * width, 1, 4, padding=1),
        )

    def forward(self, pictures: Tensor) -> Tensor:
        """[batch, 3, height, width] to logits [batch, 1, height / 4 - 1, width / 4 - 1]."""
        logits: Tensor = self.layers(pictures)
        return logits


def discriminator_loss(true_logits: Tensor, drawn_logits: Tensor) -> Tensor:
    """The hinge loss."""
    return 0.5 * (functional.relu(1.0 - true_logits).mean() + functional.relu(1.0 + drawn_logits).mean())


def adaptive_weight(reconstruction: Tensor, adversarial: Tensor, last_layer: Tensor) -> Tensor:
    """How much the adversarial loss counts: the ratio of both losses' gradients at the last layer, at most 1e4.

    arXiv:2012.09841, equation 7.
    """
    (of_reconstruction,) = torch.autograd.grad(reconstruction, last_layer, retain_graph=True)
    (of_adversarial,) = torch.autograd.grad(adversarial, last_layer, retain_graph=True)
    ratio = of_reconstruction.float().norm() / (of_adversarial.float().norm() + 1e-4)
    weight: Tensor = ratio.clamp(0.0, 1e4).detach()
    return weight
