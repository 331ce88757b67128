"""Distances between the distributions of generated and real images: rFID, gFID and others, and FD on VFMs."""

from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from callbacks.evaluation import EvaluationCallback, first_loader, needed_vfm
from vfm_vae.contracts import VFM, EvaluationImages
from vfm_vae.images import to_uint8
from vfm_vae.metrics.inception import Inception
from vfm_vae.metrics.reference import Reference, ReferenceImages, network_settings
from vfm_vae.metrics.suite import DistributionSuite, suite_names
from vfm_vae.options import at_least
from vfm_vae.types import Batch, LatentBatch


class DistributionCallback(EvaluationCallback):
    """Logs Fréchet distances, Inception Score, precision and recall of the module's `evaluation_images`, after 8 bits.

    With Inception as network and a reference, as for samples, it logs `val/gfid`, `sfid`, `inception_score`,
    `precision` and `recall`; without a reference, as for reconstructions, which are compared with their originals,
    `val/rfid`, `rsfid` and `ris`. With a VFM as network it logs `val/fd_<vfm>`, named without the tag of its weights,
    or `val/fd_<vfm>/<reference>`; these are no FIDs. Numbers can only be compared at the same number of images. Real
    images are processed once, not at every validation.

    Args:
        network: The network whose features are compared, `vfm_vae.metrics.inception.Inception` or a VFM; null for the
            module's own VFM.
        num_images: Number of images to generate, numbered evenly over the data set; null for as many as it has.
        reference: Real images to compare with: an `.npz` such as ADM's, or a folder of images, in which they lie
            together or by class, and which is measured once; null for the validated images.
        image_size: Height and width in pixels of the centre crops of a folder's images.
        statistics: File for the statistics of a folder; null for a file beside the folder. It is used again until the
            name, size or time of modification of an image changes.
        precision_recall: Whether to measure precision and recall; null measures them on Inception's features with a
            reference.
        remeasure: Whether to measure a folder again although its statistics are saved.

    Raises:
        ValueError: if the reference is missing; when a run starts, if no network is given and the module has no VFM of
            its own; when training or validation starts, if the module has no `evaluation_images`, or there are no real
            ones and no reference.
    """

    network: Inception | VFM  # `adopt` sets it where none was given
    _suite: DistributionSuite  # of one pass over the data

    def __init__(
        self,
        network: Inception | VFM | None = None,
        num_images: int | None = None,
        reference: str | None = None,
        image_size: int = 256,
        statistics: str | None = None,
        precision_recall: bool | None = None,
        remeasure: bool = False,
    ) -> None:
        super().__init__(num_images)
        at_least(1, image_size=image_size)
        if not isinstance(network, Inception | VFM | None):
            raise ValueError(f"network: Inception or a VFM; given {type(network).__name__}.")
        self._adopts = network is None
        if network is not None:
            self.network = network
        self.reference = reference
        if precision_recall is None:
            precision_recall = reference is not None and isinstance(network, Inception)
        self.precision_recall = precision_recall
        self._images = ReferenceImages(reference, image_size, statistics, remeasure) if reference else None
        self._measured: Reference | None = None

    def adopt(self, pl_module: LightningModule) -> None:
        """Uses the module's own VFM if no network was given."""
        if self._adopts and getattr(self, "network", None) is not (vfm := needed_vfm(pl_module, self, "network")):
            self.network, self._measured = vfm, None

    def names(self) -> set[str]:
        """The names of the numbers, by network and, for a VFM, by reference."""
        names = suite_names(self.network, self.reference is None, self.precision_recall)
        return {self._log_name(name) for name in names.values()}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forgets the images of another run's data."""
        super().setup(trainer, pl_module, stage)
        if self._images is None:
            self._measured = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Checks early that there are real images to compare with."""
        if trainer.val_dataloaders:
            self._check_real_images(pl_module, trainer.val_dataloaders)

    def start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Moves the network to the module's device; measures the reference, the first time."""
        if not isinstance(pl_module, EvaluationImages):
            raise ValueError(f"{type(pl_module).__name__} has no evaluation_images to measure.")
        self._check_real_images(pl_module, trainer.test_dataloaders if trainer.testing else trainer.val_dataloaders)
        self.network.to(pl_module.device)
        if self._images is not None and self._measured is None:
            self._measured = self._images.load(self.network, self.precision_recall)
        self._suite = DistributionSuite(
            self.network, self.num_chosen, self._measured, self.precision_recall, self._images is None
        ).to(pl_module.device)

    def update(self, pl_module: Any, batch: Any) -> None:
        """Adds the features of both kinds of images."""
        batch = self.select(batch)
        if not len(batch.index):
            return
        real, generated = pl_module.evaluation_images(batch)
        self._suite.update(to_uint8(generated), batch.index)
        if self._measured is None:
            if real is None:
                raise _no_real_images(pl_module)
            self._suite.update(to_uint8(real), batch.index, real=True)

    def results(self) -> dict[str, Tensor]:
        """Every number by its name."""
        values = self._suite.compute()
        self._measured = self._measured or self._suite.as_reference()
        return {self._log_name(name): value for name, value in values.items()}

    def _log_name(self, name: str) -> str:
        if isinstance(self.network, Inception) or self.reference is None:
            return name
        return f"{name}/{Path(self.reference).stem}"

    def _check_real_images(self, pl_module: LightningModule, loaders: Any) -> None:
        """Looks at one sample, where real images have to be those of the data: the first batch would cost samples."""
        loader: Any = first_loader(loaders)
        if self._images is None and self._measured is None and len(loader.dataset):
            batch = loader.collate_fn([loader.dataset[0]])
            if isinstance(batch, LatentBatch) or (isinstance(batch, Batch) and not batch.has_images):
                raise _no_real_images(pl_module)

    def settings(self) -> dict[str, Any]:
        """What the numbers depend on."""
        reference = self._images.settings() if self._images else {"reference": "the images themselves"}
        settings = super().settings() | {"precision_recall": self.precision_recall} | reference
        return network_settings(self.network) | settings


def _no_real_images(pl_module: LightningModule) -> ValueError:
    return ValueError(
        f"reference: {type(pl_module).__name__} on this data has no real images to compare with; give an .npz or a "
        "folder"
    )
