"""The averaged weights that a sweep compares: the checkpoint's own, and others from the snapshots of its run."""

from collections.abc import Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from ldm.compatibility import DIFFUSION
from vfm_vae import post_hoc, schema
from vfm_vae.checkpoints import read_checkpoint
from vfm_vae.frozen import sha256_of
from vfm_vae.options import about, within
from vfm_vae.writing import write_torch

OPTION = "ckpt_path"
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

    @cached_property
    def _fingerprint(self) -> str:
        content = self.stored.content
        tensors: dict[str, Tensor] = self.stored.averaged() if self.has_average else content["state_dict"]
        return sha256_of(tensors)

    @cached_property
    def _snapshots(self) -> list[dict[str, Any]]:
        """What identifies the snapshots up to the checkpoint's moment."""
        found = post_hoc.snapshots(post_hoc.find(self.run))
        return [asdict(each) for each in found if each.start + each.images <= self.stored.images_seen]

    def identity(self, length: float | None) -> dict[str, Any]:
        """What identifies the weights, as plain data.

        Args:
            length: Length of the average; None for the checkpoint's own.
        """
        own = {"checkpoint": self._fingerprint, "images_seen": self.stored.images_seen}
        return own if length is None else own | {"length": length, "snapshots": self._snapshots}

    def check(self, lengths: Sequence[float]) -> None:
        """Checks that averages can be reconstructed, and warns of those that are not met well.

        Raises:
            ValueError: if there are no snapshots of that moment and run, a length is out of range, or nothing puts
                averages into the place of the weights in training.
        """
        if not lengths:
            return
        if not self.has_average:
            raise ValueError("sweep.lengths: no callback uses averages here; add EMA to trainer.callbacks")
        within(post_hoc.SHORTEST, post_hoc.LONGEST, **{"sweep.lengths": lengths})
        with about("sweep.lengths", instead_of="run"):
            post_hoc.check_run(self.run, self.stored.content, self.stored.images_seen)
            low, high = post_hoc.reliable(self.run, self.stored.images_seen)
        if not low <= min(lengths) <= max(lengths) <= high:
            rank_zero_warn(f"sweep.lengths: the run's snapshots meet lengths from {low:g} to {high:g}, others roughly")

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
        weights = post_hoc.reconstruct(self.run, length, self.stored.images_seen)
        checkpoint = {name: part for name, part in self.stored.content.items() if name not in LEFT_OUT}
        checkpoint["callbacks"] = {}  # some hold averages of their own
        schema.write_average(checkpoint, weights, self.stored.images_seen)
        write_torch(file, checkpoint | {MADE_OF: identity})
