"""Samplers, which integrate a velocity field from noise to data.

A sampler is called with the field, a function of `x: [B, ...]` and one time for all (a scalar on the CPU), and with the
noise at t = 0; it returns the data at t = 1. Time is `path`'s.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor
from torchdiffeq import odeint

from ldm.path import score
from vfm_vae.description import Described
from vfm_vae.finite import not_finite
from vfm_vae.options import at_least, positive

Noise = Callable[[], Tensor]
VelocityField = Callable[[Tensor, Tensor], Tensor]  # of states and one time for all


def time_grid(steps: int, shift: float = 1.0) -> Tensor:
    """Times from 0 to 1, spent mostly near noise for a shift below 1 and near data above.

    `t' = s·t / (1 + (s − 1)·t)` of evenly spaced t (Esser et al. 2024, arXiv 2403.03206, eq. 23, in this project's
    direction of time).

    Args:
        steps: Points of the grid, so one more than there are intervals.
        shift: The shift s; 1 leaves the grid even, LightningDiT takes 0.3.

    Returns:
        float32 `[steps]`.
    """
    t = torch.linspace(0, 1, steps)
    return shift * t / (1 + (shift - 1) * t)


class Sampler(Described, ABC):
    """Integrates a velocity field from noise at t = 0 to data at t = 1."""

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


class GridSampler(Sampler):
    """Base class of samplers on a grid of times.

    Args:
        steps: Number of points on the time grid, both ends included.
        shift: Warps the grid, see `time_grid`.

    Raises:
        ValueError: if an option lies outside its range.
    """

    def __init__(self, steps: int = 250, shift: float = 1.0):
        at_least(2, steps=steps)
        positive(shift=shift)
        self.steps, self.shift = steps, shift

    @property
    def times(self) -> Tensor:
        """The grid, `[steps]`."""
        return time_grid(self.steps, self.shift)


class Euler(GridSampler):
    """Explicit Euler: one evaluation per interval of the grid, error of first order.

    Args:
        steps: Number of points on the time grid, both ends included: one more than there are evaluations.
        shift: Warps the grid, see `time_grid`.
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
        shift: Warps the grid, see `time_grid`.
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


class EulerMaruyama(Sampler):
    """Stochastic sampler of SiT (Ma et al. 2024, arXiv 2401.08740) and REG: the reverse SDE with diffusion 2·(1 − t).

    From noise level τ = 1 − t = 1 in even, noisy steps to the last level, then without noise to 0. The state is kept in
    float64.

    Args:
        steps: Number of evaluations, including the last, noiseless one.
        last: Noise level before the last step, in (0, 1).

    Raises:
        ValueError: if an option lies outside its range.
    """

    def __init__(self, steps: int = 250, last: float = 0.04):
        at_least(2, steps=steps)
        if not 0 < last < 1:
            raise ValueError(f"last: a noise level in (0, 1), given {last}")
        self.steps, self.last = steps, last

    @property
    def times(self) -> Tensor:
        """1 − noise level at the ends of all steps, float64 `[steps + 1]`."""
        levels = torch.linspace(1, self.last, self.steps, dtype=torch.float64)
        return 1 - torch.cat([levels, levels.new_zeros(1)])

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
