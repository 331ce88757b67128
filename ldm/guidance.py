"""Guidance: samples are led away from a weaker prediction, inside an interval of time.

All kinds compute `weak + scale · (strong − weak)` and differ in what is weak: the prediction without a condition
(`Guidance`), that of a weaker denoiser (`Autoguidance`), or one from halfway through the same denoiser
(`InternalGuidance`).
"""

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor

from ldm.condition import Condition
from ldm.models.denoiser import Denoiser
from ldm.partner import Guided, Partner
from ldm.samplers import VelocityField
from vfm_vae.description import Described
from vfm_vae.options import at_least, within

Velocity = Callable[[Tensor, float], Tensor]  # of states and one time for all
Pair = Callable[[Tensor, float], tuple[Tensor, Tensor]]  # the strong and the weak one

ROUNDING = 1e-6  # of a sampler's times, at which the ends of an interval still belong to it


class Guidance(Described):
    """Classifier-free guidance within an interval of time: `u + scale · (c − u)`; the base class of all guidance, too.

    c is the prediction with the condition, u the one without (Ho & Salimans 2022, arXiv 2207.12598). Outside the
    interval (Kynkäänniemi et al. 2024, arXiv 2404.07724) and at scale 1 only c is computed. With `inner`, both c and u
    are guided by that first, inside its own interval.

    A subclass says in `_pair` what is led away from what.

    Args:
        scale: Strength of guidance; 1 for none.
        start: Guidance begins at this time, 0 being noise and 1 data.
        end: Guidance ends after this time.
        channels: Guides only this many of the first latent channels, 3 in LightningDiT's published numbers; null guides
            all.
        cls_scale: Strength of guidance for the class token that REG diffuses; 0 for none.
        inner: Another guidance of the predictions with and without the condition, such as InternalGuidance; null for
            the denoiser's own predictions.

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
        inner: "Guidance | None" = None,
    ):
        at_least(0, scale=scale, cls_scale=cls_scale)
        at_least(1, channels=channels)
        within(0, 1, start=start, end=end)
        if start > end:
            raise ValueError(f"start, end: the interval can't start after its end, given {start} and {end}")
        self.scale, self.start, self.end, self.channels, self.cls_scale = scale, start, end, channels, cls_scale
        self.inner = inner

    def with_scale(self, scale: float) -> Self:
        """The same guidance with another scale; at 1 there is none, nor an inner one."""
        return self._with(scale=scale, **{} if self.inner is None or scale != 1 else {"inner": None})

    def with_interval(self, start: float, end: float) -> Self:
        """The same guidance inside another interval of time; an inner one keeps its own."""
        return self._with(start=start, end=end)

    def _with(self, **options: Any) -> Self:
        return type(self)(**self.arguments | options)

    @property
    def acts(self) -> bool:
        """Whether predictions are guided at any time."""
        return self.scale != 1 or (self.inner is not None and self.inner.acts)

    def acts_at(self, t: float) -> bool:
        """Whether predictions at time `t` are guided, disregarding an inner guidance."""
        return self.scale != 1 and self.start - ROUNDING <= t <= self.end + ROUNDING

    def check_model(self, model: Denoiser) -> None:
        """Checks that a denoiser can be guided so.

        Raises:
            ValueError: if it can't.
        """
        within(1, model.in_channels, **{"guidance.channels": self.channels})
        if self.inner is not None:
            self.inner.check_model(model)

    def prepare(self, diffusion: Guided) -> None:
        """Reads what guidance takes besides the denoiser, once, and checks that it fits; here, what `inner` takes.

        Raises:
            ValueError: if it can't be had, or does not fit.
        """
        if self.inner is not None:
            self.inner.prepare(diffusion)

    def compile_regions(self) -> None:
        """Compiles what guidance takes besides the denoiser, as the denoiser is compiled."""
        if self.inner is not None:
            self.inner.compile_regions()

    def settings(self) -> dict[str, Any]:
        """All that samples depend on, as plain data."""
        kind = {} if type(self) is Guidance else {"class": type(self).__name__}
        inner = {} if self.inner is None else {"inner": self.inner.settings()}
        return kind | {name: value for name, value in self.arguments.items() if name != "inner"} | inner

    def field(self, model: Denoiser, condition: Condition) -> VelocityField:
        """The velocity that a sampler integrates.

        Args:
            model: The denoiser.
            condition: What samples are drawn for.

        Returns:
            A function of the states `[B, ...]` and of one time for all, a scalar on the CPU.

        Raises:
            ValueError: if the denoiser can't be guided so.
        """
        self.check_model(model)
        velocity = self._velocity(model, condition)
        return lambda state, t: velocity(state, t.item())

    def _velocity(self, model: Denoiser, condition: Condition) -> Velocity:
        strong, pair = self._strong(model, condition), self._pair(model, condition)

        def guided(state: Tensor, time: float) -> Tensor:
            return self._lead(model, *pair(state, time)) if self.acts_at(time) else strong(state, time)

        return guided

    def _strong(self, model: Denoiser, condition: Condition) -> Velocity:
        """What is computed where this guidance does not act."""
        return _plain(model, condition) if self.inner is None else self.inner._velocity(model, condition)

    def _pair(self, model: Denoiser, condition: Condition) -> Pair:
        """The velocity that is wanted and the one that it is led away from, where guidance acts."""
        both = self._strong(model, condition.cat(condition.null()))

        def pair(state: Tensor, time: float) -> tuple[Tensor, Tensor]:
            conditional, unconditional = both(torch.cat([state, state]), time).chunk(2)
            return conditional, unconditional

        return pair

    def _lead(self, model: Denoiser, strong: Tensor, weak: Tensor) -> Tensor:
        """Guides the velocities of states `[B, ...]`: of latents, those channels that are to be guided."""
        (latents, token), (weak_latents, weak_token) = model.split(strong), model.split(weak)
        end = latents.shape[1] if self.channels is None else self.channels
        moved = guide(latents[:, :end], weak_latents[:, :end], self.scale)
        if token is not None and weak_token is not None and self.cls_scale > 0:
            token = guide(token, weak_token, self.cls_scale)
        return model.join(torch.cat([moved, latents[:, end:]], dim=1), token)


class Autoguidance(Guidance):
    """Autoguidance (Karras et al. 2024, arXiv 2406.02507): away from what a weaker denoiser predicts.

    `g + scale · (f − g)`, f being the denoiser's prediction and g that of its partner, both with the condition. RAE
    (arXiv 2510.11690) takes the scale 1.42, with a partner of a fifth of the parameters, trained for 14 epochs. Outside
    the interval and at scale 1 the partner computes nothing.

    Args:
        partner: The weaker denoiser: a checkpoint of its training, whose averaged weights are taken where there are
            any; or a folder that `save_pretrained` wrote, or `owner/model` on the Hugging Face hub. It may be of
            another class and size, but of the same latents and conditions.
        scale: Strength of guidance; 1 for none.
        start: Guidance begins at this time, 0 being noise and 1 data.
        end: Guidance ends after this time.
        channels: Guides only this many of the first latent channels; null guides all.
        cls_scale: Strength of guidance for the class token that REG diffuses; 0 for none.
    """

    def __init__(
        self,
        partner: str,
        scale: float = 1.0,
        start: float = 0.0,
        end: float = 1.0,
        channels: int | None = None,
        cls_scale: float = 0.0,
    ):
        super().__init__(scale, start, end, channels, cls_scale)
        self.partner = Partner(partner)

    def _with(self, **options: Any) -> Self:
        other = super()._with(**options)
        other.partner = self.partner  # which is read but once
        return other

    def prepare(self, diffusion: Guided) -> None:
        """Reads the partner and checks that it fits.

        Raises:
            ValueError: if there is no such partner, or it is of other latents or conditions.
        """
        self.partner.check(diffusion)

    def compile_regions(self) -> None:
        """Compiles the partner block by block, if need be when it is read."""
        self.partner.compile_regions()

    def settings(self) -> dict[str, Any]:
        """All that samples depend on, as plain data: the partner by its weights, wherever they lie."""
        return super().settings() | {"partner": self.partner.fingerprint() if self.acts else None}

    def _pair(self, model: Denoiser, condition: Condition) -> Pair:
        strong = _plain(model, condition)

        def pair(state: Tensor, time: float) -> tuple[Tensor, Tensor]:
            return strong(state, time), _plain(self.partner.on(state.device), condition)(state, time)

        return pair


class InternalGuidance(Guidance):
    """Internal guidance (RAE v2, arXiv 2605.18324): away from what the denoiser itself predicts halfway.

    `base + scale · (full − base)`, both from one pass through the denoiser, whose internal head (`base_depth`) gives
    `base`: so it costs next to nothing. RAE v2 takes the scale 1.78 up to t = 0.9.

    Args:
        scale: Strength of guidance; 1 for none.
        start: Guidance begins at this time, 0 being noise and 1 data.
        end: Guidance ends after this time.
        channels: Guides only this many of the first latent channels; null guides all.
        cls_scale: Strength of guidance for the class token that REG diffuses; 0 for none.
    """

    def __init__(
        self,
        scale: float = 1.0,
        start: float = 0.0,
        end: float = 1.0,
        channels: int | None = None,
        cls_scale: float = 0.0,
    ):
        super().__init__(scale, start, end, channels, cls_scale)

    def check_model(self, model: Denoiser) -> None:
        """Checks that a denoiser has an internal head.

        Raises:
            ValueError: if it has none.
        """
        super().check_model(model)
        if not model.base_depth:
            raise ValueError(
                f"guidance: InternalGuidance leads away from what the denoiser predicts halfway, but this "
                f"{type(model).__name__} has no internal head: train one with base_depth, or guide it otherwise"
            )

    def _pair(self, model: Denoiser, condition: Condition) -> Pair:
        def pair(state: Tensor, time: float) -> tuple[Tensor, Tensor]:
            prediction = model(state, state.new_full((len(state),), time), condition, base=True)
            return prediction.velocity, prediction.base

        return pair


def _plain(model: Denoiser, condition: Condition) -> Velocity:
    """A denoiser's own prediction."""
    return lambda state, time: model(state, state.new_full((len(state),), time), condition).velocity


def guide(strong: Tensor, weak: Tensor, scale: float) -> Tensor:
    """`weak + scale · (strong − weak)` of predictions alike in shape (Ho & Salimans 2022, eq. 6)."""
    return weak + scale * (strong - weak)
