"""How similarly two feature spaces arrange the same samples: CKNNA, mutual nearest neighbours, and CKA.

Centred kernel nearest-neighbour alignment is from Huh et al. 2024, "The Platonic Representation Hypothesis". The usual
forms build several `n x n` matrices and multiply two of them. Here each sample's nearest neighbours are searched, and
all that follows is sums over at most `n * k` non-zeros; linear CKA comes from products of channels by channels. All
are exact, at any number of samples.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torchmetrics import Metric

from vfm_vae.metrics.features import add_feature_states, keep_features, kept_features
from vfm_vae.metrics.neighbours import Neighbours, check_count, intersect, nearest_neighbours

_PART_ROWS = 4096  # of float64 features held at a time


def prepare_features(features: Tensor, q: float = 0.95) -> Tensor:
    """Tames outliers, then brings every sample to unit length, as is done before CKNNA is measured.

    All values are clamped to `[-limit, limit]`, where `limit` is the entry `int(q * numel)` of the sorted absolute
    values of the whole matrix; then each row is L2-normalised.

    Args:
        features: `[n, d]`, any floating-point type.
        q: The fraction of absolute values that stays as it is, in [0, 1].

    Returns:
        `[n, d]` in float32.

    Raises:
        ValueError: if `features` is no matrix, or `q` lies outside of [0, 1].
    """
    if features.ndim != 2 or not features.numel():
        raise ValueError(f"features must be a matrix [samples, channels] with entries; got {tuple(features.shape)}.")
    if not 0 <= q <= 1:
        raise ValueError(f"q must lie in [0, 1]; got {q}.")
    features = features.float()
    rank = min(int(q * features.numel()), features.numel() - 1)
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
        a: Features `[n, d_a]`, usually from `prepare_features`.
        b: Features `[n, d_b]` of the same samples in the same order.
        k: Number of neighbours.
        unbiased: Use the unbiased estimate of HSIC, where no sample is its own neighbour; the biased one lets it be.

    Returns:
        Scalar float32, at most 1; nan where the unbiased self-alignments have no common sign, or features are not
        finite.

    Raises:
        ValueError: if the features don't belong together, or there are too few samples for `k`.
    """
    _check_features(a, b)
    _check_samples(len(a), k, unbiased)
    near_a, near_b = (nearest_neighbours(x, k, exclude_self=unbiased) for x in (a, b))
    return cknna_of_neighbours(near_a, near_b, unbiased).to(a.device)


def cknna_of_neighbours(near_a: Neighbours, near_b: Neighbours, unbiased: bool = True) -> Tensor:
    """CKNNA from neighbours already found: who compares many features with one another searches each of them once.

    Args:
        near_a: The neighbours of every sample in one kernel, from `nearest_neighbours`.
        near_b: Those of the same samples in the other.
        unbiased: Use the unbiased estimate of HSIC, for which neighbours are searched with `exclude_self`; the biased
            one is for neighbours searched without.

    Returns:
        Scalar float32 on the CPU, as of `cknna`.

    Raises:
        ValueError: if the neighbours don't belong together, or are not of the kind that the estimate needs.
    """
    for name, near in (("near_a", near_a), ("near_b", near_b)):
        if near.excludes_self != unbiased:
            raise ValueError(
                f"{name}: unbiased={unbiased} needs neighbours searched with exclude_self={unbiased}; "
                f"got exclude_self={near.excludes_self}."
            )
    if (near_a.num_samples, near_a.k) != (near_b.num_samples, near_b.k):
        raise ValueError(
            "near_a and near_b must be equally many neighbours of the same samples; "
            f"got {near_a.k} of {near_a.num_samples} and {near_b.k} of {near_b.num_samples}."
        )
    _check_samples(near_a.num_samples, near_a.k, unbiased)
    hsic_of = _hsic_unbiased if unbiased else _hsic_biased
    scale = hsic_of(_MaskedPair.of(near_a, near_a)) * hsic_of(_MaskedPair.of(near_b, near_b))
    return (hsic_of(_MaskedPair.of(near_a, near_b)) / (scale.sqrt() + 1e-6)).float()


