"""Layers of the decoder."""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vfm_vae.modules.maps import Blur, GroupNorm, PixelShuffle, Pointwise, as_map, as_pixels

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "lrelu": lambda: nn.LeakyReLU(0.2),
    "silu": nn.SiLU,
    "gelu": nn.GELU,
}


def activation(name: str) -> nn.Module:
    """An activation by its name in a config.

    Raises:
        ValueError: for a name that is not in `ACTIVATIONS`.
    """
    if name not in ACTIVATIONS:
        raise ValueError(f"activation '{name}' is unknown: choose one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]()


class EqualizedLinear(nn.Module):
    """Linear layer with an equalised learning rate (Karras et al. 2018, section 4.1).

    The weight is stored as N(0, 1) / m and used as `W · m / √in`, the bias as `m · b`, m being the multiplier.

    Args:
        in_features: Width of the input.
        out_features: Width of the output.
        lr_multiplier: Factor m on the layer's learning rate.
        bias_init: Initial value of the effective bias.
    """

    def __init__(self, in_features: int, out_features: int, lr_multiplier: float = 1.0, bias_init: float = 0.0):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_features, in_features) / lr_multiplier)
        self.bias = nn.Parameter(torch.full([out_features], bias_init / lr_multiplier))
        self.weight_gain = lr_multiplier / math.sqrt(in_features)
        self.bias_gain = lr_multiplier

    def forward(self, x: Tensor) -> Tensor:
        """Maps `[B, in]` to `[B, out]`."""
        return F.linear(x, self.weight * self.weight_gain, self.bias * self.bias_gain)


class UpsampleUnit(nn.Module):
    """Doubles the sides: GroupNorm, depthwise 3x3, pointwise, pixel-shuffle, blur.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        taps: Kernel of the blur that follows, or None for no blur.
        norm_first: Whether the norm comes first; otherwise it stands between shuffle and blur.
    """

    def __init__(self, in_channels: int, out_channels: int, taps: Sequence[int] | None, norm_first: bool = True):
        super().__init__()
        norm_channels = in_channels if norm_first else out_channels
        self.norm_first = norm_first
        self.norm = GroupNorm(min(32, norm_channels // 4), norm_channels)
        self.depthwise = nn.Conv2d(in_channels, in_channels, 3, padding=1, groups=in_channels, bias=False)
        self.pointwise = Pointwise(in_channels, 4 * out_channels, bias=False)
        self.shuffle = PixelShuffle(2)
        self.blur = Blur(taps) if taps is not None else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Maps `[B, C_in, H, W]` to `[B, C_out, 2H, 2W]`."""
        if self.norm_first:
            x = self.norm(x)
        x = self.shuffle(self.pointwise(self.depthwise(x)))  # [B, C_out, 2H, 2W]
        return self.blur(x if self.norm_first else self.norm(x))


class ChannelRMSNorm(nn.Module):
    """Divides by the root mean square over channels and scales each by a gain (Zhang & Sennrich 2019)."""

    def __init__(self, channels: int):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(channels))
        self.scale = math.sqrt(channels)

    def forward(self, x: Tensor) -> Tensor:
        """Normalises `[..., C]`."""
        return F.normalize(x, dim=-1) * (self.scale * self.gain)


class SelfAttentionLayer(nn.Module):
    """Self-attention with a learned null token, then a feed-forward layer; both residual, and zero at the start.

    It works on tokens rather than maps: queries, keys and values are then contiguous in their last dimension, which
    makes scaled dot-product attention on a CPU several times faster.

    Args:
        channels: Channels of the map.
        num_heads: Attention heads; must divide the channels.
        widening: Hidden width of the feed-forward layer, in multiples of the channels.

    Raises:
        ValueError: if the heads do not divide the channels.
    """

    def __init__(self, channels: int, num_heads: int = 8, widening: int = 4):
        super().__init__()
        if channels % num_heads:
            raise ValueError(f"attention_heads={num_heads} does not divide the {channels} channels of its block")
        self.num_heads = num_heads
        self.norm = ChannelRMSNorm(channels)
        self.qkv = nn.Linear(channels, 3 * channels, bias=False)
        self.null_kv = nn.Parameter(0.02 * torch.randn(2, num_heads, channels // num_heads))
        self.out = nn.Linear(channels, channels, bias=False)
        expand, contract = nn.Linear(channels, widening * channels), nn.Linear(widening * channels, channels)
        self.feed_forward = nn.Sequential(ChannelRMSNorm(channels), expand, nn.GELU(), contract)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(contract.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Maps `[B, C, H, W]` to the same shape."""
        return as_map(self.on_tokens(as_pixels(x)), x.shape[2:])

    def on_tokens(self, tokens: Tensor) -> Tensor:
        """Maps `[B, N, C]` to the same shape."""
        tokens = tokens + self.attend(self.norm(tokens))
        return tokens + self.feed_forward(tokens)

    def attend(self, tokens: Tensor) -> Tensor:
        """Attention over `[B, N, C]` and the null token, whose key and value come first."""
        batch = len(tokens)
        qkv = self.qkv(tokens).unflatten(-1, (3, self.num_heads, -1))  # [B, N, 3, heads, d]
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # each [B, heads, N, d]
        null_key, null_value = self.null_kv.to(qkv.dtype)[:, None, :, None].expand(-1, batch, -1, -1, -1)
        key = torch.cat([null_key, key], dim=2)  # [B, heads, 1 + N, d]
        value = torch.cat([null_value, value], dim=2)
        out = F.scaled_dot_product_attention(query, key, value)
        return self.out(out.transpose(1, 2).flatten(2))
