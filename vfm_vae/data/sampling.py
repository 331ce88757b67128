"""Which images a rank sees, and in what order.

All randomness of training is a function of (seed, epoch, index): neither workers nor ranks nor a restart change it.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DistributedSampler


class Draw(NamedTuple):
    """What a sampler asks of a data set.

    Attributes:
        index: Position in the data set.
        epoch: Seeds the sample's augmentation, together with the data set's seed and the index.
        padding: The sample only makes ranks equal; metrics are to leave it out.
    """

    index: int  # type: ignore[assignment]  # tuples have a method of this name
    epoch: int = 0
    padding: bool = False


class TrainingSampler(DistributedSampler[Any]):
    """Shuffles by (seed, epoch) and gives each rank its part of every batch; an incomplete last step is dropped.

    An epoch has one order, whatever the batch size, the accumulation and the number of ranks: each batch over all ranks
    takes the images that come next. So a place in the epoch is a number of images. Where images lie in shards, a few
    shards are mixed at a time and others left alone, so that reading stays within those. It is a `DistributedSampler`
    so that Lightning leaves it in place, whatever `use_distributed_sampler` says.

    Args:
        dataset: What is sampled; only its length is used.
        batch_size: Images of one batch on one rank.
        seed: Seed of the order.
        num_replicas: Number of ranks.
        rank: This process's.
        shards: Number of the shard that each sample lies in, `[len(dataset)]`; None shuffles all samples together.
        mixed_shards: How many shards are mixed at a time.
        batches_per_step: Batches whose gradients make one step; an epoch holds whole steps.

    Attributes:
        num_batches: Number of batches in a whole epoch.
        start: Images at the beginning of the epoch's order, over all ranks, that the next iteration leaves out, because
            a former run has seen them.

    Raises:
        ValueError: the data set is smaller than what makes one step.
    """

    dataset: Any

    def __init__(
        self,
        dataset: Any,
        batch_size: int,
        *,
        seed: int = 0,
        num_replicas: int = 1,
        rank: int = 0,
        shards: np.ndarray | None = None,
        mixed_shards: int = 64,
        batches_per_step: int = 1,
    ) -> None:
        super().__init__(dataset, num_replicas, rank, seed=seed)
        self.batch_size = batch_size
        self.shards, self.mixed_shards = shards, mixed_shards
        self.batches_per_step = batches_per_step
        self.num_batches = self.batches_behind(0)
        self.start = 0
        if self.num_batches == 0:
            step = batch_size * num_replicas * batches_per_step
            raise ValueError(
                f"batch_size: a step takes {step} images, more than the {len(dataset)} of training; lower it"
            )

    @property
    def order(self) -> dict[str, int | None]:
        """What an epoch's order depends on, beside the epoch."""
        mixed_shards = None if self.shards is None else self.mixed_shards
        return {"images": len(self.dataset), "seed": self.seed, "mixed_shards": mixed_shards}

    def batches_behind(self, start: int) -> int:
        """Batches that are left of an epoch behind so many images, over all ranks; they make whole steps."""
        step = self.batch_size * self.num_replicas * self.batches_per_step
        return (len(self.dataset) - start) // step * self.batches_per_step

    def __iter__(self) -> Iterator[Draw]:
        """The draws on this rank, of one epoch or of what is left of it."""
        order = self._order(np.random.default_rng((self.seed, self.epoch)))[self.start :]
        shape = self.batches_behind(self.start), self.num_replicas, self.batch_size
        mine = order[: math.prod(shape)].reshape(shape)[:, self.rank].flatten()
        return iter([Draw(index, self.epoch) for index in mine.tolist()])

    def _order(self, generator: np.random.Generator) -> np.ndarray:
        """The samples' positions in the order of an epoch, `[len(dataset)]`."""
        if self.shards is None:
            return generator.permutation(len(self.dataset))
        turn = generator.permutation(int(self.shards.max()) + 1)[self.shards] // self.mixed_shards
        return np.lexsort((generator.random(len(turn)), turn))

    def __len__(self) -> int:
        """Samples of a whole epoch on this rank."""
        return self.num_batches * self.batch_size


class EvaluationSampler(DistributedSampler[Any]):
    """Every image once, in order; each batch is divided over the ranks, the last one filled with marked padding.

    Args:
        dataset: What is sampled; only its length is used.
        batch_size: Images of one batch on one rank.
        num_replicas: Number of ranks.
        rank: This process's.
    """

    dataset: Any

    def __init__(self, dataset: Any, batch_size: int, *, num_replicas: int = 1, rank: int = 0) -> None:
        super().__init__(dataset, num_replicas, rank, shuffle=False)
        self.batch_size = batch_size

    def __iter__(self) -> Iterator[Draw]:
        """The draws of this rank."""
        size = len(self.dataset)
        total = self.batch_size * self.num_replicas
        for start in range(0, size, total):
            stop = min(start + total, size)
            share = math.ceil((stop - start) / self.num_replicas)
            for index in range(start + self.rank * share, start + (self.rank + 1) * share):
                yield Draw(index) if index < stop else Draw(stop - 1, padding=True)

    def __len__(self) -> int:
        """Samples on this rank, padding included: the same on every rank."""
        full, rest = divmod(len(self.dataset), self.batch_size * self.num_replicas)
        return full * self.batch_size + math.ceil(rest / self.num_replicas)


class GivenOrder(DistributedSampler[Any]):
    """The samples that this rank was told to take, in that order; ranks may differ in number.

    A rank without any gets one that is padding: without a batch, Lightning would skip the run's hooks on this rank
    alone, and others would wait for it.

    Args:
        dataset: What is sampled; only its length is used.
        indices: Positions in it.
    """

    def __init__(self, dataset: Any, indices: Sequence[int]) -> None:
        super().__init__(dataset, num_replicas=1, rank=0, shuffle=False)
        self.indices = indices

    def __iter__(self) -> Iterator[Draw]:
        """The draws of this rank."""
        return iter([Draw(index) for index in self.indices] or [Draw(0, padding=True)])

    def __len__(self) -> int:
        """Samples on this rank."""
        return max(len(self.indices), 1)


def caption_drawn(seed: int, epoch: int, index: int, count: int) -> int:
    """Which of an image's captions training sees, of so many: the same beside images and cached latents."""
    return seed_of(seed, epoch, index, *b"caption") % count


class IndexedNoise:
    """Random numbers that belong to single samples, whatever the batch, rank or device.

    Each sample has a stream of its own on the CPU, from which successive calls draw.

    Args:
        purpose: A word for what they are needed for; each has streams of its own.
        seed: Changes all streams.
        index: Numbers of the samples, int64 `[B]`; negative ones, which mark padding, share a stream.
        device: Device on which the numbers are wanted.
    """

    def __init__(self, purpose: str, seed: int, index: Tensor, device: torch.device | str = "cpu") -> None:
        self.device = device
        seeds = [seed_of(seed, max(number, -1) + 1, *purpose.encode()) for number in index.tolist()]
        self._streams = [torch.Generator().manual_seed(number) for number in seeds]

    def normal(self, *shape: int) -> Tensor:
        """Standard normal numbers, float32 `[B, *shape]`."""
        return torch.stack([torch.randn(shape, generator=stream) for stream in self._streams]).to(self.device)

    def integers(self, high: int) -> Tensor:
        """Uniform integers below `high`, int64 `[B]`."""
        drawn = [torch.randint(high, (), generator=stream) for stream in self._streams]
        return torch.stack(drawn).to(self.device)


def seed_of(*parts: int) -> int:
    """One seed made of several numbers (none negative), such as seed, rank and images seen."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> 1)
