"""Conditions: what a denoiser is told about each sample, and where it comes from.

A `Condition` moves along with a batch, from the data to the denoiser. Only the denoiser looks inside. A `Conditioning`
makes conditions. A new kind of condition is a subclass of each, and a denoiser that understands it.
"""

import reprlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor

from vfm_vae.data.sampling import IndexedNoise
from vfm_vae.description import Described, describe
from vfm_vae.options import at_least
from vfm_vae.text import TextEncoder
from vfm_vae.types import Batch, LatentBatch

LabelMode = Literal["random", "balanced"]


@dataclass(frozen=True)
class Condition(ABC):
    """What a denoiser is told about a batch. Subclasses are frozen dataclasses, too.

    Attributes:
        rows: Names of the fields that hold a row for each sample, tensors `[B, ...]`. All samples share other fields.
    """

    rows: ClassVar[tuple[str, ...]]

    @abstractmethod
    def null(self) -> Self:
        """As many rows that say nothing, for guidance and for dropped conditions."""

    @abstractmethod
    def plain(self) -> list[Any]:
        """Each row as JSON has it, for files and titles."""

    def tensors(self) -> dict[str, Tensor]:
        """What is kept of the rows beside samples: here all of them, `[B, ...]` each, by the names of their fields."""
        return {name: getattr(self, name) for name in self.rows}

    def __len__(self) -> int:
        """Number of samples."""
        return len(getattr(self, self.rows[0]))

    def __getitem__(self, rows: Tensor | slice) -> Self:
        """Some of the samples, by a slice, by positions int64 `[N]`, or by a mask bool `[B]`."""
        return self._of_rows(lambda name, values: values[rows])

    def to(self, device: torch.device | str) -> Self:
        """The condition on another device."""
        moved = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: x.to(device) for name, x in moved.items() if isinstance(x, Tensor)})

    def cat(self, other: Self) -> Self:
        """These samples, then those of `other`."""
        return self._of_rows(lambda name, values: torch.cat([values, getattr(other, name)]))

    def drop(self, dropped: Tensor) -> Self:
        """The condition, but null where `dropped`, bool `[B]`, is true."""
        null = self.null()

        def choose(name: str, values: Tensor) -> Tensor:
            return torch.where(dropped.reshape(-1, *(1,) * (values.ndim - 1)), getattr(null, name), values)

        return self._of_rows(choose)

    def _of_rows(self, function: Callable[[str, Tensor], Tensor]) -> Self:
        return replace(self, **{name: function(name, getattr(self, name)) for name in self.rows})


class Conditioning(Described, ABC):
    """Makes conditions: of batches in training, of numbers or of a user's values in sampling.

    Attributes:
        num_classes: How many classes there are, where conditions are classes; None otherwise.
        text_encoder: Embeds texts, where conditions are texts; None otherwise.
        is_random: Whether `of_samples` takes random numbers.
    """

    num_classes: int | None = None
    text_encoder: TextEncoder | None = None
    is_random: bool = True

    @property
    def text_channels(self) -> int:
        """Width of the embeddings, where conditions are texts; 0 otherwise."""
        return 0 if self.text_encoder is None else self.text_encoder.width

    @abstractmethod
    def of_batch(self, batch: Batch | LatentBatch) -> Condition:
        """The condition of a training or validation batch, on its device."""

    def of_evaluation(self, batch: Batch | LatentBatch) -> Condition | None:
        """What the samples of an evaluation batch, or of one that only numbers them, are drawn for.

        None, as here, leaves that to `of_samples`: the classes of samples are not those of the batch.
        """
        return None

    def null_of_batch(self, batch: Batch | LatentBatch) -> Condition:
        """As many rows as a batch has that say nothing; it need not hold what conditions are made of."""
        return self.of_batch(batch).null()

    @abstractmethod
    def of_samples(self, index: Tensor, noise: IndexedNoise) -> Condition:
        """The condition of samples if none is given; it depends only on the seed and a sample's number.

        Args:
            index: Numbers of the samples, int64 `[B]`.
            noise: Random numbers of each sample. What this leaves of them becomes the sample's noise.
        """

    @abstractmethod
    def of_values(self, values: Sequence[Any] | Tensor) -> Condition:
        """The condition that plain values stand for, such as class numbers.

        Raises:
            ValueError: if there is none for a value.
        """

    def settings(self) -> dict[str, Any]:
        """All that `of_samples` depends on besides the seed, as plain data."""
        return {"conditioning": describe(self)}


@dataclass(frozen=True)
class Labels(Condition):
    """A condition of classes.

    Attributes:
        labels: int64 `[B]`; `num_classes` for none.
        num_classes: Number of classes.
    """

    rows: ClassVar[tuple[str, ...]] = ("labels",)
    labels: Tensor
    num_classes: int

    def null(self) -> Self:
        """No class."""
        return replace(self, labels=torch.full_like(self.labels, self.num_classes))

    def plain(self) -> list[int]:
        """The classes' numbers."""
        return self.labels.tolist()


def labels_of(condition: Condition) -> Tensor:
    """The labels of a condition, for a denoiser that takes nothing else.

    Raises:
        ValueError: if it has none.
    """
    if not isinstance(condition, Labels):
        raise ValueError(
            f"model.conditioning: gives {type(condition).__name__}, but the denoiser takes class labels; change one of "
            "the two"
        )
    return condition.labels


class ClassLabels(Conditioning):
    """Samples are conditioned on their class.

    Args:
        num_classes: Number of classes.
        mode: How samples' classes are chosen: `random`, or `balanced` for equally many of each.

    Raises:
        ValueError: if there is no class.
    """

    num_classes: int

    def __init__(self, num_classes: int, mode: LabelMode = "random"):
        at_least(1, num_classes=num_classes)
        self.num_classes, self.mode = num_classes, mode

    def of_batch(self, batch: Batch | LatentBatch) -> Labels:
        """The batch's labels."""
        return Labels(batch.labels, self.num_classes)

    def of_samples(self, index: Tensor, noise: IndexedNoise) -> Labels:
        """Random or balanced classes; both modes take the same random numbers, so samples share their noise."""
        random = noise.integers(self.num_classes)
        return Labels(random if self.mode == "random" else index % self.num_classes, self.num_classes)

    def of_values(self, values: Sequence[Any] | Tensor) -> Labels:
        """Classes by their numbers."""
        try:
            given = torch.as_tensor(values)
        except (TypeError, ValueError, RuntimeError):
            given = torch.empty(0)  # words, say, or lists of several lengths
        labels = given.to(torch.int64)
        if given.ndim != 1 or not len(given) or (labels != given).any():
            told = reprlib.repr(values.tolist() if isinstance(values, Tensor) else values)
            raise ValueError(f"labels: give at least one class, each by its number, a whole one; given {told}")
        if others := labels[(labels < 0) | (labels >= self.num_classes)].unique().tolist():
            raise ValueError(f"labels: the classes are 0 to {self.num_classes - 1}, given {others}")
        return Labels(labels, self.num_classes)

    def settings(self) -> dict[str, Any]:
        """How classes are chosen."""
        return {"label_mode": self.mode}
