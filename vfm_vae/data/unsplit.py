"""Images of a folder without splits, a share of which is held out for validation."""

import hashlib
import os
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from lightning.pytorch.utilities import rank_zero_info

from vfm_vae.data.folder import classes_of
from vfm_vae.data.images import ImageDataset, kept
from vfm_vae.data.listing import EXTENSIONS, find_images, say_left_out
from vfm_vae.data.transforms import Transform


class UnsplitFolderDataset(ImageDataset):
    """The training or the validation images of a folder that has no `train` and `val` below it.

    Its top folders are classes where all images lie in one; otherwise there is one class. An image is held out for
    validation by a hash of its path in the folder, so it stays where it is when others come.

    Args:
        root: The folder.
        split: `train` or `val`.
        transform: Makes a tensor of an RGB image.
        val_fraction: Share of the images that is held out.
        exclude: Names of images to leave out, relative to the folder.
        **kwargs: As for `ImageDataset`.

    Raises:
        ValueError: a folder can't be read; there are not two images at least.
    """

    def __init__(
        self,
        root: str | Path,
        split: str,
        transform: Transform,
        *,
        val_fraction: float,
        exclude: Collection[str] = (),
        **kwargs: Any,
    ) -> None:
        left_out: Counter[str] = Counter()
        names = find_images(root, left_out)
        say_left_out(root, left_out)
        if not names:
            raise ValueError(
                f"root: {str(root)!r} holds neither folders 'train' and 'val' nor images, which end with "
                f"{' '.join(EXTENSIONS)}"
            )
        if len(names) < 2:
            raise ValueError(f"root: {str(root)!r} has a single image, but training and validation take one each")
        self.classes, labels = classes_of(names)
        is_held_out = held_out(names, val_fraction)
        chosen = np.flatnonzero(is_held_out == (split == "val"))
        if split == "train":
            rank_zero_info(
                f"root: {str(root)!r} has no folders 'train' and 'val', so {is_held_out.sum()} of its {len(names)} "
                f"images, by their names, are held out for validation (data.val_fraction); classes: {len(self.classes)}"
            )
        positions = [int(chosen[i]) for i in kept([names[i] for i in chosen], exclude, root)]
        super().__init__(root, [names[i] for i in positions], [labels[i] for i in positions], transform, **kwargs)

    def open(self, index: int) -> BinaryIO:
        """An image's file, not decoded."""
        return open(self.place / self.name(index), "rb")


def is_unsplit(root: str | Path) -> bool:
    """Whether there is a folder, but neither `train` nor `val` in it."""
    return Path(root).is_dir() and not any(Path(root, split).is_dir() for split in ("train", "val"))


def held_out(names: Sequence[str], fraction: float) -> np.ndarray:
    """Which images are for validation, bool `[n]`: about that share, but one at least, and never all.

    Args:
        names: Paths of two images or more.
        fraction: The share.
    """
    hashes = [hashlib.sha256(os.fsencode(name)).digest()[:8] for name in names]
    places = np.array([int.from_bytes(digest) / 2**64 for digest in hashes])  # even in [0, 1)
    is_held_out: np.ndarray = places < fraction
    is_held_out[places.argmin()] = True
    is_held_out[places.argmax()] = False
    return is_held_out
