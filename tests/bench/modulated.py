"""The modulated layers against the grouped convolution of the published code, forward and backward.

Also against a convolution that is not modulated at all, which no form can be faster than.
"""

import os

import torch
import torch.nn.functional as F
from timing import best_times, table
from torch import Tensor

from vfm_vae.modules.modulated import demodulate, modulated_pointwise

# Channels, sides and number of the modulated ConvNeXt layers of the f16d32 decoder at 256 px.
LAYERS = [(512, 8, 7), (512, 16, 7), (512, 32, 7), (512, 64, 7), (256, 128, 5), (128, 256, 5)]
BATCH = 2


def grouped_convolution(x: Tensor, weight: Tensor, style: Tensor, bias: Tensor) -> Tensor:
    """Per-sample weights as the groups of one convolution (Karras et al. 2020, appendix B)."""
    batch, channels, height, width = x.shape
    weights = weight * style[:, None]  # [B, O, I]
    weights = weights * torch.rsqrt(weights.square().sum(2, keepdim=True) + 1e-8)
    x = x.reshape(1, batch * channels, height, width)
    y = F.conv2d(x, weights.reshape(-1, channels, 1, 1), groups=batch).view(batch, -1, height, width)
    return y + bias[:, None, None]


def ours(x: Tensor, weight: Tensor, style: Tensor, bias: Tensor) -> Tensor:
    """The decoder's form."""
    return modulated_pointwise(x, weight, style, bias, demodulate(weight, style))


def compare(channels: int, side: int) -> dict[str, float]:
    """Seconds of either form, each in the memory layout that it is used with."""
    weight = torch.randn(4 * channels, channels, requires_grad=True)
    style = torch.randn(BATCH, channels, requires_grad=True)
    bias = torch.randn(4 * channels, requires_grad=True)
    x, gradient = torch.randn(BATCH, channels, side, side), torch.randn(BATCH, 4 * channels, side, side)
    layouts = {"grouped": torch.contiguous_format, "ours": torch.channels_last}
    xs = {name: x.contiguous(memory_format=layout).requires_grad_() for name, layout in layouts.items()}
    gradients = {name: gradient.contiguous(memory_format=layout) for name, layout in layouts.items()}
    difference = grouped_convolution(x, weight, style, bias) - ours(x, weight, style, bias)
    error = difference.abs().max()
    assert error < 1e-3, f"the two forms differ by {error:.1e}"
    return best_times(
        grouped=lambda: grouped_convolution(xs["grouped"], weight, style, bias).backward(gradients["grouped"]),
        ours=lambda: ours(xs["ours"], weight, style, bias).backward(gradients["ours"]),
        plain=lambda: F.conv2d(xs["ours"], weight[..., None, None], bias).backward(gradients["ours"]),
    )


def main() -> None:
    """Prints ratios, by size and over the whole decoder."""
    rows, total = [], {"grouped": 0.0, "ours": 0.0, "plain": 0.0}
    for channels, side, count in LAYERS:
        times = compare(channels, side)
        rows.append((f"{channels} channels, {side}x{side}", *ratios(times)))
        total = {name: total[name] + count * times[name] for name in total}
    rows.append(("whole decoder (38 layers); wanted: 1.30x", *ratios(total)))
    allocator = "tuned" if "MALLOC_TRIM_THRESHOLD_" in os.environ else "default"
    title = f"Modulated 1x1 convolution, {allocator} allocator: time of the grouped form over that of"
    table(title, rows, "", "ours (never below 1)", "an unmodulated convolution")


def ratios(times: dict[str, float]) -> tuple[str, str]:
    """Of the grouped form to the other two."""
    return f"{times['grouped'] / times['ours']:.2f}x", f"{times['grouped'] / times['plain']:.2f}x"


if __name__ == "__main__":
    main()
