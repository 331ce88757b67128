"""Latents at mean 0 and standard deviation 1, and back."""

import torch
from torch import Tensor, nn

from vfm_vae.data.latents import LatentStatistics


class LatentNormalization(nn.Module):
    """Normalises each channel of a latent by statistics that are saved with the model.

    Training and sampling share this one object and a checkpoint holds its buffers, so that the two can't disagree.

    Args:
        channels: C.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, channels: int):
        super().__init__()
        for name in ("mean", "std"):  # nan until they are known
            self.register_buffer(name, torch.full((1, channels, 1, 1), torch.nan))

    @property
    def is_known(self) -> bool:
        """Whether there are statistics."""
        return bool(self.mean.isfinite().all() and self.std.isfinite().all())

    def take(self, statistics: LatentStatistics) -> None:
        """Sets the statistics.

        Raises:
            ValueError: if they are not finite, or a channel does not vary.
        """
        if not all(values.isfinite().all() for values in statistics):
            raise ValueError("the latents' statistics hold nan or inf: the cache or the tokenizer is broken")
        if not (statistics.std > 0).all():
            raise ValueError("the latents have channels that do not vary: the cache or the tokenizer is broken")
        self.mean.copy_(statistics.mean)
        self.std.copy_(statistics.std)

    def differs_from(self, statistics: LatentStatistics, tolerance: float = 0.1) -> bool:
        """Whether statistics are clearly others, by more than a tenth of the standard deviation in any channel."""
        scale = self.std.clamp(min=1e-12)
        mean, std = (x.to(scale.device) for x in statistics)
        return bool(
            (((mean - self.mean) / scale).abs() > tolerance).any() or ((std / scale).log().abs() > tolerance).any()
        )

    def forward(self, z: Tensor) -> Tensor:
        """Normalises latents `[B, C, h, w]`."""
        return (z - self.mean) / self.std

    def inverse(self, x: Tensor) -> Tensor:
        """Brings normalised latents `[B, C, h, w]` back to where the tokenizer decodes them."""
        return x * self.std + self.mean
