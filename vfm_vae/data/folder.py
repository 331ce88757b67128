"""Images in a tree of folders, one per class: the layout of ImageNet."""

import os
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import Any, BinaryIO

from lightning.pytorch.utilities import rank_zero_warn

from vfm_vae.data.captions import METADATA, CaptionTable, read_captions
from vfm_vae.data.images import ImageDataset, kept
from vfm_vae.data.listing import EXTENSIONS, find_images, in_short, is_hidden, say_left_out
from vfm_vae.data.transforms import Transform

ALL = "images"  # the class of images that are not sorted into classes


class ImageFolderDataset(ImageDataset):
    """Images of `<root>/<split>/<class>/` and the folders in it, with their classes numbered in alphabetical order.

    With captions, the images are those that `<root>/<split>/metadata.jsonl` names, see `read_captions`; where not all
    of them lie in class folders, there is one class.

    Args:
        root: Folder of the data set.
        split: Folder below it, `train` or `val`.
        transform: Makes a tensor of an RGB image.
        exclude: Names of images to leave out, relative to the split's folder, as `class/file.JPEG`.
        captions: Field of `metadata.jsonl` that holds captions; None reads no captions.
        **kwargs: As for `ImageDataset`.

    Attributes:
        folder: Folder of the split; the images' names are relative to it.

    Raises:
        ValueError: the folder is missing, holds no classes or no images, or a class has none; captions can't be read;
            when reading, too many images are damaged.
    """

    def __init__(
        self,
        root: str | Path,
        split: str,
        transform: Transform,
        *,
        exclude: Collection[str] = (),
        captions: str | None = None,
        **kwargs: Any,
    ) -> None:
        self.folder = Path(root) / split
        table: CaptionTable | None = None
        if captions is None:
            self.classes = list_classes(root, split)
            names, labels = _list_images(self.folder, self.classes)
        else:
            names, table = read_captions(self.folder, captions)
            self.classes, labels = classes_of(names)
            _say_unnamed(self.folder, names)
        positions = kept(names, exclude, self.folder)
        super().__init__(
            self.folder,
            [names[i] for i in positions],
            [labels[i] for i in positions],
            transform,
            captions=None if table is None else table.of(positions),
            **kwargs,
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
    classes = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not is_hidden(entry.name))
    if not classes:
        raise ValueError(f"root: {str(folder)!r} has no class folders; {layout}: sort the images into one per class")
    return classes


def check_classes(root: str | Path, classes: list[str], split: str) -> None:
    """Checks that a split has the same classes as training, so that their numbers agree.

    Raises:
        ValueError: if not; the message names some of those that differ.
    """
    others = list_classes(root, split)
    differing = {"missing": sorted(set(classes) - set(others)), "beyond": sorted(set(others) - set(classes))}
    if others != classes:
        named = "; ".join(f"{how}: {in_short(names)}" for how, names in differing.items() if names)
        raise ValueError(
            f"root: {str(root)!r} has other class folders in {split!r} than in 'train' ({named}); make them the same, "
            "since a class is a number by their order"
        )


def _list_images(folder: Path, classes: list[str]) -> tuple[list[str], list[int]]:
    names: list[str] = []
    labels: list[int] = []
    left_out: Counter[str] = Counter()
    for label, class_name in enumerate(classes):
        files = find_images(folder / class_name, left_out)
        names += [f"{class_name}/{file}" for file in files]
        labels += [label] * len(files)
    beside = sum(e.name.lower().endswith(EXTENSIONS) and not is_hidden(e.name) for e in os.scandir(folder))
    if beside:
        left_out["images in no class folder"] = beside
    say_left_out(folder, left_out)
    counts = Counter(labels)
    empty = [name for label, name in enumerate(classes) if not counts[label]]
    if names and empty:
        raise ValueError(
            f"root: {str(folder)!r} has class folders without images ({in_short(empty)}), whose endings would be "
            f"{' '.join(EXTENSIONS)}; fill them or take them away"
        )
    return names, labels


def classes_of(names: list[str]) -> tuple[list[str], list[int]]:
    """The top folders of images as classes, and the label of each image; one class where an image lies in no folder."""
    folders = [folder if inside else "" for folder, inside, _ in (name.partition("/") for name in names)]
    if "" in folders:
        return [ALL], [0] * len(names)
    classes = sorted(set(folders))
    labels = {name: label for label, name in enumerate(classes)}
    return classes, [labels[folder] for folder in folders]


def _say_unnamed(folder: Path, names: list[str]) -> None:
    """Warns of images in the folder that are not among the names, if there are any."""
    named = set(names)
    unnamed = sum(name not in named for name in find_images(folder, Counter()))
    if unnamed:
        rank_zero_warn(f"captions: left out in {str(folder)!r}: {unnamed} images that no line of {METADATA} names")


def say_renumbered(training: list[str], others: list[str]) -> None:
    """Warns of a class whose number is another in validation, which only data with captions may have.

    Args:
        training: Names of the classes of training, by their numbers.
        others: Those of validation.
    """
    numbers = {name: number for number, name in enumerate(training)}
    for number, name in enumerate(others):
        if numbers.get(name, number) != number:
            rank_zero_warn(
                f"captions: images in {name!r} have the label {numbers[name]} in training and {number} in validation, "
                f"as {METADATA} names images in other top folders there; what goes by classes needs the same in both"
            )
            return
