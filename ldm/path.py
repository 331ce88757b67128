"""The flow from noise to data. This is the one place that states the direction of time.

**t = 0 is noise, t = 1 is data.** The path is linear (Lipman et al. 2023, arXiv 2210.02747; Liu et al. 2023, arXiv
2209.03003), and a denoiser predicts its velocity. All tensors of one call share a shape `[B, ...]`, times are `[B]`.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Times = Literal["uniform", "lognormal"]


def interpolate(data: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """`x_t = t · data + (1 − t) · noise`."""
    t = _as_wide_as(data, t)
    return t * data + (1 - t) * noise


def velocity(data: Tensor, noise: Tensor) -> Tensor:
    """`d x_t / dt = data − noise`, what the denoiser is trained to predict."""
    return data - noise


def score(velocity: Tensor, x: Tensor, t: Tensor) -> Tensor:
    """Gradient of the log-density of `x_t`, from the velocity there.

    The noise in `x_t` is expected to be `x − t · velocity`, and the score is that over `−(1 − t)` (Albergo et al. 2023,
    arXiv 2303.08797); at t = 1 it does not exist.
    """
    t = _as_wide_as(x, t)
    return (t * velocity - x) / (1 - t)


def times(distribution: Times, normal: Tensor) -> Tensor:
    """Training times in (0, 1), made of standard normal numbers.

    Args:
        distribution: `lognormal` concentrates on the middle, `t = sigmoid(n)` (Esser et al. 2024, arXiv 2403.03206,
            section 3.1); `uniform` is the normal numbers' distribution function.
        normal: Standard normal numbers of any shape.

    Raises:
        ValueError: for another distribution.
    """
    if distribution == "lognormal":
        return torch.sigmoid(normal)
    if distribution == "uniform":
        return torch.special.ndtr(normal)
    raise ValueError(f"times: 'uniform' or 'lognormal', given {distribution!r}")


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
