"""A denoiser in one file: an MLP-mixer that is told a class, or two numbers."""

import torch
from torch import Tensor, nn

from ldm.condition import Condition, labels_of
from ldm.models.denoiser import Denoiser, Prediction


class MixerBlock(nn.Module):
    """Mixes tokens, then channels."""

    def __init__(self, num_tokens: int, width: int) -> None:
        super().__init__()
        self.tokens = nn.Linear(num_tokens, num_tokens)
        self.channels = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.tokens(x.mT).mT
        return x + self.channels(x)


class Mixer(Denoiser):
    """A token for each position of the latent.

    Args:
        in_channels: channels of the latent.
        input_size: its side.
        num_classes: number of classes; null for `brightness.Brightness`.
        depth: number of blocks.
        width: width of the tokens.
    """

    def __init__(
        self, in_channels: int, input_size: int, num_classes: int | None = None, depth: int = 2, width: int = 16
    ) -> None:
        super().__init__(in_channels, input_size, num_classes)
        self.enter = nn.Linear(in_channels, width)
        self.time = nn.Linear(1, width)
        self.told = nn.Linear(2, width) if num_classes is None else nn.Embedding(num_classes + 1, width)
        self.blocks = nn.ModuleList(MixerBlock(input_size**2, width) for _ in range(depth))
        self.leave = nn.Linear(width, in_channels)

    def forward(self, state: Tensor, t: Tensor, condition: Condition, align: bool = False) -> Prediction:
        told = labels_of(condition) if self.num_classes else torch.stack([condition.values, condition.known], dim=1)
        tokens = self.enter(state.flatten(2).mT) + (self.time(t[:, None]) + self.told(told))[:, None]
        for block in self.blocks:
            tokens = block(tokens)
        return Prediction(self.leave(tokens).mT.unflatten(2, self.input_size))
