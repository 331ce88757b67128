"""What the training module, guidance and samplers ask of a network."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn


class Denoiser(nn.Module, ABC):
    """Predicts the velocity of noisy latents.

    Args:
        in_channels: Channels C of the latent.
        input_size: Sides (h, w) of the latent, or one number for a square.
        num_classes: Labels; one more, `null_label`, stands for no label.

    Attributes:
        blocks: The transformer's blocks, each from tokens to tokens `[B, prefix + N, D]`; subclasses make them.
        num_prefix_tokens: Tokens in front of those of patches.
        cls_channels: Width of a class token that is diffused along with the latent; 0 where there is none.
    """

    blocks: nn.ModuleList
    num_prefix_tokens = 0
    cls_channels = 0

    def __init__(self, in_channels: int, input_size: int | tuple[int, int], num_classes: int):
        super().__init__()
        self.in_channels = in_channels
        self.input_size = (input_size, input_size) if isinstance(input_size, int) else tuple(input_size)
        self.num_classes = num_classes

    @property
    def null_label(self) -> int:
        """The label that stands for no label."""
        return self.num_classes

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w)."""
        return self.in_channels, *self.input_size

    @property
    def state_shape(self) -> tuple[int, ...]:
        """Of what a sampler integrates: the latent's, or where a class token goes along (C · h · w + cls_channels,)."""
        return self.latent_shape

    @abstractmethod
    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Velocity `[B, C, h, w]` of `x: [B, C, h, w]` at times `t: [B]` in [0, 1] for labels `y`, int64 `[B]`."""

    def velocity(self, state: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Velocity of what a sampler integrates, `[B, …]` like `state`; other arguments as of `forward`."""
        return self(state, t, y)

    def latents_of(self, state: Tensor) -> Tensor:
        """The latents `[B, C, h, w]` in what a sampler integrates."""
        return state

    @torch.no_grad()
    def block_features(self, x: Tensor, t: Tensor, y: Tensor) -> list[Tensor]:
        """Patch tokens after every block, averaged, float32 `[B, D]` each; arguments as of `forward`."""
        features: list[Tensor] = []

        def keep(block: nn.Module, args: tuple[Tensor, ...], tokens: Tensor) -> None:
            features.append(tokens[:, self.num_prefix_tokens :].float().mean(1))

        hooks = [block.register_forward_hook(keep) for block in self.blocks]
        try:
            self.forward(x, t, y)  # not a compiled form, which may not know of hooks
        finally:
            for hook in hooks:
                hook.remove()
        return features
