"""Full-size training steps by the published configs: images per second, memory, FLOPs and their share of the peak.

    python tests/bench/full_size.py tokenizer --batch-size 64       # strong stage, bf16-mixed, on the GPU at hand
    python tests/bench/full_size.py diffusion --batch-size 128      # LightningDiT-XL/1
    python tests/bench/full_size.py tokenizer --count               # no GPU: FLOPs and activations of one image

Weights are random, which costs the same as trained ones. Data is one batch, over and over: the loader has a benchmark
of its own. A GPU's memory holds weights, gradients, optimiser states and averages beside the activations.
"""

import argparse
import gc
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from step import CONFIGS, Build
from timing import table
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import vgg16

from callbacks.ema import EMA
from callbacks.throughput import flop_counter, peak_flops
from ldm.module import DiffusionModule
from vfm_vae.data.datamodule import ImageNetDataModule
from vfm_vae.data.latents import LatentStatistics
from vfm_vae.module import TokenizerModule
from vfm_vae.types import Batch, LatentBatch

NONE = "trainer: {callbacks: [], logger: false, enable_checkpointing: false}"


def build(module: type[LightningModule], folder: str, configs: list[str], options: list[str]) -> LightningModule:
    """What configs describe, without callbacks."""
    (Path(folder) / "none.yaml").write_text(NONE)
    arguments = [f"--config={CONFIGS / name}" for name in configs] + [f"--config={folder}/none.yaml", *options]
    if not torch.cuda.is_available():  # to count what one image costs, optimiser states are not needed
        names = ("optimizer", *(("discriminator_optimizer",) if module is TokenizerModule else ()))
        arguments += [f"--model.{name}={{class_path: torch.optim.SGD, init_args: {{lr: 0.0}}}}" for name in names]
    plain = {"auto_configure_optimizers": False, "save_config_callback": None}
    cli = Build(module, ImageNetDataModule, args=["fit", *arguments], **plain)
    return cli.model


def tokenizer(folder: str, batch_size: int, more: list[str]) -> tuple[LightningModule, Batch]:
    """The strong stage with random weights, and a batch of noise."""
    state = {f"features.{name}": tensor for name, tensor in vgg16(weights=None).features.state_dict().items()}
    torch.save(state, f"{folder}/vgg16.pth")
    options = [f"--model.objective.init_args.perceptual_loss.init_args.weights={folder}/vgg16.pth"]
    options += [f"--model.{part}.init_args.pretrained=false" for part in ("model.init_args.vfm", "discriminator")]
    configs = ["vfm_vae/base.yaml", "vfm_vae/strong.yaml", "data/imagenet.yaml"]
    module = build(TokenizerModule, folder, configs, [*options, *more])
    module.equivariance.probability = module.equivariance.prior_probability = 0.0  # every step at full size
    images = torch.randint(256, (batch_size, 3, 256, 256), dtype=torch.uint8)
    return module, Batch(images, torch.zeros(batch_size, dtype=torch.int64), torch.arange(batch_size))


def diffusion(folder: str, batch_size: int, more: list[str]) -> tuple[LightningModule, LatentBatch]:
    """LightningDiT-XL/1, and a batch of noise."""
    options = ["--model.tokenizer=null"]
    configs = ["ldm/lightningdit.yaml", "ldm/epochs64.yaml", "data/latents.yaml"]
    module = build(DiffusionModule, folder, configs, [*options, *more])
    module.normalization.take(LatentStatistics(torch.zeros(1, 32, 1, 1), torch.ones(1, 32, 1, 1)))
    labels = torch.randint(1000, (batch_size,))
    return module, LatentBatch(torch.randn(batch_size, 32, 16, 16), labels, torch.arange(batch_size))


class Clock(Callback):
    """Counts the FLOPs of the first step, and times those after the fifth.

    Attributes:
        flops: of one step, forward and backward, of all networks.
        seconds: of each step.
    """

    def __init__(self, count: bool) -> None:
        self.flops, self.seconds, self._count = 0, [], count
        self._counter: FlopCounterMode | None = None

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: object, batch_idx: int) -> None:
        """Starts the clock, or the counter."""
        if batch_idx == 0 and self._count:
            self._counter = flop_counter()
            self._counter.__enter__()
        self._start = time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, out: object, *args: object) -> None:
        """Stops it, after the device has done its work."""
        if self._counter is not None:
            self._counter.__exit__(None, None, None)
            self.flops, self._counter = self._counter.get_total_flops(), None
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self._start)


@contextmanager
def saved_bytes() -> Iterator[Callable[[], int]]:
    """Bytes that autograd keeps for the backward pass, each storage once, weights left out."""
    seen: dict[int, int] = {}
    kept = []

    def pack(tensor: Tensor) -> Tensor:
        if not tensor.is_leaf:
            seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            kept.append(tensor.detach())  # its address is not used again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield lambda: sum(seen.values())


def main() -> None:
    """Prints one table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["tokenizer", "diffusion"])
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--option", action="append", default=[], help="any of the command line, as --option=--a.b=c")
    parser.add_argument("--count", action="store_true", help="FLOPs and activations of one image, on the CPU")
    options = parser.parse_args()
    if options.count:
        (flops, one, *_), (_, two, *_) = (measure(options.what, size, 1, options.option, "cpu") for size in (1, 2))
        rows = [
            ("FLOPs of an image, forward and backward", f"{flops / 1e12:.2f} T"),
            ("what autograd keeps for each image", f"{(two - one) / 2**20:.0f} MiB"),
        ]
        table(f"{options.what}, bf16-mixed, counted on the CPU", rows, "", "")
        return
    if not torch.cuda.is_available():
        parser.error("no GPU is at hand: give --count")
    flops, _, seconds, peak = measure(options.what, options.batch_size, options.steps, options.option, "gpu")
    rows = [
        ("images/s", f"{options.batch_size / seconds:.1f}"),
        ("peak memory", f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB"),
        ("model FLOP utilisation", f"{flops / seconds / peak:.1%}" if peak and flops else "not known"),
    ]
    device = torch.cuda.get_device_name()
    table(f"{options.what}, batch {options.batch_size}, bf16-mixed, {device}", rows, "", "measured")


def measure(
    what: str, batch_size: int, steps: int, more: list[str], accelerator: str
) -> tuple[int, int, float, float | None]:
    """Trains a few steps: FLOPs of one, bytes that autograd keeps (on the CPU), seconds of later ones, and the
    device's peak."""
    gc.collect()  # what a former measurement left
    with tempfile.TemporaryDirectory() as folder:
        module, batch = {"tokenizer": tokenizer, "diffusion": diffusion}[what](folder, batch_size, more)
    clock = Clock(count="--model.torch_compile=true" not in more)
    trainer = Trainer(
        accelerator=accelerator, devices=1, precision="bf16-mixed", max_steps=steps, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[clock] if accelerator == "cpu" else [EMA(), clock],
    )  # fmt: skip
    with saved_bytes() if accelerator == "cpu" else nullcontext(lambda: 0) as saved:
        trainer.fit(module, DataLoader([batch] * steps, batch_size=None))
        seconds = statistics.median(clock.seconds[5:] or clock.seconds)
        return clock.flops, saved(), seconds, peak_flops(trainer)


if __name__ == "__main__":
    main()
