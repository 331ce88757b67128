"""Layers of the diffusion transformers. Tokens are `[B, N, D]`, in raster order of their grid."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

MakesNorm = Callable[[int], nn.Module]  # given a width


class Size(NamedTuple):
    """A named size: blocks, channels, heads."""

    depth: int
    width: int
    num_heads: int


def named_size(name: str, sizes: Mapping[str, Size]) -> dict[str, int]:
    """The options that a name such as `XL/1` stands for: depth, width, num_heads and patch_size.

    Raises:
        ValueError: for a name that is not one of `sizes`, a slash, and the side of a patch.
    """
    size, _, patch_size = name.partition("/")
    if size not in sizes or not patch_size.isdigit():
        raise ValueError(f"name: one of {', '.join(sizes)}, a slash and the patch size, like XL/1; given {name!r}")
    return {**sizes[size]._asdict(), "patch_size": int(patch_size)}


def token_grid(input_size: tuple[int, int], patch_size: int) -> tuple[int, int]:
    """Rows and columns of tokens.

    Raises:
        ValueError: if patches do not fill the latent.
    """
    if any(side % patch_size for side in input_size):
        raise ValueError(f"patch_size: {patch_size} does not divide the latent's sides {input_size}")
    return input_size[0] // patch_size, input_size[1] // patch_size


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Adaptive norm (Peebles & Xie 2023, DiT, section 3.2): `x · (1 + scale) + shift`.

    Args:
        x: Normalised tokens, `[B, N, D]`.
        shift: One for each sample, `[B, 1, D]`, or for each token, `[B, N, D]`.
        scale: Alike.
    """
    return x * (1 + scale) + shift


def sincos_frequencies(num: int) -> Tensor:
    """`10000^(−k / num)` for k = 0 … num − 1, float64 (Vaswani et al. 2017, section 3.5)."""
    return 10000.0 ** (-torch.arange(num, dtype=torch.float64) / num)


