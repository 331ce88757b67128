"""A condition in one file: the mean of an image's latent."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from ldm.condition import Condition, Conditioning
from vfm_vae.data.sampling import IndexedNoise
from vfm_vae.types import Batch, LatentBatch


@dataclass(frozen=True)
class Brightness(Condition):
    """A number for each sample.

    Attributes:
        values: float32 `[B]`.
        known: float32 `[B]`, 1, or 0 where nothing is told.
    """

    rows: ClassVar[tuple[str, ...]] = ("values", "known")
    values: Tensor
    known: Tensor

    def null(self) -> Self:
        return replace(self, values=torch.zeros_like(self.values), known=torch.zeros_like(self.known))

    def plain(self) -> list[float]:
        return self.values.tolist()


class MeanOfLatents(Conditioning):
    """Tells how bright an image is.

    Args:
        scale: of what samples are drawn for, a normal distribution.
    """

    def __init__(self, scale: float = 1.0) -> None:
        self.scale = scale

    def of_batch(self, batch: Batch | LatentBatch) -> Brightness:
        return self.of_values(batch.latents.flatten(1).mean(1))

    def of_samples(self, index: Tensor, noise: IndexedNoise) -> Brightness:
        return self.of_values(self.scale * noise.normal())

    def of_values(self, values: Sequence[float] | Tensor) -> Brightness:
        values = torch.as_tensor(values, dtype=torch.float32)
        if not values.isfinite().all():
            raise ValueError(f"brightness: a finite number for each sample, given {values.tolist()}")
        return Brightness(values, torch.ones_like(values))
