"""REG (Wu et al. 2025, arXiv 2507.01467): a SiT (Ma et al. 2024, arXiv 2401.08740) that denoises a class token along.

The class token is that of a vision foundation model (VFM), and tokens within the network are aligned to the VFM's
(REPA, Yu et al. 2025, arXiv 2410.06940).
"""

import math
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.models.denoiser import Denoiser
from ldm.models.layers import (
    Block,
    FinalLayer,
    PatchEmbed,
    Size,
    TimeEmbedding,
    named_size,
    position_table,
    run_block,
    scaled_init,
    token_grid,
    unpatchify,
    xavier_init,
    zero_init,
)
from vfm_vae.pretrained import remembers_arguments

SIZES = {
    "S": Size(12, 384, 6),
    "B": Size(12, 768, 12),
    "L": Size(24, 1024, 16),
    "XL": Size(28, 1152, 16),
}


class REGOutput(NamedTuple):
    """What REG predicts.

    Attributes:
        velocity: Of the latent, `[B, C, h, w]`.
        cls_velocity: Of the class token, `[B, cls_channels]`.
        projected: Tokens after block `align_depth` in the VFM's width, the class token first,
            `[B, 1 + N, align_channels]`.
    """

    velocity: Tensor
    cls_velocity: Tensor
    projected: Tensor


