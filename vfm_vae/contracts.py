"""What the parts ask of each other. Any class with these methods will do; it need not inherit anything."""

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from vfm_vae.types import Batch, Decoded, Samples


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
