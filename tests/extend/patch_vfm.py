"""A vision foundation model that is none of timm's, in one file: random patches, and a random layer behind them."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vfm_vae.frozen import sha256_of
from vfm_vae.images import Interpolation
from vfm_vae.types import VFMFeatures, VFMShape


class PatchVFM(nn.Module):
    """Tokens of 8x8 pixels; layer 0 is twice as wide as layer 1, which is the final one.

    Args:
        width: of the final tokens.
        layers: those wanted.
        seed: of the weights, which are buffers that no checkpoint holds: so nothing trains or saves them.
    """

    stride = 8.0
    target_interpolation: Interpolation = "bilinear"

    def __init__(self, width: int, layers: Sequence[int] = (1,), seed: int = 0) -> None:
        super().__init__()
        self.width, self.layers, self.seed = width, tuple(layers), seed
        self.name = f"patches{width}"
        self.widths = self.shape_of(width, layers).widths
        generator = torch.Generator().manual_seed(seed)
        for name, shape in {"first": (3 * 64, 2 * width), "second": (2 * width, width)}.items():
            weight = torch.randn(shape, generator=generator) / shape[0] ** 0.5
            self.register_buffer(name, weight, persistent=False)

    @classmethod
    def shape_of(cls, width: int, layers: Sequence[int] = (1,), seed: int = 0) -> VFMShape:
        widths = tuple(2 * width if layer == 0 else width for layer in layers)
        return VFMShape(width, widths, cls.stride, cls.target_interpolation)

    def forward(self, images: Tensor) -> VFMFeatures:
        with torch.no_grad():
            return self.differentiable(images)

    def differentiable(self, images: Tensor) -> VFMFeatures:
        with torch.autocast(images.device.type, enabled=False):
            patches = nn.functional.unfold(images.float(), 8, stride=8).mT  # [B, N, 3 * 64]
            first = (patches @ self.first).tanh()
            second = (first @ self.second).tanh()
        layers = tuple((first, second)[layer] for layer in self.layers)
        return VFMFeatures(layers, second, second.mean(1), self.grid(*images.shape[2:]))

    def grid(self, height: int, width: int) -> tuple[int, int]:
        if height % 8 or width % 8:
            raise ValueError(f"images: {self.name} takes sides that 8 divides, given {height}x{width}")
        return height // 8, width // 8

    def fingerprint(self) -> str:
        return sha256_of(dict(self.named_buffers()))

    def source(self) -> dict[str, Any]:
        arguments = {"width": self.width, "layers": list(self.layers), "seed": self.seed}
        named = {"class_path": f"{__name__}.PatchVFM", "name": self.name, "fingerprint": self.fingerprint()}
        return arguments | named

    def view(self) -> dict[str, Any]:
        return {}

    def compile_regions(self) -> None:
        pass

    def hold_products_in(self, dtype: torch.dtype) -> None:
        pass

    def go_on_as(self, stored: Mapping[str, Any], option: str) -> None:
        pass
