"""The base class of data sets, and one of mere numbers of samples."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from vfm_vae.data.sampling import Draw
from vfm_vae.types import Batch, Caption, LatentBatch, TextBatch


class SampleSet(Dataset[tuple[Any, ...]], ABC):
    """Samples by number, each a tuple of a batch's fields in their order.

    A batch may carry more than it does: by one more field, None by default, and data sets whose samples have it.

    Attributes:
        batch_type: What samples are put together to.
        reads: Whether samples take time to read, so that workers are worth their while.
        labels: Class indices, int64 `[num_samples]`.
        shards: Number of the file that each sample lies in, int64 `[num_samples]`, where many share one and are best
            read one after the other; else None.
    """

    batch_type: ClassVar[type[Batch] | type[LatentBatch]] = Batch
    reads: ClassVar[bool] = True
    labels: np.ndarray
    shards: np.ndarray | None = None

    @abstractmethod
    def __len__(self) -> int:
        """Number of samples."""

    @abstractmethod
    def __getitem__(self, draw: Draw | int) -> tuple[Any, ...]:
        """One sample; its index is -1 where it is padding."""

    @classmethod
    def collate(cls, samples: Sequence[tuple[Any, ...]]) -> Batch | LatentBatch:
        """Puts samples together; a field that is None in all of them, or left out at the end, stays None."""
        batch: Any = cls.batch_type
        return batch(*map(_together, zip(*samples, strict=True)))


def _together(column: Sequence[Any]) -> Any:
    """One field of several samples."""
    if column[0] is None:
        return None
    return TextBatch.of(column) if isinstance(column[0], Caption) else default_collate(list(column))


class SampleNumbers(SampleSet):
    """The numbers of samples that are to be drawn, as batches that hold no images.

    Args:
        size: Number of samples.
    """

    reads = False

    def __init__(self, size: int) -> None:
        self.size = size
        self.labels = np.full(size, -1)

    def settings(self) -> dict[str, Any]:
        """What samples depend on besides their numbers, as plain data."""
        return {}

    def __len__(self) -> int:
        """Number of samples."""
        return self.size

    def __getitem__(self, draw: Draw | int) -> tuple[Tensor, int, int]:
        """Returns an empty image, label -1 and the number, which is -1 for padding."""
        draw = Draw(draw) if isinstance(draw, int) else draw
        return torch.zeros(3, 0, 0, dtype=torch.uint8), -1, -1 if draw.padding else draw.index
