"""The figures of a study."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from ldm.study.results import Curve, Results, deviation
from vfm_vae.figures import pixels_of
from vfm_vae.writing import write_picture

Pixels = NDArray[np.uint8]
PADDING = 2  # between the images of the grids that runs draw
SHOWN_IMAGES = 6  # in a row
LABEL_WIDTH, LETTER_WIDTH, DPI = 150, 6, 100  # in pixels, the first at least, and per inch
COLOURS = 256  # of a picture of photographs, which is a third as large then
STRENGTHS = {"noise": "standard deviation of the noise", "scale": "scale", "rotation": "rotation in degrees"}


def draw_figures(results: Results, folder: Path) -> dict[str, Path]:
    """Draws all figures into a folder, as PNG.

    Returns:
        Their files by what they show.
    """
    drawn = {
        "FD and class accuracy of samples along training": ("fd.png", curves(results)),
        "CKNNA of the denoisers' blocks along training": ("cknna_blocks.png", blocks(results)),
        "SE-CKNNA of latents by transformation": ("se_cknna.png", transformations(results)),
        "Reconstructions": ("reconstructions.png", reconstructions(results)),
        "Samples": ("samples.png", samples(results)),
    }
    files = {}
    for title, (name, figure) in drawn.items():
        if figure is None:
            continue
        files[title] = folder / name
        write_picture(files[title], pixels_of(figure), COLOURS)
    return files


def curves(results: Results) -> Figure:
    """Distances and class accuracy over steps: mean and a band of one standard deviation over seeds."""
    plan, titles = results.plan, _titles(results)
    figure = Figure(figsize=(4.2 * (len(plan.distances) + 1), 4.4), dpi=80, layout="constrained")
    axes = figure.subplots(1, len(plan.distances) + 1)
    for panel, distance in zip(axes, plan.distances, strict=False):
        for name, title in titles.items():
            _band(panel, results.samples(name, distance), title)
        panel.set(title=f"FD by the {distance}", xlabel="step", yscale="log")
    for name, title in titles.items():
        _band(axes[-1], results.curves[name]["val/class_accuracy"], title)
    axes[-1].set(title="class accuracy", xlabel="step")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize="small")
    return figure


def _titles(results: Results) -> dict[str, str]:
    """What figures call the diffusion models, by name, without those that only guide others."""
    partners = {guided.partner for guided in results.plan.guided.values()}
    return {name: each.title for name, each in results.plan.denoisers.items() if name not in partners}


def _band(panel: Axes, curve: Curve, title: str) -> None:
    mean, spread = curve.values.mean(0), np.nan_to_num(deviation(curve.values))
    (line,) = panel.plot(curve.steps, mean, marker=".", label=title)
    panel.fill_between(curve.steps, mean - spread, mean + spread, alpha=0.2, color=line.get_color())


def blocks(results: Results) -> Figure | None:
    """CKNNA of every block over steps, a heat map for each diffusion model, all on one scale."""
    titles, maps = _titles(results), {}
    for name in titles:
        if measured := results.blocks(name):
            maps[name] = np.array([curve.values.mean(0) for curve in measured.values()])
    if not maps:
        return None
    figure = Figure(figsize=(2.6 * len(maps) + 1, 3), dpi=80, layout="constrained")
    low, high = min(each.min() for each in maps.values()), max(each.max() for each in maps.values())
    axes = figure.subplots(1, len(maps), squeeze=False)[0]
    for panel, (name, values) in zip(axes, maps.items(), strict=True):
        steps = next(iter(results.blocks(name).values())).steps
        shown = panel.imshow(values, origin="lower", aspect="auto", vmin=low, vmax=high)
        panel.set_xticks(range(len(steps)), [str(step) for step in steps], fontsize="x-small")
        panel.set_yticks(range(len(values)), [str(number) for number in results.blocks(name)])
        panel.set_title(titles[name], fontsize="small")
        panel.set_xlabel("step")
    axes[0].set_ylabel("block")
    figure.colorbar(shown, ax=list(axes))
    return figure


def transformations(results: Results) -> Figure | None:
    """SE-CKNNA of each tokenizer over the strength of each kind of transformation."""
    if not results.tokenizers:
        return None
    figure = Figure(figsize=(12.6, 3.8), dpi=80, layout="constrained")
    axes = figure.subplots(1, len(STRENGTHS), sharey=True)
    for panel, (kind, title) in zip(axes, STRENGTHS.items(), strict=True):
        prefix = f"test/se_cknna/latent/{kind}_"
        for name, measures in results.tokenizers.items():
            strengths = {float(tag.removeprefix(prefix)): values for tag, values in measures.items() if prefix in tag}
            places = sorted(strengths)
            means = [strengths[place].mean() for place in places]
            errors = [float(np.nan_to_num(deviation(strengths[place]))) for place in places]
            panel.errorbar(places, means, errors, marker=".", capsize=3, label=results.plan.tokenizers[name].title)
        panel.set(xlabel=title)
    axes[0].set_ylabel("SE-CKNNA")
    axes[0].legend(fontsize="small")
    return figure


def reconstructions(results: Results) -> Figure | None:
    """The same images by each tokenizer, under the images themselves."""
    plan = results.plan
    rows: dict[str, list[Pixels]] = {}
    for name, tokenizer in plan.tokenizers.items():
        file = plan.tokenizer_run(name, plan.seeds[0]) / "images/val.png"
        if file.is_file():
            cells = _cells(file)
            rows.setdefault("images", [row[0] for row in cells])
            rows[tokenizer.title] = [row[1] for row in cells]
    return _picture(rows)


def samples(results: Results) -> Figure | None:
    """Samples of each diffusion model, of the same classes from the same noise."""
    plan = results.plan
    rows: dict[str, list[Pixels]] = {}
    for name, title in _titles(results).items():
        file = plan.denoiser_run(name, plan.seeds[0]) / "images/samples_guidance_1.png"
        if file.is_file():
            rows[title] = [row[0] for row in _cells(file)]
    return _picture(rows)


def _cells(file: Path) -> list[list[Pixels]]:
    """The images of a grid, by row and column; they are square and as many as fit in the grid's smaller side.

    A grid has a padding on all sides, and its images one between them.
    """
    with Image.open(file) as picture:
        pixels = np.asarray(picture.convert("RGB"))
    side = _side(pixels)
    step = side + PADDING
    rows, columns = ((length - PADDING) // step for length in pixels.shape[:2])
    starts = [[(PADDING + row * step, PADDING + column * step) for column in range(columns)] for row in range(rows)]
    return [[pixels[y : y + side, x : x + side] for y, x in row] for row in starts]


def _side(pixels: Pixels) -> int:
    """Side of a grid's images: up to the first column behind them that is white padding from top to bottom."""
    white = (pixels == 255).all(axis=(0, 2))
    return int(np.flatnonzero(white[PADDING + 1 :])[0]) + 1


def _picture(rows: dict[str, list[Pixels]]) -> Figure | None:
    """Rows of images behind their titles, pixel by pixel; None if there are none."""
    if not rows:
        return None
    shown = {title: _spread(images) for title, images in rows.items()}
    side = next(iter(shown.values()))[0].shape[0] + PADDING
    label_width = max(LABEL_WIDTH, LETTER_WIDTH * (max(map(len, shown)) + 2))
    width, height = label_width + side * max(map(len, shown.values())), side * len(shown)
    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI)
    for place, (title, images) in enumerate(reversed(shown.items())):
        figure.text(LETTER_WIDTH / width, (place + 0.5) * side / height, title, va="center", fontsize=8)
        for column, image in enumerate(images):
            figure.figimage(image, label_width + column * side, place * side)
    return figure


def _spread(images: Iterable[Pixels]) -> list[Pixels]:
    """Some of many images, evenly chosen."""
    given = list(images)
    places = np.linspace(0, len(given) - 1, min(SHOWN_IMAGES, len(given))).round().astype(int)
    return [given[place] for place in places]
