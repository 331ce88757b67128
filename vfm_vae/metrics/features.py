"""Collects the features of an evaluation over batches and ranks."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from vfm_vae.finite import check_finite


@contextmanager
def float32_arithmetic(device: torch.device) -> Iterator[None]:
    """Full float32 precision and no gradients, whatever precision training allows for its own products."""
    precision = torch.get_float32_matmul_precision()
    cudnn: Any = torch.backends.cudnn
    convolutions = cudnn.conv.fp32_precision
    torch.set_float32_matmul_precision("highest")
    cudnn.conv.fp32_precision = "ieee"
    try:
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)
        cudnn.conv.fp32_precision = convolutions


def add_feature_states(metric: Metric, prefix: str = "") -> None:
    """Adds the states that `keep_features` fills to a metric."""
    metric.add_state(f"{prefix}features", default=[], dist_reduce_fx="cat")
    metric.add_state(f"{prefix}index", default=[], dist_reduce_fx="cat")


def keep_features(metric: Metric, features: Tensor, index: Tensor, prefix: str = "") -> None:
    """Adds samples to a metric's states.

    Args:
        metric: The metric.
        features: `[B, d]`, any floating-point type; kept in float32.
        index: Number of each sample, int64 `[B]`; samples with a negative number are left out.
        prefix: Prefix of the states' names.

    Raises:
        ValueError: if the shapes of features and index do not match.
    """
    if features.ndim != 2 or index.shape != features.shape[:1]:
        raise ValueError(
            f"features and index must be [B, d] and [B]; got {tuple(features.shape)} and {tuple(index.shape)}."
        )
    real = index >= 0
    # Always in float32, because ranks can only gather tensors of the same type.
    getattr(metric, f"{prefix}features").append(features[real].detach().float())
    getattr(metric, f"{prefix}index").append(index[real])


def kept_features(metric: Metric, prefix: str = "") -> Tensor:
    """All features in a metric's states, float32 `[n, d]`, each sample once, in the order of their numbers.

    Raises:
        ValueError: if they hold nan or inf, which no search for neighbours would notice; raised on all ranks.
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
    """Collects features over batches and ranks, in the order of their samples' numbers.

    A sample seen twice counts once, and padding (a negative number) not at all. A rank without samples must add an
    empty `[0, d]`, so that all ranks have the same states to gather.
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
        """All features, float32 `[n, d]`, each sample once, in the order of their numbers."""
        return kept_features(self)


def check_kind(real: bool, reference: object | None) -> None:
    """Checks that no real samples are added to a metric that has a reference.

    Raises:
        ValueError: if they are.
    """
    if real and reference is not None:
        raise ValueError("real: True was given, but the reference stands for real images; add generated ones only.")
