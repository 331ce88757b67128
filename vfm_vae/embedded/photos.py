"""The `photos` data set: crops of the photographs that scikit-image and scikit-learn ship inside their packages.

Thirteen photographs are thirteen classes. Each photograph is divided into 5×5 tiles, of which five are held out, a
knight's move apart: one in each quadrant and one in the centre, so that every tile is held out or borders one that is,
and a class looks alike in training and validation. A validation crop lies inside a held-out tile, a training crop
touches none: the two never share a pixel.

    python -m vfm_vae.embedded.photos --root data/photos
"""

import argparse
import io
import json
import tarfile
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image
from skimage import data

from vfm_vae.checkpoints import read_json


def _of_sklearn(name: str) -> np.ndarray:
    """A photograph of scikit-learn, which takes half a second to import: for every command, if it stood above."""
    from sklearn.datasets import load_sample_image

    photo: np.ndarray = load_sample_image(name)
    return photo


# The ten colour photographs that both wheels hold, and three grey ones; everything else in them is a drawing, a
# microscope's test image, a texture without a subject or a download.
PHOTOS: Mapping[str, Callable[[], np.ndarray]] = {
    "astronaut": data.astronaut,
    "brick": data.brick,
    "camera": data.camera,
    "cat": data.cat,
    "china": lambda: _of_sklearn("china.jpg"),
    "coffee": data.coffee,
    "coins": data.coins,
    "flower": lambda: _of_sklearn("flower.jpg"),
    "histology": data.immunohistochemistry,
    "hubble": data.hubble_deep_field,
    "motorcycle": lambda: data.stereo_motorcycle()[0],
    "retina": lambda: data.retina()[170:1241, 170:1241],  # without the black corners around the round field of view
    "rocket": data.rocket,
}
TILES = 5
HELD_OUT = ((0, 3), (1, 0), (2, 2), (3, 4), (4, 1))  # (row, column)
SIDES: Mapping[str, tuple[float, float]] = {"train": (0.7, 1.6), "val": (0.8, 1.0)}  # in units of a tile's short side
MANIFEST, SHARDS, SHARD_SIZE = "photos.json", "shards", 500

Split = Literal["train", "val"]


class Box(NamedTuple):
    """A rectangle of pixels: `left <= x < right`, `top <= y < bottom`."""

    left: int
    top: int
    right: int
    bottom: int

    def overlaps(self, other: "Box") -> bool:
        """Whether the two rectangles have a pixel in common."""
        return (
            self.left < other.right and other.left < self.right and self.top < other.bottom and other.top < self.bottom
        )


def load_photo(name: str) -> Image.Image:
    """The photograph of a class, RGB.

    Raises:
        ValueError: there is no such photograph.
    """
    if name not in PHOTOS:
        raise ValueError(f"name={name!r} is no photograph; choose one of {', '.join(PHOTOS)}")
    return Image.fromarray(PHOTOS[name]()).convert("RGB")


def held_out_tiles(width: int, height: int) -> list[Box]:
    """The five tiles of a photograph, `width` × `height` pixels, that training never sees."""
    x = [round(width * column / TILES) for column in range(TILES + 1)]
    y = [round(height * row / TILES) for row in range(TILES + 1)]
    return [Box(x[column], y[row], x[column + 1], y[row + 1]) for row, column in HELD_OUT]


def sample_box(generator: np.random.Generator, width: int, height: int, split: Split, tile: int = 0) -> Box:
    """Draw a square crop of random place and scale.

    Args:
        generator: Source of randomness.
        width: Width of the photograph in pixels.
        height: Height of the photograph in pixels.
        split: `train` draws from all that is not held out, `val` from one held-out tile.
        tile: Which held-out tile a validation crop lies in, 0..4; training crops ignore it.
    """
    short_side = min(width, height) // TILES
    side = round(short_side * generator.uniform(*SIDES[split]))
    tiles = held_out_tiles(width, height)
    area = Box(0, 0, width, height) if split == "train" else tiles[tile]
    while True:
        left = int(generator.integers(area.left, area.right - side, endpoint=True))
        top = int(generator.integers(area.top, area.bottom - side, endpoint=True))
        box = Box(left, top, left + side, top + side)
        if split == "val" or not any(box.overlaps(held_out) for held_out in tiles):
            return box


def crop(photo: Image.Image, box: Box, size: int) -> Image.Image:
    """Cut a box out and resize it to `size` × `size` pixels, Lanczos.

    Cut first: `resize(box=...)` would read pixels around the box, and those may belong to the other split.
    """
    return photo.crop(box).resize((size, size), Image.Resampling.LANCZOS)