def mutual_knn(a: Tensor, b: Tensor, k: int = 10) -> Tensor:
    """The part of each sample's `k` nearest neighbours that both feature spaces share, averaged (Huh et al. 2024).

    No sample is its own neighbour; of neighbours equally near, those that come first in the batch are taken.

    Args:
        a: Features `[n, d_a]`, usually from `prepare_features`.
        b: Features `[n, d_b]` of the same samples in the same order.
        k: Number of neighbours.

    Returns:
        Scalar float32 in [0, 1], `k / (n - 1)` for unrelated features; nan where features are not finite.

    Raises:
        ValueError: if the features don't belong together, or there are too few samples for `k`.
    """
    _check_features(a, b)
    pair = _MaskedPair.of(*(nearest_neighbours(x, k) for x in (a, b)))
    share = torch.tensor(len(pair.keys) / (len(a) * k), device=a.device)
    # Neighbours of features that are not finite are none, but make a pair all the same.
    return share if bool((pair.p + pair.q).isfinite().all()) else torch.full_like(share, math.nan)


def cka(a: Tensor, b: Tensor, unbiased: bool = False) -> Tensor:
    """Linear centred kernel alignment: `HSIC(K, L) / (sqrt(HSIC(K, K) HSIC(L, L)) + 1e-6)` (Kornblith et al. 2019).

    The small number in the denominator is as in CKNNA, so that published values are met. Never is a kernel `n x n`
    computed: see `hsic`.

    Args:
        a: Features `[n, d_a]`, any floating-point type.
        b: Features `[n, d_b]` of the same samples in the same order.
        unbiased: Use the unbiased estimate of HSIC.

    Returns:
        Scalar float32, at most 1, 0 where a feature space holds a single point; nan where the unbiased
        self-alignments have no common sign, or features are not finite.

    Raises:
        ValueError: if the features don't belong together, or there are fewer than 4 samples (biased: 1).
    """
    scale = hsic(a, a, unbiased) * hsic(b, b, unbiased)
    return (hsic(a, b, unbiased) / (scale.sqrt() + 1e-6)).float()


@torch.no_grad()
def hsic(a: Tensor, b: Tensor, unbiased: bool = False) -> Tensor:
    """Hilbert-Schmidt independence criterion of two linear kernels `K = A A^T` and `L = B B^T`.

    The biased one is `tr(K H L H)` with `H = I - 1/n` (Gretton et al. 2005, without its factor). The unbiased one is of
    both kernels with their diagonals set to zero,
    `[tr(K L) + sum K sum L / ((n-1)(n-2)) - 2 sum (K L) / (n-2)] / (n(n-3))` (Song et al. 2012). Neither changes when
    features are shifted, so both are of centred features, with rows `x_i` and `y_i`: the first is `|X^T Y|^2`; the
    second follows from it with `u_i = |x_i|^2` and `v_i = |y_i|^2` alone, because a row of `X X^T` sums up to zero, and
    without its diagonal to `-u_i`. Time is `O(n d_a d_b)`, memory `O(d_a d_b)`.

    Args:
        a: Features `[n, d_a]`, any floating-point type.
        b: Features `[n, d_b]` of the same samples in the same order.
        unbiased: Use the unbiased estimate.

    Returns:
        Scalar float64.

    Raises:
        ValueError: if the features don't belong together, or there are fewer than 4 samples (biased: 1).
    """
    _check_features(a, b)
    n, least = len(a), 4 if unbiased else 1
    if n < least:
        raise ValueError(f"a and b: HSIC needs at least {least} samples; got {n}.")
    mean_a, mean_b = (sum(part.double().sum(0) for part in x.split(_PART_ROWS)) / n for x in (a, b))
    cross = mean_a.new_zeros(a.shape[1], b.shape[1])
    sum_u, sum_v, sum_uv = mean_a.new_zeros(3)
    for part_a, part_b in zip(a.split(_PART_ROWS), b.split(_PART_ROWS), strict=True):
        x, y = part_a.double() - mean_a, part_b.double() - mean_b
        cross.addmm_(x.T, y)
        u, v = x.square().sum(1), y.square().sum(1)
        sum_u, sum_v, sum_uv = sum_u + u.sum(), sum_v + v.sum(), sum_uv + u @ v
    trace = cross.square().sum()
    if not unbiased:
        return trace
    return (trace - sum_uv + sum_u * sum_v / ((n - 1) * (n - 2)) - 2 * sum_uv / (n - 2)) / (n * (n - 3))


