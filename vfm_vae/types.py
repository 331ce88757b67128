"""Data that the packages exchange."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol, Self, runtime_checkable

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence


class Caption(NamedTuple):
    """What is said of one image.

    Attributes:
        text: The caption; empty where nothing is said.
        tokens: What a text encoder made of it, `[n, D]`; None where that is yet to be done.
        empty: What it made of the empty caption, `[E, D]`, likewise.
        length: L, the most tokens that it makes of a caption, likewise.
    """

    text: str
    tokens: Tensor | None = None
    empty: Tensor | None = None
    length: int | None = None


@dataclass(frozen=True)
class TextBatch:
    """The captions of a batch, and their embeddings where those are known.

    Attributes:
        captions: One for each image; empty where nothing is said.
        embeddings: What a text encoder makes of them, bfloat16 `[B, L, D]`, with zeros behind the last token of each;
            None where that is yet to be done.
        mask: Which of them are tokens, bool `[B, L]`, likewise. Every caption has some, the empty one, too.
        empty: Embeddings of the empty caption, `[E, D]`, likewise.
    """

    captions: tuple[str, ...]
    embeddings: Tensor | None = None
    mask: Tensor | None = None
    empty: Tensor | None = None

    @classmethod
    def of(cls, captions: Sequence[Caption]) -> Self:
        """Puts captions together; all have embeddings, or none has."""
        texts = tuple(caption.text for caption in captions)
        tokens = [caption.tokens for caption in captions if caption.tokens is not None]
        if not tokens or captions[0].length is None:
            return cls(texts)
        return cls(texts, *_padded(tokens, captions[0].length), captions[0].empty)

    def __len__(self) -> int:
        """Number of captions."""
        return len(self.captions)

    def __getitem__(self, rows: Tensor | slice) -> Self:
        """Some of them, by a slice, by positions int64 `[N]`, or by a mask bool `[B]`."""
        chosen: dict[str, Any] = {"captions": rows_of_texts(self.captions, rows)}
        for name in ("embeddings", "mask"):
            values = getattr(self, name)
            chosen[name] = None if values is None else values[rows]
        return replace(self, **chosen)

    def to(self, device: torch.device | str) -> Self:
        """The same on another device; the host waits for no GPU."""
        on_gpu = torch.device(device).type == "cuda"
        return self._each(lambda values: values.to(device, non_blocking=on_gpu))

    def pin_memory(self) -> Self:
        """The same in pinned memory, from which GPUs read faster; data loaders call this."""
        return self._each(lambda values: values.pin_memory())

    def _each(self, function: Callable[[Tensor], Tensor]) -> Self:
        tensors = {name: getattr(self, name) for name in ("embeddings", "mask", "empty")}
        changed: dict[str, Any] = {name: function(x) for name, x in tensors.items() if x is not None}
        return replace(self, **changed)


def _padded(tokens: Sequence[Tensor], length: int) -> tuple[Tensor, Tensor]:
    """Texts of several lengths side by side, each followed by zeros.

    Args:
        tokens: Embeddings of each, `[n, D]`.
        length: L, which all have room in.

    Returns:
        `[B, L, D]`, and which of these are tokens, bool `[B, L]`.
    """
    side_by_side = pad_sequence([*tokens], batch_first=True)
    embeddings = pad(side_by_side, (0, 0, 0, length - side_by_side.shape[1]))
    counts = torch.tensor([len(text) for text in tokens])
    mask = torch.arange(length) < counts[:, None]
    return embeddings, mask.to(embeddings.device, non_blocking=True)


def rows_of_texts(texts: Sequence[str], rows: Tensor | slice) -> tuple[str, ...]:
    """Some of several texts, by a slice, by positions int64 `[N]`, or by a mask bool `[B]`."""
    if isinstance(rows, slice):
        return tuple(texts[rows])
    positions = rows.nonzero()[:, 0] if rows.dtype == torch.bool else rows
    return tuple(texts[position] for position in positions.tolist())


class Batch(NamedTuple):
    """What the DataModule yields.

    Attributes:
        images: uint8 images, `[B, 3, H, W]` in 0..255.
        labels: int64 class indices, `[B]`.
        index: int64 positions in the data set, `[B]`; -1 marks the padding of a validation set that does not divide
            over the ranks, which every metric leaves out.
        text: The images' captions; None where the data has none.
    """

    images: Tensor
    labels: Tensor
    index: Tensor  # type: ignore[assignment]  # tuples have a method of this name
    text: TextBatch | None = None

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
        index: As in `Batch`.
        features: A VFM's features of the clean images, as `VFMFeatures.sequence` has them, `[B, 1 + N, D]` in the
            precision that they are stored in, float32 or bfloat16; None where the cache has none.
        text: The images' captions with their embeddings; None where the cache has none.
    """

    latents: Tensor
    labels: Tensor
    index: Tensor  # type: ignore[assignment]  # tuples have a method of this name
    features: Tensor | None = None
    text: TextBatch | None = None

    @property
    def real(self) -> Tensor:
        """Which samples are no padding, bool `[B]`."""
        return self.index >= 0


