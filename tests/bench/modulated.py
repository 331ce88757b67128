"""The modulated layers against the grouped convolution of the published code, forward and backward."""

import torch
import torch.nn.functional as F
from timing import best_times, table
from torch import Tensor

from vfm_vae.modules.modulated import modulated_pointwise

# Channels, sides and number of the modulated ConvNeXt layers of the f16d32 decoder at 256 px.
LAYERS = [(512, 8, 7), (512, 16, 7), (512, 32, 7), (512, 64, 7), (256, 128, 5), (128, 256, 5)]
BATCH = 2


def grouped_convolution(x: Tensor, weight: Tensor, style: Tensor) -> Tensor:
    """Per-sample weights as the groups of one convolution (Karras et al. 2020, appendix B)."""
    batch, channels, height, width = x.shape
    weights = weight * style[:, None]  # [B, O, I]
    weights = weights * torch.rsqrt(weights.square().sum(2, keepdim=True) + 1e-8)
    x = x.reshape(1, batch * channels, height, width)
    return F.conv2d(x, weights.reshape(-1, channels, 1, 1), groups=batch).view(batch, -1, height, width)


def compare(channels: int, side: int) -> dict[str, float]:
    """Seconds of either form, each in the memory layout that it is used with."""
    weight = torch.randn(4 * channels, channels, requires_grad=True)
    style = torch.randn(BATCH, channels, requires_grad=True)
    x, gradient = torch.randn(BATCH, channels, side, side), torch.randn(BATCH, 4 * channels, side, side)
    layouts = {"grouped": torch.contiguous_format, "ours": torch.channels_last}
    xs = {name: x.contiguous(memory_format=layout).requires_grad_() for name, layout in layouts.items()}
    gradients = {name: gradient.contiguous(memory_format=layout) for name, layout in layouts.items()}
    error = (grouped_convolution(x, weight, style) - modulated_pointwise(x, weight, style)).abs().max()
    assert error < 1e-3, f"the two forms differ by {error:.1e}"
    return best_times(
        grouped=lambda: grouped_convolution(xs["grouped"], weight, style).backward(gradients["grouped"]),
        ours=lambda: modulated_pointwise(xs["ours"], weight, style).backward(gradients["ours"]),
    )


def main() -> None:
    """Prints ratios, by size and over the whole decoder."""
    rows, total = [], {"grouped": 0.0, "ours": 0.0}
    for channels, side, count in LAYERS:
        times = compare(channels, side)
        rows.append((f"{channels} channels, {side}x{side}", f"{times['grouped'] / times['ours']:.2f}x"))
        total = {name: total[name] + count * times[name] for name in total}
    rows.append(("whole decoder (38 layers), wanted: 1.30x", f"{total['grouped'] / total['ours']:.2f}x"))
    table("Modulated 1x1 convolution, speed-up over the grouped form (wanted: never below 1)", rows)


if __name__ == "__main__":
    main()
