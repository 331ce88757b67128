"""Matplotlib's figures as pixels."""

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


def pixels_of(figure: Figure) -> np.ndarray:
    """What a figure shows, uint8 `[height, width, 3]`; no window and no global state of matplotlib is involved."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
