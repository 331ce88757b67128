"""Adversarial losses on the logits of a discriminator.

Logits come as one tensor of any shape, or as a sequence of them (one per scale): the loss is then the mean over the
sequence of each tensor's mean.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

Logits = Tensor | Sequence[Tensor]


def hinge_discriminator_loss(real: Logits, generated: Logits) -> tuple[Tensor, Tensor]:
    """Hinge loss of the discriminator (Lim & Ye, 2017), as its two terms: their sum is minimised.

    Returns:
        `mean relu(1 - real)` and `mean relu(1 + generated)`, float32 scalars.
    """
    return _mean(real, lambda logits: F.relu(1 - logits)), _mean(generated, lambda logits: F.relu(1 + logits))


def hinge_generator_loss(generated: Logits) -> Tensor:
    """The generator's side of the hinge loss: `-mean generated`, a float32 scalar."""
    return _mean(generated, torch.neg)


def _mean(logits: Logits, loss: Callable[[Tensor], Tensor]) -> Tensor:
    tensors = [logits] if isinstance(logits, Tensor) else logits
    return torch.stack([loss(tensor.float()).mean() for tensor in tensors]).mean()
