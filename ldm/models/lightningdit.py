"""LightningDiT (Yao et al. 2025, arXiv 2501.01423, section 4): a diffusion transformer with current parts."""

from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ldm.models.denoiser import Denoiser
from ldm.models.layers import (
    Block,
    FinalLayer,
    PatchEmbed,
    RMSNorm,
    Size,
    TimeEmbedding,
    named_size,
    position_table,
    rotary_angles,
    run_block,
    scaled_init,
    token_grid,
    unpatchify,
    xavier_init,
    zero_init,
)
from vfm_vae.pretrained import remembers_arguments

SIZES = {
    "B": Size(12, 768, 12),
    "L": Size(24, 1024, 16),
    "XL": Size(28, 1152, 16),
    "1p0B": Size(24, 1536, 24),
    "1p6B": Size(28, 1792, 28),
}


class LightningDiT(Denoiser):
    """A transformer on patches of the latent, conditioned on time and class by adaptive norms.

    Args:
        in_channels: Channels C of the latent.
        input_size: Sides (h, w) of the latent, or one number for a square.
        patch_size: Side of a patch.
        depth: Blocks.
        width: Channels D of the tokens, a multiple of 4 · num_heads.
        num_heads: Heads of attention.
        num_classes: Labels; one more stands for no label.
        qk_norm: Normalise queries and keys.
        swiglu: Gated MLP instead of GELU.
        rotary: Rotary position embedding in attention, beside the fixed table.
        rms_norm: RMSNorm with a gain instead of LayerNorm without.
        activation_checkpointing: Compute each block again in the backward pass instead of keeping what is in it: about
            a third more time for a fraction of the memory.

    Raises:
        ValueError: if sizes do not divide.
    """

    position: Tensor
    rotary_cos: Tensor
    rotary_sin: Tensor

    @remembers_arguments
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
        activation_checkpointing: bool = False,
    ):
        super().__init__(in_channels, input_size, num_classes)
        if width % (4 * num_heads):
            raise ValueError(f"width: {width} does not divide by 4 · num_heads = {4 * num_heads}")
        self.grid = token_grid(self.input_size, patch_size)
        self.patch_size = patch_size
        self.activation_checkpointing = activation_checkpointing
        if rms_norm:
            norm = head_norm = partial(RMSNorm, eps=1e-6)
        else:
            norm, head_norm = partial(nn.LayerNorm, eps=1e-6, elementwise_affine=False), nn.LayerNorm
        self.patch_embed = PatchEmbed(in_channels, width, patch_size)
        self.time_embed = TimeEmbedding(width)
        self.label_embed = nn.Embedding(num_classes + 1, width)
        self.blocks = nn.ModuleList(
            Block(width, num_heads, norm, head_norm if qk_norm else None, swiglu) for _ in range(depth)
        )
        self.final = FinalLayer(width, patch_size**2 * in_channels, norm)
        # Constants of the grid, made here and not stored.
        self.register_buffer("position", position_table(self.grid, width), persistent=False)
        angles = rotary_angles(self.grid, width // num_heads) if rotary else None
        self.register_buffer("rotary_cos", angles.cos().float() if rotary else None, persistent=False)
        self.register_buffer("rotary_sin", angles.sin().float() if rotary else None, persistent=False)
        self.reset_parameters()

    @classmethod
    def of_size(cls, name: str, **kwargs: Any) -> "LightningDiT":
        """A named size with its patch size, such as `XL/1`.

        Args:
            name: One of `SIZES`, a slash, and the side of a patch.
            **kwargs: Further arguments.

        Raises:
            ValueError: for a name that is not of this form.
        """
        return cls(**named_size(name, SIZES), **kwargs)

    def reset_parameters(self) -> None:
        """Xavier for linear layers, N(0, 0.02²) for the embeddings, zeros for modulations and the output."""
        xavier_init(*(module for module in self.modules() if isinstance(module, nn.Linear)), self.patch_embed.proj)
        scaled_init(0.02, self.label_embed, self.time_embed.mlp[0], self.time_embed.mlp[2])
        zero_init(*(block.modulation for block in self.blocks), self.final.modulation, self.final.out)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Velocity of noisy latents.

        Args:
            x: `[B, C, h, w]`.
            t: Times in [0, 1], 0 being noise, `[B]`.
            y: Labels, int64 `[B]`; `null_label` for none.

        Returns:
            `[B, C, h, w]`.
        """
        tokens = self.patch_embed(x) + self.position  # [B, N, D]
        condition = F.silu(self.time_embed(t) + self.label_embed(y))  # [B, D]
        rotary = None if self.rotary_cos is None else (self.rotary_cos, self.rotary_sin)
        for block in self.blocks:
            tokens = run_block(block, tokens, condition, rotary, recompute=self.activation_checkpointing)
        return unpatchify(self.final(tokens, condition), self.grid, self.patch_size)
