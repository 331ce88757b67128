"""How well images fit the captions or prompts that they were made for, by CLIP."""

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from callbacks.evaluation import EvaluationCallback, first_loader
from vfm_vae.contracts import DrawsSamples, EvaluationImages
from vfm_vae.images import to_uint8
from vfm_vae.metrics.clip_score import CLIP
from vfm_vae.metrics.reconstruction import MeanOverImages
from vfm_vae.types import Batch, LatentBatch


class CLIPScoreCallback(EvaluationCallback):
    """Logs the CLIP score of the module's `evaluation_images`, after 8 bits, as `val/clip_score`.

    That is 100 · max(cosine, 0) between CLIP's embeddings of an image and of its caption or prompt, averaged over
    images. Numbers can only be compared by the same CLIP. Its weights are read when they are first needed, and are in
    no checkpoint. Captions that are longer than CLIP reads are cut.

    Args:
        name: The CLIP: `owner/model` on the Hugging Face hub, or a folder that `save_pretrained` of the library
            transformers wrote.
        num_images: Number of images to measure, spread evenly over the data set; null for all.

    Raises:
        ValueError: when a run starts, if there is no such CLIP, or samples are drawn for classes; when training or
            validation starts, if the data has neither captions nor prompts, or the module has no `evaluation_images`.
    """

    def __init__(self, name: str = "openai/clip-vit-base-patch16", num_images: int | None = None) -> None:
        super().__init__(num_images)
        self.name = name
        self._clip: CLIP | None = None
        self._scores = MeanOverImages()

    @property
    def clip(self) -> CLIP:
        """The network, which is loaded when it is first asked for."""
        if self._clip is None:
            self._clip = CLIP(self.name)
        return self._clip

    def names(self) -> set[str]:
        """One number."""
        return {"clip_score"}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Loads the network, so that a mistake shows before anything is computed."""
        super().setup(trainer, pl_module, stage)
        if isinstance(pl_module, DrawsSamples) and pl_module.num_classes is not None:
            raise ValueError("CLIPScoreCallback: this model draws samples of classes, not of captions; leave it out")
        if stage != "predict":
            _ = self.clip

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Checks early that there are captions."""
        if trainer.val_dataloaders:
            _check_captions(trainer.val_dataloaders)

    def start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Moves the network to the module's device."""
        if not isinstance(pl_module, EvaluationImages):
            raise ValueError(f"{type(pl_module).__name__} has no evaluation_images to measure.")
        _check_captions(trainer.test_dataloaders if trainer.testing else trainer.val_dataloaders)
        self.clip.to(pl_module.device)
        self._scores = MeanOverImages().to(pl_module.device)

    def update(self, pl_module: Any, batch: Batch | LatentBatch) -> None:
        """Scores the images of a batch."""
        batch = self.select(batch)
        if len(batch.index):
            assert batch.text is not None  # as `start` has checked
            images = to_uint8(pl_module.evaluation_images(batch)[1])
            self._scores.update(self.clip(images, batch.text.captions))

    def results(self) -> dict[str, Tensor]:
        """The mean score."""
        return {"clip_score": self._scores.compute()}

    def settings(self) -> dict[str, Any]:
        """What the number depends on."""
        return super().settings() | {"clip": self.name, "clip_weights": self.clip.fingerprint()}


def _check_captions(loaders: Any) -> None:
    """Looks at one sample: the first batch would cost images."""
    loader: Any = first_loader(loaders)
    if len(loader.dataset) and loader.collate_fn([loader.dataset[0]]).text is None:
        raise ValueError(
            "CLIPScoreCallback: the data has neither captions (data.captions) nor prompts (data.prompts) to compare "
            "images with; set one of them, or leave the callback out"
        )
