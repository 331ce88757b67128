"""Images in tar shards as WebDataset writes them: `imagenet1k-train-0000.tar` with `<key>.jpg` and `<key>.cls`.

The shards are looked through once. The index that comes of it, where each image begins and how long it is, makes them a
data set like a folder: any image by its number, so that training resumes exactly and ranks get equally much.
"""

import io
import json
import logging
import os
import re
import tarfile
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple
from zipfile import BadZipFile

import numpy as np
from lightning.pytorch.utilities import rank_zero_warn

from vfm_vae.data.images import ImageDataset, kept
from vfm_vae.data.listing import EXTENSIONS, in_short, is_hidden
from vfm_vae.data.transforms import Transform
from vfm_vae.writing import whole_file

UNKNOWN = -1
SPLITS = {"train": {"train", "training"}, "val": {"val", "valid", "validation"}, "test": {"test", "testing"}}
READ_AT_ONCE = 1 << 16  # holds the header of nearly every image, and half of most

log = logging.getLogger(__name__)


class Shard(NamedTuple):
    """What the index knows of one shard.

    Attributes:
        size: Size of the file in bytes; with `modified`, it tells whether the file has changed.
        modified: When it was written, in nanoseconds.
        names: Names of the images' members, bytes `[n]`.
        offsets: Where their contents begin in the shard, in bytes, int64 `[n]`.
        sizes: Sizes of their contents in bytes, int64 `[n]`.
        labels: int64 `[n]`.
        damage: What was found wrong: samples without an image or a label, and a tar that breaks off (`whole` is False).
        whole: Whether the tar was readable to its end.
    """

    size: int
    modified: int
    names: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray
    labels: np.ndarray
    damage: list[str]
    whole: bool


class ImageShardDataset(ImageDataset):
    """Images of the tar shards of a split, in the order of the shards' names.

    Samples without label or image and what can't be read of a shard count as damaged images; how many a broken shard
    has lost is estimated from the others.

    Args:
        root: Folder of the shards, which have the word `train` or `val` in their names (or `training`, `valid`,
            `validation`); or with folders `train` and `val` for them.
        split: `train` or `val`.
        transform: Makes a tensor of an RGB image.
        index: File that keeps the index; written where it is missing or older than the shards. None keeps none.
        exclude: Names of images to leave out, as `shard.tar/member.jpg`.
        **kwargs: As for `ImageDataset`.

    Raises:
        ValueError: there are no shards or images, or too many are damaged; the index can't be written.
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
        **kwargs: Any,
    ) -> None:
        self.paths = list_shards(root, split)
        shards = read_index(self.paths, None if index is None else Path(index))
        names = [
            f"{path.name}/{os.fsdecode(n)}" for path, shard in zip(self.paths, shards, strict=True) for n in shard.names
        ]
        positions = kept(names, exclude, Path(root) / f"*{split}*.tar")
        self.offsets, self.sizes, labels = (
            np.concatenate([getattr(shard, column) for shard in shards])[positions]
            for column in ("offsets", "sizes", "labels")
        )
        self.shards = np.repeat(np.arange(len(shards)), [len(shard.names) for shard in shards])[positions]
        self.classes = [str(label) for label in range(int(labels.max()) + 1)]
        super().__init__(root, [names[i] for i in positions], labels, transform, num_lost=_num_lost(shards), **kwargs)
        for path, shard in zip(self.paths, shards, strict=True):
            for damage in shard.damage:
                log.warning("damaged shard: %s: %s", path, damage)
                self._check_damage(f"in {path.name!r} ({damage})")

    def open(self, index: int) -> BinaryIO:
        """An image's file, not decoded."""
        shard = _opened(str(self.paths[self.shards[index]]))
        return io.BufferedReader(Member(shard, int(self.offsets[index]), int(self.sizes[index])), READ_AT_ONCE)


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


def shard_index(folder: Path, split: str) -> Path:
    """File that keeps the index of a split's shards in a folder."""
    return folder / f"{split}_shards.npz"


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


def read_index(paths: list[Path], file: Path | None = None, retry: bool = False, num_threads: int = 8) -> list[Shard]:
    """Reads the headers of shards that are not yet in the index, and keeps the index.

    Args:
        paths: Paths of the shards.
        file: The index; None keeps none.
        retry: Whether to look again at shards that the disk or the network did not give. One process does so, and all
            others take what it found.
        num_threads: Shards that are read at once.

    Raises:
        ValueError: the index can't be written.
    """
    known = _load_index(file) if file is not None and file.is_file() else {}
    stats = [path.stat() for path in paths]

    def is_known(path: Path, stat: os.stat_result) -> bool:
        shard = known.get(path.name)
        if shard is not None and shard.size == UNKNOWN:
            return not retry
        return shard is not None and (shard.size, shard.modified) == (stat.st_size, stat.st_mtime_ns)

    new = [path for path, stat in zip(paths, stats, strict=True) if not is_known(path, stat)]
    if new:
        log.info("looking through %d shards", len(new))
        with ThreadPoolExecutor(num_threads) as threads:
            known |= dict(zip([path.name for path in new], threads.map(index_shard, new), strict=True))
        if file is not None:
            _save_index(file, {path.name: known[path.name] for path in paths})
    return [known[path.name] for path in paths]


