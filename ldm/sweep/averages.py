"""The averaged weights that a sweep compares: the checkpoint's own, and others from the snapshots of its run."""

from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from ldm.compatibility import DIFFUSION
from vfm_vae import schema
from vfm_vae.checkpoints import read_checkpoint
from vfm_vae.frozen import sha256_of
from vfm_vae.writing import write_torch

OPTION = "ckpt_path"
SNAPSHOTS = "post_hoc_ema"  # folder within the run's
MADE_OF = "made_of"  # in a checkpoint that a sweep has written, what it was made of
LEFT_OUT = ("optimizer_states", "lr_schedulers", "loops")  # of training


class Averages:
    """The weights of a checkpoint with averages of any length.

    Args:
        checkpoint: A checkpoint of training.
        has_average: Whether a callback puts averages into the place of the weights in training.

    Attributes:
        checkpoint: As given.
        run: Folder of the run that it belongs to.

    Raises:
        ValueError: if it is no diffusion model's checkpoint.
    """

    def __init__(self, checkpoint: Path, has_average: bool) -> None:
        self.checkpoint, self.has_average = checkpoint, has_average
        self.run = checkpoint.parent.parent if checkpoint.parent.name == "checkpoints" else checkpoint.parent
        content = read_checkpoint(checkpoint, OPTION, mmap=True)
        self.stored = schema.take(content, DIFFUSION, f"{OPTION}: {str(checkpoint)!r}")

    @property
    def snapshots(self) -> Path:
        """Folder of the run's snapshots."""
        return self.run / SNAPSHOTS

    @property
    def step(self) -> int:
        """Steps of training that the checkpoint has seen."""
        return int(self.stored.content["global_step"])

    @cached_property
    def _fingerprint(self) -> str:
        content = self.stored.content
        tensors: dict[str, Tensor] = self.stored.averaged() if self.has_average else content["state_dict"]
        return sha256_of(tensors)

    def identity(self, length: float | None) -> dict[str, Any]:
        """What identifies the weights, as plain data.

        Args:
            length: Length of the average; None for the checkpoint's own.
        """
        own = {"checkpoint": self._fingerprint, "images_seen": self.stored.images_seen}
        if length is None:
            return own
        files = {file.name: file.stat().st_size for file in sorted(self.snapshots.iterdir()) if file.is_file()}
        return own | {"length": length, "snapshots": files}

    def check(self, lengths: list[float]) -> None:
        """Checks that averages can be reconstructed.

        Raises:
            ValueError: if there are no snapshots, or nothing puts averages into the place of the weights in training.
        """
        if lengths and not self.has_average:
            raise ValueError("sweep.lengths: no callback uses averages here; add EMA to trainer.callbacks")
        if lengths and not self.snapshots.is_dir():
            raise ValueError(
                f"sweep.lengths: there are no snapshots in {str(self.snapshots)!r}, of which averages could be "
                "reconstructed; train with the callback PostHocEMA, or leave lengths out"
            )

    def write(self, length: float, file: Path) -> None:
        """Writes a checkpoint like this one, with another average and nothing that only training takes.

        A file that was made of the same is left as it is.

        Raises:
            ValueError: if the average can't be reconstructed.
            NotWritten: if the file can't be written.
        """
        identity = self.identity(length)
        if file.is_file() and read_checkpoint(file, "sweep.folder", mmap=True).get(MADE_OF) == identity:
            return
        from vfm_vae import post_hoc

        weights = post_hoc.reconstruct(self.snapshots, length, self.stored.images_seen)
        checkpoint = {name: part for name, part in self.stored.content.items() if name not in LEFT_OUT}
        schema.write_average(checkpoint, weights, self.stored.images_seen)
        write_torch(file, checkpoint | {MADE_OF: identity})
