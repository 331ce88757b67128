"""Precision and recall of generated images, by balls around features."""

import torch
from torch import Tensor
from torchmetrics import Metric

from vfm_vae.finite import check_finite
from vfm_vae.metrics.features import add_feature_states, check_kind, float32_arithmetic, keep_features, kept_features
from vfm_vae.metrics.neighbours import Search

_BLOCK_ROWS = 1024  # of a distance matrix held at a time: 200 MB at 50 000 samples
_EXACT_ROWS = 256  # of differences in float64 held at a time: 30 MB with 8 of width 2048
_CANDIDATES = 8  # balls looked at again where rounding leaves open whether a point lies in any


class PrecisionRecall(Metric):
    """Improved precision and recall (Kynkäänniemi et al. 2019, eq. 1 and 2; ADM's evaluator has k = 3).

    Each sample stands for a ball that reaches to its k-th nearest of the same kind. Precision is the share of generated
    samples inside the ball of any real one, recall the share of real ones inside the ball of any generated one. Samples
    are told apart by their numbers: one seen twice counts once, padding (negative number) not at all, and neither
    order nor ranks matter. A rank without samples has to add none of the features' width.

    Distances come from float32 products, in blocks; where these leave a choice open it is made in float64.

    Args:
        k: Balls reach to the k-th neighbour, not counting the sample itself.
        reference: Features of real images `[m, d]`, where they are known before, the same on every rank; then only
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
            index: Number of each sample among those of its kind, int64 `[B]`; negative ones are left out.
            real: Whether they are of real images, or of generated ones.

        Raises:
            ValueError: if shapes don't fit, or they are real beside a reference.
        """
        check_kind(real, self._reference)
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
