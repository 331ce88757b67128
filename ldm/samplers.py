"""Samplers, which integrate a velocity field from noise to data.

A sampler is called with the field, a function of `x: [B, ...]` and one time for all (a scalar on the CPU), and with the
noise at t = 0; it returns the data at t = 1. Time is `path`'s.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from itertools import pairwise
from types import MappingProxyType
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from torchdiffeq import odeint

from ldm.path import Shift, check_shift, score, shift_for, shifted
from vfm_vae.description import Described
from vfm_vae.finite import not_finite
from vfm_vae.options import at_least, positive, within

Noise = Callable[[], Tensor]
VelocityField = Callable[[Tensor, Tensor], Tensor]  # of states and one time for all


def time_grid(steps: int, shift: float | None = 1.0, end: float = 1.0) -> Tensor:
    """Times from 0 to 1, spent mostly near noise for a shift below 1 and near data above.

    Args:
        steps: Points of the grid, so one more than there are intervals.
        shift: Warps evenly spaced times, see `path.shifted`; LightningDiT takes 0.3.
        end: The last of the even times; below 1 the grid stops short of data.

    Returns:
        float32 `[steps]`.
    """
    return shifted(torch.linspace(0, end, steps), shift)


class Sampler(Described, ABC):
    """Integrates a velocity field from noise at t = 0 to data at t = 1.

    Attributes:
        added: Options that a class got when there were folders of samples that don't note them, with the values that
            those samples were drawn by.
    """

    added: ClassVar[Mapping[str, Any]] = MappingProxyType({})

    @abstractmethod
    def __call__(self, field: VelocityField, noise: Tensor, fresh_noise: Noise | None = None) -> Tensor:
        """Samples.

        Args:
            field: Velocity as a function of `x: [B, ...]` and a time.
            noise: Standard normal, `[B, ...]`.
            fresh_noise: Returns more of it, each time it is called; for samplers that are stochastic.

        Returns:
            Samples like `noise`.
        """

    def fitted_to(self, latent_shape: Sequence[int]) -> "Sampler":
        """The sampler for latents of a shape `(C, h, w)`; itself, unless an option follows from the shape."""
        return self

    def settings(self) -> dict[str, Any]:
        """Class and arguments as a folder of samples notes them, which must not differ from what older ones note."""
        options = {name: value for name, value in self.arguments.items() if (name, value) not in self.added.items()}
        return {"class": type(self).__name__, **options}


class ShiftedSampler(Sampler):
    """Base class of samplers whose times can be shifted.

    Args:
        shift: Warps the times, see `path.shifted`: below 1 there are more near noise. `auto` follows from the latents'
            shape, see `path.shift_for`; null and 1 shift nothing.

    Raises:
        ValueError: if it is no such shift.
    """

    shift: Shift = 1.0

    def __init__(self, shift: Shift = 1.0):
        check_shift(shift)
        self.shift = shift

    def fitted_to(self, latent_shape: Sequence[int]) -> Self:
        """The same sampler with the number that its shift stands for."""
        fitted = copy(self)
        fitted.shift = shift_for(self.shift, latent_shape)
        if "shift" in self.arguments:
            fitted.arguments = self.arguments | {"shift": fitted.shift}
        return fitted

    @property
    def known_shift(self) -> float | None:
        """The shift as a number; None for none.

        Raises:
            ValueError: if it follows from the latents, which nobody has told.
        """
        if isinstance(self.shift, str):
            raise ValueError(
                "sampler.shift: 'auto' follows from the shape of the latents, which a sampler alone doesn't know: take "
                "`sampler.fitted_to(latent_shape)`, or give a number"
            )
        return self.shift


class GridSampler(ShiftedSampler):
    """Base class of samplers on a grid of times.

    Args:
        steps: Number of points on the time grid, both ends included.
        shift: Warps the grid: below 1 there are more points near noise. `auto` takes `sqrt(4096 / (C·h·w))` for latents
            of that shape, null the even grid. Published shifts of noise levels, as RAE's 6.93, are 1 / shift.
        end: Time at which the even grid ends before it is warped; 1 is data. RAE's published samples end at 0.999.

    Raises:
        ValueError: if an option lies outside its range.
    """

    added = MappingProxyType({"end": 1.0})
    end: float = 1.0

    def __init__(self, steps: int = 250, shift: Shift = 1.0, end: float = 1.0):
        super().__init__(shift)
        at_least(2, steps=steps)
        positive(end=end)
        within(0, 1, end=end)
        self.steps, self.end = steps, end

    @property
    def times(self) -> Tensor:
        """The grid, `[steps]`."""
        return time_grid(self.steps, self.known_shift, self.end)


class Euler(GridSampler):
    """Explicit Euler: one evaluation per interval of the grid, error of first order.

    Args:
        steps: Number of points on the time grid, both ends included: one more than there are evaluations.
        shift: Warps the grid: below 1 there are more points near noise. `auto` takes `sqrt(4096 / (C·h·w))` for latents
            of that shape, null the even grid. Published shifts of noise levels, as RAE's 6.93, are 1 / shift.
        end: Time at which the even grid ends before it is warped; 1 is data. RAE's published samples end at 0.999.
    """

    def __call__(self, field: VelocityField, noise: Tensor, fresh_noise: Noise | None = None) -> Tensor:
        """Samples; nothing is stochastic."""
        x = noise
        for t, next_t in pairwise(self.times):
            x = x + (next_t - t) * field(x, t)
        return x


class Heun(GridSampler):
    """Heun's method (the explicit trapezoidal rule): two evaluations per interval, error of second order.

    Args:
        steps: Number of points on the time grid, both ends included.
        shift: Warps the grid: below 1 there are more points near noise. `auto` takes `sqrt(4096 / (C·h·w))` for latents
            of that shape, null the even grid. Published shifts of noise levels, as RAE's 6.93, are 1 / shift.
        end: Time at which the even grid ends before it is warped; 1 is data. RAE's published samples end at 0.999.
    """

    def __call__(self, field: VelocityField, noise: Tensor, fresh_noise: Noise | None = None) -> Tensor:
        """Samples; nothing is stochastic."""
        x = noise
        for t, next_t in pairwise(self.times):
            step = next_t - t
            here = field(x, t)
            there = field(x + step * here, next_t)
            x = x + step / 2 * (here + there)
        return x


class Dopri5(Sampler):
    """Adaptive Runge-Kutta of order 5 (Dormand & Prince 1980), by torchdiffeq; all samples share the step.

    The step depends on the batch: samples are reproducible up to the tolerance only.

    Args:
        atol: Absolute tolerance of a step.
        rtol: Relative tolerance of a step.
    """

    def __init__(self, atol: float = 1e-6, rtol: float = 1e-3):
        positive(atol=atol, rtol=rtol)
        self.atol, self.rtol = atol, rtol

    def __call__(self, field: VelocityField, noise: Tensor, fresh_noise: Noise | None = None) -> Tensor:
        """Samples; nothing is stochastic.

        Raises:
            ValueError: if no step is small enough, as where velocities are not finite.
        """
        ends = torch.tensor([0.0, 1.0], device=noise.device)
        try:
            return odeint(lambda t, x: field(x, t), noise, ends, method="dopri5", atol=self.atol, rtol=self.rtol)[-1]
        except AssertionError as error:  # all that torchdiffeq says
            raise not_finite(f"samples: no step of Dopri5 is small enough ({error})") from error


class EulerMaruyama(ShiftedSampler):
    """Stochastic sampler of SiT (Ma et al. 2024, arXiv 2401.08740) and REG: the reverse SDE with diffusion 2·(1 − t).

    From noise level τ = 1 − t = 1 in noisy steps, even unless shifted, to the last level, then without noise to 0. The
    state is kept in float64.

    Args:
        steps: Number of evaluations, including the last, noiseless one.
        last: Noise level before the last step, in (0, 1), as it is before a shift.
        shift: Warps the times of all levels: below 1 there are more near noise. `auto` takes `sqrt(4096 / (C·h·w))` for
            latents of that shape, null and 1 leave them even.

    Raises:
        ValueError: if an option lies outside its range.
    """

    added = MappingProxyType({"shift": 1.0})

    def __init__(self, steps: int = 250, last: float = 0.04, shift: Shift = 1.0):
        super().__init__(shift)
        at_least(2, steps=steps)
        if not 0 < last < 1:
            raise ValueError(f"last: a noise level in (0, 1), given {last}")
        self.steps, self.last = steps, last

    @property
    def times(self) -> Tensor:
        """1 − noise level at the ends of all steps, float64 `[steps + 1]`."""
        levels = torch.linspace(1, self.last, self.steps, dtype=torch.float64)
        return torch.cat([shifted(1 - levels, self.known_shift), levels.new_ones(1)])

    def __call__(self, field: VelocityField, noise: Tensor, fresh_noise: Noise | None = None) -> Tensor:
        """Samples; every step but the last takes fresh noise."""
        draw = fresh_noise or (lambda: torch.randn_like(noise))
        x = noise.double()
        for t, next_t in pairwise(self.times):
            velocity = field(x.to(noise.dtype), t).double()
            diffusion = 2 * (1 - t)
            drift = velocity + diffusion / 2 * score(velocity, x, t)
            x = x + (next_t - t) * drift
            if next_t < 1:
                x = x + (diffusion * (next_t - t)).sqrt() * draw().double()
        return x.to(noise.dtype)
