"""A sweep as a heat map: scale by scale, for each interval and each average."""

from collections.abc import Sequence
from itertools import product
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from ldm.sweep.goal import Goal
from ldm.sweep.grid import Setting
from ldm.sweep.records import Record

NAMES = {"start": "guidance begins at", "end": "guidance ends at", "length": "average"}
MAX_COLUMNS = 4  # panels beside each other
LEFT_OUT = float("nan")  # in the place of settings that are not part of the grid; they stay white


def heat_map(rows: Sequence[tuple[Setting, Record]], best: Setting, goal: Goal) -> Figure:
    """Draws the number that decides: scales from left to right, and upwards whatever has the most values.

    Of interval and average, what does not go upwards has a panel for each of its values. The best setting is framed.

    Args:
        rows: Settings with their records.
        best: The best one.
        goal: The number that decides.
    """
    values = {setting: record.metrics.get(goal.logged) for setting, record in rows}
    axes = {name: list(dict.fromkeys(getattr(setting, name) for setting in values)) for name in ("scale", *NAMES)}
    upwards = max(NAMES, key=lambda name: len(axes[name]))
    others = [name for name in NAMES if name != upwards]
    panels = [dict(zip(others, each, strict=True)) for each in product(*(axes[name] for name in others))]
    columns = min(len(panels), MAX_COLUMNS)
    height = -(-len(panels) // columns)
    size = (1.4 + (0.75 * len(axes["scale"]) + 0.4) * columns, 1.0 + (0.5 * len(axes[upwards]) + 0.7) * height)
    figure = Figure(figsize=(max(size[0], 4.5), size[1]), dpi=100, layout="constrained")
    grid = figure.subplots(height, columns, squeeze=False, sharex=True, sharey=True)
    finite = [value for value in values.values() if value is not None]
    colours = _colours(finite, goal)
    for panel, chosen in zip(grid.flat, panels, strict=False):
        cells = [[Setting(**{"scale": x, upwards: y} | chosen) for x in axes["scale"]] for y in axes[upwards]]
        shown = _panel(panel, [[values.get(cell, LEFT_OUT) for cell in row] for row in cells], colours)
        for y, row in enumerate(cells):
            for x, cell in enumerate(row):
                if cell.measured == best.measured:
                    panel.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, fill=False, edgecolor="red", linewidth=2.5))
        panel.set_xticks(range(len(axes["scale"])), [f"{scale:g}" for scale in axes["scale"]])
        panel.set_yticks(range(len(axes[upwards])), [_value(value) for value in axes[upwards]])
        panel.set_title(_title(chosen, axes), fontsize="small")
    for panel in list(grid.flat)[len(panels) :]:
        panel.set_axis_off()
    figure.supxlabel("guidance scale", fontsize="medium")
    figure.supylabel(NAMES[upwards], fontsize="medium")
    figure.suptitle(f"{goal.name}, {goal.direction}", fontsize="medium")
    bar = figure.colorbar(shown, ax=list(grid.flat), format="%.3g", ticks=_ticks(finite))
    bar.minorticks_off()
    return figure


def _panel(panel: Axes, values: list[list[float | None]], colours: dict[str, Any]) -> Any:
    """One panel, with its numbers."""
    numbers = np.array([[LEFT_OUT if value is None else value for value in row] for row in values])
    shown = panel.imshow(numbers, origin="lower", aspect="auto", **colours)
    for (y, x), number in np.ndenumerate(numbers):
        text = "not\nfinite" if values[y][x] is None else "" if np.isnan(number) else f"{number:.3g}"
        is_dark = not np.isnan(number) and sum(shown.cmap(shown.norm(number))[:3]) < 1.5
        panel.text(x, y, text, ha="center", va="center", fontsize="small", color="white" if is_dark else "black")
    return shown


def _colours(finite: list[float], goal: Goal) -> dict[str, Any]:
    """Bright is better; distances, which may differ by orders of magnitude, by their logarithms."""
    low, high = min(finite), max(finite)
    norm = LogNorm(low, high) if goal.lower and 0 < low < high else Normalize(low, high)
    return {"cmap": "viridis_r" if goal.lower else "viridis", "norm": norm}


def _ticks(finite: list[float]) -> list[float]:
    """Some of the numbers, from the smallest to the largest."""
    return [float(number) for number in np.quantile(finite, [0, 0.25, 0.5, 0.75, 1])]


def _value(value: float | None) -> str:
    return "own" if value is None else f"{value:g}"


def _title(chosen: dict[str, Any], axes: dict[str, list[Any]]) -> str:
    """What a panel shows, as far as there are several."""
    return ", ".join(f"{NAMES[name]} {_value(value)}" for name, value in chosen.items() if len(axes[name]) > 1)
