"""What batches are made of."""

from typing import NamedTuple

import pytest
import torch
from torch.utils.data import DataLoader

from vfm_vae.data.samples import SampleNumbers, SampleSet


class Captioned(NamedTuple):
    images: torch.Tensor
    labels: torch.Tensor
    index: torch.Tensor
    features: torch.Tensor | None = None
    words: torch.Tensor | None = None


class Captions(SampleSet):
    """Carries a field more than batches do, with or without one before it."""

    batch_type = Captioned

    def __init__(self, features):
        self.features = features

    def __len__(self):
        return 4

    def __getitem__(self, draw):
        return torch.zeros(3, 2, 2), 0, draw, self.features, torch.full((5,), draw)


@pytest.mark.parametrize("features", [None, torch.ones(2)])
@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_batch_may_carry_more(features, num_workers):
    data = Captions(features)
    first, second = DataLoader(data, batch_size=2, collate_fn=data.collate, num_workers=num_workers)
    assert isinstance(first, Captioned) and first.labels.dtype == torch.int64
    assert second.words.tolist() == [[2] * 5, [3] * 5] and second.index.tolist() == [2, 3]
    assert second.features is None if features is None else second.features.shape == (2, 2)


def test_numbers_of_samples_hold_no_images():
    batch = SampleNumbers.collate([SampleNumbers(5)[number] for number in range(2, 5)])
    assert not batch.has_images and batch.index.tolist() == [2, 3, 4] and batch.labels.tolist() == [-1] * 3
