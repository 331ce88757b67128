"""Adversarial losses on the logits of a discriminator, and feature matching on its features.

Logits come as one tensor of any shape, or as a sequence of them (one per scale): the loss is then the mean over the
sequence of each tensor's mean.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

Logits = Tensor | Sequence[Tensor]


def hinge_discriminator_loss(real: Logits, generated: Logits) -> tuple[Tensor, Tensor]:
    """Hinge loss of the discriminator (Lim & Ye, 2017), as two terms whose sum is minimised.

    Returns:
        `mean relu(1 - real)` and `mean relu(1 + generated)`, float32 scalars.
    """
    return _mean(real, lambda logits: F.relu(1 - logits)), _mean(generated, lambda logits: F.relu(1 + logits))


def hinge_generator_loss(generated: Logits) -> Tensor:
    """The generator's side of the hinge loss: `-mean generated`, a float32 scalar."""
    return _mean(generated, torch.neg)


def least_squares_discriminator_loss(real: Logits, generated: Logits) -> tuple[Tensor, Tensor]:
    """Least-squares loss of the discriminator (LSGAN, arXiv 1611.04076, equation 2 with a = 0 and b = 1), as two terms.

    Unlike in the paper, neither term is halved.

    Returns:
        `mean (real - 1)²` and `mean generated²`, float32 scalars whose sum is minimised.
    """
    return _mean(real, lambda logits: (logits - 1).square()), _mean(generated, torch.square)


def least_squares_generator_loss(generated: Logits) -> Tensor:
    """The generator's side of the least-squares loss: `mean (generated - 1)²`, a float32 scalar, not halved either."""
    return _mean(generated, lambda logits: (logits - 1).square())


def feature_matching_loss(real: Sequence[Sequence[Tensor]], generated: Sequence[Sequence[Tensor]]) -> Tensor:
    """L1 between a discriminator's features of real and of generated images (pix2pixHD, arXiv 1711.11585, section 3.2).

    The generator minimises `1/scales · Σ 4/(outputs - 1) · mean |real - generated|`, the sum running over scales and
    layers. With five outputs per scale the factor 4/4 leaves the sum over layers as it is.

    Args:
        real: For each scale, the outputs of all layers for real images. The last, the logits, is not compared. They
            receive no gradient.
        generated: The same for as many generated images.

    Returns:
        A float32 scalar.
    """
    per_scale = []
    for real_outputs, generated_outputs in zip(real, generated, strict=True):
        *real_features, _ = real_outputs
        *features, _ = generated_outputs
        distances = [
            F.l1_loss(ours.float(), target.detach().float())
            for ours, target in zip(features, real_features, strict=True)
        ]
        per_scale.append(4 / len(features) * torch.stack(distances).sum())
    return torch.stack(per_scale).mean()


def _mean(logits: Logits, loss: Callable[[Tensor], Tensor]) -> Tensor:
    tensors = [logits] if isinstance(logits, Tensor) else logits
    return torch.stack([loss(tensor.float()).mean() for tensor in tensors]).mean()
