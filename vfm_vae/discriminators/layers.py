"""Layers that the discriminators share."""

import math
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vfm_vae.modules.maps import uses_native_kernels


class LocalBatchNorm(nn.Module):
    """Batch norm over small groups of consecutive samples, without running statistics: the same in training and eval.

    Args:
        num_channels: Channels of the input.
        virtual_batch_size: Largest group size; a batch of B makes ⌈B / virtual_batch_size⌉ equal groups.
        eps: Added to the (biased) variance.
    """

    def __init__(self, num_channels: int, virtual_batch_size: int = 8, eps: float = 1e-5) -> None:
        super().__init__()
        self.virtual_batch_size = virtual_batch_size
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(num_channels))
        self.bias = nn.Parameter(torch.zeros(num_channels))

    def forward(self, x: Tensor) -> Tensor:
        """Normalises `x: [B, C, ...]`.

        Raises:
            ValueError: if the batch doesn't divide into equal groups.
        """
        groups = math.ceil(len(x) / self.virtual_batch_size)
        if len(x) % groups:
            raise ValueError(
                f"batch size: {len(x)} doesn't divide into {groups} equal groups of at most {self.virtual_batch_size} "
                f"samples; take a multiple of {self.virtual_batch_size}, or fewer"
            )
        if x.ndim == 4 and not uses_native_kernels(x):  # folding would undo the memory layout
            normalise = partial(F.batch_norm, running_mean=None, running_var=None, training=True, eps=self.eps)
            return torch.cat([normalise(part, weight=self.weight, bias=self.bias) for part in x.chunk(groups)])
        # Groups become channels, so that one fused kernel normalises all.
        folded = x.unflatten(0, (groups, -1)).transpose(0, 1).flatten(1, 2)  # [B/G, G·C, ...]
        weight, bias = self.weight.repeat(groups), self.bias.repeat(groups)
        folded = F.batch_norm(folded, None, None, weight, bias, training=True, eps=self.eps)
        return folded.unflatten(1, (groups, -1)).transpose(0, 1).flatten(0, 1)  # [B, C, ...]
