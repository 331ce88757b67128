"""The part of a module that draws samples: for prediction, and for callbacks that look at samples."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.distributed.tensor import DTensor

from ldm.condition import Condition
from ldm.pipeline import LatentDiffusion
from vfm_vae.frozen import sha256_of
from vfm_vae.images import Rounding, from_uint8, quantised
from vfm_vae.options import at_least
from vfm_vae.tokenizer import FrozenTokenizer
from vfm_vae.types import Batch, LatentBatch, Samples

Content = Literal["images", "latents"]


class DrawingModule(LightningModule):
    """Draws the samples of a `LatentDiffusion` in Lightning's hooks.

    Args:
        pipeline: Draws latents. Its denoiser and statistics become parts of this module, under the same names.
        tokenizer: Decodes them, and says whose latents they are; None if neither is needed.
        predict: What prediction returns.
        rounding: How samples are converted to 8 bits.
        seed: Seed of samples.

    Attributes:
        pipeline: As given. It is outside the module registry, so that no weight has two names.
        images_seen: How many images were trained on, over all ranks.
    """

    pipeline: LatentDiffusion

    def __init__(
        self,
        pipeline: LatentDiffusion,
        tokenizer: FrozenTokenizer | None,
        predict: Content,
        rounding: Rounding,
        seed: int,
    ):
        super().__init__()
        at_least(0, seed=seed)
        vars(self)["pipeline"] = pipeline
        self.model, self.normalization = pipeline.model, pipeline.normalization
        self.conditioning = pipeline.conditioning  # which may hold networks, to be moved along
        self.tokenizer = tokenizer
        pipeline.latent_source = None if tokenizer is None else tokenizer.identity
        self.predict: Content = predict
        self.rounding: Rounding = rounding
        self.seed = seed
        self.images_seen = 0
        self._drawn: Samples | None = None
        self._captions: tuple[str, ...] | None = None  # that they were drawn for, where there are any

    @property
    def num_classes(self) -> int | None:
        """Classes that samples can be drawn of; None where they are drawn for something else."""
        return self.conditioning.num_classes

    @property
    def can_decode(self) -> bool:
        """Whether samples can be had as images."""
        return self.tokenizer is not None

    @torch.no_grad()
    def draw(
        self,
        index: Tensor,
        condition: Condition | Sequence[Any] | Tensor | None = None,
        guidance_scale: float | None = None,
        decode: bool = True,
    ) -> Samples:
        """Draws samples, images after 8 bits; each depends on the seed, its number and its condition alone.

        Args:
            index: Their numbers, int64 `[B]`.
            condition: What they are drawn for, or plain values such as classes; `sample_condition` if not given.
            guidance_scale: Instead of the module's.
            decode: Whether images are wanted, or latents alone.

        Raises:
            ValueError: if images are wanted but there is no tokenizer, there is no condition for a value, or the
                statistics of latents are not known.
        """
        if decode and self.tokenizer is None:
            raise ValueError("model.tokenizer: images need a tokenizer that decodes latents; or set predict: latents")
        condition = None if condition is None else self.pipeline.condition(condition)
        samples = self.pipeline.draw(index, self.seed, condition, guidance_scale)
        if not decode or self.tokenizer is None:
            return samples
        return samples._replace(images=quantised(self.tokenizer.decode(samples.latents), self.rounding))

    def sample_condition(self, index: Tensor) -> Condition:
        """The condition of samples, by their numbers, int64 `[B]`."""
        return self.pipeline.sample_condition(index, self.seed)

    def evaluation_settings(self) -> dict[str, Any]:
        """All that samples depend on; all ranks must ask, as weights may be sharded."""
        state = self.model.state_dict()
        weights = {name: t.full_tensor().cpu() if isinstance(t, DTensor) else t for name, t in state.items()}
        return self.drawing_settings() | {"images_seen": self.images_seen, "weights": sha256_of(weights)}

    def drawing_settings(self) -> dict[str, Any]:
        """All that samples depend on besides the denoiser's weights."""
        return {
            **self.pipeline.settings(),
            "seed": self.seed,
            "content": self.predict,
            "rounding": self.rounding,
            "decoder": None if self.tokenizer is None or self.predict != "images" else self.tokenizer.fingerprint(),
            "precision": self.trainer.precision,
            "matmul_precision": torch.get_float32_matmul_precision(),
        }

    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> Samples:
        """Draws the samples that a batch numbers."""
        return self.draw(batch.index, self.conditioning.of_evaluation(batch), decode=self.predict == "images")

    def evaluation_images(self, batch: Batch | LatentBatch) -> tuple[Tensor | None, Tensor]:
        """Samples as `draw` gives them, numbered like the batch, beside its images where it holds any."""
        captions = None if batch.text is None else batch.text.captions
        # Callbacks that look at different parts of a batch may give the same numbers to images with other captions.
        if self._drawn is None or captions != self._captions or not torch.equal(self._drawn.index, batch.index):
            self._drawn, self._captions = self.draw(batch.index, self.conditioning.of_evaluation(batch)), captions
        assert self._drawn.images is not None  # `draw` decodes
        real = from_uint8(batch.images) if isinstance(batch, Batch) and batch.has_images else None
        return real, self._drawn.images

    def on_validation_batch_end(self, *_: Any, **__: Any) -> None:
        """Forgets the samples, after the callbacks have asked for them."""
        self._drawn = None

    on_test_batch_end = on_validation_batch_end