def num_images(batch: Batch | LatentBatch) -> int:
    """Images in a batch, for whoever measures images per second."""
    return len(batch.index)


class Encoded(NamedTuple):
    """What a tokenizer makes of a batch of images for a cache.

    Attributes:
        tensors: By their names in the cache, `latents` and `latents_flip` `[B, C, h, w]`, or `moments` `[B, 2C, h, w]`
            and, beside those, perhaps `features` `[B, 1 + N, D]` of a VFM.
        labels: int64 class indices, `[B]`.
        index: As in `Batch`.
    """

    tensors: Mapping[str, Tensor]
    labels: Tensor
    index: Tensor  # type: ignore[assignment]  # tuples have a method of this name


class Conditions(Protocol):
    """What samples are drawn for, one row each; code above the denoiser passes it on without looking inside."""

    def __len__(self) -> int:
        """Number of samples."""

    def __getitem__(self, rows: Tensor | slice) -> Self:
        """Some of the samples, by a slice, by positions int64 `[N]`, or by a mask bool `[B]`."""

    def tensors(self) -> dict[str, Tensor]:
        """What is kept of the rows, as tensors `[B, ...]` by name: class labels are `labels`."""

    def plain(self) -> list[Any]:
        """Each row as JSON has it, such as the number of a class."""


class Samples(NamedTuple):
    """What a diffusion model draws.

    Attributes:
        images: `[B, 3, H, W]` in [-1, 1]; None where latents were asked for.
        latents: Latents as the tokenizer decodes them, `[B, C, h, w]`.
        condition: What they were drawn for, such as classes.
        index: Their numbers, int64 `[B]`; -1 marks padding.
    """

    images: Tensor | None
    latents: Tensor
    condition: Conditions
    index: Tensor  # type: ignore[assignment]  # tuples have a method of this name


class VFMFeatures(NamedTuple):
    """What a frozen vision foundation model says of a batch of images, in float32.

    Attributes:
        layers: Tokens of the layers asked for, in that order, each `[B, N, C]` in raster order.
        tokens: Patch tokens after the final norm, `[B, N, C]`.
        pooled: Class token after the final norm, or the mean of the patch tokens where there is none, `[B, C]`.
        grid: Rows and columns of the token grid; `N = rows * columns`.
    """

    layers: tuple[Tensor, ...]
    tokens: Tensor
    pooled: Tensor
    grid: tuple[int, int]

    @property
    def sequence(self) -> Tensor:
        """What diffusion models are aligned to: `pooled`, then `tokens`, `[B, 1 + N, C]`."""
        return torch.cat([self.pooled[:, None], self.tokens], dim=1)


class VFMShape(NamedTuple):
    """What other parts' options follow from, known of a VFM before it is built.

    Attributes:
        width: Channels of its final tokens.
        widths: Channels of each of the layers asked for.
        stride: Pixels of an image for each token, along a side.
        target_interpolation: How training targets are resized for it, `bilinear` or `bicubic`.
    """

    width: int
    widths: tuple[int, ...]
    stride: float
    target_interpolation: str


class Decoded(NamedTuple):
    """What the decoder makes of a latent.

    Attributes:
        image: The reconstruction, `[B, 3, H, W]`, nominally in [-1, 1], not clamped.
        multiscale: The images of the earlier blocks, small to large, `[B, 3, h_i, w_i]`.
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


@runtime_checkable
class Variational(Posterior, Protocol):
    """A posterior that has a prior."""

    def kl(self) -> Tensor:
        """Divergence from the prior, summed over latent dimensions, `[B]`."""
