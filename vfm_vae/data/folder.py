"""Images in a tree of folders, one per class: the layout of ImageNet."""

import os
from collections.abc import Collection
from pathlib import Path
from typing import Any, BinaryIO

from vfm_vae.data.images import EXTENSIONS, ImageDataset, kept
from vfm_vae.data.transforms import Transform


class ImageFolderDataset(ImageDataset):
    """Images of `<root>/<split>/<class>/`, with their classes numbered in alphabetical order.

    Args:
        root: folder of the data set.
        split: folder below it, `train` or `val`.
        transform: makes a tensor of an RGB image.
        exclude: names of images to leave out, relative to the split's folder, as `class/file.JPEG`.
        **kwargs: as of `ImageDataset`.

    Attributes:
        folder: of the split; the images' names are relative to it.

    Raises:
        ValueError: the folder is missing or holds no classes or no images; when reading, too many images are damaged.
    """

    def __init__(
        self, root: str | Path, split: str, transform: Transform, *, exclude: Collection[str] = (), **kwargs: Any
    ) -> None:
        self.folder = Path(root) / split
        self.classes = list_classes(root, split)
        names, labels = _list_images(self.folder, self.classes)
        positions = kept(names, exclude, self.folder)
        super().__init__(
            self.folder, [names[i] for i in positions], [labels[i] for i in positions], transform, **kwargs
        )

    def open(self, index: int) -> BinaryIO:
        """An image's file, not decoded."""
        return open(self.folder / self.name(index), "rb")


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


def _list_images(folder: Path, classes: list[str]) -> tuple[list[str], list[int]]:
    names, labels = [], []
    for label, class_name in enumerate(classes):
        files = sorted(e.name for e in os.scandir(folder / class_name) if e.name.lower().endswith(EXTENSIONS))
        names += [f"{class_name}/{file}" for file in files]
        labels += [label] * len(files)
    return names, labels
