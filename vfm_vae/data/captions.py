"""Captions of images in folders: lines of JSON in a file beside them, as Hugging Face's ImageFolder reads it."""

import json
import posixpath
from array import array
from codecs import BOM_UTF8, BOM_UTF16_BE, BOM_UTF16_LE
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
from lightning.pytorch.utilities import rank_zero_warn

METADATA = "metadata.jsonl"


class ImageCaptions(Protocol):
    """All captions of each image of a data set."""

    def __getitem__(self, index: int) -> list[str]:
        """The captions of an image by its number; none are empty, and there may be none at all."""


class CaptionTable:
    """Captions in memory: all texts one after the other, and where each begins.

    They are arrays, because a list of a million strings is copied page by page into every forked worker.

    Args:
        text: All captions in UTF-8, uint8 `[bytes]`.
        starts: Where each caption begins there, int64 `[captions]`; those of an image follow each other.
        ends: Where each ends, int64 `[captions]`.
        firsts: Number of each image's first caption, int64 `[images]`.
        counts: How many each image has, int64 `[images]`.
    """

    def __init__(
        self, text: np.ndarray, starts: np.ndarray, ends: np.ndarray, firsts: np.ndarray, counts: np.ndarray
    ) -> None:
        self.text, self.starts, self.ends, self.firsts, self.counts = text, starts, ends, firsts, counts

    def __getitem__(self, index: int) -> list[str]:
        """The captions of an image."""
        numbers = range(self.firsts[index], self.firsts[index] + self.counts[index])
        return [self.text[self.starts[number] : self.ends[number]].tobytes().decode() for number in numbers]

    def of(self, images: Sequence[int]) -> Self:
        """The captions of some of the images, by their numbers."""
        return type(self)(self.text, self.starts, self.ends, self.firsts[images], self.counts[images])


def read_captions(folder: Path, field: str) -> tuple[list[str], CaptionTable]:
    """Reads which images a folder has, and what is said of them.

    Args:
        folder: Folder of the images, with `metadata.jsonl`: in each line, `file_name` is an image's path from the
            folder, and another field its caption or a list of captions. Those of several lines add up.
        field: Name of that field.

    Returns:
        The images' names, ordered by their top folders and then by what follows; and their captions.

    Raises:
        ValueError: there is no such file, it is not UTF-8, a line is not as expected, or there is no caption.
    """
    file = folder / METADATA
    expected = f'expected is a line such as {{"file_name": "some/image.jpg", "{field}": "its caption"}} for each image'
    if not file.is_file():
        raise ValueError(f"captions: there is no file {str(file)!r}; {expected}")
    numbers: dict[str, int] = {}  # of images by their names, in the order of the lines
    text, ends, images = bytearray(), array("q", [0]), array("q")  # of each caption: its bytes, their end, its image
    fields: Collection[str] = ()
    for line_number, line in enumerate(read_lines(file, "captions"), 1):
        if not line:
            continue
        place = f"captions: {str(file)!r}, line {line_number}"
        entry = parse_object(line, place)
        image = numbers.setdefault(_image_name(entry, place), len(numbers))
        for caption in captions_in(entry.get(field), f"{place}: {field!r}"):
            text += caption.encode()
            ends.append(len(text))
            images.append(image)
        fields = fields or entry
    if not images:
        found = f"; the first line has {', '.join(sorted(fields))}" if fields else ""
        raise ValueError(f"captions: {str(file)!r} has no caption in a field {field!r}{found}; {expected}")
    names = sorted(numbers, key=lambda name: name.partition("/")[::2])
    ranks = np.empty(len(names), dtype=np.int64)  # of images in that order, by their numbers
    ranks[[numbers[name] for name in names]] = np.arange(len(names))
    table = _by_image(text, np.array(ends), ranks[np.array(images)], len(names))
    say_uncaptioned(folder, names, table.counts == 0)
    return names, table


