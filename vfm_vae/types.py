"""Data that crosses the borders between packages, and what the callbacks ask of a module."""

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor


class Batch(NamedTuple):
    """What the DataModule yields.

    Attributes:
        images: uint8 images, `[B, 3, H, W]` in 0..255.
        labels: int64 class indices, `[B]`.
        index: int64 positions in the data set, `[B]`; -1 marks the padding of a validation set that does not divide
            over the ranks, which every metric leaves out.
    """

    images: Tensor
    labels: Tensor
    index: Tensor

    @property
    def real(self) -> Tensor:
        """Which samples are no padding, bool `[B]`."""
        return self.index >= 0

    @property
    def has_images(self) -> bool:
        """Whether there are images, or only the numbers of samples that are to be drawn (images are then empty)."""
        return self.images.shape[-1] > 0


class LatentBatch(NamedTuple):
    """What the DataModule yields where the images were encoded beforehand.

    Attributes:
        latents: float32, as the tokenizer gave them: not normalised, `[B, C, h, w]`.
        labels: int64 class indices, `[B]`.
        index: as in `Batch`.
        features: of the clean images by a VFM, as `VFMFeatures.sequence` has them, `[B, 1 + N, D]` in the precision
            that they are stored in, float32 or bfloat16; None where the cache has none.
    """

    latents: Tensor
    labels: Tensor
    index: Tensor
    features: Tensor | None = None

    @property
    def real(self) -> Tensor:
        """Which samples are no padding, bool `[B]`."""
        return self.index >= 0


def num_images(batch: Batch | LatentBatch) -> int:
    """Images in a batch, for whoever measures images per second."""
    return len(batch.labels)


class Encoded(NamedTuple):
    """What a tokenizer makes of a batch of images for a cache.

    Attributes:
        tensors: by their names in the cache, `latents` and `latents_flip` `[B, C, h, w]`, or `moments` `[B, 2C, h, w]`
            and, beside those, perhaps `features` `[B, 1 + N, D]` of a VFM.
        labels: int64 class indices, `[B]`.
        index: as in `Batch`.
    """

    tensors: Mapping[str, Tensor]
    labels: Tensor
    index: Tensor


class Samples(NamedTuple):
    """What a diffusion model draws.

    Attributes:
        images: `[B, 3, H, W]` in [-1, 1]; None where latents were asked for.
        latents: as the tokenizer decodes them, `[B, C, h, w]`.
        labels: the classes they were drawn for, int64 `[B]`.
        index: their numbers, int64 `[B]`; -1 marks padding.
    """

    images: Tensor | None
    latents: Tensor
    labels: Tensor
    index: Tensor


class VFMFeatures(NamedTuple):
    """What a frozen vision foundation model says of a batch of images, in float32.

    Attributes:
        layers: tokens of the layers asked for, in that order, each `[B, N, C]` in raster order.
        tokens: patch tokens after the final norm, `[B, N, C]`.
        pooled: class token after the final norm, or the mean of the patch tokens where there is none, `[B, C]`.
        grid: rows and columns of the token grid; `N = rows * columns`.
    """

    layers: tuple[Tensor, ...]
    tokens: Tensor
    pooled: Tensor
    grid: tuple[int, int]

    @property
    def sequence(self) -> Tensor:
        """What diffusion models are aligned to: `pooled`, then `tokens`, `[B, 1 + N, C]`."""
        return torch.cat([self.pooled[:, None], self.tokens], dim=1)


class Decoded(NamedTuple):
    """What the decoder makes of a latent.

    Attributes:
        image: the reconstruction, `[B, 3, H, W]`, nominally in [-1, 1], not clamped.
        multiscale: the images of the earlier blocks, small to large, `[B, 3, h_i, w_i]`.
    """

    image: Tensor
    multiscale: tuple[Tensor, ...]


class Posterior(Protocol):
    """A distribution over latents `[B, C, h, w]`."""

    def mode(self) -> Tensor:
        """The most likely latent."""

    def sample(self, noise: Tensor | None = None) -> Tensor:
        """A latent drawn from the distribution, with the given standard normal noise or with fresh noise."""

    def moments(self) -> Tensor:
        """What a cache stores to sample from later."""

    def kl(self) -> Tensor:
        """Divergence from the prior, summed over latent dimensions, `[B]`."""


@runtime_checkable
class CountsImages(Protocol):
    """A module that knows how many images it was trained on, over all ranks and former stages."""

    images_seen: int


@runtime_checkable
class AlignmentFeatures(Protocol):
    """A module whose inner features can be compared with a VFM's."""

    def alignment_features(self, batch: Batch, time: float | None = None) -> Mapping[str, Tensor]:
        """Pooled features `[B, D]` by name: "latent", "block_07", …; `time` is the diffusion time, if there is one."""


@runtime_checkable
class EvaluationImages(Protocol):
    """A module whose images can be measured."""

    def evaluation_images(self, batch: Batch) -> tuple[Tensor | None, Tensor]:
        """Real images, if any, and generated ones, `[B, 3, H, W]` in [-1, 1]."""


@runtime_checkable
class EncodesImages(Protocol):
    """A module that encodes images of several sizes, deterministically for each image's index."""

    def latents(self, batch: Batch) -> Tensor:
        """Latents of a batch, as evaluation uses them, `[B, C, h, w]`."""


@runtime_checkable
class Reconstructs(Protocol):
    """A module that encodes and decodes images."""

    def reconstruct(self, batch: Batch) -> Decoded:
        """Reconstruction and multi-scale images of a batch, without randomness and without speaking to other ranks."""


@runtime_checkable
class MakesLatents(Protocol):
    """A module whose `predict_step` may return `Encoded`."""

    predict: str
    seed: int

    def latent_identity(self) -> Mapping[str, str | int]:
        """What tells the tokenizer's latents from others'."""


@runtime_checkable
class MakesFeatures(Protocol):
    """A module whose `Encoded` may hold a VFM's features beside the latents."""

    def features_source(self) -> Mapping[str, Any] | None:
        """What a cache says of that VFM, as `FrozenVFM.source` has it; None where there is none."""


@runtime_checkable
class DrawsSamples(Protocol):
    """A module that generates; what it draws depends on a sample's number alone, not on batches or ranks."""

    predict: str
    can_decode: bool
    num_classes: int

    def draw(
        self,
        index: Tensor,
        labels: Tensor | None = None,
        guidance_scale: float | None = None,
        decode: bool = True,
    ) -> Samples:
        """Samples by their numbers `[B]`; labels and guidance scale are the module's where none are given."""

    def sample_labels(self, index: Tensor) -> Tensor:
        """The classes that the module chooses for samples, `[B]`."""

    def evaluation_settings(self) -> Mapping[str, Any]:
        """All that samples depend on, as JSON has it."""


@runtime_checkable
class HasEvaluationSettings(Protocol):
    """A module that can say under what conditions it is measured."""

    def evaluation_settings(self) -> Mapping[str, Any]:
        """All that measured numbers depend on, as JSON has it."""


@runtime_checkable
class WeightAverage(Protocol):
    """Whoever keeps averaged weights: the module hands a former stage's over to it."""

    def load_average(self, state: Mapping[str, Any]) -> None:
        """Continues from `state`, as a checkpoint holds it under the key `ema`."""
