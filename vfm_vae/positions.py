"""Tables of learned positions of vision transformers, at other grids of tokens than those they were trained at."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from vfm_vae.images import Interpolation


def has_positions(network: nn.Module) -> bool:
    """Whether a timm network has a table that follows the grid of its input; rotary embeddings have none."""
    return getattr(network, "dynamic_img_size", False) and isinstance(getattr(network, "pos_embed", None), Tensor)


def resample_positions(
    table: Tensor, old_grid: Sequence[int], new_grid: Sequence[int], interpolation: Interpolation
) -> Tensor:
    """Brings a table of positions to another grid, without antialias.

    Args:
        table: `[1, P + rows * columns, C]`; the P first are of class token and registers, and stay as they are.
        old_grid: Its rows and columns.
        new_grid: Those wanted.
        interpolation: Computed in float32.

    Returns:
        `[1, P + rows * columns, C]` in the precision of `table`.
    """
    num_prefix = table.shape[1] - math.prod(old_grid)
    return resample_abs_pos_embed(
        table, list(new_grid), list(old_grid), num_prefix, interpolation=interpolation, antialias=False
    )


class Positions:
    """The frozen table of a vision transformer, resampled as the published networks have it where timm would otherwise.

    Without antialias. The network keeps its own table as its weight.

    Args:
        network: A network of timm's with a table of positions, see `has_positions`.
        interpolation: How the published network resamples the table.
    """

    def __init__(self, network: Any, interpolation: Interpolation) -> None:
        self.network, self.interpolation = network, interpolation
        self._resampled: dict[tuple[int, int], nn.Parameter] = {}

    @contextmanager
    def at(self, grid: tuple[int, int]) -> Iterator[None]:
        """Within it the network has a table of this grid, of rows and columns, so that nothing is left to resample."""
        own, embed = self.network.pos_embed, self.network.patch_embed
        own_grid = embed.grid_size
        self.network.pos_embed, embed.grid_size = own if grid == own_grid else self._table(grid), grid
        try:
            yield
        finally:
            self.network.pos_embed, embed.grid_size = own, own_grid

    @torch.inference_mode(False)  # validation may be the first to ask, and training after it
    @torch.no_grad()
    def _table(self, grid: tuple[int, int]) -> nn.Parameter:
        own, table = self.network.pos_embed, self._resampled.get(grid)
        if table is None or (table.device, table.dtype) != (own.device, own.dtype):  # the network has moved
            values = resample_positions(own, self.network.patch_embed.grid_size, grid, self.interpolation)
            table = self._resampled[grid] = nn.Parameter(values, requires_grad=False)
        return table
