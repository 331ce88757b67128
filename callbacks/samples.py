"""Writes samples; every rank writes its own part, and goes on where an earlier run was stopped."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from PIL import Image

from callbacks.layouts import LAYOUTS, Numbers
from callbacks.writers import keep_settings, place_of, write_images
from vfm_vae.checkpoints import open_tensors
from vfm_vae.contracts import DrawsSamples
from vfm_vae.data.archive import write_archive
from vfm_vae.data.prompts import SamplePrompts
from vfm_vae.data.samples import SampleNumbers
from vfm_vae.lightning_private import undeclared
from vfm_vae.options import one_of
from vfm_vae.saving import alike
from vfm_vae.trial import Output
from vfm_vae.types import Samples
from vfm_vae.writing import check_place, write_tensors, write_text

AT_ONCE = 64  # conditions


class SampleWriter(Output):
    """Writes samples as `<directory>/00000042.png`, or latents in `.safetensors` where the module gives those.

    Numbers, labels and noise do not depend on ranks and batches, so an interrupted run is completed by any other. Of
    prompts, `samples.json` notes the hash, and `prompts.jsonl` says which sample is of which.

    Args:
        directory: Folder to write to, made if it is missing; the default is `--run.output`.
        npz: Whether to also write all images to `<directory>.npz`, as ADM's evaluator reads them: `arr_0` uint8 `[N, H,
            W, 3]` and `arr_1`, the labels `[N]` or prompts `[N]` or other conditions that they were drawn for.
        layout: How images lie in the folder. `numbers` is as above. `geneval` is as GenEval reads them,
            `00010/samples/00002.png` for image 2 of prompt 10. `dpg` adds `grids/<name>.png` with the four images of
            each prompt, as DPG-Bench reads them.

    Raises:
        ValueError: when prediction starts, if the module draws no samples, the directory holds others, or they can't be
            laid out as `layout` says.
    """

    _layout: Numbers
    _samples: SampleNumbers

    def __init__(
        self,
        directory: str | None = None,
        npz: bool = False,
        layout: Literal["numbers", "geneval", "dpg"] = "numbers",
    ) -> None:
        one_of("layout", layout, *LAYOUTS)
        self.directory, self.npz, self.layout = place_of(directory), npz, layout

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Divides what is missing over the ranks; Lightning lets no rank go on before all did so."""
        if stage != "predict":
            return
        data = undeclared(trainer).datamodule
        if not isinstance(pl_module, DrawsSamples) or "samples" not in data.predict_sets:
            raise ValueError(
                "data.num_samples: says how many samples a diffusion model is to draw, or data.prompts for what; set "
                "one of them"
            )
        if pl_module.predict == "latents" and (self.npz or self.layout != "numbers"):
            option = "npz: holds" if self.npz else f"layout: {self.layout!r} is of"
            raise ValueError(f"{option} images, but model.predict is 'latents'; leave one of them out")
        self._samples = data.predict_sets["samples"]
        self._layout = LAYOUTS[self.layout](self._samples)
        present = self._present()
        missing = [number for number in range(len(self._samples)) if number not in present]
        data.predict_indices["samples"] = missing[trainer.global_rank :: trainer.world_size]

    def on_predict_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Notes how samples are drawn, and with which weights, which are averaged ones by now."""
        trainer.predict_loop.return_predictions = False
        unsaid = {"rounding": "round"}  # as all were, before there was a choice
        settings = {**pl_module.evaluation_settings(), **self._samples.settings()}
        keep_settings(trainer, self.directory / "samples.json", settings, unsaid)
        if self.npz:  # which is written when all samples are there
            alike(trainer.strategy, lambda: check_place(self._archive, option="directory"))

        def begin() -> None:
            if trainer.is_global_zero:
                self._layout.begin(self.directory)
                if isinstance(self._samples, SamplePrompts):
                    lines = map(json.dumps, self._lines(self._samples, pl_module.predict == "images"))
                    write_text(self.directory / "prompts.jsonl", "".join(f"{line}\n" for line in lines))

        alike(trainer.strategy, begin)

    def on_predict_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Samples, *args: Any) -> None:
        """Writes the batch."""
        if outputs.images is not None:
            write_images(self.directory, outputs.images, outputs.index, self._layout.file)
        elif (real := outputs.index >= 0).any():
            tensors = {"latents": outputs.latents, **outputs.condition.tensors(), "index": outputs.index}
            tensors = {name: values[real].cpu() for name, values in tensors.items()}
            write_tensors(self.directory / f"latents_{tensors['index'][0]:08d}.safetensors", tensors)

    def on_predict_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Makes what consists of several images, once all ranks have finished."""
        trainer.strategy.barrier()
        self._layout.finish(self.directory, slice(trainer.global_rank, None, trainer.world_size))
        files = [self.directory / self._layout.file(number) for number in range(len(self._samples))]
        if self.npz and trainer.is_global_zero and all(file.is_file() for file in files):
            images = (np.asarray(Image.open(file)) for file in files)
            write_archive(self._archive, images, len(files), arr_1=np.asarray(self._conditions(pl_module)))
            rank_zero_info(f"{self._archive}: {len(files)} samples")

    def _conditions(self, pl_module: Any) -> list[Any]:
        """What each sample was drawn for, as JSON has it."""
        if isinstance(self._samples, SamplePrompts):
            return [self._samples.prompt_of(number).text for number in range(len(self._samples))]
        parts = torch.arange(len(self._samples)).split(AT_ONCE)  # texts take much memory
        return [value for part in parts for value in pl_module.sample_condition(part).plain()]

    def _lines(self, samples: SamplePrompts, as_images: bool) -> Iterator[dict[str, Any]]:
        """What is known of each sample's prompt."""
        for number in range(len(samples)):
            prompt = samples.prompt_of(number)
            file = self._layout.file(number) if as_images else None
            known = {
                "number": number,
                "file": file,
                "prompt": prompt.text,
                "name": prompt.name,
                "record": prompt.record,
            }
            yield {name: value for name, value in known.items() if value is not None}

    @property
    def _archive(self) -> Path:
        return self.directory.with_name(f"{self.directory.name}.npz")

    def _present(self) -> set[int]:
        files = {file.relative_to(self.directory).as_posix() for file in self.directory.glob(self._layout.pattern)}
        numbers = {number for number in range(len(self._samples)) if self._layout.file(number) in files}
        for file in self.directory.glob("latents_*.safetensors"):
            with open_tensors(file, "directory") as stored:
                numbers.update(stored.get_tensor("index").tolist())
        return numbers
