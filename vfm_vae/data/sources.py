"""Where samples come from: a tree of folders, tar shards, photographs that are written on the spot, cached latents."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any

from vfm_vae.data.folder import ImageFolderDataset, check_classes
from vfm_vae.data.images import ImageDataset
from vfm_vae.data.latents import LatentDataset, LatentStatistics, split_folder
from vfm_vae.data.samples import SampleSet
from vfm_vae.data.shard_index import CaptionMembers, read_index, shard_index
from vfm_vae.data.shards import ImageShardDataset, find_shards
from vfm_vae.data.small import SmallImages
from vfm_vae.data.transforms import Transform
from vfm_vae.data.unsplit import UnsplitFolderDataset, is_unsplit
from vfm_vae.embedded.captions import write_captions
from vfm_vae.embedded.photos import write_photos
from vfm_vae.options import at_least, one_of


@dataclass(frozen=True)
class Options:
    """What sources are told, each of which takes what concerns it; `ImageNetDataModule` explains those not said here.

    Attributes:
        train_transform: Makes a tensor of an image in training.
        evaluation_transform: Makes one where nothing is random.
        small: The images that training leaves out.
    """

    root: Path
    cache_dir: Path
    train_transform: Transform
    evaluation_transform: Transform
    small: SmallImages
    photos: Mapping[str, int]
    captions: str | None
    exif_transpose: bool
    max_bad_fraction: float
    val_fraction: float
    seed: int


class Source(ABC):
    """Finds the samples of a split, and reads none.

    Args:
        options: What the DataModule was given.
    """

    def __init__(self, options: Options) -> None:
        self.options, self.root = options, options.root

    @abstractmethod
    def prepare(self) -> None:
        """Makes what is missing before samples can be found; one process of each machine does it."""

    @abstractmethod
    def training(self) -> SampleSet:
        """The samples of training, with its randomness."""

    @abstractmethod
    def evaluated(self, split: str) -> SampleSet | None:
        """A split without randomness; None where the source may lack it, and does."""

    def latent_statistics(self) -> LatentStatistics | None:
        """By which latents are normalised: those of the training split; None where there are none."""
        return None


class Images(Source):
    """Images that lie somewhere; subclasses say where."""

    @abstractmethod
    def images(self, split: str, transform: Transform, **kwargs: Any) -> ImageDataset:
        """All images of a split, but for those that further arguments of the data set leave out."""

    def prepare(self) -> None:
        """Lists the small images."""
        self.options.small.find(lambda: self.images("train", self.options.evaluation_transform))

    def training(self) -> ImageDataset:
        """Augmented, without the small ones."""
        return self.images("train", self.options.train_transform, exclude=self.options.small.names())

    def evaluated(self, split: str) -> ImageDataset:
        """All of a split; what stands in for a damaged one is marked."""
        return self.images(split, self.options.evaluation_transform, replace_damaged=False)

    def _reading(self) -> dict[str, Any]:
        return {name: getattr(self.options, name) for name in ("seed", "exif_transpose", "max_bad_fraction")}


class Folders(Images):
    """Images as `<root>/{train,val}/<class>/*`, or as `<root>/{train,val}/metadata.jsonl` names them with captions.

    A folder without either, and without captions, is divided by the images' names.
    """

    def images(self, split: str, transform: Transform, **kwargs: Any) -> ImageDataset:
        """Those of a split's folder, or of its share."""
        captions = self.options.captions
        if captions is None and is_unsplit(self.root):
            share = self.options.val_fraction
            return UnsplitFolderDataset(self.root, split, transform, val_fraction=share, **kwargs | self._reading())
        return ImageFolderDataset(self.root, split, transform, captions=captions, **kwargs | self._reading())

    def training(self) -> ImageDataset:
        """Augmented, without the small ones.

        Raises:
            ValueError: if there are no captions, and `val` has other classes, whose numbers would be others.
        """
        dataset = super().training()
        # With captions, folders need not be classes; an unsplit folder has the same ones in both parts.
        if isinstance(dataset, ImageFolderDataset) and self.options.captions is None:
            check_classes(self.root, dataset.classes, "val")
        return dataset


class Photos(Folders):
    """The embedded photographs, in folders."""

    def prepare(self) -> None:
        """Writes them, and captions if those are wanted, where they are missing."""
        write_photos(self.root, **self.options.photos)
        if self.options.captions is not None:
            write_captions(self.root)
        super().prepare()


class Shards(Images):
    """Images in tar shards, with an index of each split's."""

    def images(self, split: str, transform: Transform, **kwargs: Any) -> ImageShardDataset:
        """Those of the shards that have the split in their names."""
        captions = self.options.captions
        return ImageShardDataset(
            self.root, split, transform, index=self._index(split), captions=captions, **kwargs | self._reading()
        )

    def prepare(self) -> None:
        """Indexes new shards."""
        captions = self.options.captions
        members = None if captions is None else CaptionMembers.of(captions)
        for split in ("train", "val"):
            if paths := find_shards(self.root, split):
                read_index(paths, self._index(split), retry=True, captions=members)
        super().prepare()

    def _index(self, split: str) -> Path:
        return shard_index(self.options.cache_dir, split, self.options.captions)


class CachedLatents(Source):
    """A cache of latents; one without splits is all training."""

    def prepare(self) -> None:
        """Nothing: a cache is finished, or refused."""

    def training(self) -> LatentDataset:
        """With noise and mirroring, where the cache has what they take."""
        folder = split_folder(self.root, "train")
        assert folder is not None  # a cache without it is refused
        return LatentDataset(folder, train=True, seed=self.options.seed)

    def evaluated(self, split: str) -> LatentDataset | None:
        """Plain views, or means."""
        folder = split_folder(self.root, split)
        return None if folder is None else LatentDataset(folder, train=False, seed=self.options.seed)

    def latent_statistics(self) -> LatentStatistics | None:
        """Those of the training split, where the cache has it."""
        folder = self.root if any(self.root.glob("*.safetensors")) else self.root / "train"
        return LatentStatistics.read(folder) if folder.is_dir() else None


SOURCES: dict[str, type[Source]] = {"folder": Folders, "shards": Shards, "photos": Photos, "latents": CachedLatents}


def check_photos(arguments: Mapping[str, int]) -> None:
    """Checks that `write_photos` takes these arguments.

    Raises:
        ValueError: if not.
    """
    for name, value in arguments.items():
        one_of("photos", name, *list(signature(write_photos).parameters)[1:])
        at_least(0 if name == "seed" else 1, **{f"photos.{name}": value})


def check_captions(source: str, captions: str | None) -> None:
    """Checks that a source has captions in such a place.

    Raises:
        ValueError: if not.
    """
    if captions is None:
        return
    if source == "latents":
        raise ValueError("captions: cached latents bring the captions that they were made with; leave the option out")
    if source == "shards":
        CaptionMembers.of(captions)
    if not captions:
        raise ValueError("captions: the name of a field of metadata.jsonl, such as 'text', given ''")
