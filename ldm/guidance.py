"""Classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598) inside an interval of time."""

from collections.abc import Callable

import torch
from torch import Tensor

from vfm_vae.pretrained import remembers_arguments

ConditionalField = Callable[[Tensor, Tensor, Tensor], Tensor]
VelocityField = Callable[[Tensor, Tensor], Tensor]


class Guidance:
    """Draws predictions away from what the model says without a label, `u + scale · (c − u)`.

    Outside the interval (Kynkäänniemi et al. 2024, arXiv 2404.07724) and at scale 1 only `c` is computed.

    Args:
        scale: Strength; 1 is no guidance.
        start: Time from which on it acts, itself included; 0 is noise, 1 is data.
        end: Time up to which it acts, itself included.
        channels: Guide only the first so many latent channels, as the published LightningDiT numbers do with 3; null
            guides all.

    Raises:
        ValueError: if an option lies outside its range.
    """

    @remembers_arguments
    def __init__(self, scale: float = 1.0, start: float = 0.0, end: float = 1.0, channels: int | None = None):
        if not 0 <= start <= end <= 1:
            raise ValueError(f"start, end: 0 <= start <= end <= 1 is needed, given {start} and {end}")
        if channels is not None and channels < 1:
            raise ValueError(f"channels: at least 1, or null for all, given {channels}")
        self.scale, self.start, self.end, self.channels = scale, start, end, channels

    def with_scale(self, scale: float) -> "Guidance":
        """The same at another strength."""
        return Guidance(scale, self.start, self.end, self.channels)

    def acts_at(self, t: float) -> bool:
        """Whether predictions at time `t` are guided."""
        return self.scale != 1 and self.start <= t <= self.end

    def field(self, model: ConditionalField, labels: Tensor, null: int) -> VelocityField:
        """The velocity that a sampler integrates.

        Args:
            model: Predicts the velocity `[B, C, h, w]` of `x_t`, times `[B]` and labels `[B]`.
            labels: Classes of the samples, int64 `[B]`.
            null: The label that stands for no label.

        Returns:
            A function of the samples `[B, C, h, w]` and one time for all, a scalar on the CPU.
        """
        both = torch.cat([labels, torch.full_like(labels, null)])

        def guided(x: Tensor, t: Tensor) -> Tensor:
            time = t.item()
            times = x.new_full((len(x),), time)
            if not self.acts_at(time):
                return model(x, times, labels)
            conditional, unconditional = model(x.repeat(2, 1, 1, 1), times.repeat(2), both).chunk(2)
            direction = conditional - unconditional
            if self.channels is None or self.channels >= x.shape[1]:
                return unconditional + self.scale * direction
            guided_channels = (unconditional + self.scale * direction)[:, : self.channels]
            return torch.cat([guided_channels, conditional[:, self.channels :]], dim=1)

        return guided
