"""LightningDiT (Yao et al. 2025, arXiv 2501.01423, section 4), a diffusion transformer.

It may denoise the class token of a vision foundation model (VFM) along (REG, Wu et al. 2025, arXiv 2507.01467), and
project tokens within to the VFM's width, for their alignment (REPA, Yu et al. 2025, arXiv 2410.06940, and REG).
"""

from collections.abc import Mapping
from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.condition import Condition, labels_of
from ldm.models.denoiser import Prediction, Predicts
from ldm.models.layers import (
    Block,
    MakesNorm,
    PatchEmbed,
    RMSNorm,
    Size,
    TimeEmbedding,
    layers_of,
    scaled_init,
    xavier_init,
    zero_init,
)
from ldm.models.projectors import Projects
from ldm.models.transformer import DiffusionTransformer
from vfm_vae.options import at_least

SIZES = {
    "B": Size(12, 768, 12),
    "L": Size(24, 1024, 16),
    "XL": Size(28, 1152, 16),
    "1p0B": Size(24, 1536, 24),
    "1p6B": Size(28, 1792, 28),
}


def check_heads(width: int, num_heads: int, rotary: bool) -> None:
    """Checks that heads divide the width, with room for positions.

    Args:
        width: Channels of the tokens.
        num_heads: Number of attention heads.
        rotary: Whether attention has a rotary position embedding.

    Raises:
        ValueError: if they do not.
    """
    if rotary and width % (4 * num_heads):
        raise ValueError(f"width: {width} does not divide by 4 · num_heads = {4 * num_heads}")
    if width % 4 or width % num_heads:
        raise ValueError(f"width: {width} does not divide by both 4 and num_heads = {num_heads}")


def norms(rms_norm: bool) -> tuple[MakesNorm, MakesNorm]:
    """What makes the norms of tokens, and those of queries and keys: RMSNorm with a gain, or LayerNorm."""
    if rms_norm:
        return (partial(RMSNorm, eps=1e-6),) * 2
    return partial(nn.LayerNorm, eps=1e-6, elementwise_affine=False), nn.LayerNorm


class LightningDiT(DiffusionTransformer):
    """A transformer on patches of the latent, conditioned on time and class by adaptive norms.

    Args:
        in_channels: Channels C of the latent.
        input_size: Height and width of the latent, or one number for a square.
        patch_size: Height and width of a patch.
        depth: Number of blocks.
        width: Channels D of the tokens: a multiple of 4 · num_heads, or of both 4 and num_heads without `rotary`.
        num_heads: Number of attention heads.
        num_classes: Number of classes; the network has one more label, for no class.
        qk_norm: Whether to normalise queries and keys.
        swiglu: Whether MLPs are gated (SwiGLU); otherwise they use GELU.
        rotary: Whether attention has a rotary position embedding besides the fixed table of positions.
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
        in_channels: int = 32,
        input_size: int | tuple[int, int] = 16,
        patch_size: int = 1,
        depth: int = 28,
        width: int = 1152,
        num_heads: int = 16,
        num_classes: int = 1000,
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
            num_classes,
            cls_channels,
            align_channels,
            align_depth,
            activation_checkpointing,
            base_depth,
            predicts,
        )
        at_least(1, width=width, num_heads=num_heads, projector_width=projector_width)
        check_heads(width, num_heads, rotary)
        norm, head_norm = norms(rms_norm)
        self.patch_embed = PatchEmbed(in_channels, width, patch_size)
        self.time_embed = TimeEmbedding(width)
        self.label_embed = nn.Embedding(num_classes + 1, width)
        self.blocks = nn.ModuleList(
            Block(width, num_heads, norm, head_norm if qk_norm else None, swiglu) for _ in range(depth)
        )
        self.final = self.final_layer(width, norm)
        with torch.random.fork_rng(devices=[]):  # so that models with and without these parts begin alike in the others
            self.cls_embed = nn.Linear(cls_channels, width) if cls_channels else None
            self.cls_norm = nn.LayerNorm(width, eps=1e-6) if cls_channels else None
        self.add_heads(width, norm, projector, projector_width)
        self.add_tables(width, rotary=width // num_heads if rotary else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier for linear layers, N(0, 0.02²) for the embeddings, zeros for modulations and outputs."""
        added, zero = layers_of(self.cls_embed, self.projector), layers_of(self.final.cls_out, self.base_final)
        first = self.patch_embed.proj
        xavier_init(*(layer for layer in layers_of(self) if layer not in (first, *added, *zero)), first)
        hidden, out = layers_of(self.time_embed)
        scaled_init(0.02, self.label_embed.weight, hidden.weight, out.weight)
        modulations = (block.modulation for block in self.blocks if isinstance(block, Block))
        zero_init(*modulations, self.final.modulation, self.final.out, *zero)
        xavier_init(*added)

    def embed(self, state: Tensor, t: Tensor, condition: Condition) -> tuple[Tensor, Tensor]:
        """Tokens `[B, prefix + N, D]` and activated modulation `[B, D]` for the blocks; arguments as of `forward`."""
        x, cls_token = self.split(state)
        tokens = self.patch_embed(x)  # [B, N, D]
        if self.cls_embed is not None and self.cls_norm is not None:
            cls = self.cls_norm(self.cls_embed(cls_token))  # [B, D]
            tokens = torch.cat([cls[:, None], tokens], dim=1)  # [B, 1 + N, D]
        return tokens + self.position, F.silu(self.time_embed(t) + self.label_embed(labels_of(condition)))

    def forward(
        self, state: Tensor, t: Tensor, condition: Condition, align: bool = False, base: bool = False
    ) -> Prediction:
        """See `Denoiser.forward`."""
        tokens, modulation = self.embed(state, t, condition)  # [B, prefix + N, D], [B, D]
        modulation = modulation[:, None]  # alike for all tokens
        rotary = None if self.rotary_cos is None else (self.rotary_cos, self.rotary_sin)
        tokens, projected, early = self.through(self.blocks, tokens, modulation, rotary, align, base)
        return self.predict(state, t, self.final(tokens, modulation), projected, early)
