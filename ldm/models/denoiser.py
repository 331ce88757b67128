"""The base class of denoisers: what training, sampling and measuring ask of them."""

import math
from abc import ABC, abstractmethod
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed import broadcast
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

from ldm import path
from ldm.condition import Condition
from vfm_vae.compilation import compile_regions
from vfm_vae.description import Described
from vfm_vae.hooks import run_and_keep
from vfm_vae.options import at_least, one_of

Predicts = Literal["velocity", "data"]


class Prediction(NamedTuple):
    """The prediction of a denoiser at noisy states.

    Attributes:
        velocity: The state's velocity, in the state's shape.
        projected: Tokens within the network, brought to the width of a VFM's, a class token first:
            `[B, prefix + N, align_channels]`. None where they were not asked for, or there is no projector.
        base: The velocity as an earlier block predicts it, in the state's shape. None where it was not asked for, or
            there is no internal head.
    """

    velocity: Tensor
    projected: Tensor | None = None
    base: Tensor | None = None


class Denoiser(nn.Module, Described, ABC):
    """Predicts the velocity of noisy states.

    A state is what is diffused: a latent `[B, C, h, w]`; or, where a VFM's class token is diffused along (REG), the
    latent laid flat with the token behind it, `[B, C · h · w + cls_channels]`. `split` and `join` lead from one to the
    other.

    A subclass calls this `__init__`, makes `blocks`, and has a `forward`; its arguments are plain data, so that
    checkpoints can say how to make it again. It may also set `grid` and extend `regions`.

    Args:
        in_channels: Channels C of the latent.
        input_size: Height and width of the latent, or one number for a square.
        num_classes: Number of classes, for a denoiser that is told a class (see `ldm.condition.Labels`); null for one
            that is told something else.
        cls_channels: Width of the VFM's class token that is diffused together with the latent (REG); 0 for none.
        align_channels: Width of the VFM's tokens, to which this network's tokens are projected (REPA and REG); 0 for no
            projector.
        base_depth: Number of the block after which an internal head predicts the velocity a first time, for internal
            guidance; 0 for no such head.
        predicts: What the network's output is: the `velocity`, or the `data` (x-prediction), from which `as_velocity`
            makes the velocity.

    Attributes:
        grid: Rows and columns of the network's tokens; those of the latent, unless a subclass sets others.
        text_channels: Width of the embeddings of the texts that it is told; 0 for a denoiser that is told no text.
        blocks: The network's repeated parts; the list may be empty. Each is compiled and sharded by itself. Metrics
            look at their outputs, tokens `[B, prefix + N, D]`.

    Raises:
        ValueError: if a number lies outside its range.
    """

    text_channels: int = 0
    blocks: nn.ModuleList

    def __init__(
        self,
        in_channels: int,
        input_size: int | tuple[int, int],
        num_classes: int | None = None,
        cls_channels: int = 0,
        align_channels: int = 0,
        base_depth: int = 0,
        predicts: Predicts = "velocity",
    ):
        super().__init__()
        at_least(1, in_channels=in_channels, input_size=input_size, num_classes=num_classes)
        at_least(0, cls_channels=cls_channels, align_channels=align_channels, base_depth=base_depth)
        one_of("predicts", predicts, "velocity", "data")
        self.in_channels = in_channels
        rows, columns = (input_size, input_size) if isinstance(input_size, int) else input_size
        self.input_size = rows, columns
        self.grid = self.input_size
        self.num_classes = num_classes
        self.cls_channels, self.align_channels = cls_channels, align_channels
        self.base_depth, self.predicts = base_depth, predicts

    @abstractmethod
    def forward(self, state: Tensor, t: Tensor, condition: Condition, align: bool = False) -> Prediction:
        """The velocity of noisy states.

        A denoiser with an internal head (`base_depth`) has a further argument, `base: bool = False`: whether to return
        that head's prediction, too. It is never given to others.

        Args:
            state: Noisy states, `[B, *state_shape]`.
            t: Times in [0, 1], 0 being noise, `[B]`.
            condition: What the network is told of each.
            align: Whether to project tokens to the VFM's width; sampling does without.
        """

    def as_velocity(self, output: Tensor, state: Tensor, t: Tensor) -> Tensor:
        """The velocity that an output of the network stands for: the output itself, unless that predicts data.

        This is the one place that converts. All that samples, guides and measures sees velocities alone.

        Args:
            output: The network's, in the state's shape.
            state: The noisy states that it is of, `[B, *state_shape]`.
            t: Their times, `[B]`.
        """
        return output if self.predicts == "velocity" else path.velocity_to(output, state, t)

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens in front of those of patches: 1 with a class token."""
        return 1 if self.cls_channels else 0

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w)."""
        rows, columns = self.input_size
        return self.in_channels, rows, columns

    @property
    def state_shape(self) -> tuple[int, ...]:
        """Shape of one state: the latent's, or with a class token (C · h · w + cls_channels,)."""
        return (math.prod(self.latent_shape) + self.cls_channels,) if self.cls_channels else self.latent_shape

    def join(self, latents: Tensor, token: Tensor | None) -> Tensor:
        """States of latents `[B, C, h, w]` and class tokens `[B, cls_channels]`; without cls_channels, latents alone.

        It serves noise and velocities, too.
        """
        if not self.cls_channels:
            return latents
        assert token is not None
        return torch.cat([latents.flatten(1), token], dim=1)

    def split(self, state: Tensor) -> tuple[Tensor, Tensor | None]:
        """Latents `[B, C, h, w]` and class tokens `[B, cls_channels]` of states; None without cls_channels.

        Raises:
            ValueError: if these are states of another model.
        """
        if state.shape[1:] != self.state_shape:
            raise ValueError(f"state: the model's have the shape {self.state_shape}, given {tuple(state.shape[1:])}")
        if not self.cls_channels:
            return state, None
        return state[:, : -self.cls_channels].unflatten(1, self.latent_shape), state[:, -self.cls_channels :]

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
        for buffer in self.buffers():  # which a rank may have drawn for itself, and are not sharded
            broadcast(buffer, group=mesh.get_group(), group_src=0)
        register_fsdp_forward_method(self, "block_features")

    @torch.no_grad()
    def block_features(self, state: Tensor, t: Tensor, condition: Condition) -> list[Tensor]:
        """Patch tokens after every block, averaged, float32 `[B, D]` each; arguments as of `forward`."""
        run = partial(self.forward, state, t, condition)
        layers = range(1, len(self.blocks) + 1)
        patches = self.num_prefix_tokens
        _, means = run_and_keep(run, list(self.blocks), layers, keep=lambda tokens: tokens[:, patches:].float().mean(1))
        return [means[layer] for layer in layers]
