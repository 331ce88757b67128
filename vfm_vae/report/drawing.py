"""Curves and heat maps as SVG, drawn in the colours of the page; texts that others chose stay out of them."""

import base64
import io
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from markupsafe import Markup
from matplotlib import colormaps
from numpy.typing import NDArray
from PIL import Image

WIDTH, HEIGHT = 340, 190
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 8, 24
NUM_COLOURS = 8  # of the page, which has them as --c0 and so on
LOGARITHMIC = 30.0  # ratio of values from which an axis is


class Trace(NamedTuple):
    """A line of a chart.

    Attributes:
        at: Positions along the axis.
        values: Its values.
        colour: Number of its colour; or a colour of its own.
        has_dots: Whether each value is shown as a dot.
    """

    at: NDArray[np.float64]
    values: NDArray[np.float64]
    colour: int | str
    has_dots: bool = False


def thinned(trace: Trace, limit: int) -> Trace:
    """A trace of so many values at most: means over values that lie beside one another, and their last position."""
    if len(trace.at) <= limit:
        return trace
    groups = np.array_split(np.arange(len(trace.at)), limit)
    at = np.array([trace.at[group[-1]] for group in groups])
    return trace._replace(at=at, values=np.array([trace.values[group].mean() for group in groups]))


def chart(
    traces: Sequence[Trace], marks: Sequence[float] = (), end: float | None = None, linear: bool = False
) -> Markup:
    """Lines over a common axis.

    Args:
        traces: The lines; at least one has a value.
        marks: Positions at which a vertical line is drawn.
        end: Where the axis ends; None for the last value.
        linear: Whether values are never shown on a logarithmic axis.
    """
    at = np.concatenate([trace.at for trace in traces])
    values = np.concatenate([trace.values for trace in traces])
    is_log = not linear and values.min() > 0 and values.max() / values.min() > LOGARITHMIC
    shown = [np.log10(trace.values) if is_log else trace.values for trace in traces]
    low, high = min(float(part.min()) for part in shown if len(part)), max(float(p.max()) for p in shown if len(p))
    margin = 0.06 * (high - low) or max(abs(high) * 0.1, 0.05)
    low, high = low - margin, high + margin
    first, last = min(0.0, float(at.min())), float(at.max()) if end is None else end
    last = last if last > first else first + 1

    def x(position: float) -> float:
        return LEFT + (position - first) / (last - first) * (WIDTH - LEFT - RIGHT)

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    parts = []
    for tick in _log_ticks(low, high) if is_log else ticks(low, high):
        place = y(math.log10(tick) if is_log else tick)
        parts.append(f'<path class="grid" d="M{LEFT} {place:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 5}" y="{place + 3.5:.1f}" text-anchor="end">{short(tick)}</text>')
    for tick in ticks(first, last, 5):
        anchor = "end" if x(tick) > WIDTH - 20 else "middle"
        parts.append(f'<text x="{x(tick):.1f}" y="{HEIGHT - 8}" text-anchor="{anchor}">{short(tick)}</text>')
    parts += [
        f'<path class="mark" d="M{x(mark):.1f} {TOP}V{HEIGHT - BOTTOM}"/>' for mark in marks if first < mark < last
    ]
    for trace, part in zip(traces, shown, strict=True):
        points = [(x(float(a)), y(float(v))) for a, v in zip(trace.at, part, strict=True)]
        style = _stroke(trace.colour)
        if len(points) > 1:
            way = " ".join(f"{a:.1f},{b:.1f}" for a, b in points)
            parts.append(f'<polyline {style} points="{way}"/>')
        if trace.has_dots or len(points) == 1:
            parts += [f'<circle {style} cx="{a:.1f}" cy="{b:.1f}" r="2.2"/>' for a, b in points]
    return Markup(f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">{"".join(parts)}</svg>')  # numbers alone


def _stroke(colour: int | str) -> str:
    return f'class="c{colour % NUM_COLOURS}"' if isinstance(colour, int) else f'style="stroke:{colour}"'


def heat_map(values: NDArray[np.float64], at: Sequence[float], rows: Sequence[str]) -> Markup:
    """Values as colours, the first row below.

    Args:
        values: `[rows, columns]`; nan is left clear.
        at: What the columns are, `[columns]`.
        rows: What the rows are; numbers.
    """
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    scaled = (values - low) / ((high - low) or 1)
    pixels = (colormaps["viridis"](np.nan_to_num(scaled)) * 255).astype(np.uint8)
    pixels[np.isnan(values), 3] = 0
    file = io.BytesIO()
    Image.fromarray(pixels[::-1]).save(file, "PNG")
    data = base64.b64encode(file.getvalue()).decode()
    height = max(HEIGHT, TOP + BOTTOM + 9 * len(rows))
    wide, tall = WIDTH - LEFT - 56, height - TOP - BOTTOM
    parts = [
        f'<image x="{LEFT}" y="{TOP}" width="{wide}" height="{tall}" preserveAspectRatio="none" '
        f'style="image-rendering:pixelated" href="data:image/png;base64,{data}"/>'
    ]
    for row in np.unique(np.linspace(0, len(rows) - 1, min(len(rows), 8)).round().astype(int)):
        place = TOP + tall * (1 - (row + 0.5) / len(rows))
        parts.append(f'<text x="{LEFT - 5}" y="{place + 3.5:.1f}" text-anchor="end">{int(rows[row])}</text>')
    for column in np.unique(np.linspace(0, len(at) - 1, min(len(at), 4)).round().astype(int)):
        place = LEFT + wide * (column + 0.5) / len(at)
        parts.append(f'<text x="{place:.1f}" y="{height - 8}" text-anchor="middle">{short(at[column])}</text>')
    bar = LEFT + wide + 8
    for step in range(20):
        red, green, blue, _ = (round(255 * part) for part in colormaps["viridis"]((step + 0.5) / 20))
        top = TOP + tall * (1 - (step + 1) / 20)
        parts.append(
            f'<rect x="{bar}" y="{top:.1f}" width="8" height="{tall / 20 + 0.5:.1f}" fill="rgb({red},{green},{blue})"/>'
        )
    parts.append(f'<text x="{bar + 12}" y="{TOP + 9}">{high:.4g}</text>')
    parts.append(f'<text x="{bar + 12}" y="{TOP + tall}">{low:.4g}</text>')
    return Markup(f'<svg viewBox="0 0 {WIDTH} {height}" role="img">{"".join(parts)}</svg>')  # numbers alone


def shade(fraction: float) -> str:
    """A colour between two, for lines in an order."""
    red, green, blue, _ = (round(255 * part) for part in colormaps["viridis"](0.08 + 0.8 * fraction))
    return f"rgb({red},{green},{blue})"


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers between two."""
    raw = (high - low) / count
    if not raw or not math.isfinite(raw):
        return [low]
    size = 10.0 ** math.floor(math.log10(raw))
    step = next((factor * size for factor in (1, 2, 2.5, 5) if factor * size >= raw), 10 * size)
    first = math.ceil(low / step)
    return [number * step for number in range(first, math.floor(high / step + 1e-9) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    decades = range(math.floor(low), math.ceil(high) + 1)
    factors = (1,) if high - low > 2 else (1, 3) if high - low > 1 else (1, 2, 5)
    found = [factor * 10.0**decade for decade in decades for factor in factors]
    inside = [tick for tick in found if low <= math.log10(tick) <= high]
    return inside[:: max(1, len(inside) // 5)]


def short(number: float) -> str:
    """A number of an axis, such as 8k or 20M."""
    for size, letter in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size:
            return f"{number / size:.4g}{letter}"
    return "0" if abs(number) < 1e-12 else f"{number:.4g}"
