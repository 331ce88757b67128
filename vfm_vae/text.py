"""Text encoders, which turn captions into embeddings for a denoiser; and one that needs no download."""

import re
import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from vfm_vae.data.sampling import seed_of
from vfm_vae.description import Described, describe
from vfm_vae.frozen import sha256_of
from vfm_vae.options import at_least
from vfm_vae.types import Caption, TextBatch

# Whatever the defaults are: diffusers changes both while it loads.
_PLAIN: Any = {"device": "cpu", "dtype": torch.float32}


class TextEncoder(Described, ABC):
    """Turns captions into embeddings; nothing trains, saves or counts it.

    It is no `nn.Module`, so it is in no checkpoint, and weights are read when the first caption is encoded: whoever
    trains on cached embeddings does without them.

    Attributes:
        name: What messages and notes call it.
        width: Channels D of the embeddings.
        max_tokens: L, the most tokens of a caption; what lies behind is cut off.
        whereabouts: Arguments that say where the weights lie. They make no difference where fingerprints are equal.
        num_cut: How many captions were cut so far.
    """

    whereabouts: ClassVar[frozenset[str]] = frozenset({"name"})

    name: str
    width: int
    max_tokens: int
    num_cut: int = 0
    _expected: str | None = None  # the fingerprint that weights are to have, as a cache or a checkpoint says

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Itself: copies of a model share its large weights, which never change."""
        return self

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
        """What it takes to have these embeddings again: class, arguments, and the `fingerprint`.

        While the weights are not read, that is the one that a cache or a checkpoint has named, or else None.
        """
        return {**describe(self), "fingerprint": self.fingerprint() if self.is_loaded else self._expected}

    def identity(self) -> dict[str, Any]:
        """What embeddings depend on: `source` without `whereabouts`; reads the weights for an unknown fingerprint."""
        source = self.source()
        arguments = {name: value for name, value in source["init_args"].items() if name not in self.whereabouts}
        return source | {"init_args": arguments, "fingerprint": source["fingerprint"] or self.fingerprint()}

    def go_on_as(self, source: Mapping[str, Any] | None, what: str, advice: str) -> None:
        """Takes the place of the text encoder that made a cache or a checkpoint, if it is the same.

        Weights that are yet to be read are compared with that one's fingerprint before they embed anything.

        Args:
            source: What is said of the other, see `source`; None where nothing is.
            what: Begins the message.
            advice: Ends it: what would do.

        Raises:
            ValueError: if it is another.
        """
        if source is None:
            return
        ours, theirs = _facts(self.source()), _facts(source)
        # Weights are compared by their fingerprints; by where they lie, if the other's fingerprint is not known.
        left_out = {"fingerprint"} if theirs["fingerprint"] is None else set(self.whereabouts)
        if ours["fingerprint"] is None:
            left_out.add("fingerprint")  # of weights that are yet to be read
        compared = [name for name in {**theirs, **ours} if name not in left_out]
        if names := [name for name in compared if theirs.get(name) != ours.get(name)]:
            names = [name for name in names if name != "fingerprint"] or names  # which follows from the others
            said = "; ".join(f"its {name} is {theirs.get(name)!r}, here {ours.get(name)!r}" for name in names)
            raise ValueError(f"{what} another text encoder than {self.name} at hand: {said}; {advice}")
        self._expected = theirs["fingerprint"] or self._expected

    @torch.no_grad()
    def encode(self, captions: Sequence[str], device: torch.device | str = "cpu", together: bool = True) -> TextBatch:
        """Captions with their embeddings; those that are too long are cut, counted, and told of once.

        Equal captions are embedded once.

        Args:
            captions: The captions, at least one.
            device: Device to compute on, where the embeddings will be.
            together: Whether captions are computed at once, which is faster, but others may change how an embedding is
                rounded.

        Raises:
            ValueError: if the weights are others than those of the cache or the checkpoint.
        """
        empty, place = self.empty(device), torch.device(device)
        distinct = [caption for caption in dict.fromkeys(captions) if caption]
        parts = [distinct] if together and distinct else [[caption] for caption in distinct]
        tokens = [caption for part in parts for caption in self.tokens(part, place)]
        known = {"": empty} | dict(zip(distinct, tokens, strict=True))
        return TextBatch.of([Caption(caption, known[caption], empty, self.max_tokens) for caption in captions])

    @torch.no_grad()
    def empty(self, device: torch.device | str = "cpu") -> Tensor:
        """Embeddings of the empty caption, bfloat16 `[E, D]`, which are computed once.

        Raises:
            ValueError: as of `encode`.
        """
        place = torch.device(device)
        if place not in self._empty:
            if self._expected is not None and self._expected != self.fingerprint():
                raise ValueError(
                    f"model.conditioning.encoder: the weights of {self.name} are others than those that the cache or "
                    f"the checkpoint was made with: {self.fingerprint()}, not {self._expected}; give the same"
                )
            with torch.inference_mode(False), torch.no_grad():  # training could not use what is made in that mode
                (self._empty[place],) = self.tokens([""], place)
        return self._empty[place]

    @cached_property
    def _empty(self) -> dict[torch.device, Tensor]:
        """By device."""
        return {}

    def note_cut(self, captions: Sequence[str]) -> None:
        """Counts captions that are cut; warns of the first."""
        if captions and not self.num_cut:
            warnings.warn(  # on each rank, as others may have none that is too long
                f"max_tokens: a caption has more than {self.max_tokens} tokens, and is cut behind them: "
                f"{captions[0][:60]!r}…; further ones are counted only",
                stacklevel=2,
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
        positions, channels = (torch.arange(size, **_PLAIN) for size in (len(words), half))
        angles = positions[:, None] * 10000.0 ** (-channels / half)
        return vectors + torch.cat([angles.sin(), angles.cos()], dim=1)

    def _vector(self, word: str) -> Tensor:
        return torch.randn(self.width, generator=torch.Generator().manual_seed(seed_of(*word.encode())), **_PLAIN)


def _facts(source: Mapping[str, Any]) -> dict[str, Any]:
    """What a text encoder's source says, side by side."""
    return {"class_path": source["class_path"], **source["init_args"], "fingerprint": source["fingerprint"]}


def words_of(caption: str) -> list[str]:
    """The words of a caption in lower case, without punctuation."""
    return re.findall(r"\w+", caption.lower())
