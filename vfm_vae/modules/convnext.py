"""The passes of a modulated ConvNeXt layer, forward and backward, for fusing them and for computing them again.

`x + scale · C gelu(d · E(s · norm(D x)) + e)`: a depthwise convolution D, group norm, an expanding product E whose
input channels are scaled by the style s and whose outputs by the demodulation d, GELU, and a contracting product C.
What follows the convolution is written as passes over pixels `[B, P, C]`, in which a compiler fuses everything but the
matrix products. `Recomputed` keeps nothing but the input for the backward pass.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vfm_vae.compilation import compiled
from vfm_vae.modules.maps import as_map, as_pixels, group_moments, without_autocast

LARGEST_EXPANDED, LARGEST_FUSED = 2**27, 2**30
"""How many expanded numbers are computed at a time, with and without compilation. Several copies of them are in memory
at once, in float32 if passes are not fused; and from 2^31 numbers on, kernels would need 64-bit indices."""


class Convolution(NamedTuple):
    """The depthwise convolution.

    Attributes:
        kernel: `[C, 1, k, k]`.
        bias: `[C]`.
        noise: Added to the result, `[1, 1, H, W]`, if there is any.
    """

    kernel: Tensor
    bias: Tensor
    noise: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        """Maps `[B, C, H, W]` to pixels `[B, P, C]`."""
        y = F.conv2d(x, self.kernel.to(x.dtype), self.bias.to(x.dtype), padding=self._padding, groups=len(self.kernel))
        return as_pixels(y if self.noise is None else y + self.noise.to(x.dtype))

    def gradients(self, x: Tensor, gradient: Tensor, of_weights: bool) -> tuple[Tensor, *tuple[Tensor | None, ...]]:
        """Gradients of the input, the kernel, the bias and the noise, from that of the result, `[B, P, C]`."""
        gradient = as_map(gradient, x.shape[2:])
        of_x, *of_parameters = torch.ops.aten.convolution_backward(
            gradient, x, self.kernel.to(x.dtype), [len(self.kernel)], [1, 1], [self._padding] * 2, [1, 1], False,
            [0, 0], len(self.kernel), [True, of_weights, of_weights],
        )  # fmt: skip
        of_noise = None if self.noise is None else gradient.float().sum((0, 1), keepdim=True)
        return of_x, *(of if of is None else of.to(self.kernel.dtype) for of in of_parameters), of_noise

    @property
    def _padding(self) -> int:
        return self.kernel.shape[-1] // 2


class Condition(NamedTuple):
    """How the global latent modulates a layer.

    Attributes:
        style: Scale of every channel, `[B, C]`.
        demodulation: Scale of every expanded channel, `[B, 4C]`.
    """

    style: Tensor
    demodulation: Tensor


class Weights(NamedTuple):
    """The parameters of a layer other than its convolution's, in float32.

    Attributes:
        norm: Gain of the group norm, `[C]`.
        norm_bias: `[C]`.
        expand: `[4C, C]`.
        expand_bias: `[4C]`.
        contract: `[C, 4C, 1, 1]`.
        contract_bias: `[C]`.
        scale: Layer scale, `[C, 1, 1]`.
    """

    norm: Tensor
    norm_bias: Tensor
    expand: Tensor
    expand_bias: Tensor
    contract: Tensor
    contract_bias: Tensor
    scale: Tensor


class Shape(NamedTuple):
    """The group norm's options: its number of groups, and what it adds to variances."""

    groups: int
    eps: float


def forward(pixels: Tensor, convolved: Tensor, condition: Condition, weights: Weights, shape: Shape) -> Tensor:
    """The layer after its convolution, in the precision of `pixels`; statistics and sums are float32.

    Args:
        pixels: The layer's input, `[B, P, C]`.
        convolved: The output of the convolution, `[B, P, C]`.
        condition: Style and demodulation.
        weights: The layer's other parameters.
        shape: Options of its norm.

    Returns:
        `[B, P, C]`.
    """
    *_, hidden = _hidden(convolved, condition, weights, shape)
    before = hidden * condition.demodulation.unsqueeze(1) + weights.expand_bias  # [B, P, 4C], float32
    y = F.linear(F.gelu(before).to(pixels.dtype), weights.contract.flatten(1).to(pixels.dtype))  # [B, P, C]
    return (pixels + weights.scale.flatten() * (y + weights.contract_bias)).to(pixels.dtype)


