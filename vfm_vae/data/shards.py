"""Images in tar shards as WebDataset writes them: `imagenet1k-train-0000.tar` with `<key>.jpg` and `<key>.cls`.

The shards are looked through once. The index that comes of it, where each image begins and how long it is, makes them a
data set like a folder: any image by its number, so that training resumes exactly and ranks get equally much.
"""

import io
import logging
import os
import re
from collections.abc import Collection
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from lightning.pytorch.utilities import rank_zero_warn

from vfm_vae.data.captions import say_uncaptioned
from vfm_vae.data.images import ImageDataset, kept
from vfm_vae.data.listing import in_short, is_hidden
from vfm_vae.data.shard_index import CaptionMembers, Shard, read_index
from vfm_vae.data.transforms import Transform

SPLITS = {"train": {"train", "training"}, "val": {"val", "valid", "validation"}, "test": {"test", "testing"}}
READ_AT_ONCE = 1 << 16  # holds the header of nearly every image, and half of most

log = logging.getLogger(__name__)


class ImageShardDataset(ImageDataset):
    """Images of the tar shards of a split, in the order of the shards' names.

    Samples without label or image and what can't be read of a shard count as damaged images; how many a broken shard
    has lost is estimated from the others. With captions, what has no label has the label 0.

    Args:
        root: Folder of the shards, which have the word `train` or `val` in their names (or `training`, `valid`,
            `validation`); or with folders `train` and `val` for them.
        split: `train` or `val`.
        transform: Makes a tensor of an RGB image.
        index: File that keeps the index; written where it is missing or older than the shards. None keeps none.
        exclude: Names of images to leave out, as `shard.tar/member.jpg`.
        captions: Members that hold captions, `txt` or `json.FIELD`; None reads no captions.
        **kwargs: As for `ImageDataset`.

    Raises:
        ValueError: there are no shards, images or captions, or too many are damaged; the index can't be written.
    """

    shards: np.ndarray
    paths: list[Path]

    def __init__(
        self,
        root: str | Path,
        split: str,
        transform: Transform,
        *,
        index: str | Path | None = None,
        exclude: Collection[str] = (),
        captions: str | None = None,
        **kwargs: Any,
    ) -> None:
        self.paths = list_shards(root, split)
        members = None if captions is None else CaptionMembers.of(captions)
        shards = read_index(self.paths, None if index is None else Path(index), captions=members)
        names = [
            f"{path.name}/{os.fsdecode(n)}" for path, shard in zip(self.paths, shards, strict=True) for n in shard.names
        ]
        place = Path(root) / f"*{split}*.tar"
        if not names and (damages := [damage for shard in shards for damage in shard.damage]):
            raise ValueError(f"root: no images under {str(place)!r} that can be used; the first {damages[0]}")
        positions = kept(names, exclude, place)
        self.offsets, self.sizes, labels = (
            np.concatenate([getattr(shard, column) for shard in shards])[positions]
            for column in ("offsets", "sizes", "labels")
        )
        self.shards = np.repeat(np.arange(len(shards)), [len(shard.names) for shard in shards])[positions]
        self.classes = [str(label) for label in range(int(labels.max()) + 1)]
        names = [names[i] for i in positions]
        said: ShardCaptions | None = None
        if members is not None:
            texts = np.concatenate([shard.texts for shard in shards if shard.texts is not None])[positions]
            if not texts.any():
                raise ValueError(f"captions: no image in {str(place)!r} has any; expected is {members.expected}")
            say_uncaptioned(place, names, texts[:, 1] == 0)
            said = ShardCaptions(members, self.paths, self.shards, texts)
        super().__init__(root, names, labels, transform, num_lost=_num_lost(shards), captions=said, **kwargs)
        for path, shard in zip(self.paths, shards, strict=True):
            for damage in shard.damage:
                log.warning("damaged shard: %s: %s", path, damage)
                self._check_damage(f"in {path.name!r} ({damage})")

    def open(self, index: int) -> BinaryIO:
        """An image's file, not decoded."""
        shard = _opened(str(self.paths[self.shards[index]]))
        return io.BufferedReader(Member(shard, int(self.offsets[index]), int(self.sizes[index])), READ_AT_ONCE)


