import itertools

import numpy as np
import pytest
import torch

from vfm_vae.data.resuming import ResumableLoader
from vfm_vae.data.sampling import Draw, EvaluationSampler, IndexedNoise, TrainingSampler


class Indices(torch.utils.data.Dataset):
    def __init__(self, size):
        self.size = size

    def __len__(self):
        return self.size

    def __getitem__(self, draw):
        return draw.epoch, draw.index


def batches_of(draws, size):
    return (
        [list(batch) for batch in itertools.batched(draws, size)]
        if hasattr(itertools, "batched")
        else [draws[i : i + size] for i in range(0, len(draws), size)]
    )


def training_draws(size, batch_size, ranks, epoch=0, seed=0):
    samplers = [
        TrainingSampler(range(size), batch_size // ranks, seed=seed, num_replicas=ranks, rank=rank)
        for rank in range(ranks)
    ]
    for sampler in samplers:
        sampler.set_epoch(epoch)
    return [list(sampler) for sampler in samplers]


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_batches_over_all_ranks_do_not_depend_on_their_number(ranks):
    (alone,) = training_draws(30, 8, 1)
    shares = training_draws(30, 8, ranks)
    assert {len(share) for share in shares} == {24 // ranks}
    per_rank = [batches_of(share, 8 // ranks) for share in shares]
    together = [draw for parts in zip(*per_rank, strict=True) for part in parts for draw in part]
    assert together == alone


def test_training_order_depends_on_seed_and_epoch():
    (order,) = training_draws(30, 5, 1)
    assert sorted(draw.index for draw in order) == list(range(30))
    assert order == training_draws(30, 5, 1)[0]
    assert {draw.epoch for draw in training_draws(30, 5, 1, epoch=3)[0]} == {3}
    orders = [[draw.index for draw in training_draws(30, 5, 1, epoch=e, seed=s)[0]] for e in (0, 1) for s in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4


def test_draws_are_those_of_former_versions():
    """Whose runs go on in the middle of an epoch, and whose samples are drawn again."""
    orders = {None: [0, 4, 11, 1, 2, 5, 10, 7, 9, 8, 6, 3], 3: [4, 0, 1, 5, 2, 3, 9, 10, 8, 7, 6, 11]}
    for size, expected in orders.items():
        shards = None if size is None else np.arange(12) // size
        sampler = TrainingSampler(range(12), 4, seed=3, shards=shards, mixed_shards=2)
        sampler.set_epoch(1)
        assert [draw.index for draw in sampler] == expected
    noise = IndexedNoise("sample", 5, torch.tensor([0, 7]))
    expected = torch.tensor([[-0.500295102596283, 1.6655409336090088], [0.2062722146511078, 0.13289010524749756]])
    torch.testing.assert_close(noise.normal(2), expected, rtol=1e-6, atol=1e-6)
    assert noise.integers(10).tolist() == [7, 2]


def test_too_small_a_data_set_is_refused():
    with pytest.raises(ValueError, match="batch_size: a step takes 16 images, more than the 10 of training"):
        TrainingSampler(range(10), 8, num_replicas=2, rank=0)


@pytest.mark.parametrize("ranks", [1, 2])
def test_an_epoch_holds_whole_steps(ranks):
    def sampler(rank, batches_per_step):
        return TrainingSampler(range(100), 8 // ranks, num_replicas=ranks, rank=rank, batches_per_step=batches_per_step)

    one, four = (list(sampler(0, batches)) for batches in (1, 4))
    assert len(one) == 12 * 8 // ranks and len(four) == 12 * 8 // ranks
    assert len(list(sampler(0, 5))) == 10 * 8 // ranks  # not 12 batches, of which two would make no step
    with pytest.raises(ValueError, match="a step takes 104 images, more than the 100 of training"):
        sampler(0, 13)


@pytest.mark.parametrize("size", [1, 7, 8, 9, 16, 17, 23])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_evaluation_sees_every_image_once_in_equal_batches(size, ranks):
    samplers = [EvaluationSampler(range(size), 8 // ranks, num_replicas=ranks, rank=rank) for rank in range(ranks)]
    shares = [list(sampler) for sampler in samplers]
    assert {len(share) for share in shares} == {len(samplers[0])}
    real = [draw.index for share in shares for draw in share if not draw.padding]
    assert sorted(real) == list(range(size))
    assert sum(draw.padding for share in shares for draw in share) < ranks
    for batch, parts in enumerate(zip(*(batches_of(share, 8 // ranks) for share in shares), strict=True)):
        seen = [draw.index for part in parts for draw in part if not draw.padding]
        assert seen == list(range(batch * 8, min(batch * 8 + 8, size)))


def test_one_rank_needs_no_padding():
    assert list(EvaluationSampler(range(3), 2)) == [Draw(0), Draw(1), Draw(2)]


def loader(num_workers):
    data = Indices(22)
    return ResumableLoader(
        data, 4, sampler=TrainingSampler(data, 4), num_workers=num_workers, persistent_workers=num_workers > 0
    )


def epoch_of(loader, epoch):
    iterator = iter(loader)
    loader.sampler.set_epoch(epoch)  # after the iterator, as Lightning does when it resumes
    return [list(zip(*(column.tolist() for column in batch), strict=True)) for batch in iterator]


@pytest.mark.parametrize(
    ("num_workers", "num_batches"),
    [(0, 0), (0, 1), (0, 4), (0, 5), (2, 4)]
    + [pytest.param(2, number, marks=pytest.mark.slow) for number in (0, 1, 5)],
)
def test_a_loader_resumes_in_the_middle_of_an_epoch(num_workers, num_batches):
    uninterrupted = loader(num_workers)
    epochs = [epoch_of(uninterrupted, epoch) for epoch in range(3)]
    assert {len(epoch) for epoch in epochs} == {5}

    stopped = loader(num_workers)
    epoch_of(stopped, 0)
    iterator = iter(stopped)
    stopped.sampler.set_epoch(1)
    for _ in range(num_batches):
        next(iterator)
    state = stopped.state_dict()
    at = {"epoch": 1, "images": 4 * num_batches if num_batches < 5 else 22}  # the two that make no batch are left out
    assert state.items() >= (at if num_batches else {"epoch": 0, "images": 22}).items()  # not begun: the former's end

    resumed = loader(num_workers)
    resumed.load_state_dict(state)
    assert len(resumed) == 5
    if num_batches < 5:
        assert epoch_of(resumed, 1) == epochs[1][num_batches:]
    assert epoch_of(resumed, 2) == epochs[2]


def test_a_state_survives_being_saved_again_before_the_first_batch():
    stopped = loader(0)
    next(iter(stopped))
    resumed, state = loader(0), stopped.state_dict()
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state
    iter(resumed)
    assert resumed.state_dict() == state


def test_an_epoch_that_is_begun_again_is_whole():
    again = loader(0)
    next(iter(again))
    whole = epoch_of(again, 0)
    assert len(whole) == 5 and epoch_of(again, 0) == whole
