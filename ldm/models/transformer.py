"""What the diffusion transformers share: a grid of tokens, and the ways out of their blocks."""

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.models.denoiser import Denoiser, Prediction, Predicts
from ldm.models.layers import (
    FinalLayer,
    MakesNorm,
    Size,
    named_size,
    position_table,
    rotary_angles,
    run_block,
    token_grid,
    unpatchify,
)
from ldm.models.projectors import Projects, make_projector
from vfm_vae.options import at_least

Output = tuple[Tensor, Tensor | None]  # a final layer's: patches [B, N, p·p·C] and a class token [B, cls_channels]


class DiffusionTransformer(Denoiser):
    """Base class of denoisers that are transformers on patches of the latent.

    A subclass calls this `__init__`, makes its embeddings, `blocks` and `final`, and calls `add_heads` and
    `add_tables`. Its `forward` leads tokens `through` the blocks and returns what `predict` makes of them.

    Args:
        in_channels: Channels C of the latent.
        input_size: Height and width of the latent, or one number for a square.
        patch_size: Height and width of a patch.
        depth: Number of blocks that `align_depth` and `base_depth` count.
        num_classes: Number of classes; None for a network that is told something else.
        cls_channels: Width of the VFM's class token that is diffused together with the latent (REG); 0 for none.
        align_channels: Width of the VFM's tokens, to which this network's tokens are projected (REPA and REG); 0 for no
            projector.
        align_depth: Number of the block whose output is projected, 1 to depth.
        activation_checkpointing: Whether to compute blocks again in the backward pass.
        base_depth: Number of the block after which an internal head predicts the velocity, too; 0 for no such head.
        predicts: What the network's output is: the `velocity`, or the `data`.

    Attributes:
        sizes: Named sizes, for `of_size`.

    Raises:
        ValueError: if a number lies outside its range, or patches do not fill the latent.
    """

    sizes: ClassVar[Mapping[str, Size]]
    position: Tensor
    final: FinalLayer
    base_final: FinalLayer | None
    projector: nn.Module | None

    def __init__(
        self,
        in_channels: int,
        input_size: int | tuple[int, int],
        patch_size: int,
        depth: int,
        num_classes: int | None,
        cls_channels: int,
        align_channels: int,
        align_depth: int,
        activation_checkpointing: bool,
        base_depth: int,
        predicts: Predicts,
    ):
        super().__init__(in_channels, input_size, num_classes, cls_channels, align_channels, base_depth, predicts)
        at_least(1, patch_size=patch_size, depth=depth, align_depth=align_depth)
        if align_channels and align_depth > depth:
            raise ValueError(f"align_depth: a block from 1 to depth = {depth}, given {align_depth}")
        if base_depth > depth:
            raise ValueError(f"base_depth: a block from 1 to depth = {depth}, or 0 for no head, given {base_depth}")
        self.grid = token_grid(self.input_size, patch_size)
        self.patch_size, self.depth, self.align_depth = patch_size, depth, align_depth
        self.activation_checkpointing = activation_checkpointing

    @classmethod
    def of_size(cls, name: str, **kwargs: Any) -> Self:
        """A named size with its patch size, such as `XL/1`.

        Args:
            name: One of `sizes`, a slash, and the side of a patch.
            **kwargs: Further arguments, none that the name sets.

        Raises:
            ValueError: for a name that is not of this form.
            TypeError: if an argument is given that the name sets.
        """
        sizes: dict[str, Any] = named_size(name, cls.sizes)
        return cls(**sizes, **kwargs)

    def final_layer(self, width: int, norm: MakesNorm) -> FinalLayer:
        """A layer from tokens to what the network predicts.

        Args:
            width: Width of the tokens.
            norm: Makes its norm.
        """
        return FinalLayer(width, self.patch_size**2 * self.in_channels, norm, self.cls_channels)

    def add_heads(self, width: int, norm: MakesNorm, projector: Projects, projector_width: int) -> None:
        """Makes the projector and the internal head, where they are wanted.

        Args:
            width: Width of the tokens that they read.
            norm: Makes the internal head's norm.
            projector: Which projector.
            projector_width: Hidden width of the projector.

        Raises:
            ValueError: for another projector.
        """
        has_class_token = bool(self.cls_channels)
        with torch.random.fork_rng(devices=[]):  # so that models with and without these parts begin alike in the others
            self.projector = make_projector(
                projector, width, projector_width, self.align_channels, self.grid, has_class_token
            )
            self.base_final = self.final_layer(width, norm) if self.base_depth else None

    def add_tables(self, width: int, **rotary: int | None) -> None:
        """Makes the constants of the grid, which are not stored.

        A class token has no place on the grid: it gets no position, and is not turned.

        Args:
            width: Width of the tokens that get a `position`.
            **rotary: Width of an attention head by the name of its rotary embedding, which becomes `<name>_cos` and
                `<name>_sin`; None where there is none.
        """
        prefix_rows = (0, 0, self.num_prefix_tokens, 0)
        self.register_buffer("position", F.pad(position_table(self.grid, width), prefix_rows), persistent=False)
        for name, channels in rotary.items():
            angles = None if channels is None else F.pad(rotary_angles(self.grid, channels), prefix_rows)
            self.register_buffer(f"{name}_cos", None if angles is None else angles.cos().float(), persistent=False)
            self.register_buffer(f"{name}_sin", None if angles is None else angles.sin().float(), persistent=False)

    @property
    def regions(self) -> list[nn.Module]:
        """Blocks, what follows them, and the projector; embeddings are a small share."""
        after = (self.final, self.base_final, self.projector)
        return [*super().regions, *(part for part in after if part is not None)]

    def through(
        self,
        blocks: Iterable[nn.Module],
        tokens: Tensor,
        modulation: Tensor,
        rotary: tuple[Tensor, Tensor] | None,
        align: bool = False,
        base: bool = False,
        told: tuple[Tensor, ...] = (),
    ) -> tuple[Tensor, Tensor | None, Output | None]:
        """Leads tokens through blocks.

        Args:
            blocks: Which.
            tokens: `[B, prefix + N, D]`.
            modulation: The activated condition, as blocks take it.
            rotary: As attention takes it.
            align: Whether to project tokens after the block `align_depth`, if there is a projector.
            base: Whether to predict after the block `base_depth`, if there is an internal head.
            told: What blocks take besides, as texts.

        Returns:
            The tokens, those that are projected, `[B, prefix + N, align_channels]`, and the internal head's output.
        """
        projected = early = None
        for number, block in enumerate(blocks, start=1):
            tokens = run_block(block, tokens, modulation, rotary, *told, recompute=self.activation_checkpointing)
            if align and self.projector is not None and number == self.align_depth:
                projected = self.projector(tokens)
            if base and self.base_final is not None and number == self.base_depth:
                early = self.base_final(tokens, modulation)
        return tokens, projected, early

    def predict(
        self, state: Tensor, t: Tensor, output: Output, projected: Tensor | None, early: Output | None
    ) -> Prediction:
        """The prediction that outputs of the network stand for.

        Args:
            state: The noisy states, `[B, *state_shape]`.
            t: Their times, `[B]`.
            output: The final layer's.
            projected: The projected tokens, which `through` returns.
            early: The internal head's output, which it returns as well.
        """

        def velocity(patches: Tensor, token: Tensor | None) -> Tensor:
            return self.as_velocity(self.join(unpatchify(patches, self.grid, self.patch_size), token), state, t)

        return Prediction(velocity(*output), projected, None if early is None else velocity(*early))
