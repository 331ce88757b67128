"""What brings tokens within a denoiser to the width of a vision foundation model's (VFM), for their alignment."""

from typing import Literal

import torch
from torch import Tensor, nn

from vfm_vae.options import one_of

Projects = Literal["mlp", "conv"]


class Projector(nn.Sequential):
    """Projects tokens to a VFM's width (REPA, Yu et al. 2025, arXiv 2410.06940): three linear layers with SiLU.

    Args:
        width: Width of the tokens.
        hidden: Width of the hidden layers.
        out: Width of the VFM's tokens.
    """

    def __init__(self, width: int, hidden: int, out: int):
        layers = nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, out)
        super().__init__(*layers)


class ConvProjector(nn.Module):
    """Projects tokens to a VFM's width by a 3×3 convolution on their grid (iREPA, Singh et al. 2025, arXiv 2512.10794).

    A class token, which has no place on the grid, has a linear layer of its own.

    Args:
        width: Width of the tokens.
        out: Width of the VFM's tokens.
        grid: Rows and columns of tokens.
        has_class_token: Whether a class token comes first.
    """

    def __init__(self, width: int, out: int, grid: tuple[int, int], has_class_token: bool = False):
        super().__init__()
        self.grid = grid
        self.conv = nn.Conv2d(width, out, 3, padding=1)
        self.cls = nn.Linear(width, out) if has_class_token else None

    def forward(self, tokens: Tensor) -> Tensor:
        """Maps `[B, prefix + N, D]` to `[B, prefix + N, out]`."""
        patches = tokens if self.cls is None else tokens[:, 1:]
        projected = self.conv(patches.mT.unflatten(2, self.grid)).flatten(2).mT  # [B, N, out]
        return projected if self.cls is None else torch.cat([self.cls(tokens[:, :1]), projected], dim=1)


def make_projector(
    kind: Projects, width: int, hidden: int, out: int, grid: tuple[int, int], has_class_token: bool
) -> nn.Module | None:
    """A projector to a VFM's width: `mlp`, for each token by itself (REPA), or `conv`, on their grid (iREPA).

    Args:
        kind: Which.
        width: Width of the tokens.
        hidden: Width of the MLP's hidden layers.
        out: Width of the VFM's tokens; 0 for no projector.
        grid: Rows and columns of tokens.
        has_class_token: Whether a class token comes first.

    Raises:
        ValueError: for another kind.
    """
    one_of("projector", kind, "mlp", "conv")
    if not out:
        return None
    return Projector(width, hidden, out) if kind == "mlp" else ConvProjector(width, out, grid, has_class_token)
