"""Writes samples; every rank writes its own part, and goes on where an earlier run was stopped."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from PIL import Image

from callbacks.writers import keep_settings, place_of, write_images
from vfm_vae.checkpoints import open_tensors
from vfm_vae.contracts import DrawsSamples
from vfm_vae.data.archive import write_archive
from vfm_vae.lightning_private import undeclared
from vfm_vae.saving import alike
from vfm_vae.trial import Output
from vfm_vae.types import Samples
from vfm_vae.writing import check_place, write_tensors


class SampleWriter(Output):
    """Writes samples as `<directory>/00000042.png`, or latents in `.safetensors` where the module gives those.

    Numbers, labels and noise do not depend on ranks and batches, so an interrupted run is completed by any other.

    Args:
        directory: Folder to write to, made if it is missing; the default is `--run.output`.
        npz: Whether to also write all images to `<directory>.npz`, as ADM's evaluator reads them: `arr_0` uint8 `[N, H,
            W, 3]` and `arr_1`, the labels `[N]` or other conditions that they were drawn for.

    Raises:
        ValueError: when prediction starts, if the module draws no samples, or the directory holds others.
    """

    def __init__(self, directory: str | None = None, npz: bool = False) -> None:
        self.directory, self.npz = place_of(directory), npz

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Divides what is missing over the ranks; Lightning lets no rank go on before all did so."""
        if stage != "predict":
            return
        data = undeclared(trainer).datamodule
        if not isinstance(pl_module, DrawsSamples) or "samples" not in data.predict_sets:
            raise ValueError("data.num_samples: says how many samples a diffusion model is to draw; it is not set")
        if self.npz and pl_module.predict == "latents":
            raise ValueError("npz: holds images, but model.predict is 'latents'; leave one of them out")
        present = self._present()
        missing = [number for number in range(len(data.predict_sets["samples"])) if number not in present]
        data.predict_indices["samples"] = missing[trainer.global_rank :: trainer.world_size]

    def on_predict_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Notes how samples are drawn, and with which weights, which are averaged ones by now."""
        trainer.predict_loop.return_predictions = False
        unsaid = {"rounding": "round"}  # as all were, before there was a choice
        keep_settings(trainer, self.directory / "samples.json", pl_module.evaluation_settings(), unsaid)
        if self.npz:  # which is written when all samples are there
            alike(trainer.strategy, lambda: check_place(self._archive, option="directory"))

    def on_predict_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Samples, *args: Any) -> None:
        """Writes the batch."""
        if outputs.images is not None:
            write_images(self.directory, outputs.images, outputs.index)
        elif (real := outputs.index >= 0).any():
            tensors = {"latents": outputs.latents, **outputs.condition.tensors(), "index": outputs.index}
            tensors = {name: values[real].cpu() for name, values in tensors.items()}
            write_tensors(self.directory / f"latents_{tensors['index'][0]:08d}.safetensors", tensors)

    def on_predict_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Makes the `.npz` once all ranks have finished."""
        trainer.strategy.barrier()
        num_samples = len(undeclared(trainer).datamodule.predict_sets["samples"])
        files = [self.directory / f"{number:08d}.png" for number in range(num_samples)]
        if self.npz and trainer.is_global_zero and all(file.is_file() for file in files):
            labels = np.asarray(pl_module.sample_condition(torch.arange(num_samples)).plain())
            images = (np.asarray(Image.open(file)) for file in files)
            write_archive(self._archive, images, num_samples, arr_1=labels)
            rank_zero_info(f"{self._archive}: {num_samples} samples")

    @property
    def _archive(self) -> Path:
        return self.directory.with_name(f"{self.directory.name}.npz")

    def _present(self) -> set[int]:
        numbers = {int(file.stem) for file in self.directory.glob("*.png") if file.stem.isdigit()}
        for file in self.directory.glob("latents_*.safetensors"):
            with open_tensors(file, "directory") as stored:
                numbers.update(stored.get_tensor("index").tolist())
        return numbers
