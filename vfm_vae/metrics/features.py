"""Features of a whole evaluation, whichever rank saw which sample."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from vfm_vae.finite import check_finite


@contextmanager
def float32_arithmetic(device: torch.device) -> Iterator[None]:
    """Full float32 and no gradients, whatever the training run allows its own products."""
    precision = torch.get_float32_matmul_precision()
    convolutions = torch.backends.cudnn.conv.fp32_precision
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    try:
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)
        torch.backends.cudnn.conv.fp32_precision = convolutions


def add_feature_states(metric: Metric, prefix: str = "") -> None:
    """Gives a metric the states that `keep_features` fills."""
    metric.add_state(f"{prefix}features", default=[], dist_reduce_fx="cat")
    metric.add_state(f"{prefix}index", default=[], dist_reduce_fx="cat")


def keep_features(metric: Metric, features: Tensor, index: Tensor, prefix: str = "") -> None:
    """Adds samples to a metric's states.

    Args:
        metric: whose.
        features: `[B, d]`, any floating-point type; kept in float32.
        index: which sample each is, int64 `[B]`; negative ones are left out.
        prefix: of the states' names.

    Raises:
        ValueError: features and index don't belong together.
    """
    if features.ndim != 2 or index.shape != features.shape[:1]:
        raise ValueError(
            f"features and index: [B, d] and [B] are wanted; got {tuple(features.shape)} and {tuple(index.shape)}."
        )
    real = index >= 0
    # In float32 whatever they came in: ranks can only gather what is of one type.
    getattr(metric, f"{prefix}features").append(features[real].detach().float())
    getattr(metric, f"{prefix}index").append(index[real])


def kept_features(metric: Metric, prefix: str = "") -> Tensor:
    """All features of a metric's states, float32 `[n, d]`, each sample's once, in the order of the indices.

    Raises:
        ValueError: if they hold nan or inf, which no search for neighbours would notice; on all ranks.
    """
    index = dim_zero_cat(getattr(metric, f"{prefix}index"))
    order = index.argsort(stable=True)
    index = index[order]
    first = torch.ones_like(index, dtype=torch.bool)
    first[1:] = index[1:] != index[:-1]
    features = dim_zero_cat(getattr(metric, f"{prefix}features"))[order[first]]
    check_finite("features", features)
    return features


class FeatureStore(Metric):
    """Keeps features until they are all there, in the order of their samples' indices.

    A sample seen twice counts once, padding (negative index) not at all, and neither batches nor ranks matter. A rank
    without samples adds none of the same width, so that all have the same states to gather.
    """

    full_state_update = False
    is_differentiable = False

    def __init__(self) -> None:
        super().__init__()
        add_feature_states(self)

    def update(self, features: Tensor, index: Tensor) -> None:
        """Adds samples: features `[B, d]` and their indices, int64 `[B]`, as `keep_features` takes them."""
        keep_features(self, features, index)

    def compute(self) -> Tensor:
        """All features, float32 `[n, d]`, each sample's once, in the order of the indices."""
        return kept_features(self)
