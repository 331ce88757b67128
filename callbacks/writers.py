"""Writes what tokenizers predict: reconstructions, and caches of latents.

Every rank writes its own part and nothing is kept in memory. Caches go on where an earlier run was stopped.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from callbacks.texts import check_captions, embedded, expected_size, keep_empty, source_of
from vfm_vae.checkpoints import read_json
from vfm_vae.contracts import MakesFeatures, MakesLatents
from vfm_vae.data.identity import captions_digest, files_state
from vfm_vae.data.latents import IDENTITY, STATISTICS, ShardPlan, measure_shards
from vfm_vae.data.texts import pack_texts
from vfm_vae.finite import check_finite
from vfm_vae.images import to_uint8
from vfm_vae.lightning_private import undeclared
from vfm_vae.options import at_least
from vfm_vae.saving import alike
from vfm_vae.text import TextEncoder
from vfm_vae.trial import Output
from vfm_vae.types import Caption, Encoded
from vfm_vae.writing import check_place, write_json, write_picture, write_tensors


def place_of(directory: str | None) -> Path:
    """The folder that a writer writes to.

    Raises:
        ValueError: if nothing says it.
    """
    if directory is None:
        raise ValueError("run.output: give the folder to write to, --run.output FOLDER")
    return Path(directory)


class ReconstructionWriter(Output):
    """Writes predicted images as PNG, named by their position in the data set: `<directory>/00000042.png`.

    `predict_step` is to return `(images, index)`: `[B, 3, H, W]`, nominally in [-1, 1], and int64 `[B]`. Padding (a
    negative index) is left out.

    Args:
        directory: Folder to write to, made if it is missing; the default is `--run.output`.
    """

    def __init__(self, directory: str | None = None) -> None:
        self.directory = place_of(directory)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Makes the directory; sees whether it can be written to."""
        check_place(self.directory / "00000000.png", option="directory")
        trainer.predict_loop.return_predictions = False

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: tuple[Tensor, Tensor], *args: Any
    ) -> None:
        """Writes the batch."""
        write_images(self.directory, *outputs)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Waits for all ranks: a command does not end well where one of them failed."""
        trainer.strategy.barrier()


class LatentWriter(Output):
    """Writes the latents of images as a cache for diffusion models, `<directory>/<split>/`.

    Goes with `model.predict: latents` (or `moments`) and the splits of `data.predict`. Whole shards are written, each
    by one rank; a cache that was begun is completed, also by another number of ranks. At the end come the statistics
    that normalise latents, over the plain views. With `model.features`, shards hold a VFM's features too.

    With `text`, shards hold the images' captions and their embeddings, too, of all captions of an image. What that will
    take is said before it begins.

    Args:
        directory: Folder to write to, made if it is missing; the default is `--run.output`.
        shard_size: Number of images in a shard, which a rank holds in memory until it is complete.
        dtype: Precision in which latents are stored; features and embeddings of captions are stored in bfloat16.
        text: Text encoder that embeds the captions that `data.captions` names; null leaves captions out.

    Raises:
        ValueError: when prediction starts, if the module gives no latents, there are no captions to embed, or the
            directory holds others.
    """

    def __init__(
        self,
        directory: str | None = None,
        shard_size: int = 10_000,
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        text: TextEncoder | None = None,
    ) -> None:
        at_least(1, shard_size=shard_size)
        self.directory, self.shard_size, self.dtype, self.text = place_of(directory), shard_size, dtype, text
        self._streams: list[_ShardStream] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Divides the shards that are missing over the ranks; Lightning lets no rank go on before all did so."""
        if stage != "predict":
            return
        if not isinstance(pl_module, MakesLatents) or pl_module.predict == "reconstructions":
            raise ValueError("model.predict: a cache takes 'latents' or 'moments' of a tokenizer")
        self._streams, data = [], undeclared(trainer).datamodule
        if self.text is not None:
            check_captions(data.predict_sets.values())
            rank_zero_info(expected_size(self.text, data.predict_sets.values()))
        for split, dataset in data.predict_sets.items():
            plan = ShardPlan(self.directory / split, len(dataset), self.shard_size)
            shards = plan.missing(trainer.global_rank, trainer.world_size)
            data.predict_indices[split] = [image for shard in shards for image in plan.images(shard)]
            self._streams.append(_ShardStream(plan, shards, getattr(torch, self.dtype), self.text))

    def on_predict_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Notes which tokenizer makes these latents, by the weights in use, which are averaged ones by now."""
        trainer.predict_loop.return_predictions = False
        data = undeclared(trainer).datamodule
        settings = {
            "tokenizer": pl_module.latent_identity(),
            "content": pl_module.predict,
            "image_size": data.image_size,
            "evaluation_crop": data.evaluation_crop,
            "shard_size": self.shard_size,
            "dtype": self.dtype,
            "precision": trainer.precision,
            "seed": pl_module.seed,
        }
        unsaid = {"adapter": "as precision says", "evaluation_crop": "adm"}
        if trainer.precision.endswith("-mixed"):
            settings["adapter"] = "float32"  # formerly, autocast reached it
        features = pl_module.features_source() if isinstance(pl_module, MakesFeatures) else None
        if features is not None:
            settings["features"] = dict(features)
        for stream, dataset in zip(self._streams, data.predict_sets.values(), strict=True):
            file = stream.plan.folder / IDENTITY
            if not file.is_file() and any(stream.plan.folder.glob("*.safetensors")):
                raise ValueError(f"directory: {str(file.parent)!r} holds safetensors of unknown origin; choose another")
            sizes = files_state(dataset).sizes if trainer.is_global_zero else None  # the same for copies
            images = {"images": trainer.strategy.broadcast(sizes)}
            of_split: dict[str, Any] = images | {"num_images": stream.plan.num_images}
            if self.text is not None:
                digest = captions_digest(dataset) if trainer.is_global_zero else None
                of_split |= {"text": source_of(self.text, file), "captions": trainer.strategy.broadcast(digest)}
            keep_settings(trainer, file, settings | of_split, unsaid | images)
            if self.text is not None:
                keep_empty(trainer, self.text, file.parent, pl_module.device)

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Encoded,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Adds the batch, and writes the shard if it is complete."""
        dataset = list(undeclared(trainer).datamodule.predict_sets.values())[dataloader_idx]
        texts = [] if self.text is None else embedded(self.text, dataset, outputs.index, pl_module.device)
        self._streams[dataloader_idx].add(outputs, texts)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Computes the statistics once all ranks are through; that file says that the cache is finished."""
        trainer.strategy.barrier()
        for plan in [stream.plan for stream in self._streams]:
            file = plan.folder / STATISTICS
            # All ranks have to agree, whatever each one's view of a shared file system is at the moment.
            num_missing, is_finished = trainer.strategy.broadcast((len(plan.missing()), file.is_file()))
            if num_missing:
                rank_zero_warn(f"{plan.folder}: {num_missing} of {len(plan)} shards are missing; run again to go on")
            if num_missing or is_finished:
                continue
            running = measure_shards(plan, trainer.global_rank, trainer.world_size)
            running.sums = trainer.strategy.reduce(running.sums.to(pl_module.device), reduce_op="sum").cpu()
            if trainer.is_global_zero:
                running.compute().write(file)


class _ShardStream:
    """Collects samples, which arrive shard by shard, and writes each shard when it is complete."""

    def __init__(self, plan: ShardPlan, shards: list[int], dtype: torch.dtype, text: TextEncoder | None) -> None:
        self.plan, self._shards, self._dtype, self._text = plan, shards, dtype, text
        self._pending: list[dict[str, Tensor]] = []
        self._texts: list[list[Caption]] = []

    def add(self, encoded: Encoded, texts: Sequence[list[Caption]]) -> None:
        """Takes in a batch, with all captions of each image.

        Raises:
            ValueError: if it is not finite in the precision that it is stored in.
        """
        dtypes = {"features": torch.bfloat16}
        tensors = {name: x.to("cpu", dtypes.get(name, self._dtype)) for name, x in encoded.tensors.items()}
        for name, values in tensors.items():
            check_finite(f"{name} in {values.dtype}", values)
        self._pending.append(tensors | {"labels": encoded.labels.cpu(), "index": encoded.index.cpu()})
        self._texts.extend(texts)
        while self._shards and sum(len(rows["index"]) for rows in self._pending) >= len(self._current):
            self._write()

    @property
    def _current(self) -> range:
        return self.plan.images(self._shards[0])

    def _write(self) -> None:
        rows = {name: torch.cat([part[name] for part in self._pending]) for name in self._pending[0]}
        size = len(self._current)
        shard = {name: tensor[:size] for name, tensor in rows.items()}
        real = shard["index"] >= 0  # a damaged image counts as padding
        shard = {name: tensor[real] for name, tensor in shard.items()}
        if self._text is not None:
            texts = [texts for texts, is_real in zip(self._texts, real.tolist(), strict=False) if is_real]
            shard |= pack_texts(texts, self._text.width)
        write_tensors(self.plan.path(self._shards.pop(0)), shard)
        self._pending = [{name: tensor[size:] for name, tensor in rows.items()}]
        self._texts = self._texts[size:]


def keep_settings(
    trainer: Trainer, file: Path, settings: Mapping[str, Any], unsaid: Mapping[str, Any] = MappingProxyType({})
) -> None:
    """Notes how the contents of a folder are made, or checks that it is the same as noted before.

    Args:
        trainer: The trainer, whose rank zero writes.
        file: The file of notes.
        settings: The settings to note or to compare.
        unsaid: What settings are where older notes don't say, by name.

    Raises:
        ValueError: it is not; on every rank, so that none waits for another.
    """

    def note() -> None:
        if trainer.is_global_zero and not file.is_file():
            write_json(file, settings)

    alike(trainer.strategy, note)
    found = {**unsaid, **read_json(file, "directory")}
    settings = {**unsaid, **json.loads(json.dumps(settings))}
    differing = sorted(key for key in found.keys() | settings.keys() if found.get(key) != settings.get(key))
    if differing:
        changes = "; ".join(f"{key} was {found.get(key)!r}, now {settings.get(key)!r}" for key in differing)
        raise ValueError(
            f"directory: {str(file.parent)!r} holds what was made otherwise: {changes}. Choose another one"
        )


def numbered(number: int) -> str:
    """Name of an image's file, by its number."""
    return f"{number:08d}.png"


def write_images(directory: Path, images: Tensor, index: Tensor, named: Callable[[int], str] = numbered) -> None:
    """Writes images `[B, 3, H, W]` in [-1, 1] as PNG named by `index: [B]`, but for padding."""
    pixels = to_uint8(images).permute(0, 2, 3, 1).cpu().numpy()  # [B, H, W, 3]
    for number, picture in zip(index.tolist(), pixels, strict=True):
        if number >= 0:
            write_picture(directory / named(number), picture)
