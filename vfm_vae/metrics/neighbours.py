"""The exact nearest neighbours of every sample among all others, without holding an `n x n` matrix.

The matrix of inner products is computed tile by tile, on and above its diagonal alone. A tile that was multiplied is
nearly done with: but for the first few, hardly one of its entries is larger than what its row or column has found
already, and which ones could be is seen from the maxima of groups of entries.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vfm_vae.metrics.features import float32_arithmetic

_TILE_ROWS, _TILE_COLUMNS = 1024, 4096  # 16 MB, which the cache of a CPU holds
_ACCELERATOR_TILE = 4  # times as high and wide: 256 MB, and few launches
_GROUP = 16  # entries of a tile that are represented by their maximum
_CROWDED = 0.4  # with this part of the groups promising, sorting out all of the tile is faster
_TIE_ENTRIES = 2**22  # products held at a time where ties are settled


class Neighbours(NamedTuple):
    """The `k` nearest neighbours of every sample, on the CPU, where sums over them are cheap and deterministic.

    Attributes:
        num_samples: `n`.
        k: Number of neighbours.
        excludes_self: Whether no sample is its own neighbour; otherwise it may be.
        keys: `sample * n + neighbour`, ascending, `[n * k]`.
        values: The inner product of the two, float64 `[n * k]`; nan where features are not finite.
    """

    num_samples: int
    k: int
    excludes_self: bool
    keys: Tensor
    values: Tensor


def nearest_neighbours(features: Tensor, k: int, exclude_self: bool = True) -> Neighbours:
    """Finds each sample's `k` nearest by inner product, computed in float32; of equally near ones, the first.

    Time is `O(n^2 d)`; memory above the features (in float32) is `O(n k)` and one tile.

    Args:
        features: `[n, d]`, any floating-point type; of unit length where the nearest by angle are meant.
        k: Number of neighbours.
        exclude_self: Don't count a sample among its own neighbours.

    Returns:
        The neighbours. All their values are nan where the features, or their squared norms, are not finite.

    Raises:
        ValueError: if `features` is no matrix, or has too few samples for `k`.
    """
    if features.ndim != 2:
        raise ValueError(f"features must be a matrix [samples, channels]; got {tuple(features.shape)}.")
    check_count(len(features), k, k + 1 if exclude_self else k)
    with float32_arithmetic(features.device):
        features = features.detach().float()

        def products(rows: slice | Tensor, columns: slice, out: Tensor | None = None) -> Tensor:
            return torch.mm(features[rows], features[columns].T, out=out)

        search = Search(products, len(features), k + 1, exclude_self, features.device)
        # |x . y| <= |x| |y|: below the largest float32 no product is inf or nan, and all can be compared.
        if bool(torch.linalg.vector_norm(features, dim=1).square().isfinite().all()):
            search.run()
            search.settle_ties()
        else:
            search.values.fill_(math.nan)
            search.columns[:] = torch.arange(k + 1, device=features.device)
    return _ascending(search.values[:, :k].cpu(), search.columns[:, :k].cpu(), exclude_self)


def check_count(num_samples: int, k: int, least: int) -> None:
    """Raises a ValueError if there are fewer than `least` samples, or no neighbours asked for."""
    if k < 1 or num_samples < least:
        raise ValueError(f"k = {k} neighbours need k >= 1 and at least {least} samples; got {num_samples} samples.")


def intersect(keys: Tensor, ascending: Tensor) -> tuple[Tensor, Tensor]:
    """Which of `keys` occur in `ascending` (bool mask), and where those do."""
    position = torch.searchsorted(ascending, keys).clamp(max=len(ascending) - 1)
    found = ascending[position] == keys if len(ascending) else torch.zeros_like(keys, dtype=torch.bool)
    return found, position[found]


class Search:
    """The largest entries in every row of a symmetric matrix, while its tiles go by.

    Args:
        entries: Computes float32 entries `[rows, columns]` of the matrix, into a tensor if one is given.
        size: Rows of the matrix.
        num_kept: How many are looked for in each row, at most `size`, or one less where the diagonal does not count.
        exclude_diagonal: Whether it does not.
        device: The matrix's device.

    Attributes:
        values: The largest so far, descending, `[size, num_kept]`; -inf where there is none yet.
        columns: Theirs.
    """

    def __init__(
        self,
        entries: Callable[[slice | Tensor, slice, Tensor | None], Tensor],
        size: int,
        num_kept: int,
        exclude_diagonal: bool,
        device: torch.device,
    ) -> None:
        self.entries, self.size, self.num_kept = entries, size, num_kept
        self.exclude_diagonal, self.device = exclude_diagonal, device
        self.values = torch.full((size, num_kept), -math.inf, device=device)
        self.columns = torch.zeros((size, num_kept), dtype=torch.int64, device=device)

    def run(self) -> None:
        """Goes through all tiles on and above the diagonal."""
        scale = 1 if self.device.type == "cpu" else _ACCELERATOR_TILE
        rows, columns = min(scale * _TILE_ROWS, self.size), min(scale * max(_TILE_COLUMNS, _TILE_ROWS), self.size)
        buffer = torch.empty(rows, columns, device=self.device)  # written again and again: new pages are slow to get
        for start in range(0, self.size, rows):
            some = slice(start, min(start + rows, self.size))
            tile = self._tile(some, some, buffer)
            if self.exclude_diagonal:
                tile.diagonal().fill_(-math.inf)
            self._offer(tile, 1, start, start)
            for first in range(start + rows, self.size, columns):
                tile = self._tile(some, slice(first, min(first + columns, self.size)), buffer)
                self._offer(tile, 1, start, first)
                self._offer(tile, 0, first, start)

    def _tile(self, rows: slice, columns: slice, buffer: Tensor) -> Tensor:
        return self.entries(rows, columns, buffer[: rows.stop - rows.start, : columns.stop - columns.start])

    def _offer(self, tile: Tensor, dim: int, owner: int, partner: int) -> None:
        """Takes what is new among the best: with `dim` 1 of the tile's rows, with 0 of its columns.

        Args:
            tile: Inner products.
            dim: Along which they compete.
            owner: The row of `values` that the first competition is about.
            partner: The sample that the first competitor is.
        """
        owners = slice(owner, owner + tile.shape[1 - dim])
        limit = self.values[owners, -1]
        missing = -tile.shape[dim] % _GROUP
        padded = F.pad(tile, (0, missing) if dim else (0, 0, 0, missing), value=-math.inf) if missing else tile
        groups = padded.unflatten(dim, (_GROUP, -1)).movedim(dim, 0)  # [_GROUP, rows, columns], one of them shrunk
        promising = groups.amax(0) > (limit[:, None] if dim else limit)
        if promising.sum() > _CROWDED * promising.numel():
            top = (tile if dim else tile.T.contiguous()).topk(min(self.num_kept, tile.shape[dim]))
            self._take(owners, top.values, top.indices + partner)
            return
        row, column = promising.nonzero(as_tuple=True)
        who, group = (row, column) if dim else (column, row)
        values = groups[:, row, column]  # [_GROUP, m]
        member, which = (values > limit[who]).nonzero(as_tuple=True)
        if len(which):
            position = member * promising.shape[dim] + group[which]
            self._take_some(who[which] + owner, values[member, which], position + partner)

    def _take_some(self, owners: Tensor, values: Tensor, columns: Tensor) -> None:
        """Takes the best of a list of entries of any rows, `[m]` each."""
        owners, order = owners.sort(stable=True)
        owners, counts = owners.unique_consecutive(return_counts=True)
        line = torch.arange(len(owners), device=owners.device).repeat_interleave(counts)
        place = torch.arange(len(order), device=owners.device) - (counts.cumsum(0) - counts)[line]
        shape = len(owners), int(counts.max())
        table = values.new_full(shape, -math.inf)
        table[line, place] = values[order]
        theirs = columns.new_zeros(shape)
        theirs[line, place] = columns[order]
        self._take(owners, table, theirs)

    def _take(self, owners: slice | Tensor, values: Tensor, columns: Tensor) -> None:
        """Takes the best of entries `[rows, any]` of those rows."""
        columns = torch.cat((self.columns[owners], columns), dim=1)
        best = torch.cat((self.values[owners], values), dim=1).topk(self.num_kept)
        self.values[owners], self.columns[owners] = best.values, columns.gather(1, best.indices)

    def settle_ties(self) -> None:
        """Where the last entry kept equals the one before, chooses all but the last again, of equals the first ones."""
        k, tied = self.num_kept - 1, (self.values[:, -2] == self.values[:, -1]).nonzero().squeeze(1)
        for rows in tied.split(max(1, _TIE_ENTRIES // self.size)):
            matrix = self.entries(rows, slice(None), None)
            if self.exclude_diagonal:
                matrix[torch.arange(len(rows), device=rows.device), rows] = -math.inf
            last = matrix.topk(k).values[:, -1:]
            larger, equal = matrix > last, matrix == last
            room = k - larger.sum(1, keepdim=True)
            chosen = larger | (equal & (equal.cumsum(1, dtype=torch.int32) <= room))
            columns = chosen.nonzero()[:, 1].view(-1, k)
            self.values[rows, :k], self.columns[rows, :k] = matrix.gather(1, columns), columns


def _ascending(values: Tensor, columns: Tensor, excludes_self: bool) -> Neighbours:
    n, k = values.shape
    columns, order = columns.sort(dim=1)
    keys = torch.arange(n)[:, None] * n + columns
    return Neighbours(n, k, excludes_self, keys.flatten(), values.gather(1, order).double().flatten())
