"""Pictures within the page, made smaller until all of them fit into what the page may take."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

MAX_SIDE = 1600  # pixels
SMALLEST = 80


@dataclass(frozen=True)
class Picture:
    """A picture to show.

    Attributes:
        file: Where it lies.
        caption: What it shows.
        of: The run that it is of.
    """

    file: Path
    caption: str
    of: str


@dataclass(frozen=True)
class Shown:
    """A picture as the page has it.

    Attributes:
        picture: What it was made from.
        address: A `data:` address.
        width: Its width in pixels.
        height: Its height in pixels.
    """

    picture: Picture
    address: str
    width: int
    height: int


def shown_within(pictures: Sequence[Picture], budget: int) -> tuple[list[Shown], list[str]]:
    """Pictures that together take no more than a budget of bytes, and what is to be told of those that are left out.

    All become smaller by the same factor; what is still too much is left out, the last ones first.
    """
    problems = []
    read: list[tuple[Picture, Image.Image]] = []
    for picture in pictures:
        try:
            with Image.open(picture.file) as image:
                whole = image.convert("RGB")
            whole.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
            read.append((picture, whole))
        except Exception as error:  # a damaged file, as decoders report it in many ways
            problems.append(f"{picture.file.name} of {picture.of} can't be read ({error})")
    side = MAX_SIDE
    while True:
        shown = [_shown(picture, image, side) for picture, image in read]
        if sum(len(each.address) for each in shown) <= budget or side <= SMALLEST:
            break
        side = side * 7 // 10
    while shown and sum(len(each.address) for each in shown) > budget:
        left = shown.pop()
        problems.append(
            f"{left.picture.file.name} of {left.picture.of} is left out, as the page would become too large"
        )
    return shown, problems


def _shown(picture: Picture, image: Image.Image, side: int) -> Shown:
    small = image
    if max(image.size) > side:
        small = image.copy()
        small.thumbnail((side, side), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    small.save(file, "WEBP", quality=82, method=2)
    data = base64.b64encode(file.getvalue()).decode()
    return Shown(picture, f"data:image/webp;base64,{data}", *small.size)
