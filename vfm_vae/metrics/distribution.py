"""How far two sets of images lie apart as distributions of features."""

import torch
from torch import Tensor
from torchmetrics import Metric


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


class FrechetDistance(Metric):
    """Fréchet distance between the features of real and of generated images.

    Keeps sums alone (count, sum and outer products, in float64), so it holds any number of samples, and adds up over
    ranks. On Inception features this would be FID; on those of a VFM it is to be called `fd_<vfm>`, never `fid`.

    Args:
        num_features: the features' width `d`.
    """

    full_state_update = False
    higher_is_better = False
    is_differentiable = False

    def __init__(self, num_features: int) -> None:
        super().__init__()
        for side in ("real", "generated"):
            self.add_state(f"{side}_count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
            self.add_state(f"{side}_sum", torch.zeros(num_features, dtype=torch.float64), dist_reduce_fx="sum")
            outer = torch.zeros(num_features, num_features, dtype=torch.float64)
            self.add_state(f"{side}_outer", outer, dist_reduce_fx="sum")

    def update(self, features: Tensor, real: bool) -> None:
        """Adds samples.

        Args:
            features: `[B, d]`.
            real: whether they are of real images, or of generated ones.

        Raises:
            ValueError: if the features' width is another than announced.
        """
        if features.ndim != 2 or features.shape[1] != len(self.real_sum):
            raise ValueError(f"features must be [B, {len(self.real_sum)}]; got {tuple(features.shape)}.")
        features = features.detach().double()
        if real:
            self.real_count += len(features)
            self.real_sum += features.sum(0)
            self.real_outer += features.T @ features
        else:
            self.generated_count += len(features)
            self.generated_sum += features.sum(0)
            self.generated_outer += features.T @ features

    def compute(self) -> Tensor:
        """The distance, a float32 scalar.

        Raises:
            ValueError: if there are fewer than two samples of either kind.
        """
        if min(self.real_count, self.generated_count) < 2:
            raise ValueError(
                "a Fréchet distance needs at least two real and two generated samples; got "
                f"{self.real_count.item()} and {self.generated_count.item()}."
            )
        real = _mean_and_covariance(self.real_count, self.real_sum, self.real_outer)
        generated = _mean_and_covariance(self.generated_count, self.generated_sum, self.generated_outer)
        return frechet_distance(*real, *generated).float()


def _mean_and_covariance(count: Tensor, total: Tensor, outer: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and unbiased covariance from running sums."""
    mean = total / count
    return mean, (outer - count * torch.outer(mean, mean)) / (count - 1)
