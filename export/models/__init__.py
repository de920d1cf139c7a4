"""Torch definitions of the latent diffusion family, keyed as CompVis checkpoints are."""
