"""Distances between two sets of images as distributions of features."""

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric

from vfm_vae.finite import check_finite, not_finite
from vfm_vae.metrics.features import add_feature_states, float32_arithmetic, keep_features, kept_features
from vfm_vae.metrics.neighbours import Search

PERMUTATION_SEED = 2020  # of the samples of an Inception Score, as torch-fidelity has it

_BLOCK_ROWS = 1024  # of a distance matrix held at a time: 200 MB at 50 000 samples
_EXACT_ROWS = 256  # of differences in float64 held at a time: 30 MB with 8 of width 2048
_CANDIDATES = 8  # balls looked at again where rounding leaves open whether a point lies in any


class Gaussian(NamedTuple):
    """What a Fréchet distance knows of a distribution.

    Attributes:
        mean: float64 `[d]`.
        covariance: float64 `[d, d]`.
    """

    mean: Tensor
    covariance: Tensor


def frechet_distance(mean_a: Tensor, covariance_a: Tensor, mean_b: Tensor, covariance_b: Tensor) -> Tensor:
    """Squared Fréchet (2-Wasserstein) distance of two Gaussians.

    `|mean_a - mean_b|^2 + tr(S_a) + tr(S_b) - 2 tr((S_a S_b)^(1/2))` (Dowson & Landau 1982; as FID, Heusel et al.
    2017, eq. 6). `S_a S_b` has the eigenvalues of the symmetric `R S_b R` with `R = S_a^(1/2)`, so two symmetric
    eigenvalue problems do for the root's trace, and nothing can turn complex.

    Args:
        mean_a: `[d]`.
        covariance_a: `[d, d]`, symmetric, positive semi-definite, possibly singular.
        mean_b: `[d]`.
        covariance_b: `[d, d]`.

    Returns:
        Scalar float64. Rounding may leave it a little (about 1e-8 of the covariances' trace) below zero.
    """
    mean_a, covariance_a, mean_b, covariance_b = (x.double() for x in (mean_a, covariance_a, mean_b, covariance_b))
    eigenvalues, eigenvectors = torch.linalg.eigh(covariance_a)
    root = eigenvectors * eigenvalues.clamp(min=0).sqrt() @ eigenvectors.T  # S_a^(1/2)
    product = root @ covariance_b @ root
    trace_of_root = torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0).sqrt().sum()
    return (mean_a - mean_b).square().sum() + covariance_a.trace() + covariance_b.trace() - 2 * trace_of_root


class Moments(Metric):
    """Mean and covariance of features, from running sums in float64 that add up over batches and ranks.

    Args:
        num_features: the features' width `d`.
    """

    full_state_update = False
    is_differentiable = False
    count: Tensor

    def __init__(self, num_features: int) -> None:
        super().__init__()
        _add_sums(self, "", num_features)

    def update(self, features: Tensor) -> None:
        """Adds samples.

        Args:
            features: `[B, d]`.

        Raises:
            ValueError: if the features' width is another than announced.
        """
        _add_samples(self, "", features)

    def compute(self) -> Gaussian:
        """Mean and unbiased covariance.

        Raises:
            ValueError: if there are fewer than two samples.
        """
        if self.count < 2:
            raise ValueError(f"a covariance needs at least two samples; got {self.count.item()}.")
        return _gaussian(self, "")


