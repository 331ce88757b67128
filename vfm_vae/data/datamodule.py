"""The DataModule that serves images to both models."""

import os
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, default_collate

from vfm_vae.data.folder import ImageFolderDataset, list_classes, small_images
from vfm_vae.data.sampling import EvaluationSampler, ResumableLoader, TrainingSampler
from vfm_vae.data.transforms import CentreCrop, RandomCrop, Transform
from vfm_vae.embedded.photos import write_photos
from vfm_vae.types import Batch


class ImageNetDataModule(LightningDataModule):
    """Images and labels in ImageNet's layout: `<root>/train/<class>/*` and `<root>/val/<class>/*`.

    Yields `Batch`: uint8 images, labels, and positions in the data set. Training batches depend on the seed and the
    epoch alone, not on workers or the number of ranks, and a run resumed from a checkpoint goes on with the next batch
    of its epoch. Validation, test and prediction all see the `val` images once, in order.

    Args:
        root: folder of the data set; with `source: photos`, where it is written.
        image_size: side of the images in pixels.
        batch_size: training images per batch, over all ranks: each gets `batch_size / ranks`.
        val_batch_size: images per batch in validation, test and prediction, over all ranks; by default `batch_size`.
        num_workers: loading processes per rank.
        source: `folder` reads what is at `root`; `photos` first writes the embedded data set there, if it is missing.
        photos: arguments of `vfm_vae.embedded.photos.write_photos`, such as `size` and `train_per_class`.
        min_size: training images with a short side under this many pixels are left out.
        small_list: file that names the images under `min_size`, one `class/file.JPEG` a line; made by looking at every
            image where it is missing. By default `<root>/train_under_<min_size>px.txt`.
        min_crop: smallest side of the random square crop in training, as a fraction of the short side.
        resampling: filter that resizes training crops, `lanczos` or `bicubic`.
        max_bad_fraction: share of the images that may be damaged: those are left out, more stops the run.
        seed: of the order and the augmentation.

    Raises:
        ValueError: the data set is missing or not in the layout; a batch size does not fit; too many damaged images.
    """

    def __init__(
        self,
        root: str,
        image_size: int = 256,
        batch_size: int = 512,
        val_batch_size: int | None = None,
        num_workers: int = 8,
        source: Literal["folder", "photos"] = "folder",
        photos: dict[str, int] | None = None,
        min_size: int = 0,
        small_list: str | None = None,
        min_crop: float = 0.5,
        resampling: Literal["lanczos", "bicubic"] = "lanczos",
        max_bad_fraction: float = 0.01,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if source not in ("folder", "photos"):
            raise ValueError(f"source: 'folder' or 'photos', given {source!r}")
        self.root = Path(root)
        self.image_size = image_size
        self.batch_size = batch_size
        self.val_batch_size = val_batch_size or batch_size
        self.num_workers = num_workers
        self.source = source
        self.photos = photos or {}
        self.min_size = min_size
        self.small_list = Path(small_list) if small_list else self.root / f"train_under_{min_size}px.txt"
        self.train_transform = RandomCrop(image_size, min_crop, resampling)
        self.max_bad_fraction = max_bad_fraction
        self.seed = seed
        self.train_set: ImageFolderDataset | None = None
        self.val_set: ImageFolderDataset | None = None

    def prepare_data(self) -> None:
        """Writes the embedded photos and the list of small images where they are missing; one process does it."""
        if self.source == "photos":
            write_photos(self.root, **self.photos)
        if self.min_size and not self.small_list.is_file():
            self._write_small_list()

    def setup(self, stage: str | None = None) -> None:
        """Finds the images; reads none.

        Args:
            stage: `fit` takes the training images too.
        """
        if stage in ("fit", None) and self.train_set is None:
            small = self.small_list.read_text().splitlines() if self.min_size else ()
            self.train_set = self._dataset("train", self.train_transform, exclude=small)
            if list_classes(self.root, "val") != self.train_set.classes:
                raise ValueError(f"root: {str(self.root)!r} has other class folders in 'val' than in 'train'")
        if self.val_set is None:
            self.val_set = self._dataset("val", CentreCrop(self.image_size), replace_damaged=False)

    @property
    def classes(self) -> list[str]:
        """Names of the classes; a label is a position in this list."""
        return list_classes(self.root, "val")

    def train_dataloader(self) -> ResumableLoader:
        """Shuffled, augmented; the same number of full batches on every rank."""
        size, ranks = self._share("batch_size", self.batch_size)
        sampler = TrainingSampler(self.train_set, size, seed=self.seed, **ranks)
        return ResumableLoader(self.train_set, batch_size=size, sampler=sampler, **self._loading())

    def val_dataloader(self) -> DataLoader:
        """Every validation image once, in order; padding that makes ranks equal has index -1."""
        size, ranks = self._share("val_batch_size", self.val_batch_size)
        sampler = EvaluationSampler(self.val_set, size, **ranks)
        return DataLoader(self.val_set, batch_size=size, sampler=sampler, **self._loading())

    test_dataloader = val_dataloader
    predict_dataloader = val_dataloader

    def _dataset(self, split: str, transform: Transform, **kwargs: Any) -> ImageFolderDataset:
        return ImageFolderDataset(
            self.root, split, transform, seed=self.seed, max_bad_fraction=self.max_bad_fraction, **kwargs
        )

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

    def _loading(self) -> dict[str, Any]:
        return {
            "num_workers": self.num_workers,
            "collate_fn": collate,
            "pin_memory": torch.cuda.is_available(),
            "persistent_workers": self.num_workers > 0,
            # Otherwise each new iterator would draw from the global generator, and noise would depend on it.
            "generator": torch.Generator(),
        }

    def _write_small_list(self) -> None:
        names = small_images(self.root, "train", self.min_size)
        partial = self.small_list.with_name(f"{self.small_list.name}.{os.getpid()}")
        try:
            partial.write_text("".join(f"{name}\n" for name in names))
            partial.replace(self.small_list)  # at once, so that nobody reads half a list
        except OSError as error:
            raise ValueError(
                f"small_list: can't write {str(self.small_list)!r} ({error}); give another path"
            ) from error


def collate(samples: list[tuple]) -> Batch:
    """(image, label, index) triples → `Batch`."""
    return Batch(*default_collate(samples))
