"""Texts as conditions: captions in training, prompts in sampling."""

import reprlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from ldm.condition import Condition, Conditioning
from vfm_vae.data.sampling import IndexedNoise
from vfm_vae.description import class_path
from vfm_vae.text import TextEncoder
from vfm_vae.types import Batch, LatentBatch, TextBatch, rows_of_texts


@dataclass(frozen=True)
class Text(Condition):
    """A condition of embedded texts.

    Attributes:
        embeddings: float32 `[B, L, D]`, with zeros behind the last token of each text.
        mask: Which of them are tokens, bool `[B, L]`; every row has some.
        empty: Embeddings of the empty text, which says nothing, float32 `[E, D]`.
        texts: The texts themselves; None where they are not known.
    """

    rows: ClassVar[tuple[str, ...]] = ("embeddings", "mask")
    embeddings: Tensor
    mask: Tensor
    empty: Tensor
    texts: tuple[str, ...] | None = None

    @classmethod
    def of(cls, batch: TextBatch) -> Self:
        """The condition of embedded captions."""
        assert batch.embeddings is not None and batch.mask is not None and batch.empty is not None
        return cls(batch.embeddings.float(), batch.mask, batch.empty.float(), batch.captions)

    @classmethod
    def nothing(cls, empty: Tensor, length: int, count: int) -> Self:
        """The empty text, several times, without making the host wait for a GPU.

        Args:
            empty: Its embeddings, `[E, D]`.
            length: L, with zeros behind those.
            count: B.
        """
        embeddings = pad(empty.float(), (0, 0, 0, length - len(empty))).expand(count, -1, -1)
        mask = (torch.arange(length, device=empty.device) < len(empty)).expand(count, -1)
        return cls(embeddings, mask, empty.float(), ("",) * count)

    def null(self) -> Self:
        """The empty text."""
        return self.nothing(self.empty, self.mask.shape[1], len(self))

    def plain(self) -> list[str | None]:
        """The texts; None where they are not known."""
        return [None] * len(self) if self.texts is None else list(self.texts)

    def tensors(self) -> dict[str, Tensor]:
        """Nothing: embeddings are larger than the samples, and come from the texts."""
        return {}

    def __getitem__(self, rows: Tensor | slice) -> Self:
        """Some of the samples, by a slice, by positions int64 `[N]`, or by a mask bool `[B]`."""
        texts = None if self.texts is None else rows_of_texts(self.texts, rows)
        return replace(super().__getitem__(rows), texts=texts)

    def cat(self, other: Self) -> Self:
        """These samples, then those of `other`."""
        texts = None if self.texts is None or other.texts is None else self.texts + other.texts
        return replace(super().cat(other), texts=texts)

    def drop(self, dropped: Tensor) -> Self:
        """The condition, but null where `dropped`, bool `[B]`, is true; the texts are not known afterwards."""
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
    text_encoder: TextEncoder

    def __init__(self, encoder: TextEncoder):
        super().__init__()
        self.text_encoder = encoder
        self._device = torch.device("cpu")

    def of_batch(self, batch: Batch | LatentBatch) -> Text:
        """The batch's captions.

        Raises:
            ValueError: if it has none.
        """
        if batch.text is None:
            raise ValueError(
                "data.captions: the denoiser is told captions, but the data has none; set it, or give a cache that "
                "holds them"
            )
        return self._embedded(batch.text, batch.index.device)

    def of_evaluation(self, batch: Batch | LatentBatch) -> Text | None:
        """The batch's captions or prompts, each of which is embedded alone; None where it has none."""
        return None if batch.text is None else self._embedded(batch.text, batch.index.device, together=False)

    def null_of_batch(self, batch: Batch | LatentBatch) -> Text:
        """As many empty captions."""
        if batch.text is not None and batch.text.empty is not None:
            return self.of_batch(batch).null()
        return self._nothing(batch.index)

    def of_samples(self, index: Tensor, noise: IndexedNoise) -> Text:
        """Empty captions: samples of whatever there is."""
        return self._nothing(index)

    def of_values(self, values: Sequence[Any] | Tensor) -> Text:
        """Prompts, each of which is embedded alone; one may be given as it is."""
        prompts = [values] if isinstance(values, str) else values
        if not isinstance(prompts, Sequence) or not prompts or not all(isinstance(text, str) for text in prompts):
            raise ValueError(f"prompts: give at least one text, given {reprlib.repr(values)}")
        return Text.of(self.text_encoder.encode(prompts, self._device, together=False))

    def settings(self) -> dict[str, Any]:
        """Which text encoder embeds the prompts, wherever it lies."""
        return {"conditioning": class_path(type(self)), "text_encoder": self.text_encoder.identity()}

    def _embedded(self, text: TextBatch, device: torch.device, together: bool = True) -> Text:
        is_cached = text.embeddings is not None
        return Text.of(text if is_cached else self.text_encoder.encode(text.captions, device, together))

    def _nothing(self, index: Tensor) -> Text:
        empty = self.text_encoder.empty(self._device)
        return Text.nothing(empty, self.text_encoder.max_tokens, len(index))

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        # Follows the model to its device. A buffer would, too, but belong to what ranks share.
        self._device = fn(torch.empty(0, device=self._device)).device
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch does not annotate it
