"""The judge: a small convolutional network that measures and that nothing is trained with.

A Fréchet distance on features of the very VFM that a tokenizer is aligned to favours that tokenizer. The judge is a
network of another kind, trained on another task (`vfm_vae.embedded.train_judge`), whose features no loss ever asks for.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vfm_vae.checkpoints import fill, read_weights
from vfm_vae.contracts import VFM
from vfm_vae.description import class_path
from vfm_vae.frozen import Frozen
from vfm_vae.images import Interpolation
from vfm_vae.types import VFMFeatures, VFMShape

WEIGHTS = Path(__file__).with_name("judge_photos.safetensors")
WIDTH, STRIDE = 96, 8


def convolution(in_channels: int, out_channels: int, size: int = 3, stride: int = 1) -> nn.Sequential:
    """A convolution and its batch norm; what it returns is `stride` times smaller."""
    layer = nn.Conv2d(in_channels, out_channels, size, stride, padding=size // 2, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(out_channels))


class Residual(nn.Module):
    """Two convolutions beside a skip connection (He et al., "Deep residual learning", 2016).

    Args:
        channels: Channels of the map, which keeps its size.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = convolution(channels, channels)
        self.second = convolution(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Maps `[B, channels, h, w]` to the same shape."""
        return (x + self.second(self.first(x).relu())).relu()


def judge_network() -> nn.Sequential:
    """The network, of 0.26 M parameters: images `[B, 3, H, W]` in [-1, 1] to features `[B, 96, H/8, W/8]`."""
    return nn.Sequential(
        convolution(3, 24, size=5, stride=2),
        nn.ReLU(),
        convolution(24, 48, stride=2),
        nn.ReLU(),
        Residual(48),
        convolution(48, WIDTH, stride=2),
        nn.ReLU(),
        Residual(WIDTH),
    )


class Judge(Frozen, VFM):
    """A convolutional network for 64 px images that only measures; its weights come with the package.

    Callbacks take it as any other VFM: `network: Judge` makes DistributionCallback log `val/fd_judge_photos`. Tokens
    are the positions of its last feature map, eight pixels apart, and their mean is the pooled feature. It was trained
    on crops of 64 px and takes other sizes as they are, without resizing them. It always computes in float32.

    Args:
        weights: Safetensors file to read instead of the weights that come with the package.

    Raises:
        ValueError: if there is no such file, or it holds another network.
    """

    name = "judge_photos"
    layers = (-1,)
    width = WIDTH
    widths = (WIDTH,)
    stride = float(STRIDE)
    target_interpolation: Interpolation = "bilinear"

    def __init__(self, weights: str | None = None) -> None:
        with torch.device("meta"):  # initial values would draw random numbers
            network = judge_network()
        network.to_empty(device="cpu")
        file = WEIGHTS if weights is None else weights
        fill(network, read_weights(file, "weights"), f"weights: {str(file)!r} is no judge's")
        super().__init__(network)
        self.weights = weights

    @classmethod
    def shape_of(cls, **_: Any) -> VFMShape:
        """What others derive their options from; it is the same whatever the arguments."""
        return VFMShape(cls.width, cls.widths, cls.stride, cls.target_interpolation)

    @torch.no_grad()
    def forward(self, images: Tensor) -> VFMFeatures:
        """Features of `images: [B, 3, H, W] in [-1, 1]`, without gradients."""
        grid = self.grid(*images.shape[-2:])
        with torch.autocast(images.device.type, enabled=False):
            tokens = self.network(images.float()).flatten(2).mT  # [B, N, C]
        return VFMFeatures((tokens,), tokens, tokens.mean(1), grid)

    def differentiable(self, images: Tensor) -> VFMFeatures:
        """Raises a ValueError: a judge that a loss has asked for its features is none."""
        raise ValueError(f"{self.name} only measures, so no loss can have its gradients; give the loss another VFM")

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the tokens of images `[B, 3, height, width]`; ValueError if this size does not fit."""
        if min(height, width) < STRIDE or height % STRIDE or width % STRIDE:
            raise ValueError(
                f"images: {self.name} takes sides that are multiples of {STRIDE} pixels, given {height}x{width}"
            )
        return height // STRIDE, width // STRIDE

    def compile_regions(self) -> None:
        """Compiles nothing: it is small."""

    def hold_products_in(self, dtype: torch.dtype) -> None:
        """Keeps the weights in float32, in which it computes."""

    def go_on_as(self, stored: Mapping[str, Any], option: str) -> None:
        """Changes nothing: there is one way in which it computes."""

    def source(self) -> dict[str, Any]:
        """What it takes to have this judge again."""
        told = {"class_path": class_path(type(self)), "name": self.name, "layers": list(self.layers)}
        return told | {"weights": self.weights, "fingerprint": self.fingerprint()}
