"""The decoder: a latent to images at growing resolutions."""

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vfm_vae.compilation import compile_regions
from vfm_vae.description import Described
from vfm_vae.modules.layers import EqualizedLinear, SelfAttentionLayer, UpsampleUnit, activation
from vfm_vae.modules.maps import Blur, GroupNorm, PixelShuffle, PixelUnshuffle, Pointwise
from vfm_vae.modules.modulated import ModulatedConvNeXt, ToRGB
from vfm_vae.options import at_least
from vfm_vae.types import Decoded

# The published decoder is coarse in its first blocks and takes larger kernels after.
COARSE_KERNEL_BLOCKS, COARSE_BLUR_BLOCKS, EXTRA_LAYER_BLOCKS = 2, 3, 4

CHANNELS = (512, 512, 512, 512, 256, 128)  # of the published decoder
Downsampling = Literal["unshuffle", "pooling"]


class Mapping(nn.Module):
    """Pools the latent to the global latent w that styles every modulated layer.

    Args:
        in_channels: Channels of the decoder's input.
        w_channels: Width of w.
        pooled_size: Height and width to which the latent is average-pooled.
    """

    average: Tensor

    def __init__(self, in_channels: int, w_channels: int, pooled_size: int = 1):
        super().__init__()
        pooled = in_channels * pooled_size**2
        self.pooled_size = pooled_size
        self.hidden = EqualizedLinear(pooled, pooled, lr_multiplier=0.01)
        self.out = EqualizedLinear(pooled, w_channels, lr_multiplier=0.01)
        self.register_buffer("average", torch.zeros(w_channels))

    def forward(self, latent: Tensor, truncation: float = 1.0) -> Tensor:
        """Maps `[B, C, h, w]` to `[B, w_channels]`; a `truncation` below 1 moves w towards its average in training."""
        x = F.adaptive_avg_pool2d(latent.float(), self.pooled_size).flatten(1)
        x = x * torch.rsqrt(x.square().mean(dim=1, keepdim=True) + 1e-8)
        w = self.out(F.leaky_relu(self.hidden(x), 0.2)).float()
        if self.training and self.out.weight.requires_grad:  # a frozen decoder keeps its average, too
            mean = w.detach().mean(dim=0)
            mean = torch.where(mean.isfinite(), mean, self.average)  # a step that gets skipped must leave no trace
            self.average.lerp_(mean, 1 - 0.995)
        return w if truncation == 1.0 else self.average.lerp(w, truncation)


class LatentRoute(nn.Sequential):
    """Brings the latent to a block's resolution: unshuffled or pooled for coarse blocks, shuffled for fine ones.

    Args:
        in_channels: Channels of the decoder's input.
        out_channels: Channels handed to the block.
        scale: log2 of the block's input size over the latent's: -2, -1, 0, 1, …
        act: Name of the activation.
        downsampling: How the latent is made coarser: neighbours as additional channels, or their average.
    """

    def __init__(self, in_channels: int, out_channels: int, scale: int, act: str, downsampling: Downsampling):
        shrinking, pooled = 2 ** max(-scale, 0), downsampling == "pooling" and scale < 0
        channels = in_channels if pooled else in_channels * shrinking**2
        widened = out_channels * 4 ** max(scale, 0)
        super().__init__(
            nn.AvgPool2d(shrinking) if pooled else PixelUnshuffle(shrinking),
            nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False),
            Pointwise(channels, widened, bias=False),
            GroupNorm(min(32, widened), widened),
            activation(act),
            PixelShuffle(2 ** max(scale, 0)),
            Pointwise(out_channels, out_channels, bias=False),
            GroupNorm(min(32, out_channels), out_channels),
        )


