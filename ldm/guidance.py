"""Classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598) inside an interval of time."""

from typing import final

import torch
from torch import Tensor

from ldm.condition import Condition
from ldm.models.denoiser import Denoiser
from ldm.samplers import VelocityField
from vfm_vae.description import Described
from vfm_vae.options import at_least, within


@final
class Guidance(Described):
    """Classifier-free guidance within an interval of time: `u + scale · (c − u)`.

    c is the prediction with the condition, u the one without. Outside the interval (Kynkäänniemi et al. 2024, arXiv
    2404.07724) and at scale 1 only c is computed.

    Args:
        scale: Strength of guidance; 1 for none.
        start: Guidance begins at this time, 0 being noise and 1 data.
        end: Guidance ends after this time.
        channels: Guides only this many of the first latent channels, 3 in LightningDiT's published numbers; null guides
            all.
        cls_scale: Strength of guidance for the class token that REG diffuses; 0 for none.

    Raises:
        ValueError: if an option lies outside its range.
    """

    def __init__(
        self,
        scale: float = 1.0,
        start: float = 0.0,
        end: float = 1.0,
        channels: int | None = None,
        cls_scale: float = 0.0,
    ):
        at_least(0, scale=scale, cls_scale=cls_scale)
        at_least(1, channels=channels)
        within(0, 1, start=start, end=end)
        if start > end:
            raise ValueError(f"start, end: the interval can't start after its end, given {start} and {end}")
        self.scale, self.start, self.end, self.channels, self.cls_scale = scale, start, end, channels, cls_scale

    def with_scale(self, scale: float) -> "Guidance":
        """The same guidance with another scale."""
        return Guidance(**self.arguments | {"scale": scale})

    def acts_at(self, t: float) -> bool:
        """Whether predictions at time `t` are guided."""
        return self.scale != 1 and self.start <= t <= self.end

    def field(self, model: Denoiser, condition: Condition) -> VelocityField:
        """The velocity that a sampler integrates.

        Args:
            model: The denoiser.
            condition: What samples are drawn for.

        Returns:
            A function of the states `[B, ...]` and of one time for all, a scalar on the CPU.
        """
        both = condition.cat(condition.null())

        def guided(state: Tensor, t: Tensor) -> Tensor:
            time = t.item()
            times = state.new_full((len(state),), time)
            if not self.acts_at(time):
                return model(state, times, condition).velocity
            velocity = model(torch.cat([state, state]), times.repeat(2), both).velocity
            latents, token = model.split(velocity)
            if token is not None:
                conditional, unconditional = token.chunk(2)
                token = guide(conditional, unconditional, self.cls_scale) if self.cls_scale > 0 else conditional
            return model.join(self._guide_latents(*latents.chunk(2)), token)

        return guided

    def _guide_latents(self, conditional: Tensor, unconditional: Tensor) -> Tensor:
        """Guides the channels of predictions `[B, C, h, w]` that are to be guided."""
        end = conditional.shape[1] if self.channels is None else self.channels
        moved = guide(conditional[:, :end], unconditional[:, :end], self.scale)
        return torch.cat([moved, conditional[:, end:]], dim=1)


def guide(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """`u + scale · (c − u)` of predictions alike in shape (Ho & Salimans 2022, eq. 6)."""
    return unconditional + scale * (conditional - unconditional)
