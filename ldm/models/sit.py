"""SiT (Ma et al. 2024, arXiv 2401.08740), also as REG has it (Wu et al. 2025, arXiv 2507.01467): with a class token."""

from collections.abc import Mapping
from typing import ClassVar

from ldm.models.layers import Size
from ldm.models.lightningdit import LightningDiT

SIZES = {
    "S": Size(12, 384, 6),
    "B": Size(12, 768, 12),
    "L": Size(24, 1024, 16),
    "XL": Size(28, 1152, 16),
}


class SiT(LightningDiT):
    """A LightningDiT of former parts: GELU, LayerNorm without a gain, no rotary embedding. By default REG's.

    Args:
        in_channels: Channels C of the latent.
        input_size: Sides (h, w) of the latent, or one number for a square.
        patch_size: Side of a patch.
        depth: Blocks.
        width: Channels D of the tokens, a multiple of 4 and of num_heads.
        num_heads: Heads of attention.
        num_classes: Labels; one more stands for no label.
        qk_norm: Normalise queries and keys.
        cls_channels: Width of a VFM's class token that is diffused along; 0 for none, as REPA has it.
        align_channels: Width of a VFM's tokens, to which those of this network are projected; 0 for no projector.
        align_depth: Number of the block whose output is projected, from 1 to depth.
        projector_width: Hidden width of the projector.
        activation_checkpointing: Compute each block again in the backward pass instead of keeping what is in it: about
            a third more time for a fraction of the memory.

    Raises:
        ValueError: if sizes do not divide, or align_depth lies outside its range.
    """

    sizes: ClassVar[Mapping[str, Size]] = SIZES

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
        super().__init__(
            in_channels,
            input_size,
            patch_size,
            depth,
            width,
            num_heads,
            num_classes,
            qk_norm,
            swiglu=False,
            rotary=False,
            rms_norm=False,
            cls_channels=cls_channels,
            align_channels=align_channels,
            align_depth=align_depth,
            projector_width=projector_width,
            activation_checkpointing=activation_checkpointing,
        )
