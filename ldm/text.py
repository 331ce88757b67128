"""Texts as conditions: captions in training, prompts in sampling."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from ldm.condition import Condition, Conditioning
from vfm_vae.data.sampling import IndexedNoise
from vfm_vae.text import TextEncoder
from vfm_vae.types import Batch, LatentBatch, TextBatch, padded, rows_of_texts


@dataclass(frozen=True)
class Text(Condition):
    """A condition of embedded texts.

    Attributes:
        embeddings: float32 `[B, L, D]`, with zeros behind the last token of each text.
        mask: Which of them are tokens, bool `[B, L]`; every row has some.
        empty: Embeddings of the empty text, float32 `[E, D]`, which say nothing.
        texts: The texts, where they are to be told of.
    """

    rows: ClassVar[tuple[str, ...]] = ("embeddings", "mask")
    embeddings: Tensor
    mask: Tensor
    empty: Tensor
    texts: tuple[str, ...] | None = None

    @classmethod
    def of(cls, batch: TextBatch, told: bool = False) -> Self:
        """The condition of embedded captions; `told` says whether the texts themselves are kept."""
        assert batch.embeddings is not None and batch.mask is not None and batch.empty is not None
        return cls(batch.embeddings.float(), batch.mask, batch.empty.float(), batch.captions if told else None)

    def null(self) -> Self:
        """The empty text."""
        embeddings, mask = padded([self.empty], self.mask.shape[1])
        texts = None if self.texts is None else ("",) * len(self)
        return replace(
            self, embeddings=embeddings.expand_as(self.embeddings), mask=mask.expand_as(self.mask), texts=texts
        )

    def plain(self) -> list[str | None]:
        """The texts; None where they are not known."""
        return [None] * len(self) if self.texts is None else list(self.texts)

    def __getitem__(self, rows: Tensor | slice) -> Self:
        """Some of the samples, by a slice, by positions int64 `[N]`, or by a mask bool `[B]`."""
        texts = None if self.texts is None else rows_of_texts(self.texts, rows)
        return replace(super().__getitem__(rows), texts=texts)

    def cat(self, other: Self) -> Self:
        """These samples, then those of `other`."""
        known = self.texts is not None and other.texts is not None
        return replace(super().cat(other), texts=(*self.texts, *other.texts) if known else None)  # type: ignore[misc]

    def drop(self, dropped: Tensor) -> Self:
        """The condition, but null where `dropped`, bool `[B]`, is true; texts are not kept."""
        return replace(super().drop(dropped), texts=None)


def text_of(condition: Condition) -> Text:
    """The texts of a condition, for a denoiser that takes nothing else.

    Raises:
        ValueError: if it has none.
    """
    if not isinstance(condition, Text):
        raise ValueError(
            f"model.conditioning: gives {type(condition).__name__}, but the denoiser takes texts; change one of the two"
        )
    return condition


class Captions(nn.Module, Conditioning):
    """Samples are conditioned on captions: those of the data in training and evaluation, prompts in sampling.

    Embeddings that are cached beside the latents are taken as they are, others come from the text encoder.

    Args:
        encoder: Embeds captions. Its weights are read when a caption has to be embedded, and never if all are cached.
    """

    is_random = False

    def __init__(self, encoder: TextEncoder):
        super().__init__()
        self.encoder = encoder
        self._device = torch.device("cpu")

    @property
    def text_channels(self) -> int:  # type: ignore[override]
        """Width of the embeddings."""
        return self.encoder.width

    def of_batch(self, batch: Batch | LatentBatch) -> Text:
        """The batch's captions."""
        return Text.of(self._embedded(batch))

    def of_evaluation(self, batch: Batch | LatentBatch) -> Text | None:
        """The batch's captions or prompts, which are told of; None where it has none."""
        return None if batch.text is None else Text.of(self._embedded(batch), told=True)

    def null_of_batch(self, batch: Batch | LatentBatch) -> Text:
        """As many empty captions."""
        if batch.text is not None and batch.text.empty is not None:
            return Text.of(batch.text).null()
        return self.of_values([""] * len(batch.index))

    def of_samples(self, index: Tensor, noise: IndexedNoise) -> Text:
        """Empty captions: samples of whatever there is."""
        return self.of_values([""] * len(index))

    def of_values(self, values: Sequence[Any] | Tensor) -> Text:
        """Prompts."""
        prompts = [values] if isinstance(values, str) else values
        if isinstance(prompts, Tensor) or not prompts or not all(isinstance(prompt, str) for prompt in prompts):
            raise ValueError(f"prompts: give at least one text, given {values!r}")
        return Text.of(self.encoder.encode(prompts, self._device), told=True)

    def _embedded(self, batch: Batch | LatentBatch) -> TextBatch:
        if batch.text is None:
            raise ValueError("data.captions: the data has no captions, which the denoiser is told; give some that has")
        if batch.text.embeddings is not None:
            return batch.text
        return self.encoder.encode(batch.text.captions, batch.index.device)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        self._device = fn(torch.empty(0, device=self._device)).device
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch does not annotate it
