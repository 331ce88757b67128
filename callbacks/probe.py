"""Linear probes: whether samples show their class, and whether a model's features tell real images' classes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from callbacks.evaluation import EvaluationCallback, by_short_name, needed_vfm, own_vfm, rows_of, settings_of
from vfm_vae.contracts import VFM, AlignmentFeatures, DrawsSamples, EvaluationImages
from vfm_vae.data.folder import list_classes
from vfm_vae.images import from_uint8, quantised
from vfm_vae.lightning_private import undeclared
from vfm_vae.metrics.features import FeatureStore
from vfm_vae.metrics.probe import LinearProbe
from vfm_vae.metrics.reconstruction import MeanOverImages
from vfm_vae.metrics.reference import folder_features
from vfm_vae.options import at_least, within
from vfm_vae.types import Batch, LatentBatch


class ClassAccuracyCallback(EvaluationCallback):
    """Logs how often a linear probe on a VFM's pooled features finds a sample's class, as `val/class_accuracy`.

    The probe is fitted on real images when the first validation starts, and never sees samples before it judges them.

    Args:
        images: Folder `<images>/<class>/*` of the images to fit on.
        vfm: The VFM whose features are probed; null for the module's own.
        image_size: Height and width in pixels of these images' centre crops.
        num_images: Number of samples to draw, numbered evenly over the data set; null for as many as it has.

    Raises:
        ValueError: if an option lies outside its range; when a run starts, if the images are of other classes than the
            module's, or no VFM is given and it has none of its own; when validation starts, if it draws no samples.
    """

    vfm: VFM  # `adopt` sets it where none was given

    def __init__(
        self, images: str, vfm: VFM | None = None, image_size: int = 256, num_images: int | None = None
    ) -> None:
        super().__init__(num_images)
        at_least(1, image_size=image_size)
        self._adopts = vfm is None
        if vfm is not None:
            self.vfm = vfm
        self.images, self.image_size = Path(images), image_size
        self._probe: LinearProbe | None = None
        self._hits = MeanOverImages()

    def names(self) -> set[str]:
        """One number."""
        return {"class_accuracy"}

    def adopt(self, pl_module: LightningModule) -> None:
        """Uses the module's own VFM if none was given."""
        if self._adopts and getattr(self, "vfm", None) is not (vfm := needed_vfm(pl_module, self, "vfm")):
            self.vfm, self._probe = vfm, None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Compares the classes with the module's."""
        super().setup(trainer, pl_module, stage)
        found = len(list_classes(self.images.parent, self.images.name))
        if isinstance(pl_module, DrawsSamples) and found != pl_module.num_classes:
            known, advice = pl_module.num_classes or "none", "give images of the classes that the model was trained on"
            if pl_module.num_classes is None:
                advice = f"leave {type(self).__name__} out"
            raise ValueError(f"images: {str(self.images)!r} has {found} classes, but samples are of {known}; {advice}")

    def start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Moves the VFM to the module's device; fits the probe, the first time, on every rank alike."""
        if not isinstance(pl_module, DrawsSamples) or not isinstance(pl_module, EvaluationImages):
            raise ValueError(f"{type(pl_module).__name__} draws no samples whose classes could be looked at.")
        self.vfm.to(pl_module.device)
        self._hits = MeanOverImages().to(pl_module.device)
        if self._probe is None:
            self._probe = LinearProbe(*folder_features(self.vfm, self.images, self.image_size))

    def update(self, pl_module: Any, batch: Batch | LatentBatch) -> None:
        """Judges the samples of a batch."""
        batch = self.select(batch)
        if len(batch.index) and self._probe is not None:
            features = self.vfm(quantised(pl_module.evaluation_images(batch)[1])).pooled
            labels = torch.tensor(pl_module.sample_condition(batch.index).plain(), device=features.device)
            hits = self._probe.predict(features) == labels
            self._hits.update(hits.to(torch.float32))

    def results(self) -> dict[str, Tensor]:
        """The share of hits."""
        return {"class_accuracy": self._hits.compute()}

    def settings(self) -> dict[str, Any]:
        """What the number depends on."""
        fitted = {"images": str(self.images), "image_size": self.image_size}
        return super().settings() | fitted | settings_of([self.vfm])


