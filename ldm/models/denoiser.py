"""What the training module, guidance and samplers ask of a network."""

from abc import ABC, abstractmethod

from torch import Tensor, nn


class Denoiser(nn.Module, ABC):
    """Predicts the velocity of noisy latents.

    Args:
        in_channels: Channels C of the latent.
        input_size: Sides (h, w) of the latent, or one number for a square.
        num_classes: Labels; one more, `null_label`, stands for no label.
    """

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

    @abstractmethod
    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Velocity `[B, C, h, w]` of `x: [B, C, h, w]` at times `t: [B]` in [0, 1] for labels `y`, int64 `[B]`."""