def write_photos(
    root: Path | str,
    *,
    size: int = 64,
    train_per_class: int = 200,
    val_per_class: int = 40,
    seed: int = 0,
) -> Path:
    """Write the data set as an ImageFolder tree, `root/{train,val}/<class>/*.JPEG`, unless it is there already.

    Beside the tree, `root/shards/photos-{train,val}-*.tar` hold the same files as WebDataset has them. All appears
    under its name only when it is whole, and `photos.json` in it records how it was made and the box of every crop, so
    an interrupted write leaves nothing that could be mistaken for the data set.

    Args:
        root: Folder to write.
        size: Side of the crops, in pixels.
        train_per_class: Number of training crops of each photograph.
        val_per_class: Number of validation crops of each photograph; a multiple of 5 uses its tiles evenly.
        seed: The same seed writes the same files.

    Returns:
        `root` as a path.

    Raises:
        ValueError: `root` holds something else, or photos made with other settings.
    """
    root = Path(root)
    settings = {"size": size, "train_per_class": train_per_class, "val_per_class": val_per_class, "seed": seed}
    if _is_written(root, settings):
        return root
    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{root.name}-", dir=root.parent) as folder:
        partial = Path(folder) / "photos"
        boxes: dict[str, Box] = {}
        counts: dict[Split, int] = {"train": train_per_class, "val": val_per_class}
        for label, name in enumerate(PHOTOS):
            for split, count in counts.items():
                # A stream for each class and split: the first crops do not depend on how many follow.
                generator = np.random.default_rng((seed, label, split == "val"))
                boxes |= _write_class(partial, name, split, count, size, generator)
        for split in counts:
            _write_shards(partial, split)
        (partial / MANIFEST).write_text(json.dumps({"settings": settings, "boxes": boxes}, indent=1))
        try:
            partial.rename(root)
        except OSError:  # another process was first
            if not _is_written(root, settings):
                raise
    return root


def _is_written(root: Path, settings: Mapping[str, int]) -> bool:
    """Whether the data set is there; raises where something else is."""
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return False
    manifest = root / MANIFEST
    if not manifest.is_file():
        raise ValueError(f"root={str(root)!r} is taken by something else than the photos; choose another folder")
    found = read_json(manifest, "root")["settings"]
    if found != settings:
        raise ValueError(
            f"root={str(root)!r} holds photos made with {found}, asked for are {settings}; "
            "delete it or choose another folder"
        )
    return True


def _write_class(
    root: Path, name: str, split: Split, count: int, size: int, generator: np.random.Generator
) -> dict[str, Box]:
    """Write one class of one split; returns the box of each file."""
    photo = load_photo(name)
    folder = root / split / name
    folder.mkdir(parents=True)
    boxes = {}
    for number in range(count):
        box = sample_box(generator, *photo.size, split, tile=number % len(HELD_OUT))
        file = folder / f"{name}_{number:04d}.JPEG"
        crop(photo, box, size).save(file, quality=95)
        boxes[file.relative_to(root).as_posix()] = box
    return boxes


def _write_shards(root: Path, split: str) -> None:
    """Write the files of one split as tars, the classes in turn."""
    (root / SHARDS).mkdir(exist_ok=True)
    files = sorted((root / split).glob("*/*.JPEG"), key=lambda file: (file.stem.rpartition("_")[2], file.name))
    for shard, start in enumerate(range(0, len(files), SHARD_SIZE)):
        with tarfile.open(root / SHARDS / f"photos-{split}-{shard:04d}.tar", "w") as tar:
            for file in files[start : start + SHARD_SIZE]:
                label = str(list(PHOTOS).index(file.parent.name)).encode()
                for ending, content in (("jpg", file.read_bytes()), ("cls", label)):
                    member = tarfile.TarInfo(f"{file.stem}.{ending}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))


def main() -> None:
    """Command line: write the data set."""
    parser = argparse.ArgumentParser(description="Write a small data set of crops from public photographs.")
    parser.add_argument("--root", type=Path, default=Path("data/photos"), help="folder to write (%(default)s)")
    parser.add_argument("--size", type=int, default=64, help="side of the crops in pixels (%(default)s)")
    parser.add_argument("--train-per-class", type=int, default=200, help="training crops (%(default)s)")
    parser.add_argument("--val-per-class", type=int, default=40, help="validation crops (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    print(write_photos(**vars(parser.parse_args())))


if __name__ == "__main__":
    main()
