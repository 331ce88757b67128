"""Tokenizers side by side: a table of numbers, and a picture of reconstructions and their errors."""

import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import torch
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from vfm_vae.figures import pixels_of

LABELS = {
    "psnr": "PSNR in dB",
    "ssim": "SSIM",
    "lpips": "LPIPS",
    "rfid": "rFID",
    "rsfid": "rsFID",
    "ris": "rIS",
    "cknna/latent": "CKNNA",
}
LOWER_IS_BETTER = ("lpips", "fd_", "rfid", "rsfid")

# Sizes in the picture, in pixels.
DPI = 100
CELL = 192  # about the side that small images are enlarged to
GAP, GROUP_GAP, MARGIN = 6, 24, 10
TITLE, LABEL, BAR, BAR_LABELS = 36, 20, 14, 60
LETTER = 8  # about the width of one in a title
BRIGHTEST = 0.995  # quantile of the errors that takes the brightest colour, with all above it


class Row(NamedTuple):
    """A row of the table.

    Attributes:
        label: What the numbers are.
        cells: The numbers as text, one for each tokenizer.
        best: Positions of the best numbers; none where nothing is better than another.
    """

    label: str
    cells: list[str]
    best: frozenset[int] = frozenset()


def sections(entries: Mapping[str, Mapping[str, Any]], image_size: int) -> list[list[Row]]:
    """The table's rows: reconstruction, alignment, sizes, times.

    Args:
        entries: What was measured, by the tokenizers' names: `metrics`, `latent`, `parameters` and `seconds` as
            `vfm_vae.comparing.Measured` has them.
        image_size: Height and width of the images in pixels.
    """
    columns = list(entries.values())
    names = list(dict.fromkeys(name for entry in columns for name in entry["metrics"]))
    rows = {name: _metric(name, [entry["metrics"].get(name) for entry in columns]) for name in names}
    aligned = [row for name, row in rows.items() if "cknna/" in name]
    return [
        [row for name, row in rows.items() if "cknna/" not in name],
        *([aligned] if aligned else []),
        [
            Row("latent", ["x".join(map(str, entry["latent"])) for entry in columns]),
            Row("latent values per pixel", [f"{math.prod(entry['latent']) / image_size**2:.4g}" for entry in columns]),
            *(
                Row(f"parameters, {label}", [_count(entry["parameters"][part]) for entry in columns])
                for part, label in {"encoder": "encoder", "decoder": "decoder", "vfm": "frozen VFM"}.items()
            ),
        ],
        [
            _row(f"{part}, ms per image", [1000 * entry["seconds"][part] for entry in columns], min)
            for part in ("encode", "decode")
        ],
    ]


def terminal_table(entries: Mapping[str, Mapping[str, Any]], image_size: int, title: str) -> Table:
    """The table for a terminal; arguments as of `sections`. The best numbers are bold."""
    table = Table(title=title)
    table.add_column("", no_wrap=True)
    for name in entries:
        table.add_column(escape(name), justify="right")
    for rows in sections(entries, image_size):
        for row in rows:
            table.add_row(row.label, *(f"[bold]{c}[/bold]" if n in row.best else c for n, c in enumerate(row.cells)))
        table.add_section()
    return table


def markdown_table(entries: Mapping[str, Mapping[str, Any]], image_size: int) -> str:
    """The table in Markdown; arguments as of `sections`. The best numbers are bold."""
    lines = [["", *(name.replace("|", r"\|") for name in entries)], ["---", *("---:" for _ in entries)]]
    for row in (row for rows in sections(entries, image_size) for row in rows):
        lines.append([row.label, *(f"**{cell}**" if n in row.best else cell for n, cell in enumerate(row.cells))])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _metric(name: str, values: Sequence[float | None]) -> Row:
    is_lower = name.startswith(LOWER_IS_BETTER)
    if name.startswith("se_cknna/"):
        label = f"SE-CKNNA, {name.rpartition('/')[2].replace('_', ' ')}"
    else:
        label = LABELS.get(name, f"FD, {name.removeprefix('fd_')}")
    return _row(f"{label} {'↓' if is_lower else '↑'}", values, min if is_lower else max)


def _row(label: str, values: Sequence[float | None], best: Callable[..., float]) -> Row:
    cells = ["" if value is None else f"{value:.4g}" for value in values]
    known = [value for value in values if value is not None and not math.isnan(value)]
    winner = f"{best(known):.4g}" if len(values) > 1 and known else None
    return Row(label, cells, frozenset(number for number, cell in enumerate(cells) if cell == winner))


def _count(number: int) -> str:
    return f"{number / 1e6:.4g} M" if number else "0"


