"""Tells by names, sizes and times of files whether images have changed since something was made from them."""

import hashlib
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from vfm_vae.data.images import ImageDataset
from vfm_vae.data.shards import ShardCaptions

CHUNK = 1000


class FilesState(NamedTuple):
    """What tells files from others that have come under their names.

    Attributes:
        digest: SHA-256, in hexadecimal, over the files' names, sizes and times of modification.
        sizes: The same over names and sizes alone, which stay when files are copied.
        newest: When the last one was modified, or put in its place, in seconds since 1970.
    """

    digest: str
    sizes: str
    newest: float


def names_digest(dataset: ImageDataset) -> str:
    """SHA-256, in hexadecimal, over the names of images, in their order."""
    return hashlib.sha256("\n".join(dataset.name(index) for index in range(len(dataset))).encode()).hexdigest()


def captions_digest(dataset: ImageDataset) -> str:
    """SHA-256, in hexadecimal, over the captions of all images, in their order.

    Of tar shards, which are not read for it, it is over the name of what holds the captions; see `files_state`.
    """
    if isinstance(dataset.captions, ShardCaptions):
        return hashlib.sha256("\0".join(dataset.captions.members).encode()).hexdigest()
    digest = hashlib.sha256()
    for index in range(len(dataset)):
        digest.update("\0".join([*dataset.captions_of(index), "\n"]).encode())
    return digest.hexdigest()


def files_state(dataset: ImageDataset, num_threads: int = 8) -> FilesState:
    """The state of the files that hold a data set's images: theirs, or those of tar shards.

    A million files take seconds on a local disk; nothing is read.

    Args:
        dataset: The images.
        num_threads: Files that are asked for at once, since a network is slow.
    """
    if dataset.shards is None:
        paths: Sequence[str] = [str(dataset.place / dataset.name(index)) for index in range(len(dataset))]
        names: Iterable[str] = (dataset.name(index) for index in range(len(dataset)))
    else:
        paths = [str(path) for path in dataset.paths]
        names = (path.name for path in dataset.paths)
    with ThreadPoolExecutor(num_threads) as threads:
        parts = list(threads.map(_stats, (paths[start : start + CHUNK] for start in range(0, len(paths), CHUNK))))
    stats = [stat for part in parts for stat in part]
    digest, sizes = hashlib.sha256(), hashlib.sha256()
    for name, (size, modified, _) in zip(names, stats, strict=True):
        sizes.update(f"{name}\0{size}\n".encode(errors="surrogateescape"))
        digest.update(f"{name}\0{size}\0{modified}\n".encode(errors="surrogateescape"))
    return FilesState(digest.hexdigest(), sizes.hexdigest(), max(newest for _, _, newest in stats))


def _stats(paths: Sequence[str]) -> list[tuple[int, int, float]]:
    """Size, time of modification in nanoseconds, and time of the last change of any kind, of each file."""
    return [_stat(path) for path in paths]


def _stat(path: str) -> tuple[int, int, float]:
    try:
        stat = os.stat(path)
    except (FileNotFoundError, NotADirectoryError, ValueError):  # a list of images names it nonetheless
        return 0, 0, 0.0
    return stat.st_size, stat.st_mtime_ns, max(stat.st_mtime, stat.st_ctime)
