"""An index of tar shards: where each image begins and how long it is, so that it can be read by its number."""

import json
import logging
import os
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from pathlib import Path
from typing import Any, NamedTuple, Self
from urllib.parse import quote
from zipfile import BadZipFile

import numpy as np

from vfm_vae.data.captions import captions_in, decoded, parse_object
from vfm_vae.data.listing import EXTENSIONS, in_short, is_hidden
from vfm_vae.writing import whole_file

UNKNOWN = -1
COLUMNS = ("names", "offsets", "sizes", "labels")  # of the images, in the file

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
        damage: What was found wrong: samples without an image or a label, or with captions that can't be read, and a
            tar that breaks off (`whole` is False).
        whole: Whether the tar was readable to its end.
        texts: Where the contents of the members with captions begin, and their sizes, in bytes, int64 `[n, 2]`; zeros
            where nothing is said of an image. None where captions were not looked for.
    """

    size: int
    modified: int
    names: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray
    labels: np.ndarray
    damage: list[str]
    whole: bool
    texts: np.ndarray | None = None


class Row(NamedTuple):
    """What a `Shard` holds of one image."""

    name: bytes
    offset: int
    size: int
    label: int
    text_offset: int = 0
    text_size: int = 0


class CaptionMembers(NamedTuple):
    """Which members of shards hold captions.

    Attributes:
        ending: The members' ending, `.txt` or `.json`.
        field: Field of the JSON that has the captions; empty where all of a member is one.
    """

    ending: str
    field: str = ""

    @classmethod
    def of(cls, option: str) -> Self:
        """Those that the option `captions` names, `txt` or `json.FIELD`.

        Raises:
            ValueError: it names none.
        """
        ending, _, field = option.partition(".")
        if option != "txt" and (ending != "json" or not field):
            raise ValueError(f"captions: in shards, one of 'txt' and 'json.FIELD', given {option!r}")
        return cls(f".{ending}", field)

    @property
    def expected(self) -> str:
        """What shards should hold, for messages."""
        return f"{f'the field {self.field!r} in ' if self.field else ''}members <key>{self.ending} beside the images"

    def parse(self, content: bytes, place: str) -> list[str]:
        """The captions in the content of a member; none are empty.

        Args:
            content: The content.
            place: Says in a message where it is from.

        Raises:
            ValueError: it is not as expected.
        """
        text = decoded(content, place)
        if not self.field:
            return captions_in(text, place)
        return captions_in(parse_object(text, place).get(self.field), f"{place}: {self.field!r}")


def shard_index(folder: Path, split: str, captions: str | None = None) -> Path:
    """File that keeps the index of a split's shards in a folder; indices of other captions have other files."""
    return folder / (f"{split}_shards.npz" if captions is None else f"{split}_shards_{quote(captions, safe='')}.npz")


def read_index(
    paths: list[Path],
    file: Path | None = None,
    retry: bool = False,
    num_threads: int = 8,
    captions: CaptionMembers | None = None,
) -> list[Shard]:
    """Reads the headers of shards that are not yet in the index, and keeps the index.

    Args:
        paths: Paths of the shards.
        file: The index; None keeps none.
        retry: Whether to look again at shards that the disk or the network did not give. One process does so, and all
            others take what it found.
        num_threads: Shards that are read at once.
        captions: Members that hold captions; None looks for none.

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
            shards = threads.map(index_shard, new, repeat(captions))
            known |= dict(zip([path.name for path in new], shards, strict=True))
        if file is not None:
            _save_index(file, {path.name: known[path.name] for path in paths})
    return [known[path.name] for path in paths]


def index_shard(path: Path, captions: CaptionMembers | None = None) -> Shard:
    """Reads the headers, labels and captions of one shard; with captions, what has no label has the label 0."""
    stat = path.stat()
    damage: list[str] = []
    rows: list[Row] = []
    try:
        with tarfile.open(path, "r:") as tar:
            for key, members in _samples(tar):
                try:
                    rows.append(_row(tar, members, captions))
                except ValueError as error:
                    damage.append(f"sample {key!r} has {error}")
            whole = _ends_well(path, tar.offset)
        if not whole:
            damage.append(f"breaks off after {len(rows)} images")
    except tarfile.TarError as error:
        damage.append(f"unreadable from {len(rows)} images on ({error})")
        whole = False
    except OSError as error:  # of the disk or the network, and perhaps gone the next time: so not to be kept
        damage.append(f"not read from {len(rows)} images on ({error})")
        return Shard(UNKNOWN, UNKNOWN, **_columns(rows, captions), damage=damage, whole=False)
    return Shard(stat.st_size, stat.st_mtime_ns, **_columns(rows, captions), damage=damage, whole=whole)


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


def _row(tar: tarfile.TarFile, members: dict[str, tarfile.TarInfo], captions: CaptionMembers | None) -> Row:
    """What the index knows of one sample.

    Raises:
        ValueError: what is wrong with it, as the rest of a sentence.
    """
    if captions is None and ".cls" not in members:
        raise ValueError("no label (.cls)")
    try:
        label = int(_content(tar, members[".cls"])) if ".cls" in members else 0
    except ValueError as error:
        raise ValueError(f"no whole number as its label ({error})") from error
    image = next((members[ending] for ending in EXTENSIONS if ending in members), None)
    if image is None:
        raise ValueError(f"no image, only {in_short(sorted(members))}")
    row = Row(os.fsencode(image.name), image.offset_data, image.size, label)
    if captions is None or (text := members.get(captions.ending)) is None:
        return row
    is_said = captions.parse(_content(tar, text), f"unreadable captions: {text.name!r}")
    return row._replace(text_offset=text.offset_data, text_size=text.size) if is_said else row


def _columns(rows: list[Row], captions: CaptionMembers | None) -> dict[str, Any]:
    """What a `Shard` holds of each image, by name."""
    numbers = np.array([row[1:] for row in rows], dtype=np.int64).reshape(len(rows), len(Row._fields) - 1)
    columns = {"names": np.array([row.name for row in rows], dtype=np.bytes_)}
    columns |= dict(zip(COLUMNS[1:], numbers.T, strict=False))  # but for the last two, which are of texts
    return columns if captions is None else columns | {"texts": numbers[:, -2:]}


def _save_index(file: Path, shards: dict[str, Shard]) -> None:
    described = {
        name: {"size": s.size, "modified": s.modified, "images": len(s.names), "damage": s.damage, "whole": s.whole}
        for name, s in shards.items()
    }
    columns = COLUMNS if any(s.texts is None for s in shards.values()) else (*COLUMNS, "texts")
    arrays: dict[str, Any] = {name: np.concatenate([getattr(s, name) for s in shards.values()]) for name in columns}
    with whole_file(file, option="cache_dir") as content:
        np.savez(content, shards=np.array(json.dumps(described)), **arrays)


def _load_index(file: Path) -> dict[str, Shard]:
    try:
        with np.load(file, allow_pickle=False) as stored:
            described = json.loads(str(stored["shards"]))
            columns = {name: stored[name] for name in (*COLUMNS, *({"texts"} & set(stored.files)))}
    except (OSError, ValueError, KeyError, BadZipFile) as error:
        raise ValueError(f"cache_dir: {str(file)!r} is no index of shards ({error}); delete it") from error
    shards, start = {}, 0
    for name, of in described.items():
        part = {column: values[start : start + of["images"]] for column, values in columns.items()}
        shards[name] = Shard(of["size"], of["modified"], **part, damage=of["damage"], whole=of["whole"])
        start += of["images"]
    return shards
