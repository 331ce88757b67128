"""Style-modulated pointwise convolutions, in the form that is cheapest for the size at hand."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vfm_vae.modules.layers import EqualizedLinear


def modulate_activations(x: Tensor, weight: Tensor, style: Tensor, demodulation: Tensor, bias: Tensor) -> Tensor:
    """`y_o = d_o Σ_i W_oi s_i x_i + b_o` as one shared convolution between scalings of its input and of its output."""
    y = F.conv2d(x * style[:, :, None, None].to(x.dtype), weight[:, :, None, None])
    return torch.addcmul(bias[:, None, None].to(y.dtype), y, demodulation[:, :, None, None].to(y.dtype))


def modulate_weights(x: Tensor, weight: Tensor, style: Tensor, demodulation: Tensor, bias: Tensor) -> Tensor:
    """The same with one matrix per sample: a batched product on accelerators, a convolution per sample on CPU."""
    weights = weight * style.unsqueeze(1) * demodulation.unsqueeze(2)  # [B, O, I]
    if x.device.type == "cpu":  # batched products are the slower library call there
        samples = zip(x.split(1), weights[..., None, None], strict=True)
        return torch.cat([F.conv2d(sample, matrix, bias) for sample, matrix in samples])
    pixels = x.permute(0, 2, 3, 1).flatten(1, 2)  # [B, HW, I], a view where x is channels-last
    y = torch.baddbmm(bias.to(x.dtype), pixels, weights.mT.to(x.dtype))
    return y.unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)


def modulated_pointwise(x: Tensor, weight: Tensor, style: Tensor, bias: Tensor, demodulate: bool = True) -> Tensor:
    """Modulated 1x1 convolution (Karras et al. 2020, equations 1 and 3), in the cheaper of two forms.

    Scaling activations costs passes over `(I + O) · HW` numbers of a sample; scaling weights costs `O · I`, and gives
    up the one large product over the batch. `make bench` compares them.

    Args:
        x: Features, `[B, I, H, W]`.
        weight: Shared weight, `[O, I]`.
        style: Scale of every input channel, `[B, I]`.
        bias: Added to every output channel, `[O]`.
        demodulate: Whether every output channel is brought to unit expected variance.

    Returns:
        `[B, O, H, W]`.
    """
    if demodulate:
        demodulation = torch.rsqrt(style.square() @ weight.square().t() + 1e-8)  # [B, O]
    else:
        demodulation = style.new_ones(len(style), len(weight))
    few_pixels = x.shape[2] * x.shape[3] < 2 * x.shape[1]
    return (modulate_activations if few_pixels else modulate_weights)(x, weight, style, demodulation, bias)


class Style(nn.Module):
    """The style of a modulated layer: three affine maps a, b, c of w, combined as `a · b + c`.

    Args:
        w_channels: Width of the global latent w.
        channels: Channels to be scaled.
    """

    def __init__(self, w_channels: int, channels: int):
        super().__init__()
        self.affine = EqualizedLinear(w_channels, 3 * channels, bias_init=1.0)

    def forward(self, w: Tensor) -> Tensor:
        """Maps `[B, w_channels]` to `[B, channels]`."""
        a, b, c = self.affine(w).chunk(3, dim=1)
        return a * b + c


class NoiseMap(nn.Module):
    """A fixed map of noise, times a learned strength; only older published weights have it.

    Args:
        side: Sides of the stored map, which is resized to the features.
    """

    def __init__(self, side: int):
        super().__init__()
        self.register_buffer("map", torch.randn(side, side))
        self.strength = nn.Parameter(torch.zeros([]))

    def forward(self, x: Tensor) -> Tensor:
        """Adds the noise to `[B, C, H, W]`."""
        noise = F.interpolate(self.map[None, None], size=x.shape[2:], mode="bilinear", align_corners=False)
        return x + (noise * self.strength).to(x.dtype)


class ModulatedConvNeXt(nn.Module):
    """ConvNeXt layer whose first pointwise convolution is modulated by the global latent.

    Args:
        channels: Channels of the map.
        w_channels: Width of the global latent w.
        kernel: Sides of the depthwise convolution.
        noise_side: Sides of the noise map, or None for no noise.
    """

    def __init__(self, channels: int, w_channels: int, kernel: int, noise_side: int | None = None):
        super().__init__()
        self.style = Style(w_channels, channels)
        self.depthwise = nn.Conv2d(channels, channels, kernel, padding=kernel // 2, groups=channels)
        self.noise = NoiseMap(noise_side) if noise_side is not None else nn.Identity()
        self.norm = nn.GroupNorm(min(32, channels // 4), channels)
        self.expand = nn.Parameter(torch.empty(4 * channels, channels))
        self.expand_bias = nn.Parameter(torch.zeros(4 * channels))
        self.contract = nn.Conv2d(4 * channels, channels, 1)
        self.layer_scale = nn.Parameter(torch.full([channels, 1, 1], 1e-5))
        for weight in (self.depthwise.weight, self.expand, self.contract.weight):
            nn.init.trunc_normal_(weight, std=0.02)
        nn.init.zeros_(self.depthwise.bias)
        nn.init.zeros_(self.contract.bias)

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        """Maps features `[B, C, H, W]` and global latents `[B, w_channels]` to `[B, C, H, W]`."""
        y = self.norm(self.noise(self.depthwise(x)))
        y = modulated_pointwise(y, self.expand, self.style(w), self.expand_bias)  # [B, 4C, H, W]
        return torch.addcmul(x, self.layer_scale, self.contract(F.gelu(y)))


class ToRGB(nn.Module):
    """Modulated 1x1 convolution to three channels, without demodulation; the style is scaled by 1/√C.

    Args:
        channels: Channels of the map.
        w_channels: Width of the global latent w.
    """

    def __init__(self, channels: int, w_channels: int):
        super().__init__()
        self.style = Style(w_channels, channels)
        self.weight = nn.Parameter(0.1 * torch.randn(3, channels))
        self.bias = nn.Parameter(torch.zeros(3))
        self.gain = 1 / math.sqrt(channels)

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        """Maps features `[B, C, H, W]` and global latents `[B, w_channels]` to an image `[B, 3, H, W]`."""
        return modulated_pointwise(x, self.weight, self.style(w) * self.gain, self.bias, demodulate=False)
