"""A picture of how a value develops along training, block by block."""

from collections.abc import Sequence

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from vfm_vae.figures import pixels_of


def block_heat_map(values: Tensor, images_seen: Sequence[int], title: str) -> Tensor:
    """Draws values as colours, a row for each block (the first below) and a column for each time of measuring.

    Args:
        values: `[blocks, measurements]`; nan is left white.
        images_seen: Training images at each measurement, `[measurements]`.
        title: Above the picture.

    Returns:
        uint8 `[3, height, width]`.
    """
    num_blocks, num_columns = values.shape
    figure = Figure(figsize=(max(4.5, min(12, 2.5 + 0.4 * num_columns)), max(2.5, 1.2 + 0.22 * num_blocks)), dpi=100)
    axes = figure.add_subplot()
    picture = axes.imshow(values.numpy(), origin="lower", aspect="auto", interpolation="nearest", cmap="viridis")
    shown = np.unique(np.linspace(0, num_columns - 1, min(num_columns, 6)).round().astype(int))
    axes.set_xticks(shown, [f"{images_seen[column]:,}" for column in shown], rotation=20)
    rows = np.unique(np.linspace(0, num_blocks - 1, min(num_blocks, 10)).round().astype(int))
    axes.set_yticks(rows, [str(row + 1) for row in rows])
    axes.set_xlabel("images seen")
    axes.set_ylabel("block")
    axes.set_title(title, fontsize=9)
    figure.colorbar(picture)
    figure.tight_layout()
    return torch.from_numpy(pixels_of(figure)).permute(2, 0, 1)
