"""The training step with one generator forward for both players against one for each, at full size."""

import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from timing import table
from torchvision.models import vgg16

from vfm_vae.cli import CLI
from vfm_vae.data.datamodule import ImageNetDataModule
from vfm_vae.module import TokenizerModule
from vfm_vae.types import Batch

CONFIGS = Path(__file__).parents[2] / "configs"
BATCH, ACCUMULATED, ROUNDS = 2, 2, 2


class Alternate(Callback):
    """Takes every other step in the published order, with a generator forward for each player."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {"simultaneous": [], "published": []}
        self.start = 0.0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        """Where a step begins, chooses the order and starts the clock."""
        if batch_idx % ACCUMULATED == 0:
            pl_module.order = ("simultaneous", "published")[batch_idx // ACCUMULATED % 2]
            self.start = time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Where it ends, stops it."""
        if pl_module.completes_step(args[-1]):
            self.seconds[pl_module.order].append(time.perf_counter() - self.start)


class Build(CLI):
    """Parses and instantiates."""

    def _run_subcommand(self, subcommand: str) -> None:
        pass


def build(folder: Path) -> Build:
    """The strong stage with random weights in the frozen networks: their speed does not depend on them."""
    state = {f"features.{name}": tensor for name, tensor in vgg16(weights=None).features.state_dict().items()}
    torch.save(state, folder / "vgg16.pth")
    (folder / "plain.yaml").write_text("trainer: {accelerator: cpu, callbacks: [], logger: false, max_epochs: 1}")
    configs = [CONFIGS / "vfm_vae/base.yaml", CONFIGS / "vfm_vae/strong.yaml", folder / "plain.yaml"]
    sys.argv = sys.argv[:1]
    options = [
        "--model.model.init_args.vfm.init_args.pretrained=false",
        "--model.discriminator.init_args.pretrained=false",
        f"--model.objective.init_args.perceptual_loss.init_args.weights={folder / 'vgg16.pth'}",
        # The draws would make some steps smaller than others.
        "--model.equivariance.init_args.probability=0",
        "--model.equivariance.init_args.prior_probability=0",
        "--trainer.enable_checkpointing=false",
        "--trainer.enable_progress_bar=false",
        "--trainer.enable_model_summary=false",
        "--data.root=unused",
        # Optimisers weigh little in a step of 512 images; and a CPU has the memory to keep what a GPU computes again.
        f"--model.accumulate_grad_batches={ACCUMULATED}",
        "--model.model.init_args.decoder.init_args.activation_checkpointing=false",
    ]
    arguments = ["fit", *(f"--config={path}" for path in configs), *options]
    plain = {"auto_configure_optimizers": False, "save_config_callback": None}
    return Build(TokenizerModule, ImageNetDataModule, args=arguments, **plain)


def main() -> None:
    """Prints the ratio."""
    with tempfile.TemporaryDirectory() as folder:
        cli = build(Path(folder))
    images = torch.randint(256, (BATCH, 3, 256, 256), dtype=torch.uint8)
    batch = Batch(images, torch.zeros(BATCH, dtype=torch.int64), torch.arange(BATCH))
    watch = Alternate()
    cli.trainer.callbacks.append(watch)
    cli.trainer.fit(cli.model, torch.utils.data.DataLoader([batch] * (2 * ROUNDS + 2) * ACCUMULATED, batch_size=None))
    one, two = (statistics.median(seconds[1:]) for seconds in watch.seconds.values())
    title = f"Training step of the strong stage, full size, {BATCH} images, CPU"
    row = ("time in the published order, with two generator forwards, over that with one", f"{two / one:.2f}x", "1.25x")
    table(title, [row], "", "measured", "wanted")


if __name__ == "__main__":
    main()