class DecoderBlock(nn.Module):
    """One resolution: upsampling, modulated ConvNeXt layers, self-attention, and the image of the running feature sum.

    Args:
        index: Position in the decoder, which decides the sizes of kernels and blur.
        in_channels: Channels of the features and of the latent's route together.
        previous_channels: Channels of the block before, None in the first.
        channels: Channels of this block.
        w_channels: Width of the global latent.
        num_layers: Number of modulated ConvNeXt layers.
        attention_depth: Number of self-attention layers.
        attention_heads: Number of heads in each.
        attention_widening: Hidden width of their feed-forward layers, in multiples of the channels.
        blur: Whether upsampling ends with a blur.
        noise_side: Side of the legacy noise maps, or None.
        activation_checkpointing: Whether ConvNeXt layers are computed again in the backward pass.
    """

    def __init__(
        self,
        index: int,
        in_channels: int,
        previous_channels: int | None,
        channels: int,
        w_channels: int,
        num_layers: int,
        attention_depth: int,
        attention_heads: int,
        attention_widening: int,
        blur: bool,
        noise_side: int | None,
        activation_checkpointing: bool = False,
    ):
        super().__init__()
        taps = ((1, 2, 1) if index < COARSE_BLUR_BLOCKS else (1, 4, 6, 4, 1)) if blur else None
        kernel = 5 if index < COARSE_KERNEL_BLOCKS else 7
        self.upsample = UpsampleUnit(in_channels, channels, taps, norm_first=previous_channels is not None)
        self.upsample_sum = None if previous_channels is None else UpsampleUnit(previous_channels, channels, taps)
        self.layers = nn.ModuleList(
            ModulatedConvNeXt(channels, w_channels, kernel, noise_side, recompute=activation_checkpointing)
            for _ in range(num_layers)
        )
        self.attention = nn.Sequential(
            *(SelfAttentionLayer(channels, attention_heads, attention_widening) for _ in range(attention_depth))
        )
        self.to_rgb = ToRGB(channels, w_channels)

    def forward(self, x: Tensor, feature_sum: Tensor | None, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Doubles the resolution.

        Args:
            x: Features and latent route, `[B, C_in, H, W]`.
            feature_sum: Running sum of the earlier blocks' features, `[B, C_previous, H, W]`; None in the first block.
            w: Global latent, `[B, w_channels]`.

        Returns:
            Features `[B, C, 2H, 2W]`, their running sum, and the image computed from it, `[B, 3, 2H, 2W]`.
        """
        x = self.upsample(x)
        for layer in self.layers:
            x = layer(x, w)
        x = self.attention(x)
        feature_sum = x if self.upsample_sum is None else self.upsample_sum(feature_sum) + x
        return x, feature_sum, self.to_rgb(feature_sum, w)


class Decoder(nn.Module, Described):
    """Decodes a latent by multi-scale fusion and progressive resolution (VFM-VAE, section 3.3).

    Every block doubles the resolution. The first of n blocks starts at `compression / 2^n` times the latent's height
    and width, so the last one ends at `compression` times them.

    Args:
        in_channels: Channels of the latent as the adapter hands it over, after widening; null for 512 or, in a config,
            for the adapter's `decoded_channels`.
        channels: Channels of every block, coarse to fine; as many as there are blocks.
        route_channels: Channels in which the first blocks get the latent; it is the first block's only input.
        attention_depths: Number of self-attention layers in the first blocks.
        num_res_blocks: Every block has `1 + 2 · num_res_blocks` ConvNeXt layers.
        extra_low_res_layers: Whether the first four blocks have `1 + 3 · num_res_blocks` layers instead.
        w_channels: Width of the global latent w, which styles the layers.
        pooled_size: Height and width to which the latent is average-pooled to compute w.
        attention_heads: Number of heads in the self-attention layers.
        attention_widening: Hidden width of their feed-forward layers, in multiples of the channels.
        route_activation: Activation in the latent's routes: `lrelu`, `silu` or `gelu`.
        blur: Whether upsampling ends with a blur.
        legacy_noise: Whether ConvNeXt layers add the fixed noise maps of the published 256 px weights.
        channels_last: Whether memory is laid out with channels last, which halves the time of pointwise and depthwise
            convolutions on a CPU.
        activation_checkpointing: Whether to compute ConvNeXt layers again in the backward pass, to save memory.
        compression: Image height over latent height, a power of two. The default for n blocks is 2^(n - 2), so that
            the first block starts at a quarter of the latent's height and width.
        route_downsampling: How blocks that are coarser than the latent get it: by pixel-unshuffle (`unshuffle`) or by
            averaging (`pooling`).

    Raises:
        ValueError: if a number lies outside its range, or options do not fit each other.
    """

    def __init__(
        self,
        in_channels: int | None = None,
        channels: Sequence[int] = CHANNELS,
        route_channels: Sequence[int] = (512, 256, 128, 128),
        attention_depths: Sequence[int] = (2, 2, 2),
        num_res_blocks: int = 2,
        extra_low_res_layers: bool = True,
        w_channels: int = 512,
        pooled_size: int = 1,
        attention_heads: int = 8,
        attention_widening: int = 4,
        route_activation: str = "lrelu",
        blur: bool = True,
        legacy_noise: bool = False,
        channels_last: bool = True,
        activation_checkpointing: bool = False,
        compression: int | None = None,
        route_downsampling: Downsampling = "unshuffle",
    ):
        super().__init__()
        in_channels = 512 if in_channels is None else in_channels
        at_least(1, in_channels=in_channels, channels=channels, route_channels=route_channels)
        at_least(1, w_channels=w_channels, pooled_size=pooled_size, compression=compression)
        at_least(1, attention_heads=attention_heads, attention_widening=attention_widening)
        at_least(0, attention_depths=attention_depths, num_res_blocks=num_res_blocks)
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        num_blocks = len(channels)
        self.first_scale = _first_scale(num_blocks, compression)
        if not 1 <= len(route_channels) <= num_blocks or len(attention_depths) > num_blocks:
            raise ValueError(
                f"route_channels (1 to {num_blocks} entries) and attention_depths (up to {num_blocks}) belong to the "
                f"first of {num_blocks} blocks, but have {len(route_channels)} and {len(attention_depths)} entries"
            )
        if bad := [c for c in channels if c % 4]:
            raise ValueError(f"channels must divide by 4, these do not: {bad}")
        if route_downsampling not in get_args(Downsampling):
            raise ValueError(f"route_downsampling: choose 'unshuffle' or 'pooling', given {route_downsampling!r}")
        routes = [*route_channels, *[0] * (num_blocks - len(route_channels))]
        depths = [*attention_depths, *[0] * (num_blocks - len(attention_depths))]
        self.mapping = Mapping(in_channels, w_channels, pooled_size)
        self.routes = nn.ModuleList(
            LatentRoute(in_channels, c, self.first_scale + i, route_activation, route_downsampling)
            for i, c in enumerate(route_channels)
        )
        self.blocks = nn.ModuleList()
        for i in range(num_blocks):
            previous = channels[i - 1] if i else None
            groups = 3 if extra_low_res_layers and i < EXTRA_LAYER_BLOCKS else 2
            self.blocks.append(
                DecoderBlock(
                    index=i,
                    in_channels=(previous or 0) + routes[i],
                    previous_channels=previous,
                    channels=channels[i],
                    w_channels=w_channels,
                    num_layers=1 + num_res_blocks * groups,
                    attention_depth=depths[i],
                    attention_heads=attention_heads,
                    attention_widening=attention_widening,
                    blur=blur,
                    noise_side=8 * 2**i if legacy_noise else None,
                    activation_checkpointing=activation_checkpointing,
                )
            )

    @staticmethod
    def upscaling_of(channels: Sequence[int] = CHANNELS, compression: int | None = None, **_: Any) -> int:
        """The `upscaling` of a decoder with these options."""
        return compression or 2 ** (len(channels) - 2)

    def compile_regions(self) -> None:
        """Compiles layer by layer; one compilation serves latents of any size, and all layers that are alike."""
        methods = {GroupNorm: "normalise", PixelShuffle: "on_pixels", Blur: "on_pixels"}
        for kind, method in (methods | {SelfAttentionLayer: "on_tokens"}).items():
            compile_regions((module for module in self.modules() if isinstance(module, kind)), method, dynamic=True)
        layers = [module for module in self.modules() if isinstance(module, ModulatedConvNeXt)]
        compile_regions(layers, "modulation", dynamic=True)
        for layer in layers:
            layer.compiled = True

    @property
    def upscaling(self) -> int:
        """Image height over latent height, rounded down: 0 for a single block."""
        return 2 ** len(self.blocks) // self.side_multiple

    @property
    def side_multiple(self) -> int:
        """The latent's height and width must be multiples of this: how much coarser the first block is."""
        return 2**-self.first_scale

    def forward(self, latent: Tensor, truncation: float = 1.0) -> Decoded:
        """Decodes latents to images.

        Args:
            latent: The latent as the adapter widened it, `[B, C, h, w]`; h and w are multiples of `side_multiple`.
            truncation: ψ in `w̄ + ψ(w - w̄)`, w̄ being the average of w in training.

        Returns:
            The image `[B, 3, h·f, w·f]` with f = `upscaling`, and the earlier blocks' images.

        Raises:
            ValueError: if h or w is no multiple of `side_multiple`.
        """
        height, width = latent.shape[2:]
        if height % self.side_multiple or width % self.side_multiple:
            raise ValueError(f"the latent grid's sides must divide by {self.side_multiple}, got {height}x{width}")
        latent = latent.contiguous(memory_format=self.memory_format)
        w = self.mapping(latent, truncation)
        x, feature_sum, images = None, None, []
        for i, block in enumerate(self.blocks):
            inputs = [] if x is None else [x]
            if i < len(self.routes):
                inputs.append(self.routes[i](latent))
            x, feature_sum, image = block(torch.cat(inputs, dim=1), feature_sum, w)
            images.append(image.float())
        return Decoded(images[-1], tuple(images[:-1]))


def _first_scale(num_blocks: int, compression: int | None) -> int:
    """log2 of the first block's input size over the latent's, at most 0.

    Raises:
        ValueError: if so many blocks can't enlarge a latent by this factor.
    """
    if compression is None:
        return -2
    if compression & (compression - 1) or compression > 2**num_blocks:
        raise ValueError(
            f"compression: {num_blocks} blocks enlarge a latent by a power of two up to {2**num_blocks}, given "
            f"{compression}; choose one of these, or another number of blocks (channels)"
        )
    return compression.bit_length() - 1 - num_blocks
