"""Contracts: what the parts ask of each other. A class with these methods will do; it need not inherit from them."""

from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from vfm_vae.images import Interpolation
from vfm_vae.types import Batch, Conditions, Decoded, Posterior, Samples, VFMFeatures


@runtime_checkable
class VFM(Protocol):
    """A frozen vision foundation model: images in, tokens out; an `nn.Module` that nothing trains or saves.

    The command line takes any class whose methods have these names, arguments and annotations. One that inherits from
    this class may leave out `view`, `compile_regions`, `hold_products_in` and `go_on_as`. With a classmethod
    `shape_of(**init_args) -> VFMShape`, configs need not state the widths that follow from the VFM.

    Attributes:
        name: What logs, checkpoints and caches call it; unique among VFMs.
        layers: The layers asked for, counted as the VFM likes.
        width: Channels of its final tokens.
        widths: Channels of each of the layers.
        stride: Pixels of an image for each token, along a side.
        target_interpolation: How training targets are resized beside it.
    """

    name: str
    layers: tuple[int, ...]
    width: int
    widths: tuple[int, ...]
    stride: float
    target_interpolation: Interpolation

    __call__: Callable[..., VFMFeatures]
    to: Callable[..., Any]

    def forward(self, images: Tensor) -> VFMFeatures:
        """Features of `images: [B, 3, H, W] in [-1, 1]`, without gradients."""

    def differentiable(self, images: Tensor) -> VFMFeatures:
        """The same features, with gradients that reach the images (the weights take none)."""

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the tokens of images `[B, 3, height, width]`; ValueError if this size does not fit."""

    def fingerprint(self) -> str:
        """What identifies its weights: SHA-256, in hexadecimal."""

    def source(self) -> dict[str, Any]:
        """What it takes to make this VFM again, as plain data.

        That is its arguments by name, and beside them `name`, `layers`, `fingerprint`, and `class_path`, which is left
        out for `FrozenVFM` alone.
        """

    def view(self) -> dict[str, Any]:
        """How it sees images and computes, as plain data: what its features depend on besides its weights."""
        return {}

    def compile_regions(self) -> None:
        """Compiles the parts that are worth compiling, in place."""

    def hold_products_in(self, dtype: torch.dtype) -> None:
        """Keeps weights in the precision that autocast takes them in, where that changes no outputs."""

    def go_on_as(self, stored: Mapping[str, Any], option: str) -> None:
        """Computes as the VFM did that a checkpoint names; `option` sets this one, for messages."""


class Tokenizer(Protocol):
    """An `nn.Module` between images and latents: what is trained, makes caches, and decodes for diffusion models.

    `vfm_vae.pretrained_tokenizer.PretrainedTokenizer` is a base class that has most of this.

    Attributes:
        vfm: Its frozen VFM, which it encodes with or is aligned to; None where there is none.
    """

    vfm: VFM | None

    @property
    @abstractmethod
    def latent_channels(self) -> int:
        """Channels C of the latent."""

    @property
    @abstractmethod
    def compression(self) -> int:
        """Image height over latent height."""

    @property
    def side_multiple(self) -> int:
        """The latent's height and width must be multiples of this."""

    @property
    def interpolation(self) -> Interpolation:
        """How training resizes images for it."""

    @abstractmethod
    def encode(self, images: Tensor) -> Posterior:
        """The posterior of latents `[B, C, h, w]`, of images `[B, 3, H, W]` in [-1, 1]."""

    def encode_with_features(self, images: Tensor) -> tuple[Posterior, VFMFeatures | None]:
        """The posterior for training, with the VFM's features of the images if there is a VFM."""

    @abstractmethod
    def decode(self, z: Tensor) -> Decoded:
        """Images of latents, with smaller ones of the same, where it makes such."""

    def latent_identity(self) -> dict[str, Any] | None:
        """What tells these latents from those of other tokenizers, in plain data; None where that is not known.

        It has `fingerprint`, a hash of all that makes the latents, which is None where that is not known; `channels`;
        `compression`; and `tokenizer`, the class, or, of a VFMVAE, `vfm`, the name of the VFM.
        """

    def described(self) -> dict[str, Any]:
        """How a checkpoint says to make it again, in plain data; see `vfm_vae.pretrained.Pretrained.described`."""

    def check_image_size(self, size: int) -> None:
        """Raises a ValueError if images of this side can't be tokenized."""

    def compile_regions(self) -> None:
        """Compiles the parts that are worth compiling, in place."""