class FrechetDistance(Metric):
    """Fréchet distance between the features of real and of generated images.

    Keeps sums alone, so it holds any number of samples, and adds up over ranks. On Inception's pooled features this is
    FID, on its spatial ones sFID; on those of a VFM it is to be called `fd_<vfm>`, never `fid`.

    Args:
        num_features: the features' width `d`.
        reference: the real images' distribution, where it is known before; then only generated ones are added.

    Raises:
        ValueError: if the reference is of another width, or not finite.
    """

    full_state_update = False
    higher_is_better = False
    is_differentiable = False
    real_count: Tensor
    generated_count: Tensor
    generated_sum: Tensor

    def __init__(self, num_features: int, reference: Gaussian | None = None) -> None:
        super().__init__()
        if reference is not None and reference.covariance.shape != (num_features, num_features):
            raise ValueError(
                f"reference: a covariance of {num_features} features is [{num_features}, {num_features}]; got "
                f"{tuple(reference.covariance.shape)}."
            )
        if reference is not None and not all(statistic.isfinite().all() for statistic in reference):
            raise ValueError("reference: its statistics hold nan or inf; measure it anew, or give another")
        self._reference = reference
        _add_sums(self, "generated_", num_features)
        if reference is None:
            _add_sums(self, "real_", num_features)

    def update(self, features: Tensor, real: bool) -> None:
        """Adds samples.

        Args:
            features: `[B, d]`.
            real: whether they are of real images, or of generated ones.

        Raises:
            ValueError: if the features' width is another than announced, or they are real beside a reference.
        """
        _check_kind(real, self._reference)
        _add_samples(self, "real_" if real else "generated_", features)

    def compute(self) -> Tensor:
        """The distance, a float32 scalar.

        Raises:
            ValueError: if there are fewer than two samples of either kind.
        """
        if self._reference is not None:
            if self.generated_count < 2:
                raise ValueError(
                    "a Fréchet distance needs at least two generated samples beside its reference; got "
                    f"{self.generated_count.item()}."
                )
            real = Gaussian(*(statistic.to(self.generated_sum.device) for statistic in self._reference))
        else:
            if min(self.real_count, self.generated_count) < 2:
                raise ValueError(
                    "a Fréchet distance needs at least two real and two generated samples; got "
                    f"{self.real_count.item()} and {self.generated_count.item()}."
                )
            real = _gaussian(self, "real_")
        return frechet_distance(*real, *_gaussian(self, "generated_")).float()

    def real_gaussian(self) -> Gaussian:
        """Mean and covariance of the real images so far, over all ranks, which have to ask together."""
        with self.sync_context():
            return _gaussian(self, "real_")


def _check_kind(real: bool, reference: object | None) -> None:
    if real and reference is not None:
        raise ValueError("real: True was given, but the reference stands for real images; add generated ones only.")


