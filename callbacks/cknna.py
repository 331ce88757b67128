"""CKNNA with vision foundation models along training, of a latent or of a denoiser's blocks."""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from callbacks.evaluation import EvaluationCallback, by_name, first_loader, needed_vfm, rows_of, settings_of
from callbacks.heatmap import block_heat_map
from callbacks.images import show
from vfm_vae.contracts import VFM, AlignmentFeatures, EncodesImages
from vfm_vae.data.folder import ImageFolderDataset
from vfm_vae.data.images import ImageDataset
from vfm_vae.data.transforms import CentreCrop
from vfm_vae.images import from_uint8
from vfm_vae.metrics.alignment import cknna_of_neighbours, prepare_features
from vfm_vae.metrics.features import FeatureStore
from vfm_vae.metrics.neighbours import Neighbours, nearest_neighbours
from vfm_vae.metrics.semantic import geometric, names_of, published_numbers, transformed
from vfm_vae.options import at_least, within
from vfm_vae.trial import is_trial
from vfm_vae.types import Batch, LatentBatch


class CKNNACallback(EvaluationCallback):
    """Logs CKNNA between the module's features and those of reference VFMs on validation (and test) images.

    The module's features are what its `alignment_features` names: the latent averaged over positions, or a denoiser's
    patch tokens averaged after every block. A VFM's are its final patch tokens, averaged. Logged as
    `val/cknna/<feature>`; with several times as `val/cknna/<feature>/t<time>`, and with several VFMs followed by
    `/<vfm>`. Values of blocks are also drawn as a heat map, block by training progress, in TensorBoard as
    `val/cknna_blocks` and in `<log_dir>/images/cknna_blocks.png`, with times and VFMs in the name. The VFMs see each
    image once in a run, not at every validation.

    SE-CKNNA (semantic-equivariant CKNNA) compares features of transformed images with the VFM's of the clean ones, as
    `val/se_cknna/<feature>/<transformation>`. `each` measures noise, scales and rotations one by one, and their mean
    (which the published code does not compute); and scales and rotations of the latent itself, as
    `val/se_cknna/<feature>_transformed/…`. `published` measures noise, and `equivariance`: each image, or its latent,
    is turned and scaled by one random draw, that of the public script. The draw depends on the rank of the image's file
    name, without folder and ending, among the sorted names of all images that take part, or on the image's position if
    images have no names. The published numbers are of sampled latents (`model.evaluate: sample`) on 10 000 images, with
    VFMs in float32 (`precision: float32`).

    Args:
        vfms: The VFMs to compare with; null for the module's own.
        num_images: Number of images to compare on, spread evenly over the data set and always the same; null for all.
        k: Number of neighbours.
        times: Diffusion times at which a denoiser's features are measured, 0 being noise and 1 data; null for 0.5.
        images: Folder `<images>/<class>/*` of the images that cached latents were made from.
        image_size: Height and width in pixels of their centre crops.
        se_cknna: How SE-CKNNA is measured: `each` or `published`; null for not at all.
        every_n_images: Measures at the first validation after so many training images; null for every validation.

    Raises:
        ValueError: if two VFMs have the same name; when a run starts, if none is given and the module has none of its
            own; when validation starts, if the module has no `alignment_features`, or there are no images to compare
            with.
    """

    def __init__(
        self,
        vfms: Sequence[VFM] | None = None,
        num_images: int | None = None,
        k: int = 10,
        times: Sequence[float] | None = None,
        images: str | None = None,
        image_size: int = 256,
        se_cknna: Literal["each", "published"] | None = None,
        every_n_images: int | None = None,
    ) -> None:
        super().__init__(num_images)
        at_least(1, k=k, image_size=image_size, every_n_images=every_n_images)
        within(0, 1, times=times)
        if vfms is not None and not vfms:
            raise ValueError(
                "vfms: at least one is needed to compare with; got none. Leave them out to take the module's own."
            )
        if num_images is not None and num_images <= k:
            raise ValueError(f"num_images: {k} neighbours need more than {k} images; got {num_images}.")
        self.vfms, self._adopts = by_name(vfms or ()), vfms is None
        self.k = k
        self.times: list[float | None] = list(times) if times else [None]
        self.se_cknna, self.every_n_images = se_cknna, every_n_images
        self.images, self.image_size = images, image_size
        self._images = None
        if images is not None:
            folder = Path(images)
            self._images = ImageFolderDataset(folder.parent, folder.name, CentreCrop(image_size), max_bad_fraction=0)
        self._active = True
        self._directory = Path()
        self._stores: dict[str, FeatureStore] = {}
        self._references: dict[str, FeatureStore] = {}
        self._known: dict[str, Neighbours | None] = {}  # of the references, which stay the same through a run
        self._history: list[dict[str, Any]] = []
        self._numbers = torch.zeros(0, dtype=torch.int64)  # of all images, by position, in the published draws

    @property
    def state_key(self) -> str:
        """Distinguishes several such callbacks in a checkpoint."""
        return self._generate_state_key(vfms=list(self.vfms), times=self.times)

    def state_dict(self) -> dict[str, Any]:
        """The values of the blocks so far, which the heat map shows."""
        return {"history": self._history}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores them."""
        self._history = list(state_dict["history"])

    def names(self) -> set[str]:
        """The names of the numbers, by feature, time and VFM."""
        of = ["cknna/<feature>" + ("" if len(self.times) == 1 else f"/t{time:g}") for time in self.times]
        of += ["se_cknna/<feature>/<transformation>"] if self.se_cknna else []
        return {name if len(self.vfms) == 1 else f"{name}/{vfm}" for name in of for vfm in self.vfms}

    def adopt(self, pl_module: LightningModule) -> None:
        """Uses the module's own VFM if none was given."""
        if self._adopts:
            self.vfms = by_name([needed_vfm(pl_module, self, "vfms")])

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Learns where to write, on all ranks: asking Lightning for it later on one alone would wait for the others."""
        super().setup(trainer, pl_module, stage)
        self._directory = Path(trainer.log_dir or trainer.default_root_dir) / "images"
        self._known = {}

    def start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Moves the VFMs to the module's device; leaves a validation out that comes too soon."""
        if not isinstance(pl_module, AlignmentFeatures):
            raise ValueError(f"{type(pl_module).__name__} has no alignment_features to compare with a VFM's.")
        if self.se_cknna and not isinstance(pl_module, EncodesImages):
            raise ValueError(f"se_cknna: {type(pl_module).__name__} encodes no images that could be transformed.")
        if self._images is not None and len(self._images) != self.num_samples:
            raise ValueError(
                f"images: {str(self._images.folder)!r} holds {len(self._images)} images, but the data "
                f"{self.num_samples} samples; give the images that the latents were made of"
            )
        if self.se_cknna == "published":
            loaders = trainer.test_dataloaders if trainer.testing else trainer.val_dataloaders
            self._numbers = self._published_numbers(first_loader(loaders).dataset)
        self._stores, self._references = {}, {}
        last = self._history[-1]["images_seen"] if self._history else None
        too_soon = last is not None and _progress(trainer, pl_module) < last + (self.every_n_images or 0)
        self._active = trainer.state.fn != "fit" or not too_soon
        for vfm in self.vfms.values():
            vfm.to(pl_module.device)

    def _published_numbers(self, dataset: Any) -> Tensor:
        """Numbers of the images that take part, by their positions in the data set, int64 `[num_samples]`."""
        numbers = torch.arange(self.num_samples)
        positions = numbers[self.chosen(numbers)]
        if isinstance(dataset, ImageDataset):
            numbers[positions] = published_numbers([dataset.name(i) for i in positions.tolist()])
        else:
            numbers[positions] = torch.arange(len(positions))
        return numbers

    def update(self, pl_module: Any, batch: Batch | LatentBatch) -> None:
        """Extracts the features of the chosen images."""
        is_numbers_alone = isinstance(batch, Batch) and not batch.has_images
        chosen = self.chosen(batch.index)
        sharded = pl_module.device_mesh is not None  # over the ranks, all of which a pass then needs
        if not self._active or is_numbers_alone or (self._stores and not chosen.any() and not sharded):
            return  # but on a rank's first batch: it must know the features' names all the same
        part = rows_of(batch, chosen)
        # Of images the module may have all features at hand from validation; latents that are not chosen cost a pass.
        seen, rows = (part, slice(None)) if isinstance(batch, LatentBatch) and len(part.index) else (batch, chosen)
        for time in self.times:
            features = pl_module.alignment_features(seen, time)
            suffix = "" if len(self.times) == 1 else f"/t{time:g}"
            self._add({f"cknna/{name}{suffix}": values[rows] for name, values in features.items()}, part.index)
        if not self._known:
            self._add_references(pl_module, part)
        if self.se_cknna and isinstance(batch, Batch):
            self._add_transformed(pl_module, self.se_cknna, batch, chosen)

    def _add_references(self, pl_module: LightningModule, part: Batch | LatentBatch) -> None:
        """Adds the VFMs' features of the chosen images."""
        images = from_uint8(self._clean_images(part))  # [b, 3, H, W]
        for name, vfm in self.vfms.items():
            # Without images there is nothing to extract, but the width still has to agree over ranks.
            empty = torch.zeros(0, vfm.width, device=pl_module.device)
            tokens = vfm(images).tokens.mean(1) if len(images) else empty  # [b, C]
            self._references.setdefault(name, FeatureStore().to(pl_module.device)).update(tokens, part.index)

    def _add(self, features: Mapping[str, Tensor], index: Tensor) -> None:
        for name, values in features.items():
            self._stores.setdefault(name, FeatureStore().to(values.device)).update(values, index)

    def _clean_images(self, part: Batch | LatentBatch) -> Tensor:
        """The images of samples, uint8 `[b, 3, H, W]`."""
        if isinstance(part, Batch):
            return part.images
        if self._images is None:
            raise ValueError("images: the data holds latents; give the folder of the images that they were made of")
        numbers = part.index.tolist()
        if self._images.labels[numbers].tolist() != part.labels.tolist():
            raise ValueError(
                f"images: those in {str(self._images.folder)!r} have other classes than the latents; give the images "
                "that the latents were made of"
            )
        samples = [self._images[i][0] for i in numbers]
        return torch.stack(samples).to(part.index.device) if samples else torch.zeros(0, 3, 1, 1).byte()

    def _add_transformed(
        self, pl_module: EncodesImages, protocol: Literal["each", "published"], batch: Batch, chosen: Tensor
    ) -> None:
        """Adds the features of transformed images, and of transformed latents."""
        part = rows_of(batch, chosen)
        number = self._numbers[part.index.cpu()] if protocol == "published" else part.index
        latent = pl_module.latents(batch)[chosen]  # [b, C, h, w]
        parts = transformed(protocol, part.images, number) if len(number) else {}
        for name in names_of(protocol):  # a rank without images has to know them, too
            features = latent.new_zeros(latent.shape[:2])
            for rows, images in parts.get(name, ()):
                piece = Batch(images, part.labels[rows], part.index[rows])
                features[rows] = pl_module.latents(piece).mean(dim=(2, 3))
            self._add({f"se_cknna/latent/{name}": features}, part.index)
        turned = geometric(protocol, latent, number) if len(number) else {}
        for name in names_of(protocol, geometric_alone=True):
            features = latent.new_zeros(latent.shape[:2])
            for rows, maps in turned.get(name, ()):
                features[rows] = maps.mean(dim=(2, 3))
            self._add({f"se_cknna/latent_transformed/{name}": features}, part.index)

    def results(self) -> dict[str, Tensor]:
        """One value for each feature and VFM; means over transformations."""
        self._known = self._known or {name: self._neighbours(store) for name, store in self._references.items()}
        self._references = {}
        values: dict[str, Tensor] = {}
        for feature, store in self._stores.items():
            ours = self._neighbours(store)
            for name, theirs in self._known.items():
                value = torch.tensor(math.nan)
                if ours is not None and theirs is not None:
                    value = cknna_of_neighbours(ours, theirs)
                key = feature if len(self.vfms) == 1 else f"{feature}/{name}"
                values[key] = value.to(store.device)
        for mean, parts in self._means(values).items():
            values[mean] = torch.stack(parts).mean()
        return values

    def _neighbours(self, store: FeatureStore) -> Neighbours | None:
        features = store.compute()
        if len(features) <= max(self.k, 3):
            rank_zero_warn(f"CKNNA is not defined here: k = {self.k} needs more images than {len(features)}")
            return None
        return nearest_neighbours(prepare_features(features), self.k)

    def _means(self, values: Mapping[str, Tensor]) -> dict[str, list[Tensor]]:
        """The numbers of the image's transformations that are averaged, by the name of their mean."""
        if self.se_cknna != "each":
            return {}
        prefix = "se_cknna/latent/"
        means: dict[str, list[Tensor]] = {}
        for key, value in values.items():
            if key.startswith(prefix):
                _, slash, vfm = key.removeprefix(prefix).partition("/")
                means.setdefault(f"{prefix}mean{slash}{vfm}", []).append(value)
        return means

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Logs; along training, draws the heat map of blocks."""
        if trainer.sanity_checking or not self._active:
            return
        values = {name: float(value) for name, value in self.log_results(trainer).items()}
        if trainer.state.fn == "fit":
            self._history.append({"images_seen": _progress(trainer, pl_module), "values": values})
            if trainer.is_global_zero and not is_trial(trainer):
                self._draw(trainer)

    def _draw(self, trainer: Trainer) -> None:
        """One heat map for each VFM and time, of all that was measured so far."""
        blocks = [key for key in self._history[-1]["values"] if "/block_" in key]
        for kind in dict.fromkeys(re.sub(r"/block_\d+", "", key) for key in blocks):
            rows = [key for key in blocks if re.sub(r"/block_\d+", "", key) == kind]
            table = torch.tensor([[entry["values"].get(key, math.nan) for entry in self._history] for key in rows])
            title = "CKNNA" + kind.removeprefix("cknna").replace("/", ", ") + f", {', '.join(self.vfms)}"
            picture = block_heat_map(table, [entry["images_seen"] for entry in self._history], title)
            name = kind.replace("/", "_")
            show(trainer, picture, self._directory / f"{name}_blocks.png", f"val/{kind}_blocks")

    def settings(self) -> dict[str, Any]:
        """What the numbers depend on."""
        settings = {"k": self.k, "times": self.times, "se_cknna": self.se_cknna}
        if self.images is not None:
            settings |= {"images": self.images, "image_size": self.image_size}
        return super().settings() | settings | settings_of(self.vfms.values())


def _progress(trainer: Trainer, pl_module: LightningModule) -> int:
    """Images seen in training, or steps where the module doesn't count images."""
    return getattr(pl_module, "images_seen", trainer.global_step)
