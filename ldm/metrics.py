"""Metrics of a diffusion model's training."""

import torch
from torch import Tensor
from torchmetrics import Metric


class LossByTime(Metric):
    """Mean loss of the samples in each of several equal intervals of time, the same however they are batched.

    Args:
        num_buckets: Number of intervals of [0, 1].
    """

    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self, num_buckets: int = 10) -> None:
        super().__init__()
        self.num_buckets = num_buckets
        self.add_state("total", torch.zeros(num_buckets, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros(num_buckets, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, loss: Tensor, t: Tensor) -> None:
        """Adds samples.

        Args:
            loss: One number for each sample, `[B]`.
            t: Their times in [0, 1], `[B]`.
        """
        usable = loss.isfinite()  # others are counted with weight 0, which needs no waiting for the device
        bucket = (t * self.num_buckets).long().clamp(0, self.num_buckets - 1)
        self.total.index_add_(0, bucket, torch.where(usable, loss.detach(), 0).double())
        self.count.index_add_(0, bucket, usable.long())

    def compute(self) -> Tensor:
        """Means, float32 `[num_buckets]`; nan where an interval had no samples."""
        return (self.total / self.count).float()

    def named(self, stage: str) -> dict[str, Tensor]:
        """The means of intervals with samples, by the start of the interval: `loss_by_time/<stage>_0.30`."""
        values = self.compute().cpu()  # in one transfer
        return {
            f"loss_by_time/{stage}_{number / self.num_buckets:.2f}": value
            for number, value in enumerate(values)
            if value.isfinite()
        }