def _hidden(
    convolved: Tensor, condition: Condition, weights: Weights, shape: Shape
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The first half: centred pixels and their inverse deviation, their modulated form, and the expanded pixels.

    Factors that are one number for each sample and channel are multiplied first, so that pixels are read only once.
    """
    mean, inverse = group_moments(convolved, shape.groups, shape.eps)  # [B, 1, C]
    style = condition.style.unsqueeze(1)
    centred = convolved - mean  # [B, P, C], float32
    modulated = centred * (inverse * weights.norm * style) + weights.norm_bias * style
    modulated = modulated.to(convolved.dtype)
    return centred, inverse, modulated, F.linear(modulated, weights.expand.to(convolved.dtype))


def backward(
    g: Tensor, convolved: Tensor, condition: Condition, weights: Weights, shape: Shape, of_weights: bool
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """The gradients after the convolution, computed from the convolution's output alone.

    The contracting product is not computed again. Its result would be needed only for the gradient of the layer scale,
    which is `Σ_p g · (C a) = Σ_k C · (Σ_p g aᵀ)`; that inner sum is the gradient of C before scaling.

    Args:
        g: Gradient of the layer's output, `[B, P, C]`.
        convolved: As in the forward pass, `[B, P, C]`.
        condition: As in the forward pass.
        weights: As in the forward pass.
        shape: As in the forward pass.
        of_weights: Whether to compute gradients of the weights.

    Returns:
        Gradients of `convolved`, the style and the demodulation, and those of the weights in the order of `Weights`
        (an empty list unless `of_weights`).
    """
    dtype = convolved.dtype
    centred, inverse, modulated, hidden = _hidden(convolved, condition, weights, shape)

    # Contracting product and GELU.
    before = hidden * condition.demodulation.unsqueeze(1) + weights.expand_bias
    scale, contract = weights.scale.flatten(), weights.contract.flatten(1)
    of_after = g @ (scale.unsqueeze(1) * contract).to(dtype)  # [B, P, 4C]
    of_before = of_after * _gelu_slope(before)
    of_hidden = (of_before * condition.demodulation.unsqueeze(1)).to(dtype)

    # Expanding product, modulation and norm. Everything about the norm follows from two sums over pixels.
    of_modulated = of_hidden @ weights.expand.to(dtype)  # [B, P, C]
    plain = of_modulated.float().sum(1)  # [B, C]
    weighted = (of_modulated * centred).sum(1) * inverse.squeeze(1)
    of_style = weights.norm * weighted + weights.norm_bias * plain
    gain = condition.style * weights.norm  # [B, C]
    mean, slope = (_group_mean(gain * total, shape.groups) / centred.shape[1] for total in (plain, weighted))
    of_convolved = of_modulated * (inverse * gain.unsqueeze(1)) - centred * (inverse.square() * slope) - inverse * mean
    of_convolved = of_convolved.to(dtype)
    if not of_weights:
        return of_convolved, of_style, (of_before * hidden).sum(1), []

    # Likewise the gradient of the demodulation from a sample's of E: `Σ_p h · (E m) = Σ_c E · (Σ_p h mᵀ)`.
    by_sample = torch.bmm(of_hidden.mT, modulated).float()  # [B, 4C, C]
    of_demodulation = (by_sample * weights.expand).sum(2) / condition.demodulation
    unscaled = (g.flatten(0, 1).mT @ F.gelu(before).to(dtype).flatten(0, 1)).float()  # [C, 4C]
    summed = g.float().sum((0, 1))  # [C]
    of_all = [
        (weighted * condition.style).sum(0),  # norm
        (plain * condition.style).sum(0),
        by_sample.sum(0),  # expand
        (of_hidden.float().sum(1) / condition.demodulation).sum(0),
        (scale.unsqueeze(1) * unscaled).view_as(weights.contract),
        scale * summed,
        ((unscaled * contract).sum(1) + weights.contract_bias * summed).view_as(weights.scale),
    ]
    return of_convolved, of_style, of_demodulation, of_all


def _gelu_slope(x: Tensor) -> Tensor:
    """Derivative of the exact GELU: `Φ(x) + x φ(x)` (Hendrycks & Gimpel 2016, arXiv 1606.08415)."""
    return 0.5 * (1 + torch.erf(x * 0.7071067811865476)) + x * torch.exp(-0.5 * x.square()) * 0.3989422804014327


def _group_mean(x: Tensor, groups: int) -> Tensor:
    """`[B, C]` to the mean of each channel's group, `[B, 1, C]`."""
    grouped = x.unflatten(1, (groups, -1))
    return grouped.mean(2, keepdim=True).expand_as(grouped).flatten(1).unsqueeze(1)


_gradients_of_weights = True


@contextmanager
def no_gradients_of_weights() -> Iterator[None]:
    """Backward passes in this context compute no gradients for the weights of `Recomputed` layers."""
    global _gradients_of_weights
    _gradients_of_weights = False
    try:
        yield
    finally:
        _gradients_of_weights = True


class Recomputed(torch.autograd.Function):
    """The layer, keeping only its input: the backward pass computes the rest again, except the contracting product."""

    @staticmethod
    def forward(ctx: Any, shape: Shape, compile: bool, x: Tensor, *tensors: Tensor | None) -> Tensor:
        """Maps `x: [B, C, H, W]`; `tensors` are those of `Condition`, `Convolution` and `Weights`."""
        ctx.save_for_backward(x, *tensors)
        ctx.shape, ctx.compile = shape, compile
        return layer(*_sorted(x, *tensors), shape, compile)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients in the order of the arguments."""
        x, condition, convolution, weights = _sorted(*ctx.saved_tensors)
        of_weights = _gradients_of_weights and any(ctx.needs_input_grad[-len(weights) :])
        run = compiled(backward, dynamic=True) if ctx.compile else backward
        parts: list[tuple[Any, ...]] = []
        with without_autocast(x):
            for g, part, told in _chunks(ctx.compile, gradient.to(x.dtype), x, condition):
                of_convolved, *of_condition, of_tail = run(
                    as_pixels(g), convolution(part), told, weights, ctx.shape, of_weights
                )
                of_x, *of_convolution = convolution.gradients(part, of_convolved, of_weights)
                parts.append((of_x + g, *of_condition, *of_convolution, *(of_tail or [None] * len(weights))))
        columns = enumerate(zip(*parts, strict=True))  # the first three gradients have one row for each sample
        return None, None, *(None if column[0] is None else _together(i < 3, column) for i, column in columns)


def layer(
    x: Tensor, condition: Condition, convolution: Convolution, weights: Weights, shape: Shape, compile: bool
) -> Tensor:
    """The whole layer, `[B, C, H, W]` to the same shape, with or without compiled passes."""
    run = compiled(forward, dynamic=True) if compile else forward
    parts = [
        run(as_pixels(part), convolution(part), told, weights, shape)
        for _, part, told in _chunks(compile, x, x, condition)
    ]
    return as_map(_together(True, parts), x.shape[2:])


def _sorted(x: Tensor, *tensors: Any) -> tuple[Tensor, Condition, Convolution, Weights]:
    """The arguments of `layer`, detached where compiling again for tensors that require gradients would be a waste."""
    return (
        x.detach(),
        Condition(*(tensor.detach() for tensor in tensors[:2])),
        Convolution(*tensors[2:5]),
        Weights(*tensors[5:]),
    )


def _chunks(
    compile: bool, gradient: Tensor, x: Tensor, condition: Condition
) -> Iterator[tuple[Tensor, Tensor, Condition]]:
    """Yields a few samples at a time, in parts of about equal size that do not expand to too many numbers."""
    parts = math.ceil(4 * x.numel() / (LARGEST_FUSED if compile else LARGEST_EXPANDED))
    samples = math.ceil(len(x) / parts)
    if samples == len(x):
        yield gradient, x, condition
        return
    for start in range(0, len(x), samples):
        part = slice(start, start + samples)
        yield gradient[part], x[part], Condition(*(tensor[part] for tensor in condition))


def _together(by_sample: bool, parts: Sequence[Tensor]) -> Tensor:
    """Puts together what was computed for a few samples at a time: concatenated by sample, or summed."""
    if len(parts) == 1:
        return parts[0]
    return torch.cat(tuple(parts)) if by_sample else torch.stack(tuple(parts)).sum(0)
