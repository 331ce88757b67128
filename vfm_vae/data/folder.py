"""Images in a tree of folders, one per class: the layout of ImageNet."""

import logging
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from vfm_vae.data.sampling import Draw
from vfm_vae.data.transforms import Transform, to_rgb

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp")

log = logging.getLogger(__name__)


class ImageFolderDataset(Dataset):
    """Images of `<root>/<split>/<class>/`, with their classes numbered in alphabetical order.

    A damaged image is named in the log once and counted, over all workers of this rank. In training the next good image
    takes its place; in evaluation that one comes marked as padding, so that no metric counts it.

    Args:
        root: folder of the data set.
        split: folder below it, `train` or `val`.
        transform: makes a tensor of an RGB image.
        seed: of the augmentation.
        exclude: names of images to leave out, relative to the split's folder, as `class/file.JPEG`.
        replace_damaged: whether another image takes the place of a damaged one (training), or marks it (evaluation).
        max_bad_fraction: share of the data set that may be damaged.

    Attributes:
        classes: names of the classes, sorted.
        labels: class indices, int64 `[num_images]`.

    Raises:
        ValueError: the folder is missing or holds no classes or no images; when reading, too many images are damaged.
    """

    def __init__(
        self,
        root: str | Path,
        split: str,
        transform: Transform,
        *,
        seed: int = 0,
        exclude: Iterable[str] = (),
        replace_damaged: bool = True,
        max_bad_fraction: float = 0.01,
    ) -> None:
        self.folder = Path(root) / split
        self.transform = transform
        self.seed = seed
        self.replace_damaged = replace_damaged
        self.max_bad_fraction = max_bad_fraction
        self.classes = list_classes(root, split)
        names, labels = _list_images(self.folder, self.classes, frozenset(exclude))
        # Arrays, because a list of a million strings is copied page by page into every forked worker.
        self._names = np.array([os.fsencode(name) for name in names])
        self.labels = np.array(labels, dtype=np.int64)
        self._damaged = torch.zeros(len(names), dtype=torch.bool).share_memory_()  # seen by all workers

    def __len__(self) -> int:
        """Number of images."""
        return len(self._names)

    def name(self, index: int) -> str:
        """Path of an image relative to the split's folder, `class/file.JPEG`."""
        return os.fsdecode(self._names[index])

    @property
    def num_damaged(self) -> int:
        """How many images have been found damaged so far."""
        return int(self._damaged.sum())

    def __getitem__(self, draw: Draw | int) -> tuple[Tensor, int, int]:
        """Returns image (uint8 `[3, H, W]`), label and index; index -1 marks padding."""
        draw = Draw(draw) if isinstance(draw, int) else draw
        index = draw.index
        while (image := self._read(index)) is None:
            index = (index + 1) % len(self)
        generator = np.random.default_rng((self.seed, draw.epoch, draw.index))
        is_padding = draw.padding or (index != draw.index and not self.replace_damaged)
        return self.transform(image, generator), int(self.labels[index]), -1 if is_padding else index

    def _read(self, index: int) -> Image.Image | None:
        """The decoded image, or None for one that is damaged."""
        if self._damaged[index]:
            return None
        try:
            with Image.open(self.folder / self.name(index)) as image:
                image.load()
                return to_rgb(image)
        except Exception as error:  # decoders raise OSError, SyntaxError, struct.error and more at bad bytes
            self._record_damage(index, error)
            return None

    def _record_damage(self, index: int, error: Exception) -> None:
        self._damaged[index] = True
        log.warning("damaged image left out: %s (%s)", self.folder / self.name(index), error)
        if self.num_damaged > self.max_bad_fraction * len(self):
            raise ValueError(
                f"max_bad_fraction: {self.num_damaged} of the {len(self)} images in {str(self.folder)!r} are damaged, "
                f"more than {self.max_bad_fraction:.2%}, the last {self.name(index)!r} ({error}); repair the data set "
                "(the log names every one) or allow more"
            ) from error


def list_classes(root: str | Path, split: str) -> list[str]:
    """Names of the class folders in `<root>/<split>/`, sorted.

    Raises:
        ValueError: a folder is missing, or there are no class folders.
    """
    folder = Path(root) / split
    layout = f"expected are images as {folder}/<class>/<name>.JPEG"
    if not Path(root).is_dir():
        raise ValueError(f"root: there is no folder {str(root)!r}; {layout}")
    if not folder.is_dir():
        raise ValueError(f"root: {str(root)!r} has no folder {split!r}; {layout}")
    classes = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
    if not classes:
        raise ValueError(f"root: {str(folder)!r} has no class folders; {layout}: sort the images into one per class")
    return classes


def _list_images(folder: Path, classes: list[str], exclude: frozenset[str]) -> tuple[list[str], list[int]]:
    names, labels = [], []
    for label, class_name in enumerate(classes):
        files = sorted(e.name for e in os.scandir(folder / class_name) if e.name.lower().endswith(EXTENSIONS))
        kept = [name for file in files if (name := f"{class_name}/{file}") not in exclude]
        names += kept
        labels += [label] * len(kept)
    if not names:
        left = f" but those that are left out ({len(exclude)})" if exclude else ""
        raise ValueError(f"root: no images under {str(folder)!r}{left}; known endings are {' '.join(EXTENSIONS)}")
    return names, labels


def small_images(root: str | Path, split: str, min_size: int, num_threads: int = 8) -> list[str]:
    """Names of the images whose short side is under `min_size` pixels; reads headers alone.

    Images whose header can't be read are not among them: they show as damaged when their turn comes.
    """
    folder = Path(root) / split
    names, _ = _list_images(folder, list_classes(root, split), frozenset())

    def is_small(name: str) -> bool:
        try:
            with Image.open(folder / name) as image:
                return min(image.size) < min_size
        except Exception:  # damaged, as decoders report it in many ways; reading it in training records that
            return False

    with ThreadPoolExecutor(num_threads) as threads:
        return [name for name, small in zip(names, threads.map(is_small, names), strict=True) if small]
