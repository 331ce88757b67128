"""What prediction leaves on disk."""

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from PIL import Image
from torch import Tensor

from vfm_vae.metrics.reconstruction import to_uint8


class ReconstructionWriter(Callback):
    """Writes predicted images as PNG, named by their position in the data set: `<directory>/00000042.png`.

    `predict_step` is to return `(images, index)`: `[B, 3, H, W]`, nominally in [-1, 1], and int64 `[B]`. Padding (a
    negative index) is left out. Every rank writes its own images; none are kept in memory.

    Args:
        directory: where to write; made if it is missing.
    """

    def __init__(self, directory: str) -> None:
        self.directory = Path(directory)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Makes the directory."""
        self.directory.mkdir(parents=True, exist_ok=True)
        trainer.predict_loop.return_predictions = False

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: tuple[Tensor, Tensor], *args: Any
    ) -> None:
        """Writes the batch."""
        images, index = outputs
        pixels = to_uint8(images).permute(0, 2, 3, 1).cpu().numpy()  # [B, H, W, 3]
        for position, picture in zip(index.tolist(), pixels, strict=True):
            if position >= 0:
                Image.fromarray(picture).save(self.directory / f"{position:08d}.png")
