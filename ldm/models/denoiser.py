"""What the training module, guidance and samplers ask of a network."""

import math
from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

from vfm_vae.compilation import compile_regions
from vfm_vae.description import Described
from vfm_vae.options import at_least


class Prediction(NamedTuple):
    """What a denoiser says of noisy latents.

    Attributes:
        velocity: Of the latents, `[B, C, h, w]`.
        cls_velocity: Of the class token, `[B, cls_channels]`; None where none is diffused along.
        projected: Tokens within the network in the width of a VFM's, a class token first,
            `[B, prefix + N, align_channels]`; None where they were not asked for, or there is no projector.
    """

    velocity: Tensor
    cls_velocity: Tensor | None = None
    projected: Tensor | None = None


class Denoiser(nn.Module, Described, ABC):
    """Predicts the velocity of noisy latents, and of a class token where one is diffused along.

    Args:
        in_channels: Channels C of the latent.
        input_size: Sides (h, w) of the latent, or one number for a square.
        num_classes: Labels; one more, `null_label`, stands for no label.
        cls_channels: Width of a VFM's class token that is diffused along with the latent (REG); 0 for none.
        align_channels: Width of a VFM's tokens, to which those within the network are projected (REPA and REG); 0 for
            no projector.

    Attributes:
        blocks: The transformer's blocks, each from tokens to tokens `[B, prefix + N, D]`; subclasses make them.

    Raises:
        ValueError: if a number lies outside its range.
    """

    blocks: nn.ModuleList

    def __init__(
        self,
        in_channels: int,
        input_size: int | tuple[int, int],
        num_classes: int,
        cls_channels: int = 0,
        align_channels: int = 0,
    ):
        super().__init__()
        at_least(1, in_channels=in_channels, input_size=input_size, num_classes=num_classes)
        at_least(0, cls_channels=cls_channels, align_channels=align_channels)
        self.in_channels = in_channels
        self.input_size = (input_size, input_size) if isinstance(input_size, int) else tuple(input_size)
        self.num_classes = num_classes
        self.cls_channels, self.align_channels = cls_channels, align_channels

    @property
    def null_label(self) -> int:
        """The label that stands for no label."""
        return self.num_classes

    def check_labels(self, labels: Tensor) -> None:
        """Sees that samples are asked for of classes, which `null_label` is none of.

        Raises:
            ValueError: if not.
        """
        if others := labels[(labels < 0) | (labels >= self.num_classes)].unique().tolist():
            raise ValueError(f"labels: the classes are 0 to {self.num_classes - 1}, given {others}")

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens in front of those of patches: 1 with a class token."""
        return 1 if self.cls_channels else 0

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w)."""
        return self.in_channels, *self.input_size

    @property
    def state_shape(self) -> tuple[int, ...]:
        """Of what a sampler integrates: the latent's, or where a class token goes along (C · h · w + cls_channels,)."""
        return (math.prod(self.latent_shape) + self.cls_channels,) if self.cls_channels else self.latent_shape

    @abstractmethod
    def forward(
        self, x: Tensor, t: Tensor, y: Tensor, cls_token: Tensor | None = None, align: bool = False
    ) -> Prediction:
        """Velocities of noisy latents and noisy class tokens.

        Args:
            x: `[B, C, h, w]`.
            t: Times in [0, 1], 0 being noise, `[B]`.
            y: Labels, int64 `[B]`; `null_label` for none.
            cls_token: The VFM's class token as noisy as `x`, `[B, cls_channels]`, where the model has one.
            align: Whether to project tokens to the VFM's width; sampling does without.

        Raises:
            ValueError: if a model with a class token is given none, or one without is given one.
        """

    def velocity(self, state: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Velocity of what a sampler integrates, `[B, …]` like `state`; other arguments as of `forward`."""
        if not self.cls_channels:
            return self(state, t, y).velocity
        prediction = self(self.latents_of(state), t, y, state[:, -self.cls_channels :])
        return torch.cat([prediction.velocity.flatten(1), prediction.cls_velocity], dim=1)

    def latents_of(self, state: Tensor) -> Tensor:
        """The latents `[B, C, h, w]` in what a sampler integrates."""
        return state[:, : -self.cls_channels].unflatten(1, self.latent_shape) if self.cls_channels else state

    @property
    def regions(self) -> list[nn.Module]:
        """The parts that are worth compiling, each by itself: here the blocks, to which subclasses add others."""
        return list(self.blocks)

    def compile_regions(self) -> None:
        """Compiles block by block, in place; equal blocks share one compilation, so that it takes no longer for many.

        Compiled is what each region computes, when it is first called. The first size of a batch has code of its own,
        others share one. Names of weights, hooks and copies stay as they are.
        """
        compile_regions(self.regions)

    def shard(self, mesh: DeviceMesh) -> None:
        """Shards the weights over ranks, block by block, in place; once is enough."""
        if isinstance(self, FSDPModule):
            return
        for part in (*self.blocks, self):
            # Without resharding, a validation would leave the outermost parameters whole, and averages couldn't return.
            fully_shard(part, mesh=mesh, reshard_after_forward=True)
        register_fsdp_forward_method(self, "block_features")

    @torch.no_grad()
    def block_features(self, x: Tensor, t: Tensor, y: Tensor, cls_token: Tensor | None = None) -> list[Tensor]:
        """Patch tokens after every block, averaged, float32 `[B, D]` each; arguments as of `forward`."""
        features: list[Tensor] = []

        def keep(block: nn.Module, args: tuple[Tensor, ...], tokens: Tensor) -> None:
            features.append(tokens[:, self.num_prefix_tokens :].float().mean(1))

        hooks = [block.register_forward_hook(keep) for block in self.blocks]
        try:
            self.forward(x, t, y, cls_token)
        finally:
            for hook in hooks:
                hook.remove()
        return features
