"""SiT (Ma et al. 2024, arXiv 2401.08740), also with a class token as in REG (Wu et al. 2025, arXiv 2507.01467)."""

from collections.abc import Mapping
from typing import ClassVar

from ldm.models.denoiser import Predicts
from ldm.models.layers import Size
from ldm.models.lightningdit import LightningDiT
from ldm.models.projectors import Projects

SIZES = {
    "S": Size(12, 384, 6),
    "B": Size(12, 768, 12),
    "L": Size(24, 1024, 16),
    "XL": Size(28, 1152, 16),
}


class SiT(LightningDiT):
    """A LightningDiT with older parts: GELU, LayerNorm without a gain, no rotary embedding. The defaults are REG's.

    Args:
        in_channels: Channels C of the latent.
        input_size: Height and width of the latent, or one number for a square.
        patch_size: Height and width of a patch.
        depth: Number of blocks.
        width: Channels D of the tokens, a multiple of 4 and of num_heads.
        num_heads: Number of attention heads.
        num_classes: Number of classes; the network has one more label, for no class.
        qk_norm: Whether to normalise queries and keys.
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
        ValueError: if sizes do not divide, or align_depth or base_depth lies outside its range.
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
        base_depth: int = 0,
        predicts: Predicts = "velocity",
        projector: Projects = "mlp",
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
            base_depth=base_depth,
            predicts=predicts,
            projector=projector,
        )
