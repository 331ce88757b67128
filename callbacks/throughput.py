"""Images per second, and the fraction of the hardware's peak operations that training uses."""

import re
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from lightning.fabric.utilities.throughput import Throughput as Rates
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import RunningStage
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count, sdpa_backward_flop_count, sdpa_flop_count

from vfm_vae.data.steps import batches_per_step
from vfm_vae.lightning_private import log_numbers, logs_now
from vfm_vae.options import at_least, positive
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


class Throughput(Callback):
    """Logs images per second, and counts the floating-point operations of a training step itself.

    In the first training batches of a run, all products (matrix products, convolutions, attention), forward and
    backward, of every player and every frozen network, are counted as the device is told to do them, at two operations
    per multiplication and addition; their mean per batch becomes the module's `flops_per_batch`. A batch's count is
    exact; take more than one where batches differ, as with equivariance regularisation, which shrinks some. What
    activation checkpointing computes twice counts twice. Everything else (norms, resizing, optimisers) doesn't count.
    With `torch.compile`, the batches that are counted run uncompiled, so they differ from compiled ones by rounding;
    but a module whose `rehearse(batch)` does a step's products on the meta device is counted by that, and no batch is
    slower. List it before callbacks that compute at the end of a batch, or that is counted as well.

    Logged where Lightning logs, each over the last `window_size` batches of rank zero, those that were counted left
    out, and validations and what comes with them:

    - `train/device/samples_per_sec`, and over all ranks, where there are several, `train/samples_per_sec`; likewise
      `batches_per_sec`;
    - `train/device/flops_per_sec`, likewise `train/flops_per_sec`;
    - `train/device/mfu`: the share of what the device can do at most, where that is known: `peak_flops`, or, with
      `bf16` or `16` precision, the data sheet of the GPUs in `PEAK_FLOPS`. (Lightning's own table holds numbers with
      sparsity for some.)
    - `train/device/memory_gb`: the most that tensors took on rank zero's GPU so far, in 10⁹ bytes; not on CPUs;
    - `train/time` (seconds), `train/batches` and `train/samples` (of rank zero) since the last that was counted.

    An evaluation's speed is logged at its end, as `validate/...`, `test/...` and `predict/...`, without operations. The
    host never waits for the device to measure, so a time is that at which a batch was launched.

    Args:
        batch_size_fn: Returns the number of images in a batch.
        window_size: Number of batches to average over. With few, a GPU's rates are rough.
        count_batches: Number of batches whose operations are counted, completed to whole steps; 0 for none, and no
            operations are logged.
        peak_flops: Peak operations per second of one device; null to look it up.

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
        at_least(2, window_size=window_size)
        at_least(0, count_batches=count_batches)
        positive(peak_flops=peak_flops)
        self.batch_size_fn, self.window_size = batch_size_fn, window_size
        self.count_batches, self.peak_flops = count_batches, peak_flops
        self.available_flops: float | None = None
        self._meters: dict[RunningStage, _Meter] = {}
        self._counts: list[int] = []
        self._num_counted = count_batches
        self._counter: FlopCounterMode | None = None
        self._counting = ExitStack()

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Looks up the device's peak operations per second."""
        self.available_flops = self.peak_flops or peak_flops(trainer)
        self._meters = {}
        if stage == "fit":
            self._counts = []
            # Where a module steps by itself, the batches of a step need not cost the same.
            per_step = 1 if pl_module.automatic_optimization else batches_per_step(trainer)
            self._num_counted = -(-self.count_batches // per_step) * per_step
            pl_module.flops_per_batch = None

    @rank_zero_only
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts the clock."""
        self._begin(trainer)

    @rank_zero_only
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Begins to count; a module that can rehearse its step does, and none is taken for that."""
        if len(self._counts) == self._num_counted:
            return
        rehearse = getattr(pl_module, "rehearse", None)
        with flop_counter() as counter:
            rehearsed = rehearse is not None and rehearse(batch)
        if rehearsed:
            self._counts = [counter.get_total_flops()] * self._num_counted
            self._finish_counting(trainer, pl_module)
        else:
            self._counting.enter_context(torch.compiler.set_stance("force_eager"))
            self._counter = self._counting.enter_context(flop_counter())

    @rank_zero_only
    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, *args: Any) -> None:
        """Notes the count, and then starts the clock; later batches are measured."""
        if self._counter is not None:
            self._counting.close()
            self._counts.append(self._counter.get_total_flops())
            self._counter = None
            self._finish_counting(trainer, pl_module)
            return
        self._meters[RunningStage.TRAINING].note(self.batch_size_fn(batch), pl_module.flops_per_batch)
        # The connector, as in Lightning's own monitors: `log_dict` would copy to the device in each batch, and wait.
        if logs_now(trainer):
            self._log(trainer)

    def _finish_counting(self, trainer: Trainer, pl_module: Any) -> None:
        if len(self._counts) == self._num_counted:
            pl_module.flops_per_batch = sum(self._counts) / self._num_counted
        self._begin(trainer)

    @rank_zero_only
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts the evaluation's clock."""
        if not trainer.sanity_checking:
            self._begin(trainer)

    @rank_zero_only
    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Measures a batch of the evaluation."""
        if not trainer.sanity_checking:
            self._meters[_stage(trainer)].note(self.batch_size_fn(batch))

    @rank_zero_only
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Logs the evaluation's speed; lets the clock of training, if it ran, go on where it stood."""
        if not trainer.sanity_checking:
            self._log(trainer)
        if RunningStage.TRAINING in self._meters:
            self._meters[RunningStage.TRAINING].resume()

    on_test_start = on_predict_start = on_validation_start
    on_test_batch_end = on_predict_batch_end = on_validation_batch_end
    on_test_end = on_predict_end = on_validation_end

    def _begin(self, trainer: Trainer) -> None:
        rates = Rates(self.available_flops, trainer.world_size, self.window_size)
        self._meters[_stage(trainer)] = _Meter(rates)

    def _log(self, trainer: Trainer) -> None:
        stage = _stage(trainer)
        rates = {f"{stage.value}/{name}": rate for name, rate in self._meters[stage].rates.compute().items()}
        device = trainer.strategy.root_device
        if device.type == "cuda":
            rates[f"{stage.value}/device/memory_gb"] = torch.cuda.max_memory_allocated(device) / 1e9
        log_numbers(trainer, rates)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Counts no longer."""
        self._counting.close()
        self._counter = None


def _stage(trainer: Trainer) -> RunningStage:
    assert trainer.state.stage is not None  # within hooks
    return trainer.state.stage


class _Meter:
    """Counts batches and images, and the seconds that the host took for them.

    It looks at the clock when a batch was launched. Waiting until the device has done it would leave the device idle
    while the next is launched. A device's queue is bounded, to about the launches of a step, so over a window of 50
    batches the difference is small.
    """

    def __init__(self, rates: Rates) -> None:
        self.rates = rates
        self._batches = self._images = 0
        self._seconds, self._start = 0.0, time.perf_counter()

    def note(self, images: int, flops: Any = None) -> None:
        """A batch has ended."""
        self._batches += 1
        self._images += images
        self._seconds = time.perf_counter() - self._start
        self.rates.update(time=self._seconds, batches=self._batches, samples=self._images, flops=flops)

    def resume(self) -> None:
        """Leaves out the time that has passed since the last batch."""
        self._start = time.perf_counter() - self._seconds


def flop_counter() -> FlopCounterMode:
    """Counts the operations of products within it, at two per multiplication and addition.

    Torch's counter, which lacks the CPU's fused attention, and takes the gradients of a grouped convolution for those
    of a dense one.
    """
    aten = torch.ops.aten
    formulas = {
        aten.convolution_backward: _convolution_backward,
        aten._scaled_dot_product_flash_attention_for_cpu: (
            lambda query, key, value, *_, **__: sdpa_flop_count(query, key, value)
        ),
        aten._scaled_dot_product_flash_attention_for_cpu_backward: (
            lambda gradient, query, key, value, *_, **__: sdpa_backward_flop_count(gradient, query, key, value)
        ),
    }
    return FlopCounterMode(display=False, custom_mapping=formulas)


def _convolution_backward(gradient: list[int], x: list[int], weight: list[int], *arguments: Any, **_: Any) -> int:
    """The gradients of the input and of the weight, where asked for: each has the products of the forward pass.

    Args:
        gradient: Shape of the output's gradient.
        x: Shape of the input.
        weight: Shape `[C_out, C_in / groups, *kernel]`, transposed `[C_in, C_out / groups, *kernel]`.
        arguments: The others of `aten.convolution_backward`, in its order.
    """
    transposed, wanted = arguments[-4], arguments[-1]
    return conv_flop_count(x, weight, gradient, transposed) * sum(wanted[:2])


def peak_flops(trainer: Trainer) -> float | None:
    """A device's peak operations per second in 16 bits; None if they are unknown, or in another precision."""
    device = trainer.strategy.root_device
    if device.type != "cuda" or str(trainer.precision) not in ("bf16-mixed", "bf16-true", "16-mixed", "16-true"):
        return None
    name = torch.cuda.get_device_name(device)
    if "MIG" in name:  # a share of the device
        return None
    return next((peak for part, peak in PEAK_FLOPS.items() if re.search(rf"\b{part}\b", name)), None)
