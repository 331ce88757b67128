"""LightningDiT for texts: each block has a cross-attention to the tokens of a text, as in PixArt-α.

Chen et al. 2023, PixArt-α (arXiv 2310.00426), section 2.3, put cross-attention between self-attention and MLP, and let
its output begin as zero, so that training begins as that of a network without it. As in Lumina-Next (Zhuo et al. 2024,
arXiv 2406.18583), the mean of the text is told with the time besides.
"""

from collections.abc import Mapping
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from ldm.condition import Condition
from ldm.models.denoiser import Prediction, Predicts
from ldm.models.layers import (
    Block,
    MakesNorm,
    Size,
    StateEmbed,
    TimeEmbedding,
    layers_of,
    modulate,
    scaled_init,
    xavier_init,
    zero_init,
)
from ldm.models.lightningdit import SIZES, check_heads, norms
from ldm.models.projectors import Projects
from ldm.models.transformer import DiffusionTransformer
from ldm.text import text_of
from vfm_vae.options import at_least


class CrossAttention(nn.Module):
    """Attention of an image's tokens to those of a text.

    Args:
        width: Width of both.
        num_heads: Number of heads; must divide the width.
        norm: Makes the norms of queries and keys, given the width of a head; null for none.
    """

    def __init__(self, width: int, num_heads: int, norm: MakesNorm | None = None):
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.query_norm = norm(width // num_heads) if norm else nn.Identity()
        self.key_norm = norm(width // num_heads) if norm else nn.Identity()
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        """Attends.

        Args:
            x: Tokens of the image, `[B, N, D]`.
            text: Tokens of the text, `[B, L, D]`.
            mask: Which of them there are, bool `[B, 1, 1, L]`.
        """
        query = self.query_norm(self.query(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2))  # [B, heads, N, d]
        key_value = self.key_value(text).unflatten(-1, (2, self.num_heads, -1))  # [B, L, 2, heads, d]
        key, value = (part.transpose(1, 2) for part in key_value.unbind(2))  # [B, heads, L, d] each
        key = self.key_norm(key)
        out = F.scaled_dot_product_attention(query.to(value.dtype), key.to(value.dtype), value, attn_mask=mask)
        return self.out(out.transpose(1, 2).flatten(2))


class TextBlock(Block):
    """A block with cross-attention between self-attention and MLP, neither modulated nor gated.

    Args:
        width: Width of the tokens.
        num_heads: Number of attention heads, of both kinds of attention.
        norm: Makes the norms in front of all three.
        qk_norm: Makes the norms of queries and keys; null for none.
        swiglu: Whether the MLP is gated.
    """

    def __init__(self, width: int, num_heads: int, norm: MakesNorm, qk_norm: MakesNorm | None, swiglu: bool):
        super().__init__(width, num_heads, norm, qk_norm, swiglu)
        self.norm_cross = norm(width)
        self.cross_attention = CrossAttention(width, num_heads, qk_norm)

    def forward(
        self, x: Tensor, condition: Tensor, rotary: tuple[Tensor, Tensor] | None = None, *told: Tensor
    ) -> Tensor:
        """Maps tokens.

        Args:
            x: `[B, N, D]`.
            condition: Activated, `[B, 1, D]`.
            rotary: As attention takes it.
            *told: Tokens of the text, `[B, L, D]`, and which of them there are, bool `[B, 1, 1, L]`.
        """
        text, mask = told
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.modulation(condition).chunk(6, dim=-1)
        x = x + gate_a * self.attention(modulate(self.norm_attention(x), shift_a, scale_a), rotary)
        x = x + self.cross_attention(self.norm_cross(x), text, mask)
        return x + gate_m * self.mlp(modulate(self.norm_mlp(x), shift_m, scale_m))


class TextEmbed(nn.Module):
    """Brings the embeddings of a text to the network's width, and says what is in the text as a whole.

    Args:
        text_channels: Width of the embeddings.
        width: The network's.
        norm: Makes the norm of the embeddings.
    """

    def __init__(self, text_channels: int, width: int, norm: MakesNorm):
        super().__init__()
        self.norm = norm(text_channels)
        self.proj = nn.Linear(text_channels, width)
        self.pooled = nn.Linear(width, width)

    def forward(self, embeddings: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Maps `[B, L, text_channels]` to tokens `[B, L, D]` and, of their mean, `[B, D]`.

        Args:
            embeddings: Those of each text's tokens, in whatever precision; what lies behind the last is not looked at.
            mask: Which of them are tokens, bool `[B, L]`; every text has some.
        """
        tokens = self.proj(self.norm(embeddings.masked_fill(~mask[..., None], 0)))
        shares = mask / mask.sum(1, keepdim=True)  # [B, L]
        return tokens, self.pooled((tokens * shares[..., None]).sum(1))


class TextLightningDiT(DiffusionTransformer):
    """A LightningDiT that is told a text, by cross-attention in each block and by adaptive norms, instead of a class.

    Texts have no positions but those that their embeddings speak of.

    Args:
        text_channels: Width of the texts' embeddings, which is the text encoder's.
        in_channels: Channels C of the latent.
        input_size: Height and width of the latent, or one number for a square.
        patch_size: Height and width of a patch.
        depth: Number of blocks.
        width: Channels D of the tokens: a multiple of 4 · num_heads, or of both 4 and num_heads without `rotary`.
        num_heads: Number of attention heads.
        qk_norm: Whether to normalise queries and keys.
        swiglu: Whether MLPs are gated (SwiGLU); otherwise they use GELU.
        rotary: Whether self-attention has a rotary position embedding besides the fixed table of positions.
        rms_norm: Whether norms are RMSNorm with a gain; otherwise they are LayerNorm without.
        cls_channels: Width of the VFM's class token that is diffused together with the latent (REG); 0 for none.
        align_channels: Width of the VFM's tokens, to which this network's tokens are projected (REPA and REG); 0 for no
            projector.
        align_depth: Number of the block whose output is projected, 1 to depth.
        projector_width: Hidden width of the projector.
        activation_checkpointing: Whether to compute blocks again in the backward pass: it takes about a third more time
            and a fraction of the memory.
        base_depth: Number of the block after which an internal head predicts the velocity, too, for internal guidance;
            1 to depth, 0 for no such head.
        predicts: What the network's output is: the `velocity`, or the `data`, of which the velocity is made.
        projector: How tokens are projected to the VFM's width: `mlp`, each by itself (REPA), or `conv`, by one
            convolution on their grid (iREPA).

    Raises:
        ValueError: if a number lies outside its range, or sizes do not divide.
    """

    sizes: ClassVar[Mapping[str, Size]] = SIZES
    rotary_cos: Tensor
    rotary_sin: Tensor

    def __init__(
        self,
        text_channels: int,
        in_channels: int = 32,
        input_size: int | tuple[int, int] = 16,
        patch_size: int = 1,
        depth: int = 28,
        width: int = 1152,
        num_heads: int = 16,
        qk_norm: bool = True,
        swiglu: bool = True,
        rotary: bool = True,
        rms_norm: bool = True,
        cls_channels: int = 0,
        align_channels: int = 0,
        align_depth: int = 8,
        projector_width: int = 2048,
        activation_checkpointing: bool = False,
        base_depth: int = 0,
        predicts: Predicts = "velocity",
        projector: Projects = "mlp",
    ):
        super().__init__(
            in_channels,
            input_size,
            patch_size,
            depth,
            None,
            cls_channels,
            align_channels,
            align_depth,
            activation_checkpointing,
            base_depth,
            predicts,
        )
        at_least(1, text_channels=text_channels, width=width, num_heads=num_heads, projector_width=projector_width)
        check_heads(width, num_heads, rotary)
        norm, head_norm = norms(rms_norm)
        self.text_channels = text_channels
        self.state_embed = StateEmbed(in_channels, width, patch_size, cls_channels)
        self.time_embed = TimeEmbedding(width)
        self.text_embed = TextEmbed(text_channels, width, norm)
        self.blocks = nn.ModuleList(
            TextBlock(width, num_heads, norm, head_norm if qk_norm else None, swiglu) for _ in range(depth)
        )
        self.final = self.final_layer(width, norm)
        self.add_heads(width, norm, projector, projector_width)
        self.add_tables(width, rotary=width // num_heads if rotary else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As LightningDiT's; what is made of the whole text begins small, and cross-attention with zeros as outputs."""
        added, zero = layers_of(self.state_embed.cls, self.projector), layers_of(self.final, self.base_final)
        hidden, out = layers_of(self.time_embed)
        blocks = [block for block in self.blocks if isinstance(block, TextBlock)]
        xavier_init(*(layer for layer in layers_of(self) if layer not in (*added, *zero)))
        scaled_init(0.02, hidden.weight, out.weight, self.text_embed.pooled.weight)
        zero_init(*zero, *(layer for block in blocks for layer in (block.modulation, block.cross_attention.out)))
        xavier_init(*added)

    def forward(
        self, state: Tensor, t: Tensor, condition: Condition, align: bool = False, base: bool = False
    ) -> Prediction:
        """See `Denoiser.forward`."""
        told = text_of(condition)
        text, pooled = self.text_embed(told.embeddings, told.mask)  # [B, L, D], [B, D]
        tokens = self.state_embed(*self.split(state)) + self.position  # [B, prefix + N, D]
        modulation = F.silu(self.time_embed(t) + pooled)[:, None]  # alike for all tokens
        rotary = None if self.rotary_cos is None else (self.rotary_cos, self.rotary_sin)
        text_and_mask = text, told.mask[:, None, None]
        tokens, projected, early = self.through(self.blocks, tokens, modulation, rotary, align, base, text_and_mask)
        return self.predict(state, t, self.final(tokens, modulation), projected, early)
