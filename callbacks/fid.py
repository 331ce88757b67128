"""How far generated images lie from real ones as a distribution, watched during validation."""

from pathlib import Path

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from callbacks.evaluation import EvaluationCallback
from vfm_vae.metrics.distribution import FrechetDistance
from vfm_vae.metrics.reconstruction import quantised
from vfm_vae.metrics.reference import folder_features
from vfm_vae.types import Batch, EvaluationImages, LatentBatch
from vfm_vae.vfm import FrozenVFM


class FrechetDistanceCallback(EvaluationCallback):
    """Logs the Fréchet distance between real and generated images on the features of a VFM.

    The images are those of the module's `evaluation_images`, after 8 bits; the features are the VFM's pooled ones.
    Logged as `val/fd_<vfm>`, the VFM's name without the tag of its weights: it can't be compared with FID, which is
    measured on Inception's features, nor with other numbers of images. With a folder as reference its name is added,
    `val/fd_<vfm>/<folder>`, since the two kinds of numbers can't be compared either.

    Args:
        vfm: whose features are compared.
        num_images: generate so many images, numbered evenly over the data set; null for as many as it has.
        reference: folder of real images, `<reference>/<class>/*`, centre-cropped to `image_size`; null takes those of
            the data that is validated.
        image_size: side of the reference images in pixels.

    Raises:
        ValueError: when validation starts, if the module has no `evaluation_images`, or gives no real ones.
    """

    def __init__(
        self, vfm: FrozenVFM, num_images: int | None = None, reference: str | None = None, image_size: int = 256
    ) -> None:
        super().__init__(num_images)
        self.vfm = vfm
        self.name = f"fd_{vfm.name.split('.')[0]}"
        self.reference, self.image_size = reference, image_size
        if reference is not None:
            self.name += f"/{Path(reference).name}"
        self._reference_features: Tensor | None = None  # of this rank's part
        self._metric: FrechetDistance | None = None

    def start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Moves the VFM to the module's device; looks at the reference images, the first time."""
        if not isinstance(pl_module, EvaluationImages):
            raise ValueError(f"{type(pl_module).__name__} has no evaluation_images to measure.")
        self.vfm.to(pl_module.device)
        self._metric = FrechetDistance(self.vfm.width).to(pl_module.device)
        if self.reference is None:
            return
        if self._reference_features is None:
            part = (trainer.global_rank, trainer.world_size)
            self._reference_features = folder_features(self.vfm, self.reference, self.image_size, part).features
        self._metric.update(self._reference_features, real=True)

    def update(self, pl_module: LightningModule, batch: Batch | LatentBatch) -> None:
        """Adds the features of both kinds of images."""
        batch = self.select(batch)
        if not len(batch.index):
            return
        real, generated = pl_module.evaluation_images(batch)
        self._metric.update(self.vfm(quantised(generated)).pooled, real=False)
        if self.reference is not None:
            return
        if real is None:
            raise ValueError(
                f"reference: {type(pl_module).__name__} on this data has no real images to compare with; give a folder"
            )
        self._metric.update(self.vfm(quantised(real)).pooled, real=True)

    def results(self) -> dict[str, Tensor]:
        """The distance."""
        return {self.name: self._metric.compute()}
