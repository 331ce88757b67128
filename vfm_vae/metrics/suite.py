"""All metrics of a set of images as a distribution, with one pass of the network over each image."""

import torch
from torch import Tensor, nn

from vfm_vae.metrics.distribution import FrechetDistance, InceptionScore
from vfm_vae.metrics.inception import POOL_WIDTH, SPATIAL_WIDTH, Inception
from vfm_vae.metrics.precision_recall import PrecisionRecall
from vfm_vae.metrics.reference import Network, Reference, extract, name_of


def suite_names(network: Network, reconstructions: bool, precision_recall: bool) -> dict[str, str]:
    """What the suite's numbers are called, by what computes them; without spatial statistics there is no sFID."""
    if isinstance(network, Inception):
        samples = {"distance": "gfid", "spatial": "sfid", "score": "inception_score"}
        names = {"distance": "rfid", "spatial": "rsfid", "score": "ris"} if reconstructions else samples
        suffix = ""
    else:
        names, suffix = {"distance": f"fd_{name_of(network)}"}, f"_{name_of(network)}"
    return names | ({name: f"{name}{suffix}" for name in ("precision", "recall")} if precision_recall else {})


class DistributionSuite(nn.Module):
    """Fréchet distances, Inception Score, precision and recall of generated images, by the ADM protocol.

    Compared is with a reference, or with real images that are given along (a tokenizer's inputs with its
    reconstructions). On Inception's features the numbers of samples are called `gfid`, `sfid`, `inception_score`,
    `precision`, `recall`, those of reconstructions `rfid`, `rsfid`, `ris`; on those of a VFM, `fd_<vfm>`,
    `precision_<vfm>`, `recall_<vfm>`, never `fid`.

    Args:
        network: Extracts features; only called, not owned, so that its weights are in no `state_dict`.
        num_images: Number of generated images to expect, which decides the splits of the Inception Score.
        reference: Real images that were measured before; None where they are given along.
        precision_recall: Whether to measure these two; needs the reference's features.
        reconstructions: Whether reconstructions are measured, or samples; by default, whether there is no reference.

    Raises:
        ValueError: the reference belongs to another network.
    """

    def __init__(
        self,
        network: Network,
        num_images: int,
        reference: Reference | None = None,
        precision_recall: bool = False,
        reconstructions: bool | None = None,
    ) -> None:
        super().__init__()
        self._network = (network,)
        is_paired = reference is None if reconstructions is None else reconstructions
        is_inception = isinstance(network, Inception)
        width = POOL_WIDTH if isinstance(network, Inception) else network.width
        if reference is not None and len(reference.pool.mean) != width:
            raise ValueError(
                f"reference: its statistics are of {len(reference.pool.mean)} features, but {name_of(network)} has "
                f"{width}; they were made by another network"
            )
        self.distance = FrechetDistance(width, reference.pool if reference else None)
        self.names = suite_names(network, is_paired, precision_recall)
        if is_inception:
            self.score = InceptionScore(num_images)
        if is_inception and (reference is None or reference.spatial is not None):
            self.spatial = FrechetDistance(SPATIAL_WIDTH, reference.spatial if reference else None)
        else:
            self.names.pop("spatial", None)
        known = reference.features if reference else None
        self.neighbours = PrecisionRecall(reference=known) if precision_recall else None
        if self.neighbours is not None:  # a rank that gets no images has to agree on the width all the same
            nothing = torch.zeros(0, width), torch.zeros(0, dtype=torch.int64)
            for real in (False, True) if reference is None else (False,):
                self.neighbours.update(*nothing, real=real)

    def update(self, images: Tensor, index: Tensor, real: bool = False) -> None:
        """Adds images.

        Args:
            images: uint8 `[B, 3, H, W]`, without padding.
            index: Numbers of the images from 0 to `num_images - 1`, int64 `[B]`.
            real: Whether they are real ones, to compare with, where there is no reference.
        """
        features = extract(self._network[0], images)
        self.distance.update(features.pool, real=real)
        if "spatial" in self.names and features.spatial is not None:
            self.spatial.update(features.spatial, real=real)
        if "score" in self.names and features.logits is not None and not real:
            self.score.update(features.logits, index)
        if self.neighbours is not None:
            self.neighbours.update(features.pool, index, real=real)

    @torch.no_grad()
    def compute(self) -> dict[str, Tensor]:
        """Every number by its name, float32 scalars, the same on all ranks."""
        measured = (part for part in ("distance", "spatial", "score") if part in self.names)
        parts: dict[str, Tensor] = {part: getattr(self, part).compute() for part in measured}
        if self.neighbours is not None:
            parts |= self.neighbours.compute()
        return {name: parts[part] for part, name in self.names.items()}

    def as_reference(self) -> Reference:
        """The real images that were given along, for a later suite that is not shown them again; asked on all ranks."""
        spatial = self.spatial.real_gaussian() if "spatial" in self.names else None
        features = self.neighbours.real_samples() if self.neighbours is not None else None
        return Reference(self.distance.real_gaussian(), spatial, features)
