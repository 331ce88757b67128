"""The base class of data sets of images, which copes with damaged ones."""

import logging
import os
from abc import abstractmethod
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from PIL import Image
from torch import Tensor

from vfm_vae.data.captions import ImageCaptions
from vfm_vae.data.decoding import decode
from vfm_vae.data.listing import EXTENSIONS
from vfm_vae.data.samples import SampleSet
from vfm_vae.data.sampling import Draw, caption_drawn
from vfm_vae.data.transforms import Transform
from vfm_vae.types import Caption

log = logging.getLogger(__name__)


class ImageDataset(SampleSet):
    """Images by number; subclasses say where they lie.

    A damaged image is named in the log once and counted, over all workers of this rank. In training the next good image
    takes its place; in evaluation that one comes marked as padding, so that no metric counts it.

    Of an image's captions, training sees another in each epoch, drawn apart from the augmentation, and evaluation the
    first.

    Args:
        place: What the images lie in, for messages.
        names: Names of the images in `place`.
        labels: Class indices, one for each name.
        transform: Makes a tensor of an RGB image.
        seed: Seed of the augmentation.
        exif_transpose: Whether images are turned as their EXIF orientation says.
        replace_damaged: Whether another image takes the place of a damaged one (training), or marks it (evaluation).
            Captions are likewise drawn or the first.
        max_bad_fraction: Share of the data set that may be damaged.
        num_lost: Images that are known to be damaged, and are not among the names.
        captions: What is said of each image; None where samples come without captions.

    Attributes:
        classes: Names of the classes; a label is a position in this list.
        paths: The tar shards, where images lie in such.

    Raises:
        ValueError: a label is negative; too many images are damaged: at once, or when reading.
    """

    classes: list[str]
    paths: list[Path]

    def __init__(
        self,
        place: str | Path,
        names: Sequence[str],
        labels: Sequence[int] | np.ndarray,
        transform: Transform,
        *,
        seed: int = 0,
        exif_transpose: bool = True,
        replace_damaged: bool = True,
        max_bad_fraction: float = 0.01,
        num_lost: int = 0,
        captions: ImageCaptions | None = None,
    ) -> None:
        self.place = Path(place)
        self.transform = transform
        self.seed = seed
        self.exif_transpose = exif_transpose
        self.replace_damaged = replace_damaged
        self.max_bad_fraction = max_bad_fraction
        self.num_lost = num_lost
        self.captions = captions
        # Arrays, because a list of a million strings is copied page by page into every forked worker.
        self._names = np.array([os.fsencode(name) for name in names])
        self.labels = np.array(labels, dtype=np.int64)
        if (self.labels < 0).any():
            first = int(np.argmax(self.labels < 0))
            raise ValueError(
                f"root: {str(self.place / names[first])!r} has the label {self.labels[first]}, but classes are "
                "numbered from 0 on; give it the label of its class, or leave it out of the data set"
            )
        self._damaged = torch.zeros(len(names), dtype=torch.bool).share_memory_()  # seen by all workers

    @abstractmethod
    def open(self, index: int) -> BinaryIO:
        """An image's file, not decoded."""

    def __len__(self) -> int:
        """Number of images."""
        return len(self._names)

    def name(self, index: int) -> str:
        """Name of an image in the place it lies in."""
        return os.fsdecode(self._names[index])

    @property
    def num_damaged(self) -> int:
        """How many images have been found damaged so far."""
        return self.num_lost + int(self._damaged.sum())

    @property
    def has_captions(self) -> bool:
        """Whether samples come with captions."""
        return self.captions is not None

    def captions_of(self, index: int) -> list[str]:
        """All captions of an image, or the empty one where it has none."""
        return (self.captions[index] if self.captions is not None else []) or [""]

    def __getitem__(self, draw: Draw | int) -> tuple[Tensor, int, int] | tuple[Tensor, int, int, Caption]:
        """Returns image (uint8 `[3, H, W]`), label and index, -1 for padding; then a caption, if there are any."""
        draw = Draw(draw) if isinstance(draw, int) else draw
        index = draw.index
        while (image := self._read(index)) is None:
            index = (index + 1) % len(self)
        generator = np.random.default_rng((self.seed, draw.epoch, draw.index))
        is_padding = draw.padding or (index != draw.index and not self.replace_damaged)
        sample = self.transform(image, generator), int(self.labels[index]), -1 if is_padding else index
        return (*sample, self._caption(index, draw.epoch)) if self.has_captions else sample

    def small(self, min_size: int, num_threads: int = 8) -> list[str]:
        """Names of the images whose short side is under `min_size` pixels; reads headers alone.

        Images whose header can't be read are not among them: they show as damaged when their turn comes.
        """

        def is_small(index: int) -> bool:
            try:
                with self.open(index) as file, Image.open(file) as image:
                    return min(image.size) < min_size
            except Exception:  # damaged, as decoders report it in many ways; reading it in training records that
                return False

        with ThreadPoolExecutor(num_threads) as threads:
            return [self.name(index) for index, small in enumerate(threads.map(is_small, range(len(self)))) if small]

    def _caption(self, index: int, epoch: int) -> Caption:
        captions = self.captions_of(index)
        is_drawn = self.replace_damaged and len(captions) > 1
        return Caption(captions[caption_drawn(self.seed, epoch, index, len(captions)) if is_drawn else 0])

    def _read(self, index: int) -> Image.Image | None:
        """The decoded image, or None for one that is damaged."""
        if self._damaged[index]:
            return None
        try:
            with self.open(index) as file:
                return decode(file, self.exif_transpose)
        except (OSError, ValueError) as error:
            self._damaged[index] = True
            log.warning("damaged image left out: %s (%s)", self.place / self.name(index), error)
            self._check_damage(f"{self.name(index)!r} ({error})")
            return None

    def _check_damage(self, last: str) -> None:
        count, every = self.num_damaged, bool(self._damaged.all())  # then there is no next good one to be found
        if every or count > self.max_bad_fraction * (len(self) + self.num_lost):
            share = "all" if every else f"more than {self.max_bad_fraction:.2%}"
            raise ValueError(
                f"max_bad_fraction: {count} of the {len(self) + self.num_lost} images in "
                f"{str(self.place)!r} are damaged, {share}, the last {last}; repair the "
                "data set (the log names every one) or allow more"
            )


def kept(names: Sequence[str], exclude: Collection[str], place: str | Path) -> list[int]:
    """Positions of the names that are not excluded.

    Raises:
        ValueError: none is left.
    """
    exclude = frozenset(exclude)
    positions = [position for position, name in enumerate(names) if name not in exclude]
    if not positions:
        left = f" but those that are left out ({len(exclude)})" if exclude else ""
        raise ValueError(f"root: no images under {str(place)!r}{left}; known endings are {' '.join(EXTENSIONS)}")
    if exclude and len(positions) == len(names):
        rank_zero_warn(f"small_list: none of its {len(exclude)} names is that of an image under {str(place)!r}")
    return positions
