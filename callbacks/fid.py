"""How far generated images lie from real ones as a distribution, watched during validation."""

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from callbacks.evaluation import EvaluationCallback
from vfm_vae.metrics.distribution import FrechetDistance
from vfm_vae.metrics.reconstruction import quantised
from vfm_vae.types import Batch, EvaluationImages
from vfm_vae.vfm import FrozenVFM


class FrechetDistanceCallback(EvaluationCallback):
    """Logs the Fréchet distance between real and generated images on the features of a VFM.

    The images are those of the module's `evaluation_images`, after 8 bits; the features are the VFM's pooled ones.
    Logged as `val/fd_<vfm>`, the VFM's name without the tag of its weights: it can't be compared with FID, which is
    measured on Inception's features, nor with other numbers of images.

    Args:
        vfm: whose features are compared.

    Raises:
        ValueError: when validation starts, if the module has no `evaluation_images`, or gives no real ones.
    """

    def __init__(self, vfm: FrozenVFM) -> None:
        self.vfm = vfm
        self.name = f"fd_{vfm.name.split('.')[0]}"
        self._metric: FrechetDistance | None = None

    def start(self, trainer: Trainer, pl_module: LightningModule, num_samples: int) -> None:
        """Moves the VFM to the module's device."""
        if not isinstance(pl_module, EvaluationImages):
            raise ValueError(f"{type(pl_module).__name__} has no evaluation_images to measure.")
        self.vfm.to(pl_module.device)
        self._metric = FrechetDistance(self.vfm.width).to(pl_module.device)

    def update(self, pl_module: LightningModule, batch: Batch) -> None:
        """Adds the features of both kinds of images."""
        real, generated = pl_module.evaluation_images(batch)
        if real is None:
            raise ValueError(f"{type(pl_module).__name__}.evaluation_images gives no real images to compare with.")
        if batch.real.any():
            self._metric.update(self.vfm(quantised(real[batch.real])).pooled, real=True)
            self._metric.update(self.vfm(quantised(generated[batch.real])).pooled, real=False)

    def results(self) -> dict[str, Tensor]:
        """The distance."""
        return {self.name: self._metric.compute()}