def _by_image(text: bytearray, ends: np.ndarray, owners: np.ndarray, num_images: int) -> CaptionTable:
    """A table of captions that came in any order.

    Args:
        text: All captions in UTF-8.
        ends: Where each ends, after a zero, int64 `[1 + captions]`.
        owners: Number of each caption's image, int64 `[captions]`.
        num_images: Number of images.
    """
    order = np.argsort(owners, kind="stable")
    counts = np.bincount(owners, minlength=num_images)
    firsts = np.cumsum(counts) - counts
    return CaptionTable(np.frombuffer(text, dtype=np.uint8), ends[:-1][order], ends[1:][order], firsts, counts)


def say_uncaptioned(place: Path, names: Sequence[str], lacking: np.ndarray) -> None:
    """Warns of images that nothing is said of, if there are any.

    Args:
        place: What the images lie in.
        names: Names of all images.
        lacking: Which of them have no caption, bool `[images]`.
    """
    if lacking.any():
        rank_zero_warn(
            f"captions: {int(lacking.sum())} of the {len(names)} images in {str(place)!r} have none, or an empty one, "
            f"and are taken to have the empty caption; the first is {names[int(np.argmax(lacking))]!r}"
        )


def read_lines(file: Path, option: str) -> Iterator[str]:
    """The lines of a text file without the space around them.

    Args:
        file: The file, in UTF-8 with or without a byte order mark.
        option: Names the file in messages.

    Raises:
        ValueError: it can't be read, or is in another encoding.
    """
    try:
        with open(file, "rb") as content:
            for number, line in enumerate(content, 1):
                yield decoded(line, f"{option}: {str(file)!r}, line {number}")
    except OSError as error:
        raise ValueError(f"{option}: can't read {str(file)!r} ({error.strerror})") from error


def decoded(content: bytes, place: str) -> str:
    """Text of UTF-8, without a byte order mark and the space around it.

    Args:
        content: The bytes.
        place: Says in a message where they are from.

    Raises:
        ValueError: it is in another encoding.
    """
    try:
        text = content.removeprefix(BOM_UTF8).decode()
        if "\0" not in text:
            return text.strip()
    except UnicodeDecodeError:
        pass
    is_wide = b"\0" in content or content.startswith((BOM_UTF16_BE, BOM_UTF16_LE))
    likely = "UTF-16" if is_wide else "LATIN1"
    raise ValueError(f"{place} is not UTF-8; convert the file, for instance with `iconv -f {likely} -t UTF-8`")


def parse_object(line: str, place: str) -> dict[str, Any]:
    """An object in JSON.

    Args:
        line: Its text.
        place: Says in a message where it is from.

    Raises:
        ValueError: it is something else.
    """
    try:
        parsed = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{place} is no JSON ({error.msg} at column {error.colno})") from error
    except (ValueError, RecursionError) as error:  # numbers of too many digits, or brackets too deep
        raise ValueError(f"{place} can't be read as JSON ({error})") from error
    if not isinstance(parsed, dict):
        raise ValueError(f'{place} is not an object such as {{"name": "value"}}, but {line[:60]}')
    return parsed


def captions_in(value: Any, place: str) -> list[str]:
    """The captions in a value of JSON, which is a text, a list of texts, or null; empty ones are left out.

    Args:
        value: The value.
        place: Says in a message where it is from.

    Raises:
        ValueError: it is something else.
    """
    texts = value if isinstance(value, list) else [value]
    if not all(text is None or isinstance(text, str) for text in texts):
        raise ValueError(f"{place} is neither a text nor a list of texts, but {json.dumps(value)[:60]}")
    return [text.strip() for text in map(whole, filter(None, texts)) if not text.isspace()]


def whole(text: str) -> str:
    """A text with question marks for halves of characters, which JSON may hold and UTF-8 may not."""
    return text.encode(errors="replace").decode()


def _image_name(entry: dict[str, Any], place: str) -> str:
    given = entry.get("file_name")
    if not isinstance(given, str) or not given:
        raise ValueError(f"{place} has no file_name, the path of an image from the folder of the file")
    name = posixpath.normpath(whole(given))
    if name.startswith(("/", "../")) or name in (".", ".."):
        raise ValueError(f"{place} has a file_name that is not below the folder, {given!r}; give its path from there")
    return name