class REGFinalLayer(FinalLayer):
    """From tokens to patches of velocity, and from the first token to the class token's velocity.

    Args:
        width: Of the tokens.
        out_features: Numbers in a patch.
        cls_channels: Width of the VFM's class token.
        norm: Makes the norm.
    """

    def __init__(self, width: int, out_features: int, cls_channels: int, norm: type[nn.Module]):
        super().__init__(width, out_features, norm)
        self.cls_out = nn.Linear(width, cls_channels)

    def forward(self, x: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        """Maps tokens `[B, 1 + N, D]` to `[B, N, p·p·C]` and `[B, cls_channels]`, given the condition `[B, D]`."""
        x = self.modulated(x, condition)
        return self.out(x[:, 1:]), self.cls_out(x[:, 0])


class REG(Denoiser):
    """A transformer on the VFM's class token and patches of the latent, both noisy at the same time t.

    Args:
        in_channels: Channels C of the latent.
        input_size: Sides (h, w) of the latent, or one number for a square.
        patch_size: Side of a patch.
        depth: Blocks.
        width: Channels D of the tokens, a multiple of 4 and of num_heads.
        num_heads: Heads of attention.
        num_classes: Labels; one more stands for no label.
        qk_norm: Normalise queries and keys.
        cls_channels: Width of the VFM's class token.
        align_channels: Width of the VFM's tokens, to which those of this network are aligned.
        align_depth: Number of the block whose output is aligned, from 1 to depth.
        projector_width: Hidden width of the MLP between the two.
        activation_checkpointing: Compute each block again in the backward pass instead of keeping what is in it: about
            a third more time for a fraction of the memory.

    Raises:
        ValueError: if sizes do not divide, or align_depth lies outside its range.
    """

    num_prefix_tokens = 1
    position: Tensor

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
        cls_channels: int = 768,
        align_channels: int = 768,
        align_depth: int = 8,
        projector_width: int = 2048,
        activation_checkpointing: bool = False,
    ):
        super().__init__(in_channels, input_size, num_classes)
        if width % 4 or width % num_heads:
            raise ValueError(f"width: {width} does not divide by both 4 and num_heads = {num_heads}")
        if not 1 <= align_depth <= depth:
            raise ValueError(f"align_depth: a block from 1 to depth = {depth}, given {align_depth}")
        self.grid = token_grid(self.input_size, patch_size)
        self.patch_size = patch_size
        self.align_depth = align_depth
        self.cls_channels = cls_channels
        self.activation_checkpointing = activation_checkpointing
        norm = partial(nn.LayerNorm, eps=1e-6, elementwise_affine=False)
        self.patch_embed = PatchEmbed(in_channels, width, patch_size)
        self.cls_embed = nn.Linear(cls_channels, width)
        self.cls_norm = nn.LayerNorm(width, eps=1e-6)
        self.time_embed = TimeEmbedding(width)
        self.label_embed = nn.Embedding(num_classes + 1, width)
        self.blocks = nn.ModuleList(
            Block(width, num_heads, norm, nn.LayerNorm if qk_norm else None, swiglu=False) for _ in range(depth)
        )
        self.projector = nn.Sequential(
            nn.Linear(width, projector_width),
            nn.SiLU(),
            nn.Linear(projector_width, projector_width),
            nn.SiLU(),
            nn.Linear(projector_width, align_channels),
        )
        self.final = REGFinalLayer(width, patch_size**2 * in_channels, cls_channels, norm)
        # A constant of the grid, made here and not stored; the class token has no place in it, hence zeros.
        self.register_buffer("position", F.pad(position_table(self.grid, width), (0, 0, 1, 0)), persistent=False)
        self.reset_parameters()

    @classmethod
    def of_size(cls, name: str, **kwargs: Any) -> "REG":
        """A named size with its patch size, such as `XL/1`.

        Args:
            name: One of `SIZES`, a slash, and the side of a patch.
            **kwargs: Further arguments.

        Raises:
            ValueError: for a name that is not of this form.
        """
        return cls(**named_size(name, SIZES), **kwargs)

    def reset_parameters(self) -> None:
        """Xavier for linear layers, N(0, 0.02²) for the embeddings, zeros for modulations and both outputs."""
        xavier_init(*(module for module in self.modules() if isinstance(module, nn.Linear)), self.patch_embed.proj)
        scaled_init(0.02, self.label_embed, self.time_embed.mlp[0], self.time_embed.mlp[2])
        zero_init(*(block.modulation for block in self.blocks), self.final.modulation)
        zero_init(self.final.out, self.final.cls_out)

    def embed(self, x: Tensor, t: Tensor, y: Tensor, cls_token: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens `[B, 1 + N, D]` and activated condition `[B, D]` that enter the blocks; arguments as of `forward`."""
        cls = self.cls_norm(self.cls_embed(cls_token))  # [B, D]
        tokens = torch.cat([cls[:, None], self.patch_embed(x)], dim=1) + self.position  # [B, 1 + N, D]
        return tokens, F.silu(self.time_embed(t) + self.label_embed(y))

    def forward(self, x: Tensor, t: Tensor, y: Tensor, cls_token: Tensor) -> REGOutput:
        """Velocities of noisy latents and noisy class tokens.

        Args:
            x: `[B, C, h, w]`.
            t: Times in [0, 1], 0 being noise, `[B]`.
            y: Labels, int64 `[B]`; `null_label` for none.
            cls_token: The VFM's class token as noisy as `x`, `[B, cls_channels]`.

        Returns:
            Both velocities, and the projected tokens.
        """
        tokens, condition = self.embed(x, t, y, cls_token)  # [B, 1 + N, D], [B, D]
        for number, block in enumerate(self.blocks, start=1):
            tokens = run_block(block, tokens, condition, recompute=self.activation_checkpointing)
            if number == self.align_depth:
                projected = self.projector(tokens)  # [B, 1 + N, align_channels]
        patches, cls_velocity = self.final(tokens, condition)  # [B, N, p·p·C], [B, cls_channels]
        return REGOutput(unpatchify(patches, self.grid, self.patch_size), cls_velocity, projected)

    @property
    def state_shape(self) -> tuple[int, ...]:
        """Of the latent, flat, and the class token behind it: (C · h · w + cls_channels,)."""
        return (math.prod(self.latent_shape) + self.cls_channels,)

    def velocity(self, state: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Velocity of latent and class token together, `[B, C · h · w + cls_channels]` like `state`."""
        cls_token = state[:, -self.cls_channels :]
        output = self(self.latents_of(state), t, y, cls_token)
        return torch.cat([output.velocity.flatten(1), output.cls_velocity], dim=1)

    def latents_of(self, state: Tensor) -> Tensor:
        """The latents `[B, C, h, w]` in a state."""
        return state[:, : -self.cls_channels].unflatten(1, self.latent_shape)

    @torch.no_grad()
    def block_features(self, x: Tensor, t: Tensor, y: Tensor, cls_token: Tensor) -> list[Tensor]:
        """Patch tokens after every block, averaged, float32 `[B, D]` each; arguments as of `forward`."""
        tokens, condition = self.embed(x, t, y, cls_token)
        features = []
        for block in self.blocks:
            tokens = block(tokens, condition)
            features.append(tokens[:, self.num_prefix_tokens :].float().mean(1))
        return features
