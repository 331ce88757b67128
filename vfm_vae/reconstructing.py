"""Evaluation and prediction of tokenizers: encodes and decodes images to measure, write or cache them."""

from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from vfm_vae.contracts import VFM
from vfm_vae.data.sampling import IndexedNoise
from vfm_vae.frozen import sha256_of
from vfm_vae.images import Rounding, from_uint8, quantised, resize
from vfm_vae.metrics.reconstruction import PSNR, ReconstructionMetrics
from vfm_vae.types import Batch, Decoded, Encoded


class Reconstructing(LightningModule):
    """The part of `TokenizerModule` that evaluates and predicts; its options are explained there.

    Attributes:
        val_metrics: Compares reconstructions with images.
        val_thumbnail: Compares images shrunk to the latent's grid and enlarged again.
    """

    model: Any  # a Tokenizer and an nn.Module at once, for which Python has no type
    features: VFM | None
    evaluate: Literal["mode", "sample"]
    rounding: Rounding
    predict: Literal["reconstructions", "latents", "moments"]
    seed: int
    images_seen: int
    val_metrics: ReconstructionMetrics
    val_thumbnail: PSNR

    def __init__(self) -> None:
        super().__init__()
        self._evaluated: tuple[Batch, Tensor] | None = None  # reconstructions of the batch at hand
        self._encoded: tuple[Batch, Tensor] | None = None

    def reconstruct(self, batch: Batch) -> Decoded:
        """Reconstruction `[B, 3, H, W]` and multi-scale images of a batch, not clamped."""
        with torch.no_grad():
            return self.model.decode(self.model.encode(from_uint8(batch.images)).mode())

    @torch.no_grad()
    def latents(self, batch: Batch) -> Tensor:
        """The latents that evaluation looks at, `[B, C, h, w]`; encodes a batch once, however many ask for it."""
        if self._encoded is None or self._encoded[0] is not batch:
            posterior = self.model.encode(from_uint8(batch.images))
            latents = posterior.mode()
            if self.evaluate == "sample":
                noise = IndexedNoise("evaluation", self.seed, batch.index, self.device)
                latents = posterior.sample(noise.normal(*latents.shape[1:]))
            self._encoded = batch, latents
        return self._encoded[1]

    def alignment_features(self, batch: Batch, time: float | None = None) -> dict[str, Tensor]:
        """The latent, averaged over positions, `[B, C]`; `time` is for diffusion models."""
        return {"latent": self.latents(batch).mean(dim=(2, 3))}

    @torch.no_grad()
    def evaluation_images(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Images and their reconstructions after 8 bits, `[B, 3, H, W]` in [-1, 1]; decodes a batch once."""
        if self._evaluated is None or self._evaluated[0] is not batch:
            self._evaluated = batch, quantised(self.model.decode(self.latents(batch)).image, self.rounding)
        return from_uint8(batch.images), self._evaluated[1]

    def evaluation_settings(self) -> dict[str, Any]:
        """All that measured numbers depend on."""
        return {
            "latent": self.evaluate,
            "rounding": self.rounding,
            "seed": self.seed,
            "tokenizer": self.latent_identity(),
            "precision": self.trainer.precision,
            "matmul_precision": torch.get_float32_matmul_precision(),
            "images_seen": self.images_seen,
            "weights": sha256_of(self.model.state_dict()),
        }

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Measures reconstructions."""
        images, reconstructions = (x[batch.real] for x in self.evaluation_images(batch))
        self.val_metrics.update(reconstructions, images)
        # What the latent's grid alone would hold: the image shrunk to it and enlarged again.
        thumbnail = resize(images, [side // self.model.compression for side in images.shape[2:]], "bilinear")
        self.val_thumbnail.update(resize(thumbnail, images.shape[2:], "bilinear"), images)

    def on_validation_batch_end(self, *_: Any, **__: Any) -> None:
        """Forgets the batch, after the callbacks have asked for it."""
        self._evaluated = self._encoded = None

    on_test_batch_end = on_validation_batch_end

    def on_validation_epoch_end(self) -> None:
        """Logs the metrics over all ranks."""
        self._log_metrics("val")

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Measures reconstructions."""
        self.validation_step(batch, batch_idx)

    def on_test_epoch_end(self) -> None:
        """Logs the metrics over all ranks."""
        self._log_metrics("test")

    def _log_metrics(self, stage: str) -> None:
        values = self.val_metrics.compute() | {"psnr_thumbnail": self.val_thumbnail.compute()}
        self.log_dict({f"{stage}/{name}": value for name, value in values.items()}, rank_zero_only=False)
        with torch.inference_mode(False):  # or training after `validate` could not go on with these states
            self.val_metrics.reset()
            self.val_thumbnail.reset()

    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> tuple[Tensor, Tensor] | Encoded:
        """Reconstructions `[B, 3, H, W]` in [-1, 1] and the positions of their images, `[B]`, or what a cache holds."""
        if self.predict == "reconstructions":
            return self.evaluation_images(batch)[1], batch.index
        images = from_uint8(batch.images)
        posterior = self.model.encode(images)
        if self.predict == "moments":
            tensors = {"moments": posterior.moments()}
            if self.features is not None:
                tensors["features"] = self.features(images).sequence.bfloat16()  # [B, 1 + N, D]
            return Encoded(tensors, batch.labels, batch.index)
        noise = IndexedNoise("posterior", self.seed, batch.index, self.device)
        views = {"latents": posterior, "latents_flip": self.model.encode(images.flip(3))}
        latents = {name: view.sample(noise.normal(*view.mode().shape[1:])) for name, view in views.items()}
        return Encoded(latents, batch.labels, batch.index)

    @property
    def vfm(self) -> VFM | None:
        """The tokenizer's own VFM, which callbacks may use, too."""
        return self.model.vfm

    def latent_identity(self) -> dict[str, Any] | None:
        """What a cache notes of the tokenizer."""
        return self.model.latent_identity()

    def features_source(self) -> dict[str, Any] | None:
        """What a cache notes of the VFM whose features it holds, wherever its weights lie."""
        if self.features is None:
            return None
        return {name: value for name, value in self.features.source().items() if name != "weights"}
