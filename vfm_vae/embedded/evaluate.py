"""Measures what the features of an embedded network tell about a crop: its class, place and scale.

python -m vfm_vae.embedded.evaluate --picture docs/embedded_pca.png
"""

import argparse
import json
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import r2_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from vfm_vae.embedded import photos
from vfm_vae.embedded.vit import WEIGHTS, vit_photos_patch8_64
from vfm_vae.writing import write_picture

SHOWN = ("astronaut", "camera", "cat", "china", "coffee", "flower", "motorcycle", "rocket")
SCATTERED = ("astronaut", "china", "motorcycle", "retina")

TokensOf = Callable[[Tensor], Tensor]
"""A network: images `[B, 3, H, W]` in [-1, 1] to tokens `[B, N, C]`."""


class Features(NamedTuple):
    """Crops of one split and what the network says of them.

    Attributes:
        images: uint8 `[n, 3, H, W]`.
        labels: int64 `[n]`.
        places: `place_of` each crop, `[n, 3]`.
        tokens: The network's final tokens, `[n, N, C]`.
        pooled: Their mean, `[n, C]`.
    """

    images: Tensor
    labels: np.ndarray
    places: np.ndarray
    tokens: np.ndarray
    pooled: np.ndarray


def relative_box(box: photos.Box, width: int, height: int) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of a box with the photograph's edges at -1 and 1."""
    return (
        2 * box.left / width - 1,
        2 * box.top / height - 1,
        2 * box.right / width - 1,
        2 * box.bottom / height - 1,
    )


def place_of(boxes: Tensor) -> Tensor:
    """Centre x and centre y in the photograph, in [-1, 1], and scale of crops.

    The scale is the binary logarithm of the crop's side over the short side of a tile.

    Args:
        boxes: `relative_box` of the crops, `[n, 4]`.

    Returns:
        `[n, 3]`.
    """
    low, high = boxes[:, :2], boxes[:, 2:]
    # The side of a square is the larger part of the photograph's shorter side.
    scale = ((high - low).amax(1, keepdim=True) / 2 * photos.TILES).log2()
    return torch.cat([(low + high) / 2, scale], 1)


@torch.no_grad()
def extract(tokens_of: TokensOf, root: Path, split: photos.Split) -> Features:
    """A network's features of every crop of a split of the data set at `root`."""
    manifest = json.loads((root / photos.MANIFEST).read_text())["boxes"]
    names = list(photos.PHOTOS)
    sizes = {name: photos.load_photo(name).size for name in names}
    images, labels, boxes = [], [], []
    for file, box in manifest.items():
        of_split, name, _ = file.split("/")
        if of_split == split:
            images.append(np.asarray(Image.open(root / file)))
            labels.append(names.index(name))
            boxes.append(relative_box(photos.Box(*box), *sizes[name]))
    batch = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
    tokens = torch.cat([tokens_of(chunk / 127.5 - 1) for chunk in batch.split(256)])  # [n, N, C]
    places = place_of(torch.tensor(boxes)).numpy()
    return Features(batch, np.array(labels), places, tokens.numpy(), tokens.mean(1).numpy())


def measure(train: Features, val: Features) -> dict[str, float]:
    """Read the pooled features out, linearly and by neighbours.

    Returns:
        `probe_top1`: accuracy on validation crops of logistic regression on the class.
        `place_r2`, `scale_r2`: determination of the centre in the photograph (mean of x and y) and of the scale by
        ridge regression, fitted on every other training crop of all photographs and measured on the rest.
        `place_r2_held_out`: the same of the centre, fitted on training and measured on validation crops, whose pixels
        the network never saw: it can tell their place only by what resembles their surroundings.
        `within_variance`: part of the features' variance that lies within the photographs; 0 is collapse to classes.
        `neighbour_top1`: how often the nearest training crop, by cosine, is of the same photograph.
        `neighbour_distance`: how far off it then lies, over the mean distance to all crops of that photograph.
    """
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=500)).fit(train.pooled, train.labels)
    regression = make_pipeline(StandardScaler(), Ridge(10.0))
    held_out = regression.fit(train.pooled, train.places).predict(val.pooled)
    seen = regression.fit(train.pooled[::2], train.places[::2]).predict(train.pooled[1::2])
    within = np.mean([val.pooled[val.labels == label].var(0).sum() for label in np.unique(val.labels)])
    nearest = (_unit(val.pooled) @ _unit(train.pooled).T).argmax(1)
    same = train.labels[nearest] == val.labels
    distances = np.linalg.norm(val.places[:, None, :2] - train.places[None, :, :2], axis=-1)  # [n_val, n_train]
    of_photo = np.where(val.labels[:, None] == train.labels[None], distances, np.nan)
    ratio = distances[np.arange(len(nearest)), nearest] / np.nanmean(of_photo, 1)
    return {
        "probe_top1": float(probe.score(val.pooled, val.labels)),
        "place_r2": float(r2_score(train.places[1::2, :2], seen[:, :2])),
        "scale_r2": float(r2_score(train.places[1::2, 2], seen[:, 2])),
        "place_r2_held_out": float(r2_score(val.places[:, :2], held_out[:, :2])),
        "within_variance": float(within / val.pooled.var(0).sum()),
        "neighbour_top1": float(same.mean()),
        "neighbour_distance": float(ratio[same].mean()),
    }


