"""Operations on maps that keep them in channels-last memory, even where PyTorch's own do not.

On CUDA, `F.group_norm`, `F.pixel_shuffle` and replicate padding return contiguous maps whatever they are given, and the
convolutions that follow then use kernels that are several times slower. Here these operations are views of
`[B, H, W, C]` and reductions over them, which the compiler can fuse. On a CPU, PyTorch's own kernels keep the layout
and are faster.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial, reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vfm_vae.compilation import is_compiled


def uses_native_kernels(x: Tensor) -> bool:
    """Whether PyTorch's own kernels are right for `x`: on a CPU, outside of compiled code."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def in_fast_layout(x: Tensor) -> Tensor:
    """Maps `[B, C, H, W]` in the memory layout in which convolutions are fast; on a CPU any will do."""
    return x if uses_native_kernels(x) else x.contiguous(memory_format=torch.channels_last)


def compute_precision(x: Tensor) -> torch.dtype:
    """The precision of matrix products that take `x`: autocast's where it is on, otherwise that of `x`."""
    device = x.device.type
    autocasts = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if autocasts else x.dtype


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """A context that turns autocast off on the device of `x`."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


def as_pixels(x: Tensor) -> Tensor:
    """`[B, C, H, W]` as pixels `[B, HW, C]`, a view where the memory is channels-last."""
    pixels = x.permute(0, 2, 3, 1).flatten(1, 2)
    # The compiler treats views of different tensors differently; a detached tensor is no view.
    return pixels if pixels.requires_grad else pixels.detach()


def as_map(pixels: Tensor, size: Sequence[int]) -> Tensor:
    """Pixels `[B, HW, C]` as `[B, C, H, W]` of `size` (H, W), a view in channels-last memory."""
    return pixels.unflatten(1, tuple(size)).permute(0, 3, 1, 2)


def group_moments(x: Tensor, num_groups: int, eps: float) -> tuple[Tensor, Tensor]:
    """Mean and inverse standard deviation of each group of channels (Wu & He 2018, arXiv 1803.08494), in float32.

    Moments are taken of each channel first, then combined within groups, so that memory is read in order.

    Args:
        x: `[B, P, C]`, P pixels.
        num_groups: Groups of adjacent channels.
        eps: Added to the variance.

    Returns:
        Those of its group for each channel, `[B, 1, C]` each.
    """
    variances, means = torch.var_mean(x.float(), dim=1, correction=0)  # [B, C] each
    variances, means = variances.unflatten(1, (num_groups, -1)), means.unflatten(1, (num_groups, -1))
    mean = means.mean(2, keepdim=True)  # [B, G, 1]
    variance = (variances + (means - mean).square()).mean(2, keepdim=True)
    inverse = torch.rsqrt(variance + eps)
    of_mean, of_inverse = (moment.expand_as(means).flatten(1).unsqueeze(1) for moment in (mean, inverse))
    return of_mean, of_inverse


class GroupNorm(nn.GroupNorm):
    """Group norm that keeps the memory layout and precision of its input; it computes in float32."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalises `[B, C, H, W]`."""
        if uses_native_kernels(x):
            return super().forward(x)
        with without_autocast(x):
            run = self.normalise
            if not is_compiled(self, "normalise"):  # passes that are not fused would keep float32 copies for autograd
                run = partial(checkpoint, run, use_reentrant=False, preserve_rng_state=False)
            return as_map(run(as_pixels(x)), x.shape[2:])

    def normalise(self, pixels: Tensor) -> Tensor:
        """Normalises `[B, P, C]`."""
        mean, inverse = group_moments(pixels, self.num_groups, self.eps)
        return ((pixels - mean) * inverse * self.weight + self.bias).to(pixels.dtype)


