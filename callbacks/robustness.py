"""How much the features of a latent and of VFMs change when images change."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from callbacks.evaluation import EvaluationCallback, by_short_name, own_vfm, rows_of, settings_of
from vfm_vae.contracts import VFM, EncodesImages
from vfm_vae.images import from_uint8
from vfm_vae.metrics.reconstruction import MeanOverImages
from vfm_vae.metrics.semantic import is_identity, names_of, transformed
from vfm_vae.types import Batch


class RobustnessCallback(EvaluationCallback):
    """Logs the cosine similarity between features of clean and of transformed images.

    The features are the latent averaged over positions and VFMs' averaged patch tokens; the transformations are noise,
    scales and rotations as for SE-CKNNA. Logged as `val/robustness/<feature>/<transformation>`, with their mean. A
    VFM's feature has the VFM's name, without the tag of its weights unless two differ only by it.

    Args:
        vfms: VFMs to compare with; null for the module's own, if it has one; `[]` for none.
        num_images: Number of images to measure on, spread evenly over the data set; null for all.

    Raises:
        ValueError: if a VFM is given twice; when validation starts, if the module encodes no images.
    """

    def __init__(self, vfms: Sequence[VFM] | None = None, num_images: int | None = None) -> None:
        super().__init__(num_images)
        self.vfms, self._adopts = by_short_name(vfms or ()), vfms is None
        self._similarities: dict[str, dict[str, MeanOverImages]] = {}

    def adopt(self, pl_module: LightningModule) -> None:
        """Uses the module's own VFM if none was given."""
        if self._adopts:
            vfm = own_vfm(pl_module)
            self.vfms = by_short_name([] if vfm is None else [vfm])

    def names(self) -> set[str]:
        """The names of the numbers, by feature."""
        return {f"robustness/{name}" for name in ("latent", *self.vfms)}

    def start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Moves the VFMs to the module's device."""
        if not isinstance(pl_module, EncodesImages):
            raise ValueError(f"{type(pl_module).__name__} encodes no images that could be transformed.")
        self._similarities = {
            name: {
                change: MeanOverImages().to(pl_module.device) for change in names_of("each") if not is_identity(change)
            }
            for name in ("latent", *self.vfms)
        }
        for vfm in self.vfms.values():
            vfm.to(pl_module.device)

    def update(self, pl_module: EncodesImages, batch: Batch) -> None:
        """Compares features of the chosen images."""
        part = rows_of(batch, self.chosen(batch.index))
        if not len(part.index):
            return
        clean = self._features(pl_module, part)
        for change, ((_, images),) in transformed("each", part.images, part.index).items():
            if is_identity(change):
                continue
            for name, features in self._features(pl_module, part._replace(images=images)).items():
                self._similarities[name][change].update(F.cosine_similarity(features, clean[name]))

    def _features(self, pl_module: EncodesImages, batch: Batch) -> Mapping[str, Tensor]:
        features = {"latent": pl_module.latents(batch).mean(dim=(2, 3)).float()}  # [B, C] each
        return features | {name: vfm(from_uint8(batch.images)).tokens.mean(1) for name, vfm in self.vfms.items()}

    def results(self) -> dict[str, Tensor]:
        """Means over images, and over transformations."""
        values: dict[str, Tensor] = {}
        for name, similarities in self._similarities.items():
            parts = {change: similarity.compute() for change, similarity in similarities.items()}
            values |= {f"robustness/{name}/{change}": value for change, value in parts.items()}
            values[f"robustness/{name}/mean"] = torch.stack(list(parts.values())).mean()
        return values

    def settings(self) -> dict[str, Any]:
        """What the numbers depend on."""
        return super().settings() | settings_of(self.vfms.values())