def grid_positions(grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Row and column of every token in raster order, float64 `[N]` each."""
    rows, columns = (torch.arange(side, dtype=torch.float64) for side in grid)
    return rows.repeat_interleave(grid[1]), columns.repeat(grid[0])


def position_table(grid: tuple[int, int], width: int) -> Tensor:
    """Fixed sine-cosine position embedding (as MAE and DiT have it).

    Half of the channels speak of the column, the other half of the row; each half holds the sines, then the cosines.

    Args:
        grid: Rows and columns of tokens.
        width: Channels, a multiple of 4.

    Returns:
        float32 `[N, width]`.
    """
    rows, columns = grid_positions(grid)
    angles = [position[:, None] * sincos_frequencies(width // 4) for position in (columns, rows)]  # [N, width / 4]
    return torch.cat([half for angle in angles for half in (angle.sin(), angle.cos())], dim=1).float()


def rotary_angles(grid: tuple[int, int], head_width: int) -> Tensor:
    """Angles of the rotary embedding in two dimensions (Su et al. 2021, RoFormer; by axis as EVA-02 has it).

    Pairs of channels turn by these: the first half of a head's with the row, the second with the column.

    Args:
        grid: Rows and columns of tokens.
        head_width: Channels of a head, a multiple of 4.

    Returns:
        float64 `[N, head_width / 2]`.
    """
    return torch.cat([p[:, None] * sincos_frequencies(head_width // 4) for p in grid_positions(grid)], dim=1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns adjacent pairs of channels.

    Args:
        x: Queries or keys, `[B, heads, N, d]`.
        cos: Cosine of each pair's angle, `[N, d / 2]`.
        sin: Its sine.
    """
    # Each channel beside its partner, rather than one result for each half: a compiler makes a single pass of it.
    cos, sin = cos.repeat_interleave(2, dim=-1), torch.stack([-sin, sin], dim=-1).flatten(-2)  # [N, d] each
    partners = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    return (x * cos + partners * sin).to(x.dtype)


class PatchEmbed(nn.Module):
    """Square patches as tokens, by a convolution whose stride is its size.

    Args:
        in_channels: Channels of the map.
        width: Width of the tokens.
        patch_size: Side of a patch.
    """

    def __init__(self, in_channels: int, width: int, patch_size: int):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, width, patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        """Maps `[B, C, h, w]` to `[B, N, D]`."""
        return self.proj(x).flatten(2).transpose(1, 2)


class StateEmbed(nn.Module):
    """Tokens of a noisy state: its patches, and in front of them its class token, where it has one.

    Args:
        in_channels: Channels C of the latent.
        width: Width D of the tokens.
        patch_size: Side of a patch.
        cls_channels: Width of the class token; 0 if there is none.
    """

    def __init__(self, in_channels: int, width: int, patch_size: int, cls_channels: int):
        super().__init__()
        self.patches = PatchEmbed(in_channels, width, patch_size)
        with torch.random.fork_rng(devices=[]):
            self.cls = nn.Linear(cls_channels, width) if cls_channels else None
            self.cls_norm = nn.LayerNorm(width, eps=1e-6) if cls_channels else None

    def forward(self, x: Tensor, token: Tensor | None) -> Tensor:
        """Maps latents `[B, C, h, w]` and class tokens `[B, cls_channels]` to `[B, prefix + N, D]`."""
        patches = self.patches(x)
        if self.cls is None or self.cls_norm is None:
            return patches
        return torch.cat([self.cls_norm(self.cls(token))[:, None], patches], dim=1)


def unpatchify(tokens: Tensor, grid: tuple[int, int], patch_size: int) -> Tensor:
    """Lays patches, each ordered (row, column, channel), out: `[B, N, p·p·C]` to `[B, C, rows·p, columns·p]`."""
    patches = tokens.unflatten(1, grid).unflatten(3, (patch_size, patch_size, -1))  # [B, rows, columns, p, p, C]
    return patches.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


class TimeEmbedding(nn.Module):
    """Time in [0, 1] as a vector: 128 frequencies from 1 down to 1/10000, cosines then sines, and an MLP.

    Args:
        width: Width of the vector.
        num_frequencies: Half the width of what enters the MLP.
    """

    frequencies: Tensor

    def __init__(self, width: int, num_frequencies: int = 128):
        super().__init__()
        self.register_buffer("frequencies", sincos_frequencies(num_frequencies).float(), persistent=False)
        self.mlp = nn.Sequential(nn.Linear(2 * num_frequencies, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        """Maps times `[B]` to `[B, D]`."""
        angles = t[:, None].float() * self.frequencies  # [B, num_frequencies]
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=1))


class SwiGLU(nn.Module):
    """Gated MLP (Shazeer 2020, arXiv 2002.05202): `out(silu(gate) · value)`, gate and value from one linear layer.

    Args:
        width: Width of the tokens.
        hidden: Width of gate and value.
    """

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.gate_value = nn.Linear(width, 2 * hidden)
        self.out = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """Maps `[B, N, D]` to the same shape."""
        gate, value = self.gate_value(x).chunk(2, dim=-1)
        return self.out(F.silu(gate) * value)


class MLP(nn.Sequential):
    """Linear, GELU in its tanh form, linear.

    Args:
        width: Width of the tokens.
        hidden: Width of the hidden layer.
    """

    def __init__(self, width: int, hidden: int):
        super().__init__(nn.Linear(width, hidden), nn.GELU(approximate="tanh"), nn.Linear(hidden, width))


class RMSNorm(nn.RMSNorm):
    """Root-mean-square norm with a gain (Zhang & Sennrich 2019), computed in float32 whatever the tokens' precision."""

    eps: float

    def forward(self, x: Tensor) -> Tensor:
        """Normalises `[..., D]`."""
        tokens, gain = x.float(), self.weight.float()
        if torch.compiler.is_compiling():  # the plain formula fuses with what is around it
            return (tokens * (tokens.square().mean(-1, keepdim=True) + self.eps).rsqrt() * gain).to(x.dtype)
        # One kernel, which torch has only for equal types of input and gain.
        return F.rms_norm(tokens, self.normalized_shape, gain, self.eps).to(x.dtype)


class Attention(nn.Module):
    """Self-attention, with norms on queries and keys and a rotary embedding where asked for.

    Args:
        width: Width of the tokens.
        num_heads: Number of heads; must divide the width.
        norm: Makes the norms of queries and keys, given the width of a head; null for none.
    """

    def __init__(self, width: int, num_heads: int, norm: MakesNorm | None = None):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.query_norm = norm(width // num_heads) if norm else nn.Identity()
        self.key_norm = norm(width // num_heads) if norm else nn.Identity()
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Attends.

        Args:
            x: Tokens, `[B, N, D]`.
            rotary: Cosines and sines by which queries and keys turn, `[N, d / 2]` each.
        """
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))  # [B, N, 3, heads, d]
        query, key, value = (part.transpose(1, 2) for part in qkv.unbind(2))  # [B, heads, N, d] each
        query, key = self.query_norm(query), self.key_norm(key)
        if rotary is not None:
            query, key = rotate(query, *rotary), rotate(key, *rotary)
        out = F.scaled_dot_product_attention(query.to(value.dtype), key.to(value.dtype), value)
        return self.out(out.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention and MLP, each normalised, modulated and gated by the condition.

    Args:
        width: Width of the tokens.
        num_heads: Number of attention heads.
        norm: Makes the norms in front of both.
        qk_norm: Makes the norms of queries and keys; null for none.
        swiglu: Whether the MLP is gated.
    """

    def __init__(self, width: int, num_heads: int, norm: MakesNorm, qk_norm: MakesNorm | None, swiglu: bool):
        super().__init__()
        self.norm_attention = norm(width)
        self.attention = Attention(width, num_heads, qk_norm)
        self.norm_mlp = norm(width)
        self.mlp = SwiGLU(width, swiglu_hidden(width)) if swiglu else MLP(width, 4 * width)
        self.modulation = nn.Linear(width, 6 * width)

    def forward(self, x: Tensor, condition: Tensor, rotary: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Maps tokens.

        Args:
            x: `[B, N, D]`.
            condition: Activated, one for each sample, `[B, 1, D]`, or for each token, `[B, N, D]`.
            rotary: As attention takes it.
        """
        # Between blocks, tokens stay float32 under autocast to bfloat16: the gates' small terms add up over the depth.
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.modulation(condition).chunk(6, dim=-1)
        x = x + gate_a * self.attention(modulate(self.norm_attention(x), shift_a, scale_a), rotary)
        return x + gate_m * self.mlp(modulate(self.norm_mlp(x), shift_m, scale_m))


class FinalLayer(nn.Module):
    """Maps tokens to patches of velocity, and a class token in front of them to its velocity.

    Args:
        width: Width of the tokens.
        out_features: How many numbers a patch has.
        norm: Makes the norm.
        cls_channels: Width of the class token's velocity; 0 if there is none.
    """

    def __init__(self, width: int, out_features: int, norm: MakesNorm, cls_channels: int = 0):
        super().__init__()
        self.norm = norm(width)
        self.modulation = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, out_features)
        with torch.random.fork_rng(devices=[]):
            self.cls_out = nn.Linear(width, cls_channels) if cls_channels else None

    def forward(self, x: Tensor, condition: Tensor) -> tuple[Tensor, Tensor | None]:
        """Maps tokens `[B, prefix + N, D]` to patches `[B, N, p·p·C]` and `[B, cls_channels]`.

        Args:
            x: Tokens.
            condition: Activated, one for each sample, `[B, 1, D]`, or for each token, `[B, prefix + N, D]`.
        """
        shift, scale = self.modulation(condition).chunk(2, dim=-1)
        x = modulate(self.norm(x), shift, scale)
        if self.cls_out is None:
            return self.out(x), None
        return self.out(x[:, 1:]), self.cls_out(x[:, 0])


def run_block(block: nn.Module, *inputs: Any, recompute: bool) -> Tensor:
    """The block's output; where asked for, the backward pass computes what is in it again instead of keeping it."""
    if recompute and torch.is_grad_enabled():
        return checkpoint(block, *inputs, use_reentrant=False)
    return block(*inputs)


def layers_of(*parts: nn.Module | None) -> list[nn.Linear | nn.Conv2d]:
    """The linear layers and convolutions of the parts that there are, in their order."""
    modules = (module for part in parts if part is not None for module in part.modules())
    return [module for module in modules if isinstance(module, nn.Linear | nn.Conv2d)]


def xavier_init(*layers: nn.Linear | nn.Conv2d) -> None:
    """Xavier weights, a convolution's as those of the linear layer that it is on its patches, and zero biases."""
    for layer in layers:
        nn.init.xavier_uniform_(layer.weight.flatten(1))
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)


def scaled_init(std: float, *weights: Tensor) -> None:
    """Draws weights from N(0, std²)."""
    for weight in weights:
        nn.init.normal_(weight, std=std)


def zero_init(*layers: nn.Linear | nn.Conv2d) -> None:
    """Zeros: blocks start as identities and the output as zero (Peebles & Xie 2023, section 3.2, adaLN-Zero)."""
    for layer in layers:
        nn.init.zeros_(layer.weight)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)


def swiglu_hidden(width: int) -> int:
    """Hidden width that gives a gated MLP the parameters of one four times as wide: `⌊2/3 · 4D⌋`."""
    return 8 * width // 3
