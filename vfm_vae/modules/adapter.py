"""The adapter: narrows VFM tokens to the moments of a small latent, and widens the latent for the decoder."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vfm_vae.description import Described
from vfm_vae.modules.maps import pixel_unshuffle, without_autocast
from vfm_vae.options import at_least

Projection = Literal["attention", "conv"]


class ProjectionAttention(nn.Module):
    """Self-attention that changes the width: heads are averaged when it narrows, concatenated otherwise.

    Args:
        in_channels: Width of the input tokens.
        out_channels: Width of the output tokens.
        num_heads: Attention heads, at width `max(in, out)`.
    """

    def __init__(self, in_channels: int, out_channels: int, num_heads: int):
        super().__init__()
        width = max(in_channels, out_channels)
        self.num_heads = num_heads
        self.average_heads = in_channels > out_channels
        self.qkv = nn.Linear(in_channels, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.proj = nn.Linear(out_channels, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Maps `[B, N, in]` to `[B, N, out]`."""
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        qkv = F.linear(x, self.qkv.weight, bias).unflatten(-1, (3, self.num_heads, -1))
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # each [B, heads, N, d]
        out = F.scaled_dot_product_attention(query, key, value)
        out = out.mean(dim=1) if self.average_heads else out.transpose(1, 2).flatten(2)  # [B, N, out]
        return self.proj(out)


class GEGLU(nn.Module):
    """Gated feed-forward unit `W2(GELU_tanh(W0 u) · W1 u)`, `u = LN(x)` (Shazeer 2020)."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        self.gate = nn.Linear(channels, 2 * channels)
        self.value = nn.Linear(channels, 2 * channels)
        self.out = nn.Linear(2 * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Maps `[B, N, C]` to the same shape."""
        x = self.norm(x)
        return self.out(F.gelu(self.gate(x), approximate="tanh") * self.value(x))