def picture(originals: Tensor, reconstructions: Mapping[str, Tensor]) -> np.ndarray:
    """Draws originals, each tokenizer's reconstructions, and their errors; a row for each image.

    An error is the absolute difference in levels of 255, averaged over colours. All have one scale.

    Args:
        originals: uint8 `[S, 3, H, W]`.
        reconstructions: Those of each tokenizer, by its name, of the same shape.

    Returns:
        uint8 `[height, width, 3]`; pixels of small images are whole numbers of pixels here.
    """
    differences = {name: images.float() - originals.float() for name, images in reconstructions.items()}
    errors = torch.stack([difference.abs().mean(1) for difference in differences.values()])  # [T, S, H, W]
    scale = Normalize(0, max(1.0, float(np.quantile(errors.numpy(), BRIGHTEST))))
    colours = matplotlib.colormaps["magma"](scale(errors.numpy()), bytes=True)[..., :3]  # [T, S, H, W, 3]
    groups = [
        torch.stack([originals]).permute(0, 1, 3, 4, 2).numpy(),
        torch.stack(list(reconstructions.values())).permute(0, 1, 3, 4, 2).numpy(),
        colours,
    ]
    layout = _Layout(len(originals), [len(group) for group in groups], originals.shape[2])
    pixels = _frame(layout, list(reconstructions), _decibels(differences), scale)
    for group, columns in enumerate(groups):
        for column, images in enumerate(columns):
            for row, image in enumerate(images):
                left, top = layout.place(group, column, row)
                cell = image.repeat(layout.zoom, 0).repeat(layout.zoom, 1)
                pixels[top : top + layout.cell, left : left + layout.cell] = cell
    return pixels


def _decibels(differences: Mapping[str, Tensor]) -> list[list[str]]:
    """PSNR of each image, as text, by tokenizer."""
    noise = [difference.double().square().mean(dim=(1, 2, 3)).tolist() for difference in differences.values()]
    return [[f"{10 * math.log10(255**2 / value):.1f} dB" if value else "exact" for value in row] for row in noise]


def _frame(layout: "_Layout", names: Sequence[str], decibels: Sequence[Sequence[str]], scale: Normalize) -> np.ndarray:
    """All but the images: titles, PSNR and colour bar, uint8 `[height, width, 3]`."""
    figure = Figure(figsize=(layout.width / DPI, layout.height / DPI), dpi=DPI)
    for group, titles in enumerate((["input"], names, [f"error of {name}" for name in names])):
        for column, title in enumerate(titles):
            wrapped = textwrap.fill(title, layout.cell // LETTER, max_lines=2, placeholder="…")
            layout.write(figure, layout.place(group, column, 0), -GAP, wrapped, "bottom", size=10)
    for column, texts in enumerate(decibels):
        for row, text in enumerate(texts):
            layout.write(figure, layout.place(1, column, row), layout.cell + GAP // 2, text, "top", size=9)
    bar = figure.add_axes(layout.bar())
    label = "|difference|, levels of 255"
    figure.colorbar(ScalarMappable(scale, "magma"), bar, extend="max", extendfrac=0.02, label=label)
    return pixels_of(figure)


class _Layout:
    """Where things are in the picture, in pixels from its upper left corner."""

    def __init__(self, num_rows: int, groups: Sequence[int], side: int) -> None:
        self.num_rows, self.groups = num_rows, groups
        self.zoom = max(1, round(CELL / side))
        self.cell = side * self.zoom
        self.height = MARGIN + TITLE + num_rows * (self.cell + LABEL + GAP) + MARGIN - GAP
        self.right = self.place(len(groups), 0, 0)[0]
        self.width = self.right + BAR + BAR_LABELS + MARGIN

    def place(self, group: int, column: int, row: int) -> tuple[int, int]:
        """Left and top of an image."""
        before = sum(self.groups[:group]) + column
        left = MARGIN + before * (self.cell + GAP) + group * (GROUP_GAP - GAP)
        return left, MARGIN + TITLE + row * (self.cell + LABEL + GAP)

    def write(self, figure: Figure, place: tuple[int, int], below: int, text: str, align: str, size: int) -> None:
        """Writes text in the middle of an image's width, so far below its upper edge."""
        x, y = place[0] + self.cell / 2, place[1] + below
        figure.text(x / self.width, 1 - y / self.height, text, ha="center", va=align, size=size, parse_math=False)

    def bar(self) -> tuple[float, float, float, float]:
        """The colour bar, in fractions of the figure from below: left, bottom, width, height."""
        top, bottom = MARGIN + TITLE, self.place(0, 0, self.num_rows - 1)[1] + self.cell
        return self.right / self.width, 1 - bottom / self.height, BAR / self.width, (bottom - top) / self.height
