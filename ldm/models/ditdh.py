"""DiTDH, a diffusion transformer with a wide head (Zheng et al. 2025, RAE, arXiv 2510.11690, section 5).

Most of the blocks are a *body* of a usual width. What comes out of it conditions every token of a shallow, wide *head*,
which reads the noisy latent once more and predicts its velocity (as in DDT, Wang et al. 2025, arXiv 2504.05741). A
latent with more channels than tokens are wide would lose rank in a narrow output.
"""

from collections.abc import Mapping
from functools import partial
from math import pi
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.condition import Condition, labels_of
from ldm.models.denoiser import Prediction, Predicts
from ldm.models.layers import (
    Block,
    MakesNorm,
    RMSNorm,
    Size,
    StateEmbed,
    layers_of,
    scaled_init,
    xavier_init,
    zero_init,
)
from ldm.models.projectors import Projects
from ldm.models.transformer import DiffusionTransformer
from vfm_vae.options import at_least

SIZES = {
    "S": Size(12, 384, 6),
    "XL": Size(28, 1152, 16),
}


class GaussianTimeEmbedding(nn.Module):
    """Time in [0, 1] as a vector: random frequencies W, `[sin 2πtW, cos 2πtW]`, and an MLP.

    The frequencies are drawn once, from N(0, 1), and never trained (Tancik et al. 2020, arXiv 2006.10739).

    Args:
        width: Width of the vector.
        num_frequencies: Half the width of what enters the MLP.
    """

    frequencies: Tensor

    def __init__(self, width: int, num_frequencies: int = 256):
        super().__init__()
        self.register_buffer("frequencies", torch.randn(num_frequencies))
        self.mlp = nn.Sequential(nn.Linear(2 * num_frequencies, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        """Maps times `[B]` to `[B, D]`."""
        angles = 2 * pi * t[:, None].float() * self.frequencies  # [B, num_frequencies]
        return self.mlp(torch.cat([angles.sin(), angles.cos()], dim=1))


class DiTDH(DiffusionTransformer):
    """A body as LightningDiT's, and a wide head that the body's tokens condition one by one.

    Blocks have SwiGLU, RMSNorm and a rotary embedding.

    Args:
        in_channels: Channels C of the latent.
        input_size: Height and width of the latent, or one number for a square.
        patch_size: Height and width of a patch.
        depth: Number of blocks of the body.
        width: Channels D of the body's tokens, a multiple of 4 · num_heads.
        num_heads: Number of attention heads of the body's blocks.
        head_depth: Number of blocks of the wide head.
        head_width: Channels H of the wide head's tokens, a multiple of 4 · head_num_heads; best no fewer than a patch
            has numbers.
        head_num_heads: Number of attention heads of the wide head's blocks.
        num_classes: Number of classes; the network has one more label, for no class.
        qk_norm: Whether to normalise queries and keys.
        cls_channels: Width of the VFM's class token that is diffused together with the latent (REG); 0 for none.
        align_channels: Width of the VFM's tokens, to which this network's tokens are projected (REPA and REG); 0 for no
            projector.
        align_depth: Number of the body's block whose output is projected, 1 to depth.
        projector_width: Hidden width of the projector.
        activation_checkpointing: Whether to compute blocks again in the backward pass: it takes about a third more time
            and a fraction of the memory.
        base_depth: Number of the body's block after which an internal head predicts the velocity, too, for internal
            guidance; 1 to depth, 0 for no such head.
        predicts: What the network's output is: the `velocity`, or the `data`, of which the velocity is made.
        projector: How tokens are projected to the VFM's width: `mlp`, each by itself (REPA), or `conv`, by one
            convolution on their grid (iREPA).

    Attributes:
        blocks: Those of the body, then those of the head.

    Raises:
        ValueError: if a number lies outside its range, or sizes do not divide.
    """

    sizes: ClassVar[Mapping[str, Size]] = SIZES
    body_cos: Tensor
    body_sin: Tensor
    head_cos: Tensor
    head_sin: Tensor

    def __init__(
        self,
        in_channels: int = 768,
        input_size: int | tuple[int, int] = 16,
        patch_size: int = 1,
        depth: int = 28,
        width: int = 1152,
        num_heads: int = 16,
        head_depth: int = 2,
        head_width: int = 2048,
        head_num_heads: int = 16,
        num_classes: int = 1000,
        qk_norm: bool = False,
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
        at_least(1, head_depth=head_depth, head_width=head_width, head_num_heads=head_num_heads)
        for prefix, channels, heads in (("", width, num_heads), ("head_", head_width, head_num_heads)):
            if channels % (4 * heads):
                raise ValueError(f"{prefix}width: {channels} does not divide by 4 · {prefix}num_heads = {4 * heads}")
        norm: MakesNorm = partial(RMSNorm, eps=1e-6)
        make_block = partial(Block, norm=norm, qk_norm=norm if qk_norm else None, swiglu=True)
        self.body_embed = StateEmbed(in_channels, width, patch_size, cls_channels)
        self.head_embed = StateEmbed(in_channels, head_width, patch_size, cls_channels)
        self.time_embed = GaussianTimeEmbedding(width)
        self.label_embed = nn.Embedding(num_classes + 1, width)
        body = [make_block(width, num_heads) for _ in range(depth)]
        self.blocks = nn.ModuleList(body + [make_block(head_width, head_num_heads) for _ in range(head_depth)])
        self.to_head = nn.Identity() if width == head_width else nn.Linear(width, head_width)
        self.final = self.final_layer(head_width, norm)
        self.add_heads(width, norm, projector, projector_width)
        self.add_tables(width, body=width // num_heads, head=head_width // head_num_heads)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Sets what does not begin as PyTorch has it.

        Xavier for the embeddings of patches, the class token and the projector, N(0, 0.02²) for labels and the weights
        of the time's MLP, zeros for modulations and outputs.
        """
        hidden, out = layers_of(self.time_embed)
        xavier_init(*layers_of(self.body_embed.patches, self.head_embed.patches))
        scaled_init(0.02, self.label_embed.weight, hidden.weight, out.weight)
        modulations = (block.modulation for block in self.blocks if isinstance(block, Block))
        zero_init(*modulations, *layers_of(self.final, self.base_final))
        xavier_init(*layers_of(self.body_embed.cls, self.head_embed.cls, self.projector))

    def forward(
        self, state: Tensor, t: Tensor, condition: Condition, align: bool = False, base: bool = False
    ) -> Prediction:
        """See `Denoiser.forward`."""
        x, cls_token = self.split(state)
        body, head = list(self.blocks)[: self.depth], list(self.blocks)[self.depth :]
        time = self.time_embed(t)[:, None]  # [B, 1, D]
        labels = self.label_embed(labels_of(condition))[:, None]
        modulation = F.silu(F.silu(time + labels))  # twice, as published weights take it
        tokens = self.body_embed(x, cls_token) + self.position  # [B, prefix + N, D]
        rotary = self.body_cos, self.body_sin
        tokens, projected, early = self.through(body, tokens, modulation, rotary, align, base)
        modulation = F.silu(self.to_head(F.silu(time + tokens)))  # [B, prefix + N, H], for each token its own
        tokens = self.head_embed(x, cls_token).to(tokens.dtype)  # float32 between blocks, under autocast, too
        tokens, *_ = self.through(head, tokens, modulation, (self.head_cos, self.head_sin))
        return self.predict(state, t, self.final(tokens, modulation), projected, early)
