"""Images without classes, all in one folder."""

import os
from collections import Counter
from pathlib import Path
from typing import Any, BinaryIO

from vfm_vae.data.images import ImageDataset
from vfm_vae.data.listing import EXTENSIONS, find_images, is_hidden, list_images
from vfm_vae.data.transforms import Transform


class FlatFolderDataset(ImageDataset):
    """The images of a folder in alphabetical order; all have the label 0.

    Args:
        folder: The folder.
        transform: Makes a tensor of an RGB image.
        **kwargs: As for `ImageDataset`.

    Raises:
        ValueError: when reading, too many images are damaged.
    """

    def __init__(self, folder: str | Path, transform: Transform, **kwargs: Any) -> None:
        names = list_images(folder)
        super().__init__(folder, names, [0] * len(names), transform, **kwargs)
        self.classes = ["images"]

    def open(self, index: int) -> BinaryIO:
        """An image's file, not decoded."""
        return open(self.place / self.name(index), "rb")


def is_flat(folder: str | Path) -> bool:
    """Whether images lie in a folder itself, and none in the folders below it."""
    has_images = any(e.name.lower().endswith(EXTENSIONS) and not is_hidden(e.name) for e in os.scandir(folder))
    return has_images and not any("/" in name for name in find_images(folder, Counter()))
