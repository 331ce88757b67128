"""Text encoders, which turn captions into embeddings for a denoiser; and one that needs no download."""

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from vfm_vae.data.sampling import seed_of
from vfm_vae.description import Described, describe
from vfm_vae.frozen import sha256_of
from vfm_vae.options import at_least
from vfm_vae.types import TextBatch, padded


class TextEncoder(Described, ABC):
    """Turns captions into embeddings; nothing trains, saves or counts it.

    It is no `nn.Module`, so it is in no checkpoint, and weights are read when the first caption is encoded: whoever
    trains on cached embeddings does without them.

    Attributes:
        name: What messages and notes call it.
        width: Channels D of the embeddings.
        max_tokens: L, the most tokens of a caption; what lies behind is cut off.
    """

    name: str
    width: int
    max_tokens: int
    num_cut: int = 0

    @abstractmethod
    def tokens(self, captions: Sequence[str], device: torch.device) -> list[Tensor]:
        """Embeddings of each caption's tokens, bfloat16 `[n, D]` with n from 1 to L, the empty caption's included.

        Args:
            captions: The captions.
            device: Device to compute on.
        """

    @abstractmethod
    def count(self, captions: Sequence[str]) -> list[int]:
        """How many tokens each caption has before it is cut, for which no weights are read."""

    @abstractmethod
    def fingerprint(self) -> str:
        """What identifies the weights: SHA-256, in hexadecimal; reads them."""

    @property
    def is_loaded(self) -> bool:
        """Whether the weights are in memory, or there are none to read."""
        return True

    def source(self) -> dict[str, Any]:
        """What it takes to have these embeddings again: class, arguments, and the `fingerprint`, None if not read."""
        return {**describe(self), "fingerprint": self.fingerprint() if self.is_loaded else None}

    @torch.no_grad()
    def encode(self, captions: Sequence[str], device: torch.device | str = "cpu") -> TextBatch:
        """Captions with their embeddings; those that are too long are cut, counted, and told of once.

        Args:
            captions: The captions.
            device: Device to compute on, where the embeddings will be.
        """
        place = torch.device(device)
        *tokens, empty = self.tokens([*captions, ""], place)
        embeddings, mask = padded(tokens, self.max_tokens) if tokens else padded([empty], self.max_tokens)
        rows = slice(len(captions))
        return TextBatch(tuple(captions), embeddings[rows], mask[rows], empty)

    def note_cut(self, captions: Sequence[str]) -> None:
        """Counts captions that are cut; warns of the first."""
        if captions and not self.num_cut:
            rank_zero_warn(
                f"max_tokens: a caption has more than {self.max_tokens} tokens, and is cut behind them: "
                f"{captions[0][:60]!r}…; further ones are counted only"
            )
        self.num_cut += len(captions)


class HashedWords(TextEncoder):
    """Embeds words by fixed random vectors, which their letters seed, plus sine and cosine of their positions.

    It has no weights and knows nothing of meanings: equal words are alike, others are not. That is enough for small
    data sets of plain captions. Case and punctuation are ignored. In front of the words there is a token that begins
    every caption.

    Args:
        width: Channels of the embeddings, an even number.
        max_tokens: The most tokens of a caption, the one that begins it included.

    Raises:
        ValueError: if a number lies outside its range.
    """

    name = "hashed_words"

    def __init__(self, width: int = 64, max_tokens: int = 16):
        at_least(2, width=width, max_tokens=max_tokens)
        if width % 2:
            raise ValueError(f"width: an even number, for sines and cosines, given {width}")
        self.width, self.max_tokens = width, max_tokens

    def tokens(self, captions: Sequence[str], device: torch.device) -> list[Tensor]:
        """Embeddings, see `TextEncoder.tokens`."""
        texts = [words_of(caption) for caption in captions]
        self.note_cut(
            [caption for caption, words in zip(captions, texts, strict=True) if len(words) >= self.max_tokens]
        )
        return [self._embedded(["", *words][: self.max_tokens]).to(device, torch.bfloat16) for words in texts]

    def count(self, captions: Sequence[str]) -> list[int]:
        """Words, and the token in front of them."""
        return [1 + len(words_of(caption)) for caption in captions]

    def fingerprint(self) -> str:
        """A hash of some vectors."""
        return sha256_of({"vectors": self._embedded(["", "a", "photograph"])})

    def _embedded(self, words: Sequence[str]) -> Tensor:
        vectors = torch.stack([self._vector(word) for word in words])
        half = self.width // 2
        angles = torch.arange(len(words))[:, None] * 10000.0 ** (-torch.arange(half) / half)
        return vectors + torch.cat([angles.sin(), angles.cos()], dim=1)

    def _vector(self, word: str) -> Tensor:
        return torch.randn(self.width, generator=torch.Generator().manual_seed(seed_of(*word.encode())))


def words_of(caption: str) -> list[str]:
    """The words of a caption in lower case, without punctuation."""
    return re.findall(r"\w+", caption.lower())