class LinearProbeCallback(EvaluationCallback):
    """Logs how well a linear classifier finds classes from features, as `val/probe/<feature>`.

    The features are those of the module's `alignment_features` (a latent averaged over positions, a denoiser's blocks)
    and the averaged patch tokens of VFMs, named without the tag of their weights unless two differ only by it. At every
    evaluation, a classifier for each is fitted to the training split without augmentation; its top-1 accuracy on
    validation images is logged.

    Args:
        vfms: VFMs to compare with. They need images, not cached latents. Null for the module's own, if it has one and
            there are images; `[]` for none.
        num_train_images: Number of images to fit to, spread evenly over the training split; null for all.
        num_images: Number of images to measure on; null for all.
        time: Diffusion time at which a denoiser's features are probed; null for 0.5.

    Raises:
        ValueError: if a VFM is given twice; when validation starts, if the module has no `alignment_features`, or VFMs
            have no images to see.
    """

    def __init__(
        self,
        vfms: Sequence[VFM] | None = None,
        num_train_images: int | None = None,
        num_images: int | None = None,
        time: float | None = None,
    ) -> None:
        super().__init__(num_images)
        at_least(2, num_train_images=num_train_images)
        within(0, 1, time=time)
        self.vfms, self._adopts = by_short_name(vfms or ()), vfms is None
        self.num_train_images, self.time = num_train_images, time
        self._train: Any = ()  # a data loader
        self._num_fitted = 0
        self._probes: dict[str, LinearProbe] = {}
        self._hits: dict[str, MeanOverImages] = {}

    def adopt(self, pl_module: LightningModule) -> None:
        """Uses the module's own VFM if none was given."""
        if self._adopts:
            vfm = own_vfm(pl_module)
            self.vfms = by_short_name([] if vfm is None else [vfm])

    def names(self) -> set[str]:
        """The names of the numbers, by feature."""
        return {"probe/<feature>"}

    def start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finds the training images; nothing is fitted before all callbacks have started, averaged weights included."""
        if not isinstance(pl_module, AlignmentFeatures):
            raise ValueError(f"{type(pl_module).__name__} has no alignment_features to probe.")
        self._probes, self._hits = {}, {}
        self._train = undeclared(trainer).datamodule.evaluation_dataloader("train")
        for vfm in self.vfms.values():
            vfm.to(pl_module.device)

    def update(self, pl_module: LightningModule, batch: Batch | LatentBatch) -> None:
        """Judges a batch; fits before the first one."""
        if not self._probes:
            self._fit(pl_module)
        batch = self.select(batch)
        if not len(batch.index):
            return
        for name, features in self._features(pl_module, batch).items():
            self._hits[name].update((self._probes[name].predict(features) == batch.labels).float())

    def _fit(self, pl_module: LightningModule) -> None:
        """Fits to the training features of all ranks; every rank comes to the same classifiers."""
        stores: dict[str, FeatureStore] = {}
        wanted, size = self.num_train_images, len(self._train.dataset)
        for batch in self._train:
            batch = pl_module.trainer.strategy.batch_to_device(batch, pl_module.device)
            chosen = batch.index >= 0
            if wanted is not None:
                chosen &= batch.index * min(wanted, size) % size < min(wanted, size)
            batch = batch._replace(index=batch.index.masked_fill(~chosen, -1))
            if chosen.any() and not chosen.all():  # without any, the features' names have to be known all the same
                batch = rows_of(batch, chosen)
            named = self._features(pl_module, batch) | {"labels": batch.labels[:, None]}
            for name, values in named.items():
                stores.setdefault(name, FeatureStore().to(pl_module.device)).update(values, batch.index)
        labels = stores.pop("labels").compute()[:, 0].long()
        self._num_fitted = len(labels)
        for name, store in stores.items():
            self._probes[name] = LinearProbe(store.compute(), labels)
            self._hits[name] = MeanOverImages().to(pl_module.device)

    def _features(self, pl_module: Any, batch: Batch | LatentBatch) -> dict[str, Tensor]:
        features = dict(pl_module.alignment_features(batch, self.time))
        if self._adopts and not isinstance(batch, Batch):
            self.vfms = {}  # the module's own has no images to see
        for name, vfm in self.vfms.items():
            if not isinstance(batch, Batch):
                raise ValueError("vfms: the data holds latents, so VFMs have no images to see; leave them out.")
            features[name] = vfm(from_uint8(batch.images)).tokens.mean(1)  # [B, C]
        return features

    def results(self) -> dict[str, Tensor]:
        """The accuracies."""
        return {f"probe/{name}": hits.compute() for name, hits in self._hits.items()}

    def settings(self) -> dict[str, Any]:
        """What the numbers depend on."""
        fitted = {"num_train_images": self._num_fitted, "time": self.time}
        return super().settings() | fitted | settings_of(self.vfms.values())
