"""Images per second, and how much of the hardware's arithmetic a training step uses."""

import re
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ThroughputMonitor
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from vfm_vae.types import num_images

# Dense products in bfloat16 or float16 with float32 sums, as the data sheets have them (without sparsity, which doubles
# the numbers), by what the device's name contains; the first that it does counts.
PEAK_FLOPS = {
    "B200": 2250e12,
    "H200 NVL": 835e12,
    "H200": 989.4e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100 80GB HBM3": 989.4e12,
    "A100": 312e12,
}

# The CPU's fused attention, which torch's table lacks.
CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: (
        lambda query, key, value, *_, **__: sdpa_flop_count(query, key, value)
    ),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda gradient, query, key, value, *_, **__: sdpa_backward_flop_count(gradient, query, key, value)
    ),
}


class Throughput(ThroughputMonitor):
    """Lightning's ThroughputMonitor, which counts the floating-point operations of a training step itself.

    In the first training batches of a run, all products (matrix products, convolutions, attention), forward and
    backward, of every player and every frozen network, are counted as the device is told to do them, at two operations
    per multiplication and addition; their mean per batch becomes the module's `flops_per_batch`. A batch's count is
    exact; take more than one where batches differ, as with equivariance regularisation, which shrinks some. What
    activation checkpointing computes twice counts twice. Everything else (norms, resizing, optimisers) doesn't count.
    With `torch.compile`, the batches that are counted run uncompiled, so they differ from compiled ones by rounding.
    List it before callbacks that compute at the end of a batch, or that is counted as well.

    Logged, each over the last `window_size` batches of rank zero, those that were counted left out:

    - `train/device/samples_per_sec`, and over all ranks, where there are several, `train/samples_per_sec`;
    - `train/device/flops_per_sec`, likewise `train/flops_per_sec`;
    - `train/device/mfu`: the share of what the device can do at most, where that is known: `peak_flops`, or, with
      `bf16` or `16` precision, the data sheet of the GPUs in `PEAK_FLOPS`. (Lightning's own table holds numbers with
      sparsity for some.)

    Args:
        batch_size_fn: images in a batch.
        window_size: batches that an average spans.
        count_batches: batches to count; 0 counts none and logs no operations.
        peak_flops: of one device, per second.

    Raises:
        ValueError: if a number is not possible.
    """

    def __init__(
        self,
        batch_size_fn: Callable[[Any], int] = num_images,
        window_size: int = 50,
        count_batches: int = 1,
        peak_flops: float | None = None,
    ) -> None:
        if window_size < 2:
            raise ValueError(f"window_size: must be at least 2, given {window_size}")
        if count_batches < 0:
            raise ValueError(f"count_batches: must not be negative, given {count_batches}")
        if peak_flops is not None and peak_flops <= 0:
            raise ValueError(f"peak_flops: must be positive, or null, given {peak_flops:g}")
        super().__init__(batch_size_fn, window_size=window_size)
        self.count_batches, self.peak_flops = count_batches, peak_flops
        self._counts: list[int] = []
        self._counter: FlopCounterMode | None = None
        self._counting = ExitStack()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Learns what the device can do."""
        super().setup(trainer, pl_module, stage)
        self.available_flops = self.peak_flops or peak_flops(trainer)
        for throughput in self._throughputs.values():
            throughput.available_flops = self.available_flops
        if stage == "fit":
            self._counts = []
            pl_module.flops_per_batch = None

    @rank_zero_only
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Begins to count."""
        if len(self._counts) < self.count_batches:
            self._counting.enter_context(torch.compiler.set_stance("force_eager"))
            self._counter = self._counting.enter_context(flop_counter())

    @rank_zero_only
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *args: Any
    ) -> None:
        """Notes the count, and then starts the clock; later batches are measured."""
        if self._counter is None:
            super().on_train_batch_end(trainer, pl_module, outputs, batch, *args)
            return
        self._counting.close()
        self._counts.append(self._counter.get_total_flops())
        self._counter = None
        if len(self._counts) == self.count_batches:
            pl_module.flops_per_batch = sum(self._counts) / self.count_batches
        self._start(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Counts no longer."""
        self._counting.close()
        self._counter = None


def flop_counter() -> FlopCounterMode:
    """Counts the operations of products within it, the CPU's fused attention included."""
    return FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION)


def peak_flops(trainer: Trainer) -> float | None:
    """What a device's data sheet says of its products in 16 bits; None where it or another precision is not known."""
    device = trainer.strategy.root_device
    if device.type != "cuda" or str(trainer.precision) not in ("bf16-mixed", "bf16-true", "16-mixed", "16-true"):
        return None
    name = torch.cuda.get_device_name(device)
    if "MIG" in name:  # a share of the device
        return None
    return next((peak for part, peak in PEAK_FLOPS.items() if re.search(rf"\b{part}\b", name)), None)