class Pointwise(nn.Conv2d):
    """A 1x1 convolution, computed as one matrix product over all pixels except on a CPU.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        bias: Whether there is a bias.
    """

    def __init__(self, in_channels: int, out_channels: int, bias: bool = True):
        super().__init__(in_channels, out_channels, 1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Maps `[B, C_in, H, W]` to `[B, C_out, H, W]`."""
        return pointwise(x, self.weight.flatten(1), self.bias)


def pointwise(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The function that `Pointwise` computes.

    Args:
        x: `[B, I, H, W]`.
        weight: `[O, I]`.
        bias: `[O]`.
    """
    if uses_native_kernels(x):
        return F.conv2d(x, weight[:, :, None, None], bias)
    return as_map(F.linear(as_pixels(x), weight, bias), x.shape[2:])


class PixelUnshuffle(nn.PixelUnshuffle):
    """`F.pixel_unshuffle` as a module."""

    def forward(self, x: Tensor) -> Tensor:
        """Maps `[B, C, H·f, W·f]` to `[B, C·f², H, W]`."""
        return pixel_unshuffle(x, self.downscale_factor)


def pixel_unshuffle(x: Tensor, factor: int) -> Tensor:
    """`F.pixel_unshuffle`: `[B, C, H·f, W·f]` to `[B, C·f², H, W]`."""
    if factor == 1:
        return x
    if uses_native_kernels(x):
        return F.pixel_unshuffle(x, factor)
    pixels = x.permute(0, 2, 3, 1).unflatten(2, (-1, factor)).unflatten(1, (-1, factor))  # [B, H, f, W, f, C]
    parts = [part for row in pixels.unbind(2) for part in row.unbind(3)]  # [B, H, W, C] each
    return torch.stack(parts, dim=4).flatten(3).permute(0, 3, 1, 2)


class PixelShuffle(nn.PixelShuffle):
    """`F.pixel_shuffle` as a module."""

    def forward(self, x: Tensor) -> Tensor:
        """Maps `[B, C·f², H, W]` to `[B, C, H·f, W·f]`."""
        if self.upscale_factor == 1:
            return x
        if uses_native_kernels(x):
            return super().forward(x)
        return self.on_pixels(_of_known_channels(x)).permute(0, 3, 1, 2)

    def on_pixels(self, x: Tensor) -> Tensor:
        """Maps `[B, H, W, C·f²]` to `[B, H·f, W·f, C]`."""
        x = x.unflatten(3, (-1, self.upscale_factor, self.upscale_factor))  # [B, H, W, C, f, f]
        if torch.compiler.is_compiling():
            return x.permute(0, 1, 4, 2, 5, 3).flatten(3, 4).flatten(1, 2)
        # The same without an intermediate copy.
        rows = [torch.stack(row.unbind(4), dim=3).flatten(2, 3) for row in x.unbind(4)]  # [B, H, W·f, C] each
        return torch.stack(rows, dim=2).flatten(1, 2)


class Blur(nn.Module):
    """Fixed separable binomial blur with replicate padding.

    Args:
        taps: Unnormalised one-dimensional kernel of odd length.
    """

    kernel: Tensor

    def __init__(self, taps: Sequence[int]):
        super().__init__()
        self.taps = [tap / sum(taps) for tap in taps]
        self.padding = len(taps) // 2
        kernel = torch.tensor(self.taps)
        self.register_buffer("kernel", torch.outer(kernel, kernel)[None, None], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Blurs every channel of `[B, C, H, W]`."""
        if not uses_native_kernels(x):
            return self.on_pixels(_of_known_channels(x)).permute(0, 3, 1, 2)
        x = F.pad(x, [self.padding] * 4, mode="replicate")
        return F.conv2d(x, self.kernel.to(x.dtype).expand(x.shape[1], -1, -1, -1), groups=x.shape[1])

    def on_pixels(self, x: Tensor) -> Tensor:
        """Blurs `[B, H, W, C]` by sums of shifted maps, whose gradient needs nothing to be kept."""
        for dim in (1, 2):
            side = x.shape[dim]
            first, last = x.narrow(dim, 0, 1), x.narrow(dim, side - 1, 1)
            extended = torch.cat([*[first] * self.padding, x, *[last] * self.padding], dim)
            shifted = (tap * extended.narrow(dim, offset, side) for offset, tap in enumerate(self.taps))
            x = reduce(torch.add, shifted)
        return x


def _of_known_channels(x: Tensor) -> Tensor:
    """`[B, C, H, W]` as `[B, H, W, C]`, with a number of channels that compiled code may take as constant."""
    pixels = x.permute(0, 2, 3, 1)
    torch._dynamo.mark_static(pixels, 3)
    return pixels