def index_shard(path: Path) -> Shard:
    """Reads the headers and labels of one shard."""
    stat = path.stat()
    damage: list[str] = []
    rows: list[tuple[bytes, int, int, int]] = []
    try:
        with tarfile.open(path, "r:") as tar:
            for key, members in _samples(tar):
                images = [members[ending] for ending in EXTENSIONS if ending in members]
                try:
                    label = int(_content(tar, members[".cls"]))
                    rows.append((os.fsencode(images[0].name), images[0].offset_data, images[0].size, label))
                except KeyError:
                    damage.append(f"sample {key!r} has no label (.cls)")
                except IndexError:
                    damage.append(f"sample {key!r} has no image, only {in_short(sorted(members))}")
                except ValueError as error:
                    damage.append(f"sample {key!r} has no whole number as its label ({error})")
            whole = _ends_well(path, tar.offset)
        if not whole:
            damage.append(f"breaks off after {len(rows)} images")
    except tarfile.TarError as error:
        damage.append(f"unreadable from {len(rows)} images on ({error})")
        whole = False
    except OSError as error:  # of the disk or the network, and perhaps gone the next time: so not to be kept
        damage.append(f"not read from {len(rows)} images on ({error})")
        return Shard(UNKNOWN, UNKNOWN, *_columns(rows), damage, whole=False)
    return Shard(stat.st_size, stat.st_mtime_ns, *_columns(rows), damage, whole)


def _samples(tar: tarfile.TarFile) -> Iterator[tuple[str, dict[str, tarfile.TarInfo]]]:
    """Members that follow each other under one key, the name up to the first dot of its last part, by their endings."""
    key = ""
    members: dict[str, tarfile.TarInfo] = {}
    for member in tar:
        if not member.isfile() or any(is_hidden(part) for part in member.name.split("/")):
            continue
        ending = member.name.rpartition("/")[2].partition(".")[2]
        if (found := member.name[: -len(ending) - 1]) != key:
            if members:
                yield key, members
            key, members = found, {}
        members[f".{ending.lower()}"] = member
    if members:
        yield key, members


def _ends_well(path: Path, offset: int) -> bool:
    """Whether a block of zeros, a tar's end, stands where the next member would; tarfile takes anything for an end."""
    with open(path, "rb") as file:
        file.seek(offset)
        block = file.read(tarfile.BLOCKSIZE)
    return len(block) == tarfile.BLOCKSIZE and not any(block)


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    return b"" if file is None else file.read()


def _columns(rows: list[tuple[bytes, int, int, int]]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    names, *numbers = zip(*rows, strict=True) if rows else ((),) * 4
    offsets, sizes, labels = (np.array(column, dtype=np.int64) for column in numbers)
    return np.array(names, dtype=np.bytes_), offsets, sizes, labels


def _num_lost(shards: list[Shard]) -> int:
    """Images that damage has cost: a broken shard is taken to have held as many as a whole one does."""
    whole = [len(shard.names) for shard in shards if shard.whole]
    usual = round(sum(whole) / len(whole)) if whole else 0
    return sum(
        len(shard.damage) if shard.whole else max(usual - len(shard.names), len(shard.damage)) for shard in shards
    )


def _save_index(file: Path, shards: dict[str, Shard]) -> None:
    described = {
        name: {"size": s.size, "modified": s.modified, "images": len(s.names), "damage": s.damage, "whole": s.whole}
        for name, s in shards.items()
    }
    columns = ("names", "offsets", "sizes", "labels")
    arrays: dict[str, Any] = {name: np.concatenate([getattr(s, name) for s in shards.values()]) for name in columns}
    with whole_file(file, option="cache_dir") as content:
        np.savez(content, shards=np.array(json.dumps(described)), **arrays)


def _load_index(file: Path) -> dict[str, Shard]:
    try:
        with np.load(file, allow_pickle=False) as stored:
            described = json.loads(str(stored["shards"]))
            columns = [stored[column] for column in ("names", "offsets", "sizes", "labels")]
    except (OSError, ValueError, KeyError, BadZipFile) as error:
        raise ValueError(f"cache_dir: {str(file)!r} is no index of shards ({error}); delete it") from error
    shards, start = {}, 0
    for name, of in described.items():
        stop = start + of["images"]
        names, offsets, sizes, labels = (column[start:stop] for column in columns)
        shards[name] = Shard(of["size"], of["modified"], names, offsets, sizes, labels, of["damage"], of["whole"])
        start = stop
    return shards
