"""How alike two feature spaces arrange the same samples: CKNNA, exact and at any number of samples.

Centred kernel nearest-neighbour alignment is from Huh et al. 2024, "The Platonic Representation Hypothesis". Its usual
form builds several `n x n` matrices and multiplies two of them. Here the kernels are only ever seen in blocks, from
which each sample's nearest neighbours are kept; all that follows is sums over at most `n * k` non-zeros.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

_BLOCK_ROWS = 512  # of a kernel held at a time: 100 MB at 50 000 samples


def prepare_features(features: Tensor, quantile: float = 0.95) -> Tensor:
    """Tames outliers, then brings every sample to unit length, as is done before CKNNA is measured.

    All values are clamped to `[-q, q]`, where `q` is the entry `int(quantile * numel)` of the sorted absolute values
    of the whole matrix; then each row is L2-normalised.

    Args:
        features: `[n, d]`, any floating-point type.
        quantile: the fraction of absolute values that stays as it is, in [0, 1].

    Returns:
        `[n, d]` in float32.

    Raises:
        ValueError: if `features` is no matrix, or `quantile` lies outside of [0, 1].
    """
    if features.ndim != 2 or not features.numel():
        raise ValueError(f"features must be a matrix [samples, channels] with entries; got {tuple(features.shape)}.")
    if not 0 <= quantile <= 1:
        raise ValueError(f"quantile must lie in [0, 1]; got {quantile}.")
    features = features.float()
    rank = min(int(quantile * features.numel()), features.numel() - 1)
    limit = features.abs().flatten().kthvalue(rank + 1).values
    return F.normalize(features.clamp(-limit, limit), dim=1)


def cknna(a: Tensor, b: Tensor, k: int = 10, unbiased: bool = True) -> Tensor:
    """Centred kernel nearest-neighbour alignment of two sets of features of the same samples.

    With `K = A A^T`, `L = B B^T` and a mask that keeps the entries `(i, j)` where `j` is among the `k` nearest
    neighbours of `i` in both kernels, `align(K, L) = HSIC(mask * K, mask * L)` and
    `CKNNA = align(K, L) / (sqrt(align(K, K) align(L, L)) + 1e-6)` (Huh et al. 2024). Among neighbours
    equally near, those that come first in the batch are taken. The order of `a` and `b` matters in the fourth decimal
    or so: neighbourhood is not mutual, so `sum (PQ)` is not `sum (QP)`. Time is `O(n^2 d)`, memory `O(n k)` above the
    features.

    Args:
        a: features `[n, d_a]`, usually from `prepare_features`.
        b: features `[n, d_b]` of the same samples in the same order.
        k: number of neighbours.
        unbiased: use the unbiased estimate of HSIC, where no sample is its own neighbour; the biased one lets it be.

    Returns:
        Scalar float32, at most 1; nan where the unbiased self-alignments have no common sign, or features are not
        finite.

    Raises:
        ValueError: if the features don't belong together, or there are too few samples for `k`.
    """
    _check_features(a, b)
    _check_count(len(a), k, unbiased)
    with _float32_arithmetic(a.device):
        near_a, near_b = _nearest(a, k, exclude_self=unbiased), _nearest(b, k, exclude_self=unbiased)
    hsic = _hsic_unbiased if unbiased else _hsic_biased
    common = near_a.common(near_b)
    scale = hsic(near_a.with_itself()) * hsic(near_b.with_itself())
    return (hsic(common) / (scale.sqrt() + 1e-6)).to(a.device, torch.float32)


def _check_features(a: Tensor, b: Tensor) -> None:
    if a.ndim != 2 or b.ndim != 2 or len(a) != len(b):
        raise ValueError(
            "a and b must be features of the same samples, [samples, channels]; "
            f"got {tuple(a.shape)} and {tuple(b.shape)}."
        )


def _check_count(num_samples: int, k: int, unbiased: bool) -> None:
    least = max(4, k + 1) if unbiased else k
    if k < 1 or num_samples < least:
        raise ValueError(f"k = {k} neighbours need k >= 1 and at least {least} samples; got {num_samples} samples.")


@contextmanager
def _float32_arithmetic(device: torch.device) -> Iterator[None]:
    """Neighbours are compared in full float32, whatever the training run allows its own products."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)