def _unit(features: np.ndarray) -> np.ndarray:
    """Centred features of length one."""
    features = features - features.mean(0)
    return features / np.linalg.norm(features, axis=1, keepdims=True)


def vit_tokens(weights: Path = WEIGHTS) -> TokensOf:
    """The embedded ViT with weights from a safetensors file; as its mean and std are 0.5, it takes [-1, 1] as it is."""
    vit = vit_photos_patch8_64(pretrained=True, pretrained_cfg_overlay={"file": str(weights)}).eval()
    return vit.forward_features


def report(tokens_of: TokensOf, picture: Path | None = None) -> dict[str, float]:
    """Measure a network's features on a fresh copy of the photos, print the numbers and draw the picture.

    Args:
        tokens_of: The network.
        picture: PNG file to write, if any.
    """
    with tempfile.TemporaryDirectory() as folder:
        root = photos.write_photos(Path(folder) / "photos")
        train, val = extract(tokens_of, root, "train"), extract(tokens_of, root, "val")
    numbers = measure(train, val)
    for name, value in numbers.items():
        print(f"{name:20s} {value:.3f}")
    if picture is not None:
        write_picture(picture, np.asarray(draw(train, val)))
    return numbers


def draw(train: Features, val: Features) -> Image.Image:
    """Picture of the features: patch tokens of validation crops left, pooled features by place right.

    Left, crops beside the first three principal components of their tokens as red, green and blue. Right, for each of
    four photographs, the first two components of its crops' pooled features, validation crops with an outline; the
    colour of a crop is that of its place in the small photograph below.
    """
    names = list(photos.PHOTOS)
    side, panel = 96, 384
    picture = Image.new("RGB", (4 * side + 2 * panel, len(SHOWN) * side), "white")
    shown = [np.flatnonzero(val.labels == names.index(name))[tile] for name in SHOWN for tile in (2, 3)]
    for number, (index, colours) in enumerate(zip(shown, _colours(val.tokens[shown]), strict=True)):
        corner = (number % 2 * 2 * side, number // 2 * side)
        image = Image.fromarray(val.images[index].permute(1, 2, 0).numpy())
        picture.paste(image.resize((side - 2, side - 2), Image.Resampling.BICUBIC), corner)
        image = Image.fromarray(colours).resize((side - 2, side - 2), Image.Resampling.NEAREST)
        picture.paste(image, (corner[0] + side, corner[1]))
    for number, name in enumerate(SCATTERED):
        corner = (4 * side + number % 2 * panel, number // 2 * panel)
        picture.paste(_scatter(train, val, name, panel), corner)
    return picture


def _colours(tokens: np.ndarray) -> np.ndarray:
    """Principal components of tokens `[n, N, C]` of square grids as colours, uint8 `[n, grid, grid, 3]`."""
    components = PCA(3).fit_transform(tokens.reshape(-1, tokens.shape[-1]))
    low, high = np.percentile(components, (1, 99), axis=0)
    grid = math.isqrt(tokens.shape[1])
    return (255 * ((components - low) / (high - low)).clip(0, 1)).astype(np.uint8).reshape(-1, grid, grid, 3)


def _colour_of(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Colour of a place, x and y in [-1, 1]: red to the right, green to the bottom, blue to the top left."""
    return np.stack([255 * (1 + x) / 2, 230 * (1 + y) / 2, 255 * (2 - x - y) / 4], -1).astype(np.uint8)


def _scatter(train: Features, val: Features, name: str, panel: int) -> Image.Image:
    """Pooled features of one photograph's crops in their plane of largest variance, over the key to the colours."""
    image = Image.new("RGB", (panel, panel), "white")
    pen = ImageDraw.Draw(image)
    label = list(photos.PHOTOS).index(name)
    pca = PCA(2).fit(train.pooled[train.labels == label])
    radius = np.abs(pca.transform(train.pooled[train.labels == label])).max(0)
    for split, dot in ((train, 3), (val, 4)):
        of_photo = split.labels == label
        points = panel / 2 + pca.transform(split.pooled[of_photo]) / radius * (panel / 2 - 12)
        colours = _colour_of(*split.places[of_photo, :2].T)
        for (x, y), colour in zip(points, colours, strict=True):
            outline = "black" if split is val else None
            pen.ellipse((x - dot, y - dot, x + dot, y + dot), fill=tuple(colour.tolist()), outline=outline)
    key = photos.load_photo(name)
    key.thumbnail((72, 72))
    y, x = np.meshgrid(*(np.linspace(-1, 1, length) for length in key.size[::-1]), indexing="ij")
    key = Image.blend(key, Image.fromarray(_colour_of(x, y)), 0.6)
    image.paste(key, (4, panel - 4 - key.height))
    pen.text((6, panel - 18 - key.height), name, fill="black")
    return image


def main() -> None:
    """Command line: print the numbers of the shipped weights and draw their picture."""
    parser = argparse.ArgumentParser(description="Measure the features of vit_photos_patch8_64.")
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="safetensors file (%(default)s)")
    parser.add_argument("--picture", type=Path, help="PNG file to write")
    arguments = parser.parse_args()
    report(vit_tokens(arguments.weights), arguments.picture)


if __name__ == "__main__":
    main()