class AttentionProjection(nn.Module):
    """One block `x ← Linear(LN(x)) + Attn(LN(x)); x ← x + GEGLU(LN(x))`, with no identity path around the attention.

    Args:
        in_channels: Width of the input tokens.
        out_channels: Width of the output tokens.
        num_heads: Attention heads.
    """

    def __init__(self, in_channels: int, out_channels: int, num_heads: int):
        super().__init__()
        self.norm_proj = nn.LayerNorm(in_channels)
        self.proj = nn.Linear(in_channels, out_channels)
        self.norm_attention = nn.LayerNorm(in_channels)
        self.attention = ProjectionAttention(in_channels, out_channels, num_heads)
        self.norm_mlp = nn.LayerNorm(out_channels)
        self.mlp = GEGLU(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Maps `[B, N, in]` to `[B, N, out]`."""
        x = self.proj(self.norm_proj(x)) + self.attention(self.norm_attention(x))
        return x + self.mlp(self.norm_mlp(x))


class TokenConv(nn.Conv2d):
    """A 1x1 convolution that takes tokens `[B, N, in]` to `[B, N, out]`."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Maps `[B, N, in]` to `[B, N, out]`."""
        return F.linear(x, self.weight.flatten(1), self.bias)


def projection(
    kind: Projection, in_channels: int, out_channels: int, num_layers: int, encode: bool
) -> TokenConv | nn.Sequential:
    """Builds a stack of layers that maps tokens `[B, N, in]` to `[B, N, out]`.

    Args:
        kind: Attention blocks, or a single 1x1 convolution.
        in_channels: Width of the input tokens.
        out_channels: Width of the output tokens.
        num_layers: Number of attention blocks.
        encode: Whether the width changes in the last block (encoding) or in the first (decoding).

    Raises:
        ValueError: if the kind is unknown, or attention is given widths of which neither divides the other.
    """
    if kind == "conv":
        return TokenConv(in_channels, out_channels)
    if kind != "attention":
        raise ValueError(f"projection '{kind}' is unknown: choose 'attention' or 'conv'")
    small, large = sorted([in_channels, out_channels])
    if large % small:
        raise ValueError(
            f"layer_channels, latent_channels, decoded_channels: an attention projection from {in_channels} to "
            f"{out_channels} channels needs one width to divide the other; choose others, or the projection 'conv'"
        )
    before, after = (num_layers - 1, 0) if encode else (0, num_layers - 1)
    widths = [in_channels] * (1 + before) + [out_channels] * (1 + after)
    blocks = [AttentionProjection(i, o, large // small) for i, o in pairwise(widths)]
    return nn.Sequential(*blocks)


def unshuffle_tokens(tokens: Tensor, grid: tuple[int, int], factor: int) -> Tensor:
    """Moves `factor`² neighbouring tokens into channels: `[B, N, C]` to `[B, N/f², C·f²]`, all in raster order."""
    if factor == 1:
        return tokens
    maps = tokens.transpose(1, 2).unflatten(2, grid)  # [B, C, rows, columns]
    return pixel_unshuffle(maps, factor).flatten(2).transpose(1, 2)


class Adapter(nn.Module, Described):
    """Maps VFM tokens to latents, and latents to the decoder's input (VFM-VAE, section 3.2).

    It computes in the precision of its weights, which training keeps in float32, whether or not autocast is on: in
    bfloat16 the latents' means would move by 0.5 %.

    Args:
        feature_channels: Width of each VFM layer that it reads; null in a config takes the VFM's.
        layer_channels: Width to which each layer's tokens are narrowed before they are fused.
        latent_channels: Channels C of the latent.
        unshuffle: Height of the token grid over height of the latent; null in a config takes what gives the decoder's
            compression.
        decoded_channels: Width of the decoder's input.
        alignment_channels: Width of the VFM's final tokens, to which the alignment loss projects the latent; null in a
            config takes the VFM's.
        encode_projection: How tokens are narrowed: by attention blocks, or by a 1x1 convolution.
        decode_projection: How the latent is widened: by attention blocks, or by a 1x1 convolution.
        encode_layers: Number of attention blocks in each encoding stack.
        decode_layers: Number of attention blocks in the decoding stack.
        gaussian: Whether encoding ends in means and log-variances, or in the C channels that a quantizer takes.

    Raises:
        ValueError: if a number is below 1, or widths do not fit each other.
    """

    def __init__(
        self,
        feature_channels: Sequence[int] | None = None,
        layer_channels: Sequence[int] = (64, 64, 64),
        latent_channels: int = 32,
        unshuffle: int | None = None,
        decoded_channels: int = 512,
        alignment_channels: int | None = None,
        encode_projection: Projection = "attention",
        decode_projection: Projection = "attention",
        encode_layers: int = 1,
        decode_layers: int = 1,
        gaussian: bool = True,
    ):
        super().__init__()
        if feature_channels is None or unshuffle is None or alignment_channels is None:
            raise ValueError(
                "feature_channels, unshuffle, alignment_channels: all three are needed where no config describes the "
                "VFM that they follow from, or its class has no shape_of"
            )
        at_least(1, feature_channels=feature_channels, layer_channels=layer_channels, latent_channels=latent_channels)
        at_least(1, unshuffle=unshuffle, decoded_channels=decoded_channels, alignment_channels=alignment_channels)
        at_least(1, encode_layers=encode_layers, decode_layers=decode_layers)
        if len(layer_channels) != len(feature_channels):
            raise ValueError(
                f"layer_channels: one number for each of the {len(feature_channels)} layers that are read, given "
                f"{list(layer_channels)}"
            )
        self.gaussian = gaussian
        self.feature_channels = list(feature_channels)
        self.latent_channels = latent_channels
        self.alignment_channels = alignment_channels
        self.unshuffle = unshuffle
        self.layers = nn.ModuleList(
            projection(encode_projection, i, o, encode_layers, encode=True)
            for i, o in zip(feature_channels, layer_channels, strict=True)
        )
        fused = sum(layer_channels) * unshuffle**2
        encoded = 2 * latent_channels if gaussian else latent_channels
        self.fuse = projection(encode_projection, fused, encoded, encode_layers, encode=True)
        self.widen = projection(decode_projection, latent_channels, decoded_channels, decode_layers, encode=False)
        self.alignment = nn.Conv2d(latent_channels, alignment_channels, 1, bias=False)
        self.apply(initialise)

    @property
    def precision(self) -> torch.dtype:
        """The precision of the weights, in which everything is computed."""
        return self.alignment.weight.dtype

    @property
    def last_encoding_weight(self) -> Tensor:
        """The last weight before the posterior, where the adaptive alignment weight compares gradients."""
        if isinstance(self.fuse, TokenConv):
            return self.fuse.weight
        last = self.fuse[-1]
        assert isinstance(last, AttentionProjection)
        return last.mlp.out.weight

    def encode(self, features: Sequence[Tensor], grid: tuple[int, int]) -> Tensor:
        """Maps VFM tokens to the moments of the posterior, or to what a quantizer takes.

        Args:
            features: Tokens of each layer, `[B, N, C_i]`.
            grid: Rows and columns of the token grid.

        Returns:
            Means and log-variances, `[B, 2C, rows / unshuffle, columns / unshuffle]`; `[B, C, …]` if not `gaussian`.

        Raises:
            ValueError: if the number of layers is wrong, or `unshuffle` does not divide the grid.
        """
        if len(features) != len(self.layers):
            raise ValueError(f"the adapter reads {len(self.layers)} layers of features, but was given {len(features)}")
        if grid[0] % self.unshuffle or grid[1] % self.unshuffle:
            raise ValueError(f"a token grid of {grid[0]}x{grid[1]} does not divide by unshuffle={self.unshuffle}")
        with without_autocast(features[0]):
            layers = [layer(x.to(self.precision)) for layer, x in zip(self.layers, features, strict=True)]
            tokens = torch.cat([unshuffle_tokens(x, grid, self.unshuffle) for x in layers], dim=2)
            encoded: Tensor = self.fuse(tokens)  # [B, hw, 2C or C]
        return encoded.transpose(1, 2).unflatten(2, (grid[0] // self.unshuffle, grid[1] // self.unshuffle))

    def decode(self, z: Tensor) -> Tensor:
        """Widens a latent `[B, C, h, w]` to `[B, decoded_channels, h, w]`."""
        # Contiguous, whatever was done to z, so that one compilation serves all.
        tokens = z.to(self.precision).flatten(2).transpose(1, 2).contiguous()
        with without_autocast(z):
            return self.widen(tokens).transpose(1, 2).unflatten(2, z.shape[2:])

    def align(self, z: Tensor) -> Tensor:
        """Projects a latent `[B, C, h, w]` to the VFM's width, `[B, alignment_channels, h, w]`."""
        with without_autocast(z):
            return self.alignment(z.to(self.precision))


def initialise(module: nn.Module) -> None:
    """Truncated normal of std 0.02 for linear layers, Xavier normal of gain 0.5 for convolutions, biases zero."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
    elif isinstance(module, nn.Conv2d):
        nn.init.xavier_normal_(module.weight, gain=0.5)
    if isinstance(module, nn.Linear | nn.Conv2d) and module.bias is not None:
        nn.init.zeros_(module.bias)
