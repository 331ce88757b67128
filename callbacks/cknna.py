"""Alignment with vision foundation models, watched during validation."""

from collections.abc import Sequence

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from callbacks.evaluation import EvaluationCallback
from vfm_vae.metrics.alignment import CKNNA
from vfm_vae.metrics.reconstruction import from_uint8
from vfm_vae.types import AlignmentFeatures, Batch
from vfm_vae.vfm import FrozenVFM


class CKNNACallback(EvaluationCallback):
    """Logs CKNNA between the module's features and those of reference VFMs on validation (and test) images.

    The module's features are what its `alignment_features` names, such as the latent averaged over positions; a VFM's
    are its final patch tokens, averaged. Logged as `val/cknna/<feature>`, and with several VFMs as
    `val/cknna/<feature>/<vfm>`.

    Args:
        vfms: the references.
        num_images: compare on so many images, spread evenly over the data set; null for all.
        k: number of neighbours.

    Raises:
        ValueError: if there is no VFM, or two of the same name; when validation starts, if the module has no
            `alignment_features`.
    """

    def __init__(self, vfms: Sequence[FrozenVFM], num_images: int | None = None, k: int = 10) -> None:
        if not vfms:
            raise ValueError("vfms: at least one is needed to compare with; got none.")
        if num_images is not None and num_images <= k:
            raise ValueError(f"num_images: {k} neighbours need more than {k} images; got {num_images}.")
        self.vfms = {vfm.name: vfm for vfm in vfms}
        if len(self.vfms) < len(vfms):
            raise ValueError(f"vfms: each may be given once; got {[vfm.name for vfm in vfms]}.")
        super().__init__(num_images)
        self.k = k
        self._metrics: dict[tuple[str, str], CKNNA] = {}  # by feature and VFM

    def start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Moves the VFMs to the module's device."""
        if not isinstance(pl_module, AlignmentFeatures):
            raise ValueError(f"{type(pl_module).__name__} has no alignment_features to compare with a VFM's.")
        self._metrics = {}
        for vfm in self.vfms.values():
            vfm.to(pl_module.device)

    def update(self, pl_module: LightningModule, batch: Batch) -> None:
        """Extracts the features of the chosen images."""
        chosen = self.chosen(batch.index)
        if self._metrics and not chosen.any():
            return  # but on a rank's first batch: it must know the features' names all the same
        # The whole batch, because the module may have its features at hand from validation.
        features = pl_module.alignment_features(batch)
        images, index = from_uint8(batch.images[chosen]), batch.index[chosen]
        for name, vfm in self.vfms.items():
            # Without images there is nothing to extract, but the width still has to agree over ranks.
            reference = vfm(images).tokens.mean(1) if len(index) else images.new_zeros(0, vfm.width)  # [B, C]
            for feature, values in features.items():
                metric = self._metrics.setdefault((feature, name), CKNNA(self.k).to(pl_module.device))
                metric.update(values[chosen], reference, index)

    def results(self) -> dict[str, Tensor]:
        """One value for each feature and VFM."""
        single = len(self.vfms) == 1
        return {
            f"cknna/{feature}" if single else f"cknna/{feature}/{name}": metric.compute()
            for (feature, name), metric in self._metrics.items()
        }
