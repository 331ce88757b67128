"""Noise on what a decoder sees in training, so that it bears a diffusion model's errors (RAE, arXiv 2510.11690)."""

import torch
from torch import Tensor


def noised(z: Tensor, tau: float) -> Tensor:
    """`z + σ ε` with normal ε, where σ is uniform in [0, tau] for each image; on average σ² is tau² / 3.

    Args:
        z: Latents, `[B, C, h, w]`.
        tau: Largest standard deviation, in the latents' own units; 0 draws nothing.
    """
    if tau == 0:
        return z
    sigma = tau * torch.rand(len(z), 1, 1, 1, device=z.device)
    return z + sigma * torch.randn_like(z)