def _add_sums(metric: Metric, prefix: str, num_features: int) -> None:
    """Gives a metric the states of one distribution: `<prefix>count`, `<prefix>sum` and `<prefix>outer`."""
    metric.add_state(f"{prefix}count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
    metric.add_state(f"{prefix}sum", torch.zeros(num_features, dtype=torch.float64), dist_reduce_fx="sum")
    outer = torch.zeros(num_features, num_features, dtype=torch.float64)
    metric.add_state(f"{prefix}outer", outer, dist_reduce_fx="sum")


def _sums(metric: Metric, prefix: str) -> tuple[Tensor, Tensor, Tensor]:
    return getattr(metric, f"{prefix}count"), getattr(metric, f"{prefix}sum"), getattr(metric, f"{prefix}outer")


def _add_samples(metric: Metric, prefix: str, features: Tensor) -> None:
    count, total, outer = _sums(metric, prefix)
    if features.ndim != 2 or features.shape[1] != len(total):
        raise ValueError(f"features must be [B, {len(total)}]; got {tuple(features.shape)}.")
    features = features.detach().double()
    count.add_(len(features))
    total.add_(features.sum(0))
    outer.addmm_(features.T, features)


def _gaussian(metric: Metric, prefix: str) -> Gaussian:
    """Mean and unbiased covariance from running sums.

    Raises:
        ValueError: if features held nan or inf.
    """
    count, total, outer = _sums(metric, prefix)
    if not outer.diagonal().isfinite().all():
        raise not_finite(f"features: some of {int(count)} images hold nan or inf")
    mean = total / count
    return Gaussian(mean, (outer - count * torch.outer(mean, mean)) / (count - 1))


class InceptionScore(Metric):
    """Inception Score: whether images are told apart clearly, and all classes occur (Salimans et al. 2016, section 4).

    `exp(mean KL(p(y|x) || p(y)))` in each split of the samples, then the mean over splits. A sample's number decides
    which split it belongs to, by torch-fidelity's permutation: data sets are sorted by class, and a run of numbers
    would hold few classes. So neither order nor ranks matter. The last split may be smaller, and those without samples
    don't count; where fewer samples come than were announced, all splits are smaller, and the score with them. Keeps
    sums, in float64, and the permutation.

    Args:
        num_images: Number of samples to expect.
        split_size: samples in a split; ADM's evaluator has 5 000.
        num_classes: width of the logits.

    Raises:
        ValueError: if there is no image, or none in a split.
    """

    full_state_update = False
    higher_is_better = True
    is_differentiable = False
    split: Tensor
    count: Tensor
    negentropy: Tensor
    sum: Tensor

    def __init__(self, num_images: int, split_size: int = 5000, num_classes: int = 1008) -> None:
        super().__init__()
        if min(num_images, split_size) < 1:
            raise ValueError(
                f"num_images and split_size must be at least 1; got num_images = {num_images} and "
                f"split_size = {split_size}."
            )
        self.num_images, self.split_size = num_images, split_size
        # The j-th of the shuffled samples is number permutation[j], so number i is the permutation.argsort()[i]-th.
        permutation = torch.from_numpy(np.random.RandomState(PERMUTATION_SEED).permutation(num_images))
        self.register_buffer("split", permutation.argsort() // split_size, persistent=False)
        num_splits = math.ceil(num_images / split_size)
        self.add_state("count", torch.zeros(num_splits, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("negentropy", torch.zeros(num_splits, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("sum", torch.zeros(num_splits, num_classes, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, logits: Tensor, index: Tensor) -> None:
        """Adds samples.

        Args:
            logits: `[B, num_classes]`.
            index: number of each sample from 0 to `num_images - 1`, int64 `[B]`; negative ones are left out.

        Raises:
            ValueError: if shapes don't fit, or a number is beyond those announced.
        """
        if logits.shape != (len(index), self.sum.shape[1]) or index.ndim != 1:
            raise ValueError(
                f"logits and index must be [B, {self.sum.shape[1]}] and [B]; got {tuple(logits.shape)} and "
                f"{tuple(index.shape)}."
            )
        logits, index = logits[index >= 0].detach().double(), index[index >= 0]
        if len(index) and index.max() >= self.num_images:
            raise ValueError(
                f"index must lie below num_images = {self.num_images}; got {index.max().item()}. Announce more images."
            )
        split = self.split[index]
        log_p = logits.log_softmax(1)  # [B, C]
        p = log_p.exp()
        self.count.index_add_(0, split, torch.ones_like(split))
        self.negentropy.index_add_(0, split, (p * log_p).sum(1))
        self.sum.index_add_(0, split, p)

    def compute(self) -> Tensor:
        """The score, a float32 scalar from 1 to the number of classes; nan without samples.

        `mean_i KL(p_i || q) = mean_i sum p_i log p_i - sum q log q` with `q = mean_i p_i`.

        Raises:
            ValueError: if logits held nan or inf.
        """
        used = self.count > 0
        count, negentropy, total = self.count[used], self.negentropy[used], self.sum[used]
        if not negentropy.isfinite().all():
            raise not_finite(f"logits: some of {int(count.sum())} images hold nan or inf")
        marginal = total / count[:, None]  # [splits, C]
        divergence = negentropy / count - torch.special.xlogy(marginal, marginal).sum(1)
        return divergence.exp().mean().float()


class PrecisionRecall(Metric):
    """Improved precision and recall (Kynkäänniemi et al. 2019, eq. 1 and 2; ADM's evaluator has k = 3).

    Each sample stands for a ball that reaches to its k-th nearest of the same kind. Precision is the share of generated
    samples inside the ball of any real one, recall the share of real ones inside the ball of any generated one. Samples
    are told apart by their numbers: one seen twice counts once, padding (negative number) not at all, and neither
    order nor ranks matter. A rank without samples has to add none of the features' width.

    Distances come from float32 products, in blocks; where these leave a choice open it is made in float64.

    Args:
        k: Balls reach to the k-th neighbour, not counting the sample itself.
        reference: features of real images `[m, d]`, where they are known before, the same on every rank; then only
            generated ones are added.
    """

    full_state_update = False
    is_differentiable = False
    real_index: list[Tensor]
    generated_index: list[Tensor]

    def __init__(self, k: int = 3, reference: Tensor | None = None) -> None:
        super().__init__()
        if reference is not None:
            check_finite("reference: its features", reference)
        self.k = k
        self._reference = reference
        add_feature_states(self, "generated_")
        if reference is None:
            add_feature_states(self, "real_")

    def update(self, features: Tensor, index: Tensor, real: bool = False) -> None:
        """Adds samples.

        Args:
            features: `[B, d]`.
            index: number of each sample among those of its kind, int64 `[B]`; negative ones are left out.
            real: whether they are of real images, or of generated ones.

        Raises:
            ValueError: if shapes don't fit, or they are real beside a reference.
        """
        _check_kind(real, self._reference)
        keep_features(self, features, index, "real_" if real else "generated_")

    def compute(self) -> dict[str, Tensor]:
        """`precision` and `recall`, float32 scalars in [0, 1].

        Raises:
            ValueError: if there are not more than k samples of either kind.
        """
        none = torch.zeros(0)
        generated = kept_features(self, "generated_") if len(self.generated_index) else none
        if self._reference is not None:
            real = self._reference.to(self.device).float()
        else:
            real = kept_features(self, "real_") if len(self.real_index) else none
        if min(len(real), len(generated)) <= self.k:
            raise ValueError(
                f"precision and recall with k = {self.k} need more than {self.k} real and generated samples; got "
                f"{len(real)} and {len(generated)}."
            )
        with float32_arithmetic(generated.device):
            centre = real.mean(0)  # distances come from inner products, which cancel less near the origin
            precise, recalled = _inside_balls(generated - centre, real - centre, self.k)
        return {"precision": precise.float().mean(), "recall": recalled.float().mean()}

    def real_samples(self) -> Tensor:
        """Features of the real images so far, float32 `[m, d]`, over all ranks, which have to ask together."""
        with self.sync_context():
            return kept_features(self, "real_")


def _inside_balls(a: Tensor, b: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Which samples `a: [n, d]` lie in the balls around `b: [m, d]`, and which of `b` in those around `a`, bool."""
    radii_a, radii_b = _radii(a, k), _radii(b, k)
    # What products in float32 may be off: a few rounding errors of the longest features' squared length.
    tolerance = 1e-5 * float(a.square().sum(1).amax() + b.square().sum(1).amax())
    inside_a, inside_b = (torch.zeros(len(x), dtype=torch.bool, device=x.device) for x in (a, b))
    for start in range(0, len(a), _BLOCK_ROWS):
        rows = slice(start, start + _BLOCK_ROWS)
        squares = _squared_distances(a[rows], b)  # [rows, m]
        inside_a[rows] = _reached(radii_b.float() - squares, a[rows], b, radii_b, tolerance)
        margin = (radii_a[rows, None].float() - squares).T  # [m, rows]
        inside_b |= _reached(margin, b, a[rows], radii_a[rows], tolerance)
    return inside_a, inside_b


def _reached(margin: Tensor, points: Tensor, centres: Tensor, radii: Tensor, tolerance: float) -> Tensor:
    """Which points lie in any ball, from how deep they lie in each, `[points, centres]`, up to a tolerance."""
    deepest = margin.amax(1)
    reached = deepest > tolerance
    unsure = (deepest.abs() <= tolerance).nonzero().squeeze(1)
    if len(unsure):
        # More than a few balls that all touch a point within rounding happen where samples coincide; any will do then.
        nearest = margin[unsure].topk(min(_CANDIDATES, len(centres))).indices
        reached[unsure] = (_exact(points[unsure], centres, nearest) <= radii[nearest]).any(1)
    return reached


def _radii(features: Tensor, k: int) -> Tensor:
    """Squared distance of each sample to its k-th nearest other one, float64 `[n]`."""
    lengths = features.square().sum(1)

    def closeness(rows: slice | Tensor, columns: slice, out: Tensor | None = None) -> Tensor:
        products = torch.mm(features[rows], features[columns].T, out=out)
        return products.mul_(2).sub_(lengths[rows, None]).sub_(lengths[columns])

    # One more than asked for: which of two as near is the k-th is settled in float64.
    search = Search(closeness, len(features), min(k + 1, len(features) - 1), True, features.device)
    search.run()
    return _exact(features, features, search.columns).sort(1).values[:, k - 1]


def _squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """Squared distances `[n, m]` of `[n, d]` and `[m, d]`, from products, so off by rounding."""
    return torch.addmm(b.square().sum(1), a, b.T, alpha=-2).add_(a.square().sum(1, keepdim=True))


def _exact(points: Tensor, centres: Tensor, which: Tensor) -> Tensor:
    """Squared distances of each point to some of the centres, `which: [n, c]`, from differences in float64."""
    blocks = [
        (centres[columns].double() - rows[:, None].double()).square_().sum(2)
        for rows, columns in zip(points.split(_EXACT_ROWS), which.split(_EXACT_ROWS), strict=True)
    ]
    return torch.cat(blocks)