class _MaskedPair(NamedTuple):
    """Two `n x n` kernels under one mask, the mask's non-zeros alone.

    Attributes:
        num_samples: `n`.
        keys: position `row * n + column` of each non-zero, ascending, `[m]`.
        p: the first kernel there, float64 `[m]`.
        q: the second kernel there, float64 `[m]`.
    """

    num_samples: int
    keys: Tensor
    p: Tensor
    q: Tensor

    def trace(self) -> Tensor:
        """`tr(P Q) = sum_ij P_ij Q_ji`. The mask is not symmetric: only pairs that hold both ways contribute."""
        n = self.num_samples
        mirrored = self.keys % n * n + self.keys // n
        here, there = _intersect(mirrored, self.keys)
        return (self.p[here] * self.q[there]).sum()

    def sum_of_product(self) -> Tensor:
        """`sum (P Q) = sum_j (column sum of P)_j (row sum of Q)_j`."""
        n = self.num_samples
        return torch.bincount(self.keys % n, self.p, n) @ torch.bincount(self.keys // n, self.q, n)

    def swapped(self) -> "_MaskedPair":
        """The same with P and Q exchanged."""
        return self._replace(p=self.q, q=self.p)


class _Neighbours(NamedTuple):
    """The `k` nearest neighbours of every sample, on the CPU, where the sums below are cheap and deterministic.

    Attributes:
        num_samples: `n`.
        keys: `sample * n + neighbour`, ascending, `[n * k]`.
        values: the kernel there, float64 `[n * k]`.
    """

    num_samples: int
    keys: Tensor
    values: Tensor

    def common(self, other: "_Neighbours") -> _MaskedPair:
        """Both kernels, where a neighbour is one in both."""
        here, there = _intersect(self.keys, other.keys)
        return _MaskedPair(self.num_samples, self.keys[here], self.values[here], other.values[there])

    def with_itself(self) -> _MaskedPair:
        """The kernel beside itself."""
        return _MaskedPair(self.num_samples, self.keys, self.values, self.values)


def _intersect(keys: Tensor, ascending: Tensor) -> tuple[Tensor, Tensor]:
    """Which of `keys` occur in `ascending` (bool mask), and where those do."""
    position = torch.searchsorted(ascending, keys).clamp(max=len(ascending) - 1)
    found = ascending[position] == keys if len(ascending) else torch.zeros_like(keys, dtype=torch.bool)
    return found, position[found]


def _nearest(features: Tensor, k: int, exclude_self: bool) -> _Neighbours:
    """Finds each sample's `k` nearest by inner product.

    The kernel is symmetric, so only its blocks on and above the diagonal are computed, and each is searched along
    its rows and along its columns. One neighbour more than asked for is kept: where it is as near as the last, the
    choice is made anew over the whole row.
    """
    features = features.float()
    n = len(features)
    values = features.new_full((n, k + 1), -math.inf)
    columns = torch.zeros((n, k + 1), dtype=torch.int64, device=features.device)

    def offer(first_row: int, kernel: Tensor, first_column: int) -> None:
        rows = slice(first_row, first_row + len(kernel))
        near = kernel.topk(min(k + 1, kernel.shape[1]))
        candidates = torch.cat((columns[rows], near.indices + first_column), dim=1)
        values[rows], chosen = torch.cat((values[rows], near.values), dim=1).topk(k + 1)
        columns[rows] = candidates.gather(1, chosen)

    for start in range(0, n, _BLOCK_ROWS):
        kernel = features[start : start + _BLOCK_ROWS] @ features[start:].T  # [rows, n - start]
        if exclude_self:
            kernel.diagonal().fill_(-math.inf)
        offer(start, kernel, start)
        if start + _BLOCK_ROWS < n:
            offer(start + _BLOCK_ROWS, kernel[:, _BLOCK_ROWS:].T, start)
    _settle_ties(features, values, columns, exclude_self)
    return _sorted_neighbours(values[:, :-1].cpu(), columns[:, :-1].cpu())


def _settle_ties(features: Tensor, values: Tensor, columns: Tensor, exclude_self: bool) -> None:
    """Where the last neighbour and the first one left out are equally near, chooses again, the earlier first."""
    tied = (values[:, -2] == values[:, -1]).nonzero().squeeze(1)
    for rows in tied.split(_BLOCK_ROWS):
        kernel = features[rows] @ features.T
        if exclude_self:
            kernel[torch.arange(len(rows), device=rows.device), rows] = -math.inf
        near, order = kernel.sort(descending=True, stable=True)
        values[rows], columns[rows] = near[:, : values.shape[1]], order[:, : values.shape[1]]


def _sorted_neighbours(values: Tensor, columns: Tensor) -> _Neighbours:
    n = len(values)
    columns, order = columns.sort(dim=1)
    keys = torch.arange(n)[:, None] * n + columns
    return _Neighbours(n, keys.flatten(), values.gather(1, order).double().flatten())


def _hsic_unbiased(pair: _MaskedPair) -> Tensor:
    """`[tr(PQ) + sum P sum Q / ((n-1)(n-2)) - 2 sum(PQ) / (n-2)] / (n(n-3))` for zero diagonals (Song et al. 2012)."""
    n = pair.num_samples
    total = pair.p.sum() * pair.q.sum()
    return (pair.trace() + total / ((n - 1) * (n - 2)) - 2 * pair.sum_of_product() / (n - 2)) / (n * (n - 3))


def _hsic_biased(pair: _MaskedPair) -> Tensor:
    """`tr(P H Q H)` with `H = I - 1/n`, multiplied out (Gretton et al. 2005, without its factor)."""
    n = pair.num_samples
    products = pair.sum_of_product() + pair.swapped().sum_of_product()
    return pair.trace() - products / n + pair.p.sum() * pair.q.sum() / n**2


class CKNNA(Metric):
    """CKNNA over a whole evaluation, whichever rank saw which sample.

    Features are kept until `compute`, which prepares them
    (`prepare_features`) and measures. Samples are told apart by their
    index: a sample seen twice counts once, padding (negative index) not at all, and order does not matter.

    Args:
        k: number of neighbours.
        unbiased: use the unbiased estimate of HSIC.
        quantile: the fraction of absolute values that is not clamped.
    """

    full_state_update = False
    higher_is_better = True
    is_differentiable = False

    def __init__(self, k: int = 10, unbiased: bool = True, quantile: float = 0.95) -> None:
        super().__init__()
        self.k, self.unbiased, self.quantile = k, unbiased, quantile
        self.add_state("a", default=[], dist_reduce_fx="cat")
        self.add_state("b", default=[], dist_reduce_fx="cat")
        self.add_state("index", default=[], dist_reduce_fx="cat")

    def update(self, a: Tensor, b: Tensor, index: Tensor) -> None:
        """Adds samples.

        Args:
            a: features `[B, d_a]`.
            b: features `[B, d_b]` to compare with.
            index: which sample of the data set each is, int64 `[B]`; negative ones are left out.
        """
        _check_features(a, b)
        real = index >= 0
        self.a.append(a[real].detach().float())
        self.b.append(b[real].detach().float())
        self.index.append(index[real])

    def compute(self) -> Tensor:
        """CKNNA of the samples so far: a float32 scalar, nan with a warning if they are too few for `k`."""
        index = dim_zero_cat(self.index)
        order = index.argsort(stable=True)
        index = index[order]
        first = torch.ones_like(index, dtype=torch.bool)
        first[1:] = index[1:] != index[:-1]
        order = order[first]
        try:
            _check_count(len(order), self.k, self.unbiased)
        except ValueError as error:
            rank_zero_warn(f"CKNNA is not defined here: {error}")
            return torch.tensor(math.nan, device=self.device)
        a, b = (prepare_features(dim_zero_cat(x)[order], self.quantile) for x in (self.a, self.b))
        return cknna(a, b, self.k, self.unbiased)