def _check_features(a: Tensor, b: Tensor) -> None:
    if a.ndim != 2 or b.ndim != 2 or len(a) != len(b):
        raise ValueError(
            "a and b must be features of the same samples, [samples, channels]; "
            f"got {tuple(a.shape)} and {tuple(b.shape)}."
        )


def _check_samples(num_samples: int, k: int, unbiased: bool) -> None:
    check_count(num_samples, k, max(4, k + 1) if unbiased else k)


class _MaskedPair(NamedTuple):
    """Two `n x n` kernels under one mask, the mask's non-zeros alone.

    Attributes:
        num_samples: `n`.
        keys: Position `row * n + column` of each non-zero, ascending, `[m]`.
        p: The first kernel there, float64 `[m]`.
        q: The second kernel there, float64 `[m]`.
    """

    num_samples: int
    keys: Tensor
    p: Tensor
    q: Tensor

    @classmethod
    def of(cls, first: Neighbours, second: Neighbours) -> "_MaskedPair":
        """Both kernels, where a neighbour is one in both."""
        here, there = intersect(first.keys, second.keys)
        return cls(first.num_samples, first.keys[here], first.values[here], second.values[there])

    def trace(self) -> Tensor:
        """`tr(P Q) = sum_ij P_ij Q_ji`. The mask is not symmetric: only pairs that hold both ways contribute."""
        n = self.num_samples
        mirrored = self.keys % n * n + self.keys // n
        here, there = intersect(mirrored, self.keys)
        return (self.p[here] * self.q[there]).sum()

    def sum_of_product(self) -> Tensor:
        """`sum (P Q) = sum_j (column sum of P)_j (row sum of Q)_j`."""
        n = self.num_samples
        return torch.bincount(self.keys % n, self.p, n) @ torch.bincount(self.keys // n, self.q, n)

    def swapped(self) -> "_MaskedPair":
        """The same with P and Q exchanged."""
        return self._replace(p=self.q, q=self.p)


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

    Features are kept until `compute`, which prepares them (`prepare_features`) and measures. Samples are told apart by
    their index: a sample seen twice counts once, padding (negative index) not at all, and order does not matter.

    Args:
        k: Number of neighbours.
        unbiased: Use the unbiased estimate of HSIC.
        quantile: The fraction of absolute values that is not clamped.
    """

    full_state_update = False
    higher_is_better = True
    is_differentiable = False

    def __init__(self, k: int = 10, unbiased: bool = True, quantile: float = 0.95) -> None:
        super().__init__()
        self.k, self.unbiased, self.quantile = k, unbiased, quantile
        for side in ("a_", "b_"):
            add_feature_states(self, side)

    def update(self, a: Tensor, b: Tensor, index: Tensor) -> None:
        """Adds samples.

        Args:
            a: Features `[B, d_a]`.
            b: Features `[B, d_b]` to compare with.
            index: Number of each sample, int64 `[B]`; samples with a negative number are left out.
        """
        _check_features(a, b)
        keep_features(self, a, index, "a_")
        keep_features(self, b, index, "b_")

    def compute(self) -> Tensor:
        """CKNNA of the samples so far: a float32 scalar, nan with a warning if they are too few for `k`."""
        a, b = kept_features(self, "a_"), kept_features(self, "b_")
        try:
            _check_samples(len(a), self.k, self.unbiased)
        except ValueError as error:
            rank_zero_warn(f"CKNNA is not defined here: {error}")
            return torch.tensor(math.nan, device=self.device)
        a, b = (prepare_features(x, self.quantile) for x in (a, b))
        return cknna(a, b, self.k, self.unbiased)
