"""From image files of any kind to upright 8-bit RGB."""

from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps


def decode(file: str | Path | BinaryIO, exif_transpose: bool = True) -> Image.Image:
    """Reads an image; of an animation or several pages, the first.

    Args:
        file: A file in any format that Pillow reads.
        exif_transpose: Whether to turn the image as its EXIF orientation says, so that it stands as people see it.

    Returns:
        8-bit RGB; what was transparent lies on white.

    Raises:
        ValueError: the file is missing or damaged, is no image, or too large a one; the message says why.
    """
    try:
        with Image.open(file) as image:
            image.load()
            if exif_transpose:
                ImageOps.exif_transpose(image, in_place=True)
            return to_rgb(image)
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error and more at bad bytes
        raise ValueError(" ".join(str(error).split()) or type(error).__name__) from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Converts greyscale, CMYK, palette, transparent and 16-bit images to 8-bit RGB; transparent ones lie on white.

    Raises:
        ValueError: pixels are of 32 bits, of which nobody says what is white.
    """
    if image.mode.startswith("I"):  # 16-bit greyscale, which Pillow would clip at 255 instead of scaling
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 0xFFFF:
            raise ValueError("pixels of 32 bits, whose range is not known; save the image with 8 or 16")
        image = Image.fromarray((values.astype(np.uint16) >> 8).astype(np.uint8))
    if image.mode == "F":
        raise ValueError("pixels of 32 bits, whose range is not known; save the image with 8 or 16")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")
