"""Distances between two sets of images as distributions of features."""

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric

from vfm_vae.finite import not_finite
from vfm_vae.metrics.features import check_kind

PERMUTATION_SEED = 2020  # of the samples of an Inception Score, as torch-fidelity has it


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
        num_features: The features' width `d`.
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
        num_features: The features' width `d`.
        reference: The real images' distribution, where it is known before; then only generated ones are added.

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
            real: Whether they are of real images, or of generated ones.

        Raises:
            ValueError: if the features' width is another than announced, or they are real beside a reference.
        """
        check_kind(real, self._reference)
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
        split_size: Samples in a split; ADM's evaluator has 5 000.
        num_classes: Width of the logits.

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
            index: Number of each sample from 0 to `num_images - 1`, int64 `[B]`; negative ones are left out.

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
