"""What a denoiser is told: conditions as rows that move, and where they come from."""

from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch

from ldm.condition import ClassLabels, Condition, Labels, labels_of
from vfm_vae.data.sampling import IndexedNoise
from vfm_vae.types import LatentBatch


@dataclass(frozen=True)
class Text(Condition):
    """Tokens and which of them are there, `[B, L, D]` and `[B, L]`; the empty caption's tokens are shared, `[L, D]`."""

    rows: ClassVar[tuple[str, ...]] = ("embeddings", "mask")
    embeddings: torch.Tensor
    mask: torch.Tensor
    empty: torch.Tensor

    def null(self):
        mask = torch.zeros_like(self.mask)
        mask[:, 0] = True
        return replace(self, embeddings=self.empty.expand_as(self.embeddings), mask=mask)

    def plain(self):
        return self.mask.sum(1).tolist()


def labels(*numbers: int) -> Labels:
    return Labels(torch.tensor(numbers), 5)


def text(num: int) -> Text:
    generator = torch.Generator().manual_seed(num)
    mask = torch.arange(4) < torch.arange(1, num + 1)[:, None]
    return Text(torch.randn(num, 4, 6, generator=generator), mask, torch.full((4, 6), 7.0))


@pytest.mark.parametrize("condition", [labels(3, 1, 4), text(3)], ids=["labels", "text"])
def test_rows_move_together(condition):
    assert len(condition) == 3
    picked, masked = condition[torch.tensor([2, 0])], condition[torch.tensor([False, True, True])]
    assert picked.plain() == [condition.plain()[2], condition.plain()[0]]
    assert masked.plain() == condition.plain()[1:] == condition[1:].plain()
    doubled = condition.cat(condition.null())
    assert doubled[:3].plain() == condition.plain() and doubled[3:].plain() == condition.null().plain()
    dropped = condition.drop(torch.tensor([True, False, True]))
    for name, values in dropped.tensors().items():
        assert torch.equal(values[1], condition.tensors()[name][1])
        assert torch.equal(values[0::2], condition.null().tensors()[name][0::2])
        assert values.dtype == condition.tensors()[name].dtype
    moved = condition.to("meta")
    assert type(moved) is type(condition) and len(moved) == 3
    assert all(values.is_meta for values in vars(moved).values() if isinstance(values, torch.Tensor))


def test_labels_are_what_the_batch_says():
    batch = LatentBatch(torch.zeros(2, 1, 1, 1), torch.tensor([4, 0]), torch.arange(2))
    assert ClassLabels(5).of_batch(batch).plain() == [4, 0]
    assert labels(4, 0).null().plain() == [5, 5]


@pytest.mark.parametrize("mode", ["random", "balanced"])
def test_samples_have_a_class_and_noise_of_their_own(mode):
    index = torch.tensor([0, 7, 4])
    noise, alone = (IndexedNoise("sample", 3, numbers) for numbers in (index, index[1:2]))
    conditioning = ClassLabels(5, mode)
    chosen = conditioning.of_samples(index, noise).plain()
    assert chosen[1:2] == conditioning.of_samples(index[1:2], alone).plain()
    plain = IndexedNoise("sample", 3, index)
    classes = plain.integers(5)  # drawn either way, so that the noise behind them is the same
    assert chosen == (classes if mode == "random" else index % 5).tolist()
    following = noise.normal(2)
    assert torch.equal(following, plain.normal(2)) and torch.equal(following[1:2], alone.normal(2))


def test_values_that_are_no_class_are_named():
    assert ClassLabels(5).of_values([4, 0]).plain() == [4, 0]
    with pytest.raises(ValueError, match=r"labels: the classes are 0 to 4, given \[-1, 5\]"):
        ClassLabels(5).of_values(torch.tensor([5, 2, -1, 5]))


@pytest.mark.parametrize(
    "values", [[0.7], torch.tensor([1.0, float("nan")]), [], 3, [[1]], ["cat"], [None], [[1], [2, 3]]]
)
def test_what_numbers_no_classes_is_refused(values):
    with pytest.raises(ValueError, match=r"^labels: give at least one class, each by its number, .*; given ") as raised:
        ClassLabels(5).of_values(values)
    assert "\n" not in str(raised.value)


def test_whole_numbers_are_classes():
    for values in ([1, 4], (1.0, 4.0), torch.tensor([1, 4], dtype=torch.int32), [torch.tensor(1), torch.tensor(4)]):
        assert ClassLabels(5).of_values(values).plain() == [1, 4]


def test_a_denoiser_of_classes_takes_nothing_else():
    assert torch.equal(labels_of(labels(2, 1)), torch.tensor([2, 1]))
    with pytest.raises(ValueError, match=r"model\.conditioning: gives Text, but the denoiser takes class labels"):
        labels_of(text(2))
