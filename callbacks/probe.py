"""Whether samples show the classes that they were drawn for."""

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from callbacks.evaluation import EvaluationCallback
from vfm_vae.metrics.probe import LinearProbe
from vfm_vae.metrics.reconstruction import MeanOverImages, quantised
from vfm_vae.metrics.reference import folder_features
from vfm_vae.types import Batch, DrawsSamples, EvaluationImages, LatentBatch
from vfm_vae.vfm import FrozenVFM


class ClassAccuracyCallback(EvaluationCallback):
    """Logs how often a linear probe on a VFM's pooled features finds a sample's class, as `val/class_accuracy`.

    The probe is fitted on real images, when the first validation starts, and never sees a sample before it judges it.

    Args:
        vfm: whose features are probed.
        images: folder of the images to fit on, `<images>/<class>/*`, centre-cropped to `image_size`.
        image_size: their side in pixels.
        num_images: draw so many samples, numbered evenly over the data set; null for as many as it has.

    Raises:
        ValueError: when validation starts, if the module draws no samples.
    """

    def __init__(self, vfm: FrozenVFM, images: str, image_size: int = 256, num_images: int | None = None) -> None:
        super().__init__(num_images)
        self.vfm, self.images, self.image_size = vfm, images, image_size
        self._probe: LinearProbe | None = None
        self._hits = MeanOverImages()

    def start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Moves the VFM to the module's device; fits the probe, the first time, on every rank alike."""
        if not isinstance(pl_module, DrawsSamples) or not isinstance(pl_module, EvaluationImages):
            raise ValueError(f"{type(pl_module).__name__} draws no samples whose classes could be looked at.")
        self.vfm.to(pl_module.device)
        self._hits = MeanOverImages().to(pl_module.device)
        if self._probe is None:
            self._probe = LinearProbe(*folder_features(self.vfm, self.images, self.image_size))

    def update(self, pl_module: LightningModule, batch: Batch | LatentBatch) -> None:
        """Judges the samples of a batch."""
        batch = self.select(batch)
        if len(batch.index):
            features = self.vfm(quantised(pl_module.evaluation_images(batch)[1])).pooled
            hits = self._probe.predict(features) == pl_module.sample_labels(batch.index)
            self._hits.update(hits.to(torch.float32))

    def results(self) -> dict[str, Tensor]:
        """The share of hits."""
        return {"class_accuracy": self._hits.compute()}
