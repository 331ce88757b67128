"""The flow from noise to data. This is the one place that states the direction of time.

**t = 0 is noise, t = 1 is data.** The path is linear (Lipman et al. 2023, arXiv 2210.02747; Liu et al. 2023, arXiv
2209.03003), and a denoiser predicts its velocity. All tensors of one call share a shape `[B, ...]`, times are `[B]`.
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from vfm_vae.options import positive

Times = Literal["uniform", "lognormal"]
Shift = float | Literal["auto"] | None

UNSHIFTED_SIZE = 4096  # numbers in a latent that `auto` shifts nothing for: 4x32x32, those of SD-VAE at 256 px
SHORTEST_TIME_LEFT = 0.05  # that predicted data is divided by, on the way to a velocity


def interpolate(data: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """`x_t = t · data + (1 − t) · noise`."""
    t = _as_wide_as(data, t)
    return t * data + (1 - t) * noise


def velocity(data: Tensor, noise: Tensor) -> Tensor:
    """`d x_t / dt = data − noise`, what the denoiser is trained to predict."""
    return data - noise


def velocity_to(data: Tensor, x: Tensor, t: Tensor) -> Tensor:
    """The velocity at `x_t` that leads to given data: `(data − x_t) / max(1 − t, 0.05)`, in float32 at least.

    So a network that predicts data has a velocity (x-prediction; Li & He 2025, JiT, arXiv 2511.13720). Without the
    limit, an error of the data would grow beyond all bounds towards t = 1.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return (data - x) / (1 - _as_wide_as(x, t)).clamp_min(SHORTEST_TIME_LEFT)


def score(velocity: Tensor, x: Tensor, t: Tensor) -> Tensor:
    """Gradient of the log-density of `x_t`, from the velocity there.

    The noise in `x_t` is expected to be `x − t · velocity`, and the score is that over `−(1 − t)` (Albergo et al. 2023,
    arXiv 2303.08797); at t = 1 it does not exist.
    """
    t = _as_wide_as(x, t)
    return (t * velocity - x) / (1 - t)


def times(distribution: Times, normal: Tensor, shift: float | None = None) -> Tensor:
    """Training times in (0, 1), made of standard normal numbers.

    Args:
        distribution: `lognormal` concentrates on the middle, `t = sigmoid(n)` (Esser et al. 2024, arXiv 2403.03206,
            section 3.1); `uniform` is the normal numbers' distribution function.
        normal: Standard normal numbers of any shape.
        shift: Warps the times of either distribution, see `shifted`.

    Raises:
        ValueError: for another distribution.
    """
    if distribution == "lognormal":
        return shifted(torch.sigmoid(normal), shift)
    if distribution == "uniform":
        return shifted(torch.special.ndtr(normal), shift)
    raise ValueError(f"times: 'uniform' or 'lognormal', given {distribution!r}")


def shifted(t: Tensor, shift: float | None) -> Tensor:
    """Times warped by a shift s: `t' = s·t / (1 + (s − 1)·t)`; below 1 they are nearer to noise, above nearer to data.

    This is eq. 23 of Esser et al. 2024 (arXiv 2403.03206) in this project's direction of time. Shifts of noise levels
    `1 − t`, as SD3 and RAE publish them, are the inverse: RAE's 6.93 is 1 / 6.93 here.

    Args:
        t: Times in [0, 1], of any shape.
        shift: The shift, above 0; None and 1 leave times as they are. LightningDiT samples with 0.3.
    """
    return t if shift is None or shift == 1 else shift * t / (1 + (shift - 1) * t)


def check_shift(shift: Shift) -> None:
    """Checks an option `shift`.

    Raises:
        ValueError: if it is neither a number above 0, nor `auto`, nor None.
    """
    if isinstance(shift, str):
        if shift != "auto":
            raise ValueError(f"shift: a number above 0, 'auto' or null, given {shift!r}")
    else:
        positive(shift=shift)


def shift_for(shift: Shift, latent_shape: Sequence[int]) -> float:
    """The number that an option `shift` stands for: `sqrt(4096 / (C·h·w))` in the place of `auto`.

    Large latents keep their signal longer under noise, so they take more time near it (Esser et al. 2024, section
    5.3.2; RAE, arXiv 2510.11690, counts channels, too).

    Args:
        shift: The option.
        latent_shape: The latents' shape `(C, h, w)`, without a class token.
    """
    if isinstance(shift, str):
        return math.sqrt(UNSHIFTED_SIZE / math.prod(latent_shape))
    return 1.0 if shift is None else shift


def squared_error(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error over channels and space of each sample, `[B, C, h, w]` to `[B]`."""
    return (prediction - target).square().flatten(1).mean(1)


def cosine_error(prediction: Tensor, target: Tensor) -> Tensor:
    """One minus the cosine over channels, averaged over space (LightningDiT, arXiv 2501.01423, section 3.4).

    Args:
        prediction: `[B, C, h, w]`.
        target: The same shape.

    Returns:
        `[B]`, in [0, 2].
    """
    return 1 - F.cosine_similarity(prediction, target, dim=1).flatten(1).mean(1)


def _as_wide_as(x: Tensor, t: Tensor) -> Tensor:
    """Times `[B]` with the trailing dimensions of `x`; a scalar, which may be on another device, as it is."""
    return t.reshape(-1, *(1,) * (x.ndim - 1)) if t.ndim else t
