"""Images that come into the page: uploaded files, and photographs that the dependencies hold."""

import io
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from vfm_vae.data.decoding import decode
from vfm_vae.data.transforms import CentreCrop
from vfm_vae.embedded.photos import PHOTOS, TILES, load_photo
from vfm_vae.images import from_uint8

EXAMPLES = tuple(PHOTOS)
LONGEST = 16  # times the short side, what is looked at of the long one


class Upload(NamedTuple):
    """A file that somebody uploaded, in memory alone.

    Attributes:
        name: What the file was called.
        content: Its bytes.
    """

    name: str
    content: bytes


def take(path: str | Path) -> Upload:
    """Takes an uploaded file into memory and off the disk, after a look at whether it is an image.

    Raises:
        ValueError: if it is none that can be read; the message says why. It is off the disk, too.
    """
    path = Path(path)
    try:
        upload = Upload(path.name, path.read_bytes())
    except OSError as error:
        raise ValueError(f"{path.name} can't be read: {error.strerror}") from error
    finally:
        path.unlink(missing_ok=True)
        with suppress(OSError):  # which holds nothing else
            path.parent.rmdir()
    opened(upload)
    return upload


def opened(upload: Upload, side: int = 16) -> Tensor:
    """An upload as tokenizers take it: upright, on white, after ADM's centre crop.

    Args:
        upload: The file.
        side: Height and width in pixels.

    Returns:
        float32 `[1, 3, side, side]` in [-1, 1].

    Raises:
        ValueError: if it is no image that can be read.
    """
    if not upload.content:
        raise ValueError(f"{upload.name} can't be used: the file is empty")
    try:
        image = decode(io.BytesIO(upload.content))
    except ValueError as error:
        why = str(error)
        if "cannot identify image file" in why:  # Pillow goes on with an address in memory
            why = "it is no image in a format that is known"
        raise ValueError(f"{upload.name} can't be used: {why}") from error
    # The crop brings the short side to the wanted one first: of a line of pixels it would make gigabytes.
    longest = LONGEST * min(image.size)
    left, top = (max(0, (length - longest) // 2) for length in image.size)
    image = image.crop((left, top, min(image.width, left + longest), min(image.height, top + longest)))
    return from_uint8(CentreCrop(side)(image)[None])


def example(name: str, side: int) -> Tensor:
    """The middle of a photograph, float32 `[1, 3, side, side]` in [-1, 1].

    It is a square of so many pixels as are asked for, where there are so many, but no less than fit into the tile in
    the middle; of `photos`, which the demo trains on, that tile is held out of training.

    Raises:
        ValueError: if there is no such photograph.
    """
    photo = load_photo(name)
    short = min(photo.size)
    square = min(short, max(side, short // TILES))
    left, top = (photo.width - square) // 2, (photo.height - square) // 2
    return from_uint8(CentreCrop(side)(photo.crop((left, top, left + square, top + square)))[None])


def image_of(upload: Upload | None, name: str, side: int) -> tuple[Tensor, str]:
    """The image to work on, `[1, 3, side, side]` in [-1, 1], and what it is called: the upload if there is one."""
    return (opened(upload, side), upload.name) if upload is not None else (example(name, side), name)