@runtime_checkable
class Aligned(Protocol):
    """A tokenizer whose latents can be drawn towards its VFM's features."""

    @property
    def last_encoding_weight(self) -> Tensor:
        """The last weight before the posterior, where the adaptive weight of the alignment compares gradients."""

    def align(self, z: Tensor) -> Tensor:
        """Projects latents `[B, C, h, w]` to the VFM's width, `[B, D, h, w]`."""

    def alignment_target(self, features: VFMFeatures, z: Tensor) -> Tensor:
        """What the projected latents are to be: features at the latents' positions, `[B, D, h, w]`."""


@runtime_checkable
class HasLastDecodingWeight(Protocol):
    """A tokenizer whose adversarial losses can be weighed against its reconstruction."""

    @property
    def last_decoding_weight(self) -> Tensor:
        """The decoder's last weight, where the adaptive weight of an adversarial loss compares gradients."""


@runtime_checkable
class MeasuresLatents(Protocol):
    """A tokenizer that normalises its latents by statistics of training images, measured before its first step.

    Attributes:
        statistics_images: How many images they are measured on; 0 measures nothing.
    """

    statistics_images: int

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Channels, rows and columns of the latent."""

    def raw_latents(self, images: Tensor) -> Tensor:
        """Latents `[B, C, h, w]` of images `[B, 3, H, W]` in [-1, 1], before they are normalised."""

    def take_statistics(self, mean: Tensor, std: Tensor) -> None:
        """Normalises latents from now on by their mean and standard deviation over images, each `[C, h, w]`."""


@runtime_checkable
class HasVFM(Protocol):
    """A module with a VFM of its own, which callbacks may use."""

    @property
    def vfm(self) -> VFM | None:
        """The module's VFM, if it has one."""


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

    def latent_identity(self) -> Mapping[str, Any] | None:
        """What identifies the tokenizer's latents."""


@runtime_checkable
class MakesFeatures(Protocol):
    """A module whose `Encoded` may hold a VFM's features beside the latents."""

    def features_source(self) -> Mapping[str, Any] | None:
        """What a cache says of that VFM, as `VFM.source` has it; None where there is none."""


@runtime_checkable
class DrawsSamples(Protocol):
    """A module that generates; what it draws depends on a sample's number alone, not on batches or ranks."""

    predict: str
    can_decode: bool
    num_classes: int | None  # None where samples are drawn for something else

    def draw(
        self,
        index: Tensor,
        condition: Any = None,
        guidance_scale: float | None = None,
        decode: bool = True,
    ) -> Samples:
        """Samples by their numbers `[B]`.

        They are drawn for `condition`, or plain values such as classes that stand for one; where nothing is given, for
        what the module chooses. The guidance scale is the module's, too, where none is given.
        """

    def sample_condition(self, index: Tensor) -> Conditions:
        """What the module chooses to draw samples for, by their numbers `[B]`."""

    def evaluation_settings(self) -> Mapping[str, Any]:
        """All that samples depend on, as plain data."""


@runtime_checkable
class HasEvaluationSettings(Protocol):
    """A module that says what its measured numbers depend on."""

    def evaluation_settings(self) -> Mapping[str, Any]:
        """All that measured numbers depend on, as plain data."""


@runtime_checkable
class WeightAverage(Protocol):
    """A callback that averages weights; the module hands it the averages of the previous stage."""

    def load_average(self, state: Mapping[str, Any]) -> None:
        """Continues from `state`, as a checkpoint holds it under the key `ema`."""


@runtime_checkable
class Measures(Protocol):
    """A callback that measures a module in validation and test, and logs what it finds.

    Attributes:
        num_images: Number of images that it measures; None for all.
    """

    num_images: int | None

    def adopt(self, pl_module: Any) -> None:
        """Uses the module's own VFM where it was given none."""

    def names(self) -> set[str]:
        """The names of what it logs, without `val/` or `test/`; `<feature>` stands for a module's features."""

    def settings(self) -> dict[str, Any]:
        """What its numbers depend on, as plain data."""
