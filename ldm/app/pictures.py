"""Pictures of the page: what is made of tensors, and how a page holds it without a file."""

import base64
import html
import io
import math
from collections.abc import Sequence

import numpy as np
import torch
from matplotlib import colormaps
from PIL import Image
from torch import Tensor

from vfm_vae.images import to_uint8

QUANTILE = 0.98  # of each principal component, beyond which colours are saturated
STEP = 8  # levels that the ends of an error map's scale are apart


def error_map(reconstruction: Tensor, image: Tensor) -> Tensor:
    """Mean over the channels of the absolute difference in levels of 8 bits, `[H, W]` in 0..255.

    Args:
        reconstruction: `[3, H, W]`, nominally in [-1, 1].
        image: The original, alike.
    """
    both = to_uint8(torch.stack([reconstruction, image])).float()
    return (both[0] - both[1]).abs().mean(0)


def brightest(errors: Sequence[Tensor]) -> int:
    """The error in levels that takes the brightest colour: above all but half a percent of the errors given."""
    highest = max(float(each.flatten().quantile(0.995)) for each in errors)
    return max(STEP, STEP * math.ceil(highest / STEP))


def coloured(errors: Tensor, top: int) -> np.ndarray:
    """An error map `[H, W]` as colours from black at 0 to light yellow at `top`, uint8 `[H, W, 3]`."""
    colours: np.ndarray = colormaps["inferno"]((errors.cpu() / top).clamp(0, 1).numpy())[..., :3]
    return (255 * colours).round().astype(np.uint8)


def principal(latent: Tensor) -> np.ndarray:
    """The first three principal components of a latent's positions as red, green and blue.

    Each is scaled by itself, so that the middle 96 % of its values span the colour; its sign makes the largest weight
    positive, for else it would be arbitrary.

    Args:
        latent: `[C, h, w]`.

    Returns:
        uint8 `[h, w, 3]`; a component that there is not, for want of channels or positions, is grey.
    """
    channels, height, width = latent.shape
    points = latent.detach().float().cpu().reshape(channels, -1).T.double()  # [h·w, C]
    points = points - points.mean(0)
    _, _, axes = torch.linalg.svd(points, full_matrices=False)  # [r, C]
    axes = axes[:3]
    signs = axes.gather(1, axes.abs().argmax(1, keepdim=True)).sign()
    values = points @ (axes * signs).T  # [h·w, r]
    low, high = values.quantile(1 - QUANTILE, dim=0), values.quantile(QUANTILE, dim=0)
    spread = high - low
    scaled = torch.where(spread > 1e-9, (values - low) / spread.clamp_min(1e-9), 0.5).clamp(0, 1)
    colours = torch.full((height * width, 3), 0.5, dtype=torch.float64)
    colours[:, : scaled.shape[1]] = scaled
    picture: np.ndarray = (255 * colours).round().to(torch.uint8).reshape(height, width, 3).numpy()
    return picture


def pixels(image: Tensor) -> np.ndarray:
    """An image `[3, H, W]`, nominally in [-1, 1], as uint8 `[H, W, 3]`."""
    picture: np.ndarray = to_uint8(image[None])[0].permute(1, 2, 0).cpu().numpy()
    return picture


def address(picture: np.ndarray) -> str:
    """A picture, uint8 `[H, W, 3]`, as an address that holds it: a page shows it, and no file is written."""
    file = io.BytesIO()
    Image.fromarray(picture).save(file, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def figure(picture: np.ndarray, title: str, note: str = "") -> str:
    """A picture with what it is below it, as HTML; small ones are enlarged by whole pixels' colours."""
    side = max(picture.shape[:2])
    kind = "vv-small" if side <= 128 else "vv-large"
    told = f"<b>{html.escape(title)}</b>" + (f"<span>{html.escape(note)}</span>" if note else "")
    caption = f"<figcaption>{told}</figcaption>" if title or note else ""
    label = html.escape(" ".join(filter(None, (title, note))) or "picture")
    return f'<figure class="vv-cell {kind}"><img src="{address(picture)}" alt="{label}">{caption}</figure>'


def row(figures: Sequence[str], heading: str = "", note: str = "", kind: str = "") -> str:
    """Figures side by side under a heading, as HTML; where there is no room they go on below."""
    told = f"<h3>{html.escape(heading)}<span>{html.escape(note)}</span></h3>" if heading else ""
    return f'<section class="vv-row {kind}">{told}<div>{"".join(figures)}</div></section>'


def line(text: str, kind: str = "note") -> str:
    """A line of text, as HTML; `kind` is `note`, or `error` for what went wrong."""
    role = ' role="alert"' if kind == "error" else ""
    return f'<p class="vv-{kind}"{role}>{html.escape(text)}</p>'


def bar(part: float, text: str) -> str:
    """A progress bar, as HTML.

    Args:
        part: How much is done, in [0, 1].
        text: What is said beside it.
    """
    percent = f"{100 * part:.1f}"
    inner = f'<div role="progressbar" aria-valuenow="{percent}"><i style="width: {percent}%"></i></div>'
    return f'<div class="vv-bar">{inner}{html.escape(text)}</div>'
