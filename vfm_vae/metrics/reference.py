"""Features of real images, which those of samples are compared with."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from vfm_vae.data.folder import ImageFolderDataset
from vfm_vae.data.transforms import CentreCrop
from vfm_vae.metrics.reconstruction import from_uint8
from vfm_vae.vfm import FrozenVFM


class LabelledFeatures(NamedTuple):
    """Features of images and their classes.

    Attributes:
        features: `[n, d]`.
        labels: int64 `[n]`.
    """

    features: Tensor
    labels: Tensor


@torch.no_grad()
def folder_features(
    vfm: FrozenVFM, folder: str | Path, image_size: int, part: Sequence[int] = (0, 1), batch_size: int = 64
) -> LabelledFeatures:
    """Pooled features of the images in a tree `<folder>/<class>/*`, after ADM's centre crop.

    Args:
        vfm: whose features.
        folder: the tree.
        image_size: side of the crops.
        part: (r, n) takes each n-th image from the r-th on, so that n ranks share the work.
        batch_size: images at a time.

    Raises:
        ValueError: there is no such tree, or an image is damaged.
    """
    folder = Path(folder)
    dataset = ImageFolderDataset(folder.parent, folder.name, CentreCrop(image_size), max_bad_fraction=0)
    chosen = Subset(dataset, range(part[0], len(dataset), part[1]))
    device = next(vfm.network.parameters()).device
    features, labels = [torch.zeros(0, vfm.width, device=device)], [torch.zeros(0, dtype=torch.int64, device=device)]
    # A generator of its own: the global one must not notice.
    for images, classes, _ in DataLoader(chosen, batch_size=batch_size, generator=torch.Generator()):
        features.append(vfm(from_uint8(images.to(device))).pooled)
        labels.append(classes.to(device))
    return LabelledFeatures(torch.cat(features), torch.cat(labels))