class ShardCaptions:
    """Captions in members of tar shards, read when they are asked for.

    Args:
        members: Which members they are.
        paths: The shards.
        shards: Number of the shard of each image, int64 `[n]`.
        texts: Where the member of each image begins in its shard, and its size, as in `Shard`.
    """

    def __init__(self, members: CaptionMembers, paths: list[Path], shards: np.ndarray, texts: np.ndarray) -> None:
        self.members, self.paths, self.shards, self.texts = members, paths, shards, texts

    def __getitem__(self, index: int) -> list[str]:
        """The captions of an image."""
        offset, size = self.texts[index].tolist()
        path = self.paths[self.shards[index]]
        content = os.pread(_opened(str(path)).fileno(), size, offset)
        return self.members.parse(content, f"captions: {str(path)!r}") if size else []


class Member(io.RawIOBase):
    """A part of an open file, as a file of its own; read without moving the position of the whole.

    Args:
        file: The whole; held, so that nobody closes it.
        offset: Where the part begins, in bytes.
        size: Size of the part in bytes.
    """

    def __init__(self, file: BinaryIO, offset: int, size: int) -> None:
        self.file, self.offset, self.size, self.position = file, offset, size, 0

    def readable(self) -> bool:
        """Always true."""
        return True

    def seekable(self) -> bool:
        """Always true."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Reads what comes next."""
        size = min(len(buffer), max(self.size - self.position, 0))
        content = os.pread(self.file.fileno(), size, self.offset + self.position)
        buffer[: len(content)] = content
        self.position += len(content)
        return len(content)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Moves within the part."""
        self.position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.size}[whence]
        return self.position


# Threads and forked workers may share them; the oldest are closed where nobody reads them.
@lru_cache(maxsize=128)
def _opened(path: str) -> BinaryIO:
    return open(path, "rb", buffering=0)


def find_shards(root: str | Path, split: str) -> list[Path]:
    """The shards of a split, sorted by name: those with its word in their names, and those in its folder.

    Words are what letters make without a gap: `imagenet1k-train-0000.tar` has `imagenet`, `k` and `train`.

    Raises:
        ValueError: a name has the words of both splits.
    """
    root = Path(root)
    found, others = _tars(root / split), []
    for path in _tars(root):
        words = set(re.split("[^a-z]+", path.stem.lower()))
        splits = [name for name, known in SPLITS.items() if words & known]
        if len(splits) > 1:
            raise ValueError(
                f"root: {str(path)!r} has the words of several splits, {' and '.join(splits)}, in its name; rename it, "
                "or put the shards into folders of the splits' names"
            )
        if splits == [split]:
            found.append(path)
        elif not splits:
            others.append(path.name)
    if others:
        rank_zero_warn(f"left out in {str(root)!r}: shards with no split's word in their names, {in_short(others)}")
    return sorted(found, key=lambda path: path.name)


def _tars(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*.tar") if not is_hidden(path.name))


def list_shards(root: str | Path, split: str) -> list[Path]:
    """The shards of a split, sorted by name.

    Raises:
        ValueError: there are none.
    """
    root = Path(root)
    layout = f"expected are tar shards such as {root}/imagenet1k-{split}-0000.tar"
    if not root.is_dir():
        raise ValueError(f"root: there is no folder {str(root)!r}; {layout}")
    paths = find_shards(root, split)
    if not paths:
        words = " or ".join(sorted(SPLITS[split]))
        raise ValueError(f"root: {str(root)!r} has no shards with the word {words} in their names; {layout}")
    return paths


def _num_lost(shards: list[Shard]) -> int:
    """Images that damage has cost: a broken shard is taken to have held as many as a whole one does."""
    whole = [len(shard.names) for shard in shards if shard.whole]
    usual = round(sum(whole) / len(whole)) if whole else 0
    return sum(
        len(shard.damage) if shard.whole else max(usual - len(shard.names), len(shard.damage)) for shard in shards
    )
