"""Two averages of the weights, from which those of any length are made after training."""

import math
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from callbacks.averaged import check_modules, parameters_of, placed_like, precise, whole
from vfm_vae.contracts import CountsImages
from vfm_vae.options import at_least, within
from vfm_vae.post_hoc import FOLDER, LONGEST, SHORTEST, Snapshot, beta, num_bytes, remove_all_but
from vfm_vae.saving import alike
from vfm_vae.trial import Output, is_trial
from vfm_vae.writing import check_place, remove_leftovers


class PostHocEMA(Output):
    """Keeps averages of two lengths, and stores snapshots of them, see `vfm_vae.post_hoc`.

    Averages span the images from the start of this training on: a stage that begins with the weights of another one
    counts anew. After an optimizer step of `n` images that ends at `t` images,
    `average = beta * average + (1 - beta) * weights` with `beta = (1 - n / t)^(gamma + 1)`. The average that validation
    uses is still that of the callback `EMA`. Checkpoints hold both averages in float32, so that a resumed run writes
    the same snapshots.

    Snapshots go to `<log_dir>/post_hoc_ema`. Where they would become too many, every second one is removed, and the
    interval doubles. One is written when training ends, too, and removed when it goes on. The first line of a training
    says how much space they take, and it does not begin without that. A snapshot removes those of another run in the
    same folder, and those of later steps, which a run that was resumed from an older checkpoint leaves behind.

    Args:
        lengths: Lengths of the averages that are kept: standard deviations of their profiles, as fractions of the
            training.
        every_n_steps: Number of steps between snapshots; null to spread them over `trainer.max_steps`, or for 250 if
            training has no last step.
        max_snapshots: Most snapshots that there are at a time. Between 0.04 and 0.2, 32 of them give any length.
        modules: The parts of the LightningModule whose trained parameters are averaged, such as `model`.

    Raises:
        ValueError: if an option lies outside of its range; when training starts, if the module lacks one of `modules`
            or does not count its images, or a checkpoint's averages are of other lengths or parameters.
        NotWritten: before the first step, if there is no space for all snapshots; later, if one can't be written.
    """

    def __init__(
        self,
        lengths: Sequence[float] = (0.05, 0.1),
        every_n_steps: int | None = None,
        max_snapshots: int = 32,
        modules: Sequence[str] = ("model",),
    ) -> None:
        within(SHORTEST, LONGEST, lengths=lengths)
        at_least(1, every_n_steps=every_n_steps)
        at_least(2, max_snapshots=max_snapshots)
        if not lengths or len(set(lengths)) < len(lengths):
            raise ValueError(f"lengths: at least one, and each once, given {list(lengths)}")
        self.lengths, self.every_n_steps, self.max_snapshots = tuple(lengths), every_n_steps, max_snapshots
        self.modules = (modules,) if isinstance(modules, str) else tuple(modules)
        self.tracks: list[dict[str, Tensor]] = []
        self.images = 0  # that the averages span
        self._start = 0  # images that the module had seen before
        self._first = 0  # step after which they began
        self._interval = 0
        self._run = ""
        self._step = self._written = 0
        self._folder: Path | None = None  # None where nothing is written

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Checks whether the module has what is needed, and asks for the folder, on all ranks."""
        check_modules(pl_module, self.modules)
        if stage == "fit" and not isinstance(pl_module, CountsImages):
            raise ValueError(f"PostHocEMA counts images, but {type(pl_module).__name__} has no images_seen.")
        folder = Path(trainer.log_dir or trainer.default_root_dir) / FOLDER
        self._folder = None if is_trial(trainer) else folder

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Starts at the present weights, or where the loaded averages ended; says what snapshots take."""
        parameters = {n: p for n, p in parameters_of(pl_module, self.modules).items() if p.requires_grad}
        if not parameters:
            raise ValueError(f"modules: nothing in {list(self.modules)} trains, so there is nothing to average.")
        if not self.tracks:
            self._begin(trainer, pl_module, parameters)
        for track in self.tracks:
            if {n: t.shape for n, t in track.items()} != {n: p.shape for n, p in parameters.items()}:
                raise ValueError("modules: the checkpoint's averages are of other parameters than train here")
            track.update({name: placed_like(parameters[name], tensor) for name, tensor in track.items()})
        self._step = self._written = trainer.global_step
        if self._folder is not None:
            self._look(trainer, self._folder)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
        """Updates the averages if the optimizer stepped, and stores them where that is due."""
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        images = pl_module.images_seen - self._start
        if images <= self.images:
            raise ValueError(f"the module's images_seen, {pl_module.images_seen}, did not advance in a step.")
        self._update(pl_module, images)
        while self._since_first > self._interval * (self.max_snapshots - 1):  # one more is for the end
            self._interval *= 2
        if self._since_first % self._interval == 0:
            self._write(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stores what training ends with."""
        if self._step > self._written:
            self._write(trainer)

    def state_dict(self) -> dict[str, Any]:
        """Averages and counters; all ranks must ask."""
        if not self.tracks:
            return {}
        counters = {"images": self.images, "start": self._start, "first": self._first, "interval": self._interval}
        tracks = [whole(track) for track in self.tracks]
        return counters | {"run": self._run, "lengths": list(self.lengths), "tracks": tracks}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues from a checkpoint.

        Raises:
            ValueError: if its averages have other lengths.
        """
        if not state_dict:
            return
        if tuple(state_dict["lengths"]) != self.lengths:
            raise ValueError(
                f"lengths: the checkpoint's averages have {state_dict['lengths']}, given {list(self.lengths)}; give "
                "the former, or begin from the checkpoint's weights alone by init_from"
            )
        self.tracks = [{n: precise(tensor).clone() for n, tensor in track.items()} for track in state_dict["tracks"]]
        self.images, self._start, self._first = (int(state_dict[name]) for name in ("images", "start", "first"))
        self._interval, self._run = int(state_dict["interval"]), str(state_dict["run"])

    @property
    def _since_first(self) -> int:
        return self._step - self._first

    def _begin(self, trainer: Trainer, pl_module: Any, parameters: Mapping[str, Tensor]) -> None:
        self.tracks = [{name: precise(p).clone() for name, p in parameters.items()} for _ in self.lengths]
        self.images, self._start, self._first = 0, pl_module.images_seen, trainer.global_step
        self._run = trainer.strategy.broadcast(secrets.token_hex(8))
        steps = trainer.max_steps - self._first
        spread = math.ceil(steps / (self.max_snapshots - 1)) if steps > 0 else 250
        self._interval = self.every_n_steps or spread

    @torch.no_grad()
    def _update(self, pl_module: LightningModule, images: int) -> None:
        parameters = parameters_of(pl_module, self.modules)
        weights = [precise(parameters[name]) for name in self.tracks[0]]
        for length, track in zip(self.lengths, self.tracks, strict=True):
            torch._foreach_lerp_(list(track.values()), weights, 1 - beta(length, images, images - self.images))
        self.images = images

    def _look(self, trainer: Trainer, folder: Path) -> None:
        """Says what snapshots take, and checks that there is space for those that are still to come."""
        steps = trainer.max_steps - self._first
        number = min(self.max_snapshots, math.ceil(steps / self._interval)) if steps > 0 else self.max_snapshots
        size = num_bytes(self.tracks)
        rank_zero_info(
            f"{folder}: {number} snapshots of averages at most, one every {self._interval} steps to begin with, of "
            f"{size / 1e6:,.1f} MB each, {number * size / 1e9:,.2f} GB in all"
        )

        def look() -> None:
            if trainer.is_global_zero:
                there = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
                check_place(folder.parent / f"{FOLDER}.safetensors", max(0, number * size - there), "max_snapshots")
                remove_leftovers(folder)

        alike(trainer.strategy, look)

    def _write(self, trainer: Trainer) -> None:
        folder, self._written = self._folder, self._step
        if folder is None:
            return
        snapshot = Snapshot(self._step, self.images, self._start, self.lengths, self._run)
        tracks = [whole(track) for track in self.tracks]

        def write() -> None:
            if trainer.is_global_zero:
                remove_all_but(folder, range(self._first, self._step, self._interval), self._run)
                snapshot.write(folder, tracks)

        alike(trainer.strategy, write)
