"""Which files of a folder are images."""

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_warn

# By preference, where a sample of a shard has several.
EXTENSIONS = (
    ".jpeg", ".jpg", ".png", ".webp",
    ".avif", ".bmp", ".gif", ".jfif", ".jp2", ".jpe", ".pgm", ".pnm", ".ppm", ".tif", ".tiff",
)  # fmt: skip
NUM_NAMED = 3


def list_images(folder: str | Path, option: str = "root") -> list[str]:
    """The images in a folder and all folders below it, by their paths from there, sorted.

    Hidden files and folders are left alone, as what a system puts beside files is. What else has no image's ending is
    counted in a warning.

    Args:
        folder: The folder to look in.
        option: Names the folder in messages.

    Raises:
        ValueError: a folder can't be read.
    """
    left_out: Counter[str] = Counter()
    names = find_images(folder, left_out, option)
    say_left_out(folder, left_out)
    return names


def find_images(folder: str | Path, left_out: Counter[str], option: str = "root") -> list[str]:
    """Finds images as `list_images` does, but only counts the files that it leaves out, by their ending."""
    return sorted(_walk(str(folder), "", (), left_out, option))


def say_left_out(folder: str | Path, left_out: Counter[str]) -> None:
    """Warns of files that are no images, if there are any."""
    if left_out:
        kinds = in_short([f"{count} {kind}" for kind, count in left_out.most_common()])
        rank_zero_warn(f"left out in {str(folder)!r}: {kinds}; images end with {' '.join(EXTENSIONS)}")


def is_hidden(name: str) -> bool:
    """Whether a file or folder is there for a system or a program, such as `._a.jpg` or `.ipynb_checkpoints`."""
    return (name.startswith(".") and name not in (".", "..")) or name in ("__MACOSX", "@eaDir")


def in_short(things: list[str]) -> str:
    """The first few of them, and how many more there are."""
    more = len(things) - NUM_NAMED
    return ", ".join(things[:NUM_NAMED]) + (f" and {more} more" if more > 0 else "")


def _walk(
    folder: str, prefix: str, above: tuple[tuple[int, int], ...], left_out: Counter[str], option: str
) -> Iterator[str]:
    try:
        status = os.stat(folder)
        entries = list(os.scandir(folder))
    except OSError as error:
        raise ValueError(f"{option}: can't read the folder {folder!r} ({error.strerror})") from error
    here = status.st_dev, status.st_ino
    if here in above:  # a link to a folder that it lies in
        return
    for entry in entries:
        if is_hidden(entry.name):
            continue
        if entry.name.lower().endswith(EXTENSIONS):  # asked first: the system need not say what the entry is
            yield prefix + entry.name
        elif entry.is_dir():
            yield from _walk(entry.path, f"{prefix}{entry.name}/", (*above, here), left_out, option)
        else:
            left_out[os.path.splitext(entry.name)[1].lower() or "without an ending"] += 1
