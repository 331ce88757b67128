"""Pictures of what models make: reconstructions of fixed images, samples from fixed noise."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from torchvision.utils import make_grid

from vfm_vae.contracts import CountsImages, DrawsSamples, Reconstructs
from vfm_vae.images import from_uint8, to_uint8
from vfm_vae.lightning_private import undeclared
from vfm_vae.options import at_least, within
from vfm_vae.pictures import log_picture
from vfm_vae.timeline import logged_position
from vfm_vae.trial import Output
from vfm_vae.types import Batch, Decoded
from vfm_vae.writing import write_picture


class ReconstructionImages(Output):
    """Shows fixed validation images in a grid, one per row: input, reconstruction, multi-scale images.

    The weights in training are shown as `train/reconstructions` when training starts and ends and every so many images,
    but not when a run resumes; the weights that validation uses as `val/reconstructions` after each validation. Grids
    go to the loggers, and the latest of each kind to `<log_dir>/images/{train,val}.png`. Only rank zero draws.

    Args:
        num_images: Number of rows. The images are spread evenly over the validation set, and always the same.
        every_n_images: Number of training images between grids; null for none between start and end.

    Raises:
        ValueError: if an option is not positive; when a run starts, if the module has no `reconstruct`, or doesn't
            count its images where `every_n_images` is given.
    """

    def __init__(self, num_images: int = 8, every_n_images: int | None = None) -> None:
        at_least(1, num_images=num_images, every_n_images=every_n_images)
        self.num_images, self.every_n_images = num_images, every_n_images
        self._directory = Path()
        self._batch: Batch | None = None
        self._due = 0  # images seen at which the next grid is drawn
        self._drawn = 0  # step after which the last one was, also by the run that goes on

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Asks for the folder to write to, on all ranks."""
        if not isinstance(pl_module, Reconstructs):
            raise ValueError(f"{type(pl_module).__name__} has no reconstruct to show images of.")
        if stage == "fit" and self.every_n_images and not isinstance(pl_module, CountsImages):
            raise ValueError(f"every_n_images counts images, but {type(pl_module).__name__} has no images_seen.")
        self._directory = Path(trainer.log_dir or trainer.default_root_dir) / "images"
        self._batch = None

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Draws the first state."""
        self._drawn = trainer.global_step
        if not trainer.global_step:
            self._draw(trainer, pl_module, "train")
        if self.every_n_images:
            self._due = (pl_module.images_seen // self.every_n_images + 1) * self.every_n_images

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
        """Draws every `every_n_images` images."""
        if self.every_n_images and pl_module.images_seen >= self._due:
            self._draw(trainer, pl_module, "train")
            self._drawn = trainer.global_step
            self._due = (pl_module.images_seen // self.every_n_images + 1) * self.every_n_images

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draws the last state."""
        if trainer.global_step > self._drawn:
            self._draw(trainer, pl_module, "train", ended=True)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draws with the weights that were validated."""
        if not trainer.sanity_checking:
            self._draw(trainer, pl_module, "val")

    def _draw(self, trainer: Trainer, pl_module: Any, kind: str, ended: bool = False) -> None:
        if not trainer.is_global_zero:
            return
        if self._batch is None:
            self._batch = fixed_images(trainer, pl_module, self.num_images)
        batch = trainer.strategy.batch_to_device(self._batch, pl_module.device)
        with _evaluating(pl_module), torch.no_grad(), trainer.precision_plugin.forward_context():
            decoded = pl_module.reconstruct(batch)
        grid = reconstruction_grid(from_uint8(batch.images), decoded)
        show(trainer, grid, self._directory / f"{kind}.png", f"{kind}/reconstructions", ended)


class SampleImages(Output):
    """Shows samples after each validation in grids, one for each guidance scale, with a row for each class or prompt.

    They are drawn with the weights that validation uses, always from the same noise. Grids go to the loggers as
    `val/samples_guidance_<scale>`, and the latest to `<log_dir>/images/samples_guidance_<scale>.png`. All ranks draw
    the same, as a sharded model needs them all, and rank zero writes. If the module has no tokenizer to decode with, it
    warns and draws nothing.

    Args:
        classes: The classes to show, one in each row; null for prompts, or for one row of samples as the module numbers
            them.
        num_images: Number of samples of each class or prompt.
        guidance_scales: Guidance scales to show, one grid for each; 1 is without guidance.
        batch_size: How many samples are drawn at a time.
        prompts: The prompts to show, one in each row, instead of classes. Each rank loads the text encoder in the
            first validation.

    Raises:
        ValueError: if a number lies outside its range, nothing is to be shown, or both classes and prompts are; when a
            run starts, if the module draws no samples, knows no such class, or takes no prompts.
    """

    def __init__(
        self,
        classes: Sequence[int] | None = None,
        num_images: int = 8,
        guidance_scales: Sequence[float] = (1.0,),
        batch_size: int = 64,
        prompts: Sequence[str] | None = None,
    ) -> None:
        at_least(0, classes=classes, guidance_scales=guidance_scales)
        at_least(1, num_images=num_images, batch_size=batch_size)
        if not guidance_scales or (classes is not None and not classes):
            raise ValueError("classes, guidance_scales: give at least one of each")
        if prompts is not None and (classes is not None or not prompts):
            raise ValueError("prompts: give at least one, and no classes; or leave them out")
        self.classes, self.prompts, self.num_images = classes, prompts, num_images
        self.guidance_scales, self.batch_size = list(guidance_scales), batch_size
        self._directory = Path()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Asks for the folder to write to, on all ranks."""
        if not isinstance(pl_module, DrawsSamples):
            raise ValueError(f"{type(pl_module).__name__} draws no samples to show.")
        if self.classes is not None:
            if pl_module.num_classes is None:
                raise ValueError("classes: the model draws samples that are not of classes; set it to null")
            within(0, pl_module.num_classes - 1, classes=self.classes)
        if self.prompts is not None and pl_module.num_classes is not None:
            raise ValueError("prompts: the model draws samples of classes, and takes no prompts; give classes")
        if not pl_module.can_decode:
            rank_zero_warn(
                "SampleImages: model.tokenizer is null, so there is nothing to decode samples; none are shown."
            )
        self._directory = Path(trainer.log_dir or trainer.default_root_dir) / "images"

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Draws on all ranks, because a sharded model needs all of them."""
        if trainer.sanity_checking or not pl_module.can_decode:
            return
        numbers = torch.arange(self.num_images * len(self.classes or self.prompts or [None]))
        for scale in self.guidance_scales:
            with torch.no_grad(), trainer.precision_plugin.forward_context():
                images = [
                    to_uint8(pl_module.draw(part, self._asked_for(part), scale).images).cpu()
                    for part in numbers.split(self.batch_size)
                ]
            if not trainer.is_global_zero:
                continue
            grid = make_grid(torch.cat(images), nrow=self.num_images, padding=2, pad_value=255)
            name = f"samples_guidance_{scale:g}"
            show(trainer, grid, self._directory / f"{name}.png", f"val/{name}")

    def _asked_for(self, numbers: Tensor) -> Tensor | list[str] | None:
        """What samples are drawn for, by their numbers."""
        rows = numbers // self.num_images
        if self.prompts is not None:
            return [self.prompts[row] for row in rows.tolist()]
        return None if self.classes is None else torch.tensor(self.classes)[rows]


def show(trainer: Trainer, grid: Tensor, file: Path, tag: str, ended: bool = False) -> None:
    """Writes a picture, uint8 `[3, height, width]`, to a file and to the loggers; `ended` as of `logged_position`."""
    pixels = grid.cpu().permute(1, 2, 0).contiguous().numpy()
    write_picture(file, pixels)
    for logger in trainer.loggers:
        log_picture(logger, tag, pixels, logged_position(trainer, ended))


def reconstruction_grid(images: Tensor, decoded: Decoded) -> Tensor:
    """Lays out input | reconstruction | multi-scale images, large to small, one row per image.

    Args:
        images: The input, `[B, 3, H, W]` in [-1, 1].
        decoded: What was made of them.

    Returns:
        uint8 `[3, height, width]`; small images are enlarged by whole pixels to the input's size.
    """
    columns = [images, decoded.image, *reversed(decoded.multiscale)]
    columns = [F.interpolate(column.float(), size=images.shape[-2:], mode="nearest-exact") for column in columns]
    rows = torch.stack(columns, dim=1).flatten(0, 1)  # [B * columns, 3, H, W]
    return make_grid(to_uint8(rows), nrow=len(columns), padding=2, pad_value=255)


def fixed_images(trainer: Trainer, pl_module: LightningModule, num_images: int) -> Batch:
    """Samples spread evenly over the validation set, the same however many ranks there are."""
    loader = trainer.val_dataloaders
    if loader is None:
        loader = (undeclared(trainer).datamodule or pl_module).val_dataloader()
    loader = loader[0] if isinstance(loader, list | tuple) else loader
    positions = torch.linspace(0, len(loader.dataset) - 1, num_images).round().int().unique().tolist()
    subset = Subset(loader.dataset, positions)
    # A generator of its own: the global one must not notice that images are looked at.
    return next(
        iter(DataLoader(subset, batch_size=len(subset), collate_fn=loader.collate_fn, generator=torch.Generator()))
    )


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode; afterwards every part is back in the mode it was in."""
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True
