"""Style-modulated pointwise convolutions, each in the form that is cheapest for its size."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vfm_vae.modules import convnext
from vfm_vae.modules.layers import EqualizedLinear
from vfm_vae.modules.maps import (
    GroupNorm,
    Pointwise,
    compute_precision,
    pointwise,
    uses_native_kernels,
    without_autocast,
)


def modulate_activations(x: Tensor, weight: Tensor, style: Tensor, demodulation: Tensor | None, bias: Tensor) -> Tensor:
    """`y_o = d_o Σ_i W_oi s_i x_i + b_o` as one shared matrix product, whose input and output are scaled."""
    x = x * style[:, :, None, None].to(x.dtype)
    if demodulation is None:
        return pointwise(x, weight, bias)
    y = pointwise(x, weight)
    return torch.addcmul(bias[:, None, None].to(y.dtype), y, demodulation[:, :, None, None].to(y.dtype))


def modulate_weights(x: Tensor, weight: Tensor, style: Tensor, demodulation: Tensor | None, bias: Tensor) -> Tensor:
    """The same as one convolution per sample, each with its own matrix."""
    weights = weight * style.unsqueeze(1)  # [B, O, I]
    weights = weights if demodulation is None else weights * demodulation.unsqueeze(2)
    samples = zip(x.split(1), weights[..., None, None], strict=True)
    return torch.cat([F.conv2d(sample, matrix, bias) for sample, matrix in samples])


def demodulate(weight: Tensor, style: Tensor) -> Tensor:
    """Factors that bring every output channel to unit expected variance (Karras et al. 2020, equation 3), `[B, O]`.

    Args:
        weight: `[O, I]`.
        style: Scale of every input channel, `[B, I]`.
    """
    return torch.rsqrt(style.square() @ weight.square().t() + 1e-8)


def modulated_pointwise(
    x: Tensor, weight: Tensor, style: Tensor, bias: Tensor, demodulation: Tensor | None = None
) -> Tensor:
    """Modulated 1x1 convolution (Karras et al. 2020, equations 1 and 3), in the cheaper of two forms.

    Scaling activations costs passes over `(I + O) · HW` numbers of each sample, which a compiler fuses with what comes
    before and after, and keeps the one large product over the batch. Scaling weights costs `O · I` per sample, which is
    cheaper on a CPU when there are many pixels. `make bench` compares the two.

    Args:
        x: Features, `[B, I, H, W]`.
        weight: Shared weight, `[O, I]`.
        style: Scale of every input channel, `[B, I]`.
        bias: Added to every output channel, `[O]`.
        demodulation: Scale of every output channel, `[B, O]`, if there is one.

    Returns:
        `[B, O, H, W]`.
    """
    few_pixels = x.shape[2] * x.shape[3] < 2 * x.shape[1]
    modulate = modulate_weights if uses_native_kernels(x) and not few_pixels else modulate_activations
    return modulate(x, weight, style, demodulation, bias)


class Style(nn.Module):
    """The style of a modulated layer: three affine maps a, b, c of w, combined as `a · b + c`.

    Args:
        w_channels: Width of the global latent w.
        channels: Number of channels to scale.
    """

    def __init__(self, w_channels: int, channels: int):
        super().__init__()
        self.affine = EqualizedLinear(w_channels, 3 * channels, bias_init=1.0)

    def forward(self, w: Tensor) -> Tensor:
        """Maps `[B, w_channels]` to `[B, channels]`."""
        a, b, c = self.affine(w).chunk(3, dim=1)
        return a * b + c


class NoiseMap(nn.Module):
    """A fixed map of noise times a learned strength, which only older published weights have.

    Args:
        side: Height and width of the stored map, which is resized to the features.
    """

    map: Tensor

    def __init__(self, side: int):
        super().__init__()
        self.register_buffer("map", torch.randn(side, side))
        self.strength = nn.Parameter(torch.zeros([]))

    def forward(self, size: Sequence[int]) -> Tensor:
        """The noise for maps of `size` (rows, columns), `[1, 1, H, W]`."""
        return F.interpolate(self.map[None, None], size=size, mode="bilinear", align_corners=False) * self.strength


class ModulatedConvNeXt(nn.Module):
    """ConvNeXt layer whose first pointwise convolution is modulated by the global latent.

    Args:
        channels: Channels of the map.
        w_channels: Width of the global latent w.
        kernel: Side of the depthwise convolution's kernel.
        noise_side: Side of the noise map, or None for no noise.
        recompute: Whether training keeps only the input and computes everything else again in the backward pass.

    Attributes:
        compiled: Whether the layer's passes are compiled.
    """

    def __init__(
        self, channels: int, w_channels: int, kernel: int, noise_side: int | None = None, recompute: bool = False
    ):
        super().__init__()
        self.recompute, self.compiled = recompute, False
        self.style = Style(w_channels, channels)
        self.depthwise = nn.Conv2d(channels, channels, kernel, padding=kernel // 2, groups=channels)
        self.noise = NoiseMap(noise_side) if noise_side is not None else None
        self.norm = GroupNorm(min(32, channels // 4), channels)
        self.expand = nn.Parameter(torch.empty(4 * channels, channels))
        self.expand_bias = nn.Parameter(torch.zeros(4 * channels))
        self.contract = Pointwise(4 * channels, channels)
        self.layer_scale = nn.Parameter(torch.full([channels, 1, 1], 1e-5))
        for weight in (self.depthwise.weight, self.expand, self.contract.weight):
            nn.init.trunc_normal_(weight, std=0.02)
        for bias in (self.depthwise.bias, self.contract.bias):
            assert bias is not None
            nn.init.zeros_(bias)

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        """Maps features `[B, C, H, W]` and global latents `[B, w_channels]` to `[B, C, H, W]`."""
        noise = None if self.noise is None else self.noise(x.shape[2:])
        style, demodulation = self.modulation(w)
        if self.compiled or self.recompute or not uses_native_kernels(x):
            return self._fused(x, convnext.Condition(style, demodulation), noise)
        y = self.depthwise(x)
        y = self.norm(y if noise is None else y + noise.to(y.dtype))
        y = modulated_pointwise(y, self.expand, style, self.expand_bias, demodulation)  # [B, 4C, H, W]
        return torch.addcmul(x, self.layer_scale, self.contract(F.gelu(y))).to(x.dtype)

    def modulation(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """Style `[B, C]` and demodulation `[B, 4C]` of global latents `[B, w_channels]`."""
        style = self.style(w)
        return style, demodulate(self.expand, style)

    def _fused(self, x: Tensor, condition: convnext.Condition, noise: Tensor | None) -> Tensor:
        """The same as passes over pixels, between which everything but matrix products can be fused."""
        assert self.depthwise.bias is not None and self.contract.bias is not None
        convolution = convnext.Convolution(self.depthwise.weight, self.depthwise.bias, noise)
        weights = convnext.Weights(
            self.norm.weight, self.norm.bias, self.expand, self.expand_bias,
            self.contract.weight, self.contract.bias, self.layer_scale,
        )  # fmt: skip
        shape = convnext.Shape(self.norm.num_groups, self.norm.eps)
        x = x.to(compute_precision(x))
        with without_autocast(x):
            if self.recompute and torch.is_grad_enabled():
                return convnext.Recomputed.apply(shape, self.compiled, x, *condition, *convolution, *weights)
            return convnext.layer(x, condition, convolution, weights, shape, self.compiled)


class ToRGB(nn.Module):
    """Modulated 1x1 convolution to three channels, without demodulation; the style is scaled by 1/√C.

    It computes in the precision of its weights, which training keeps in float32, whether or not autocast is on.

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
        with without_autocast(x):
            if x.dtype == self.weight.dtype:
                return self.image(x, w)
            # A copy in another precision is not kept, but made again in the backward pass.
            return checkpoint(self.image, x, w, use_reentrant=False, preserve_rng_state=False)

    def image(self, x: Tensor, w: Tensor) -> Tensor:
        """What `forward` computes, without regard to autocast."""
        x, w = x.to(self.weight.dtype), w.to(self.weight.dtype)
        return modulated_pointwise(x, self.weight, self.style(w) * self.gain, self.bias)
