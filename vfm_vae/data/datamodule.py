"""The DataModule that serves images to both models."""

from collections.abc import Mapping, Sequence
from inspect import signature
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from vfm_vae.data.folder import ImageFolderDataset, check_classes
from vfm_vae.data.identity import names_digest
from vfm_vae.data.images import ImageDataset
from vfm_vae.data.latents import LatentDataset, LatentStatistics, split_folder
from vfm_vae.data.resuming import ResumableLoader
from vfm_vae.data.sampling import Draw, EvaluationSampler, GivenOrder, TrainingSampler
from vfm_vae.data.shards import ImageShardDataset, find_shards, read_index
from vfm_vae.data.transforms import CentreCrop, RandomCrop, ResizeAndCrop, Transform
from vfm_vae.data.workers import outlive_signals
from vfm_vae.embedded.photos import write_photos
from vfm_vae.options import at_least, within
from vfm_vae.types import Batch, LatentBatch
from vfm_vae.writing import write_text

Split = Literal["train", "val"]

TITLE = "# under "  # of a list of small images


class ImageNetDataModule(LightningDataModule):
    """Images and labels: ImageNet's folders `<root>/{train,val}/<class>/*`, or tar shards; or the images' latents.

    Yields `Batch` (uint8 images, labels, and positions in the data set), or `LatentBatch` from cached latents. The
    order of training depends on the seed and the epoch alone, not on workers, batch size or ranks, and a run resumed
    from a checkpoint goes on with the next image of its epoch, also where batches or ranks have changed. Validation
    sees the `val` images once, in order, and so does test; prediction sees the splits that `predict` names. With
    `num_samples`, test and prediction see the numbers of the samples that are to be drawn instead.

    Args:
        root: folder of the data set; with `source: photos`, where it is written; with `source: latents`, of the cache.
        image_size: side of the images in pixels.
        batch_size: training images per batch, over all ranks: each gets `batch_size / ranks`.
        val_batch_size: images per batch in validation, test and prediction, over all ranks; by default `batch_size`.
        num_workers: loading processes per rank.
        source: `folder` reads folders at `root`; `shards` WebDataset's tars there, with the word `train` or `val` in
            their names; `photos` folders, after writing the embedded data set to `root` if it is missing; `latents` a
            cache that `python -m vfm_vae predict` or LightningDiT made.
        photos: arguments of `vfm_vae.embedded.photos.write_photos`, such as `size` and `train_per_class`.
        min_size: training images with a short side under this many pixels are left out.
        small_list: file that names the images under `min_size`, one `class/file.JPEG` (or `shard.tar/member.jpg`) a
            line; made by looking at every image where it is missing, or was made here of images of other names. By
            default `train_under_<min_size>px.txt` in `cache_dir`.
        mixed_shards: how many tar shards are shuffled together at a time.
        cache_dir: folder for the list of small images and the index of tar shards; by default `root`.
        crop: how training images are cropped: `random`, for tokenizers, or `centre` as in evaluation and mirrored half
            of the time, for diffusion models.
        evaluation_crop: how images are cropped where nothing is random: `adm` as ADM's reference images are, or
            `resize`, bilinearly and then the middle, as in the published reconstruction numbers.
        min_crop: smallest side of the random square crop in training, as a fraction of the short side.
        resampling: filter that resizes training crops, `lanczos` or `bicubic`.
        exif_transpose: whether images are turned as their EXIF orientation says, as photographs want it. Public code
            reads ImageNet without, and so do its configs.
        max_bad_fraction: share of the images that may be damaged: those are left out, more stops the run.
        predict: splits that prediction sees, one after the other, as evaluation does.
        num_samples: instead, test and prediction ask a diffusion model for so many samples, which needs no data set.
        seed: of the order and the augmentation.

    Attributes:
        predict_indices: by split (or `samples`), what this rank is to predict, in order; set by a writer that knows
            what is there already. Without an entry the whole is divided over the ranks.

    Raises:
        ValueError: an option lies outside its range; the data set is missing or not in the layout; a batch size does
            not fit; too many damaged images.
    """

    def __init__(
        self,
        root: str,
        image_size: int = 256,
        batch_size: int = 512,
        val_batch_size: int | None = None,
        num_workers: int = 8,
        source: Literal["folder", "shards", "photos", "latents"] = "folder",
        photos: dict[str, int] | None = None,
        min_size: int = 0,
        small_list: str | None = None,
        mixed_shards: int = 64,
        cache_dir: str | None = None,
        crop: Literal["random", "centre"] = "random",
        evaluation_crop: Literal["adm", "resize"] = "adm",
        min_crop: float = 0.5,
        resampling: Literal["lanczos", "bicubic"] = "lanczos",
        exif_transpose: bool = True,
        max_bad_fraction: float = 0.01,
        predict: Sequence[Split] = ("val",),
        num_samples: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        _check_choice("source", source, "folder", "shards", "photos", "latents")
        _check_choice("crop", crop, "random", "centre")
        _check_choice("evaluation_crop", evaluation_crop, "adm", "resize")
        at_least(1, image_size=image_size, batch_size=batch_size, val_batch_size=val_batch_size)
        at_least(1, mixed_shards=mixed_shards, num_samples=num_samples)
        at_least(0, num_workers=num_workers, min_size=min_size, seed=seed)
        within(0, 1, max_bad_fraction=max_bad_fraction)
        _check_photos(photos or {})
        self.root = Path(root)
        self.image_size = image_size
        self.batch_size = batch_size
        self.val_batch_size = val_batch_size or batch_size
        self.num_workers = num_workers
        self.source = source
        self.photos = photos or {}
        self.min_size = min_size
        self.cache_dir = Path(cache_dir) if cache_dir else self.root
        self.small_list = Path(small_list) if small_list else self.cache_dir / f"train_under_{min_size}px.txt"
        self.mixed_shards = mixed_shards
        self.train_transform: Transform = RandomCrop(image_size, min_crop, resampling)
        if crop == "centre":
            self.train_transform = CentreCrop(image_size, flip=True)
        self.evaluation_crop = evaluation_crop
        self.evaluation_transform = (CentreCrop if evaluation_crop == "adm" else ResizeAndCrop)(image_size)
        self.exif_transpose, self.max_bad_fraction = exif_transpose, max_bad_fraction
        self.predict, self.num_samples = tuple(predict), num_samples
        self.seed = seed
        self.train_set: ImageDataset | LatentDataset | None = None
        self.val_set: ImageDataset | LatentDataset | None = None
        self.predict_sets: dict[str, ImageDataset | LatentDataset | SampleNumbers] = {}
        self.predict_indices: dict[str, Sequence[int]] = {}

    def prepare_data(self) -> None:
        """Writes the embedded photos, the index of shards and the list of small images where they are missing.

        One process of each machine does it.
        """
        if self.source == "photos":
            write_photos(self.root, **self.photos)
        if self.source == "shards":
            for split in ("train", "val"):
                if paths := find_shards(self.root, split):
                    read_index(paths, self._shard_index(split), retry=True)
        if self.min_size and self.source != "latents" and not self._small_list_is_new():
            self._write_small_list()

    def setup(self, stage: str | None = None) -> None:
        """Finds the images or latents; reads none.

        Args:
            stage: `fit` takes the training images too, `predict` what is to be predicted alone.
        """
        if stage == "predict":
            names = self.predict if self.num_samples is None else ("samples",)
            self.predict_sets, self.predict_indices = {name: self._predicted(name) for name in names}, {}
            return
        if stage == "test" and self.num_samples is not None:
            return
        if stage in ("fit", None) and self.train_set is None:
            self.train_set = self._training_set()
        if self.val_set is None:
            self.val_set = self._evaluated("val")
        if stage in ("validate", "test") and self.val_set is None:
            raise ValueError(f"root: there are no validation latents in {str(self.root)!r}, which has no folder 'val'")

    @property
    def classes(self) -> list[str]:
        """Names of the classes, known after `setup`; a label is a position in this list."""
        return next(s.classes for s in (self.train_set, self.val_set) if isinstance(s, ImageDataset))

    @property
    def num_classes(self) -> int | None:
        """One more than the largest label; None before the data was looked for, or where there is none."""
        sets = [s for s in (self.train_set, self.val_set) if s is not None]
        return max(int(s.labels.max()) for s in sets) + 1 if sets else None

    @property
    def latent_statistics(self) -> LatentStatistics | None:
        """By which latents are normalised: the training split's; None where the data has none."""
        if self.source != "latents":
            return None
        folder = self.root if any(self.root.glob("*.safetensors")) else self.root / "train"
        return LatentStatistics.read(folder) if folder.is_dir() else None

    def train_dataloader(self) -> DataLoader:
        """Shuffled, augmented; on every rank the same number of full batches, which make whole steps.

        Raises:
            ValueError: if a validation would fall between the batches that make one step.
        """
        size, ranks = self._share("batch_size", self.batch_size)
        loading = self._loading(self.train_set)
        if self.trainer and self.trainer.overfit_batches:  # Lightning takes the first ones, in order, again and again
            return DataLoader(self.train_set, batch_size=size, **loading)
        ranks["batches_per_step"] = _batches_per_step(self.trainer)
        if isinstance(self.train_set, ImageDataset):
            ranks |= {"shards": self.train_set.shards, "mixed_shards": self.mixed_shards}
        sampler = TrainingSampler(self.train_set, size, seed=self.seed, **ranks)
        return ResumableLoader(self.train_set, batch_size=size, sampler=sampler, trainer=self.trainer, **loading)

    def val_dataloader(self) -> DataLoader | list[DataLoader]:
        """Every validation image once, in order; padding that makes ranks equal has index -1. Nothing without any."""
        return [] if self.val_set is None else self._evaluation_loader(self.val_set)

    def test_dataloader(self) -> DataLoader | list[DataLoader]:
        """The validation images, or the numbers of `num_samples` samples."""
        if self.num_samples is not None:
            return self._evaluation_loader(SampleNumbers(self.num_samples))
        return self.val_dataloader()

    def evaluation_dataloader(self, split: Split) -> DataLoader:
        """A split once, in order and without randomness, divided over the ranks as in validation."""
        return self._evaluation_loader(self._predicted(split))

    def spread_dataloader(self, num_images: int) -> DataLoader:
        """So many training images, spread evenly over the data set, which may be sorted by class; a rank's part."""
        count = min(num_images, len(self.train_set))
        positions = [number * len(self.train_set) // count for number in range(count)]
        _, ranks = self._share("val_batch_size", self.val_batch_size)
        return self._evaluation_loader(self.train_set, positions[ranks["rank"] :: ranks["num_replicas"]])

    def predict_dataloader(self) -> list[DataLoader]:
        """A loader for each of the `predict_sets`."""
        return [
            self._evaluation_loader(dataset, self.predict_indices.get(name))
            for name, dataset in self.predict_sets.items()
        ]

    def _training_set(self) -> ImageDataset | LatentDataset:
        if self.source == "latents":
            return LatentDataset(split_folder(self.root, "train"), train=True, seed=self.seed)
        lines = self.small_list.read_text().splitlines() if self.min_size else ()
        small = [line for line in lines if not line.startswith(TITLE)]
        dataset = self._images("train", self.train_transform, exclude=small)
        if self.source != "shards":
            check_classes(self.root, dataset.classes, "val")
        return dataset

    def _evaluated(self, split: str) -> ImageDataset | LatentDataset | None:
        """A split without randomness; None for a cache of latents that lacks it."""
        if self.source != "latents":
            return self._images(split, self.evaluation_transform, replace_damaged=False)
        folder = split_folder(self.root, split)
        return None if folder is None else LatentDataset(folder, train=False, seed=self.seed)

    def _predicted(self, name: str) -> "ImageDataset | LatentDataset | SampleNumbers":
        dataset = SampleNumbers(self.num_samples) if name == "samples" else self._evaluated(name)
        if dataset is None:
            raise ValueError(f"root: the latents in {str(self.root)!r} have no split {name!r}")
        return dataset

    def _evaluation_loader(self, dataset: Any, indices: Sequence[int] | None = None) -> DataLoader:
        size, ranks = self._share("val_batch_size", self.val_batch_size)
        sampler = EvaluationSampler(dataset, size, **ranks) if indices is None else GivenOrder(dataset, indices)
        return DataLoader(dataset, batch_size=size, sampler=sampler, **self._loading(dataset))

    def _images(self, split: str, transform: Transform, **kwargs: Any) -> ImageDataset:
        kwargs |= {name: getattr(self, name) for name in ("seed", "exif_transpose", "max_bad_fraction")}
        if self.source == "shards":
            return ImageShardDataset(self.root, split, transform, index=self._shard_index(split), **kwargs)
        return ImageFolderDataset(self.root, split, transform, **kwargs)

    def _shard_index(self, split: str) -> Path:
        return self.cache_dir / f"{split}_shards.npz"

    def _share(self, option: str, batch_size: int) -> tuple[int, dict[str, int]]:
        """One rank's part of a batch, and where this rank stands."""
        num_ranks = self.trainer.world_size if self.trainer else 1
        if batch_size < 1 or batch_size % num_ranks:
            raise ValueError(
                f"{option}: {batch_size} images in total don't divide over {num_ranks} ranks; give a multiple of "
                f"{num_ranks}"
            )
        rank = self.trainer.global_rank if self.trainer else 0
        return batch_size // num_ranks, {"num_replicas": num_ranks, "rank": rank}

    def _loading(self, dataset: Any) -> dict[str, Any]:
        num_workers = 0 if isinstance(dataset, SampleNumbers) else self.num_workers
        return {
            "num_workers": num_workers,
            "collate_fn": collate_latents if isinstance(dataset, LatentDataset) else collate,
            "pin_memory": torch.cuda.is_available(),
            "persistent_workers": num_workers > 0,
            "worker_init_fn": outlive_signals,
            # Otherwise each new iterator would draw from the global generator, and noise would depend on it.
            "generator": torch.Generator(),
        }

    def _small_list_is_new(self) -> bool:
        """Whether it is there; one that was made here must be of these images, and as new as the index of shards."""
        if not self.small_list.is_file():
            return False
        with open(self.small_list) as file:
            title = file.readline().strip()
        if title.startswith(TITLE) and title != self._title(self._images("train", self.evaluation_transform)):
            return False
        index = self._shard_index("train")
        is_ours = self.small_list.parent == self.cache_dir and index.is_file()
        return not is_ours or self.small_list.stat().st_mtime >= index.stat().st_mtime

    def _write_small_list(self) -> None:
        dataset = self._images("train", self.evaluation_transform)
        lines = [self._title(dataset), *dataset.small(self.min_size)]
        write_text(self.small_list, "".join(f"{line}\n" for line in lines), "small_list")

    def _title(self, dataset: ImageDataset) -> str:
        """Begins a list that is made here, and says of which images."""
        return f"{TITLE}{self.min_size} px, of {len(dataset)} images: {names_digest(dataset)}"


def _batches_per_step(trainer: Trainer | None) -> int:
    """Batches whose gradients are accumulated, by the module where it does that itself.

    Raises:
        ValueError: if a validation would fall between them, where gradients would be lost.
    """
    if trainer is None:
        return 1
    number = getattr(trainer.lightning_module, "accumulate_grad_batches", trainer.accumulate_grad_batches)
    interval = trainer.val_check_interval
    if isinstance(interval, int) and not isinstance(interval, bool) and interval % number:
        raise ValueError(
            f"trainer.val_check_interval: {interval} batches end in the middle of a step, which takes {number} "
            f"(accumulate_grad_batches); give a multiple of {number}"
        )
    return number


class SampleNumbers(Dataset):
    """The numbers of samples that are to be drawn, as batches that hold no images.

    Args:
        size: how many.
    """

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        """Number of samples."""
        return self.size

    def __getitem__(self, draw: Draw | int) -> tuple[Tensor, int, int]:
        """Returns an empty image, label -1 and the number, which is -1 for padding."""
        draw = Draw(draw) if isinstance(draw, int) else draw
        return torch.zeros(3, 0, 0, dtype=torch.uint8), -1, -1 if draw.padding else draw.index


def collate(samples: list[tuple]) -> Batch:
    """(image, label, index) triples → `Batch`."""
    return Batch(*default_collate(samples))


def collate_latents(samples: list[tuple]) -> LatentBatch:
    """(latent, label, index) triples, or those and features → `LatentBatch`."""
    return LatentBatch(*default_collate(samples))


def _check_photos(arguments: Mapping[str, int]) -> None:
    for name, value in arguments.items():
        _check_choice("photos", name, *list(signature(write_photos).parameters)[1:])
        at_least(0 if name == "seed" else 1, **{f"photos.{name}": value})


def _check_choice(option: str, given: str, *choices: str) -> None:
    if given not in choices:
        raise ValueError(f"{option}: one of {', '.join(map(repr, choices))}, given {given!r}")
