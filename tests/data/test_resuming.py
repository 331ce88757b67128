"""Runs that go on with other batches: every image of the epoch once, validations by steps, all epochs alike."""

import io
import itertools
import tarfile

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from vfm_vae.data.datamodule import ImageNetDataModule
from vfm_vae.data.latents import STATISTICS, LatentStatistics
from vfm_vae.data.resuming import ResumableLoader
from vfm_vae.data.sampling import TrainingSampler
from vfm_vae.writing import write_tensors

SIZE = 31  # images of training


class Model(LightningModule):
    """Learns nothing and remembers what it saw."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.images_seen, self.seen, self.validated = 0, {}, []

    def training_step(self, batch, batch_idx):
        self.images_seen += len(batch.index)
        self.seen.setdefault(self.trainer.train_dataloader.sampler.epoch, []).extend(batch.index.tolist())
        return self.weight.sum()

    def validation_step(self, batch, batch_idx):
        self.validated.append(self.global_step)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def on_save_checkpoint(self, checkpoint):
        checkpoint["images_seen"] = self.images_seen

    def on_load_checkpoint(self, checkpoint):
        self.images_seen = checkpoint["images_seen"]


@pytest.fixture(scope="module")
def roots(tmp_path_factory, make_tree_in):
    """The same number of images as folders, as shards of four and as latents."""
    roots = {source: tmp_path_factory.mktemp(source) for source in ("folder", "shards", "latents")}
    make_tree_in(roots["folder"], train=SIZE, val=1, size=(8, 8), classes=("apple",))
    for split in ("train", "val"):
        files = sorted((roots["folder"] / split).glob("*/*"))
        for shard, start in enumerate(range(0, len(files), 4)):
            with tarfile.open(roots["shards"] / f"photos-{split}-{shard}.tar", "w") as tar:
                for file in files[start : start + 4]:
                    tar.add(file, f"{file.stem}.jpg")
                    label = tarfile.TarInfo(f"{file.stem}.cls")
                    label.size = 1
                    tar.addfile(label, io.BytesIO(b"0"))
        folder = roots["latents"] / split
        folder.mkdir()
        rows = torch.zeros(len(files), 1, 1, 1)
        write_tensors(folder / "a.safetensors", {"latents": rows, "labels": torch.zeros(len(files), dtype=torch.int64)})
        LatentStatistics(torch.zeros(1), torch.ones(1)).write(folder / STATISTICS)
    return roots


class Manual(Model):
    """Accumulates by itself, as tokenizers do."""

    def __init__(self, accumulate):
        super().__init__()
        self.automatic_optimization, self.accumulate_grad_batches, self.whole = False, accumulate, []

    def training_step(self, batch, batch_idx):
        self.manual_backward(super().training_step(batch, batch_idx))
        if (batch_idx + 1) % self.accumulate_grad_batches == 0 or self.trainer.is_last_batch:
            self.optimizers().step()
            self.whole.append(int(self.weight.grad))  # a gradient of one from each batch
            self.optimizers().zero_grad()


def datamodule(roots, source, batch_size, **kwargs):
    options = {"image_size": 8, "batch_size": batch_size, "num_workers": 0, "source": source, "mixed_shards": 2}
    data = ImageNetDataModule(str(roots[source]), **options | kwargs)
    data.prepare_data()
    data.setup("fit")
    return data


def fit(folder, data, accumulate=1, num_steps=-1, model=None, **kwargs):
    """Goes on from the folder's last checkpoint, if there is one; saves after every step, validates every third."""
    saves = ModelCheckpoint(folder, save_last=True, save_top_k=0, every_n_train_steps=1, enable_version_counter=False)
    trainer = Trainer(
        default_root_dir=folder, accelerator="cpu", logger=False, enable_progress_bar=False, max_steps=num_steps,
        enable_model_summary=False, num_sanity_val_steps=0, callbacks=[saves],
        accumulate_grad_batches=accumulate if model is None else 1,
        **{"max_epochs": -1, "check_val_every_n_epoch": None, "val_check_interval": 3 * accumulate} | kwargs,
    )  # fmt: skip
    model = model or Model()
    last = folder / "last.ckpt"
    trainer.fit(model, datamodule=data, ckpt_path=last if last.exists() else None, weights_only=True)
    return model


def order(data, epoch):
    """All images of an epoch in their order."""
    dataset = data.train_set
    sampler = TrainingSampler(dataset, 1, seed=data.seed, shards=getattr(dataset, "shards", None), mixed_shards=2)
    sampler.set_epoch(epoch)
    return [draw.index for draw in sampler]


def expected(data, steps, num_epochs):
    """The images of each epoch, where steps are made of so many images, one after the other."""
    seen, position, epoch = [], 0, 0
    for size, following in itertools.pairwise(steps):
        position += size
        if SIZE - position < max(size, following):
            seen.append(order(data, epoch)[:position])
            position, epoch = 0, epoch + 1
            if epoch == num_epochs:
                return seen


CHANGES = {  # images of a batch and batches of a step, before and after
    "half": ((8, 1), (4, 1)),
    "double": ((8, 1), (16, 1)),
    "accumulated": ((8, 1), (2, 4)),
    "accumulated no more": ((2, 4), (8, 1)),
    "smaller steps of more": ((12, 1), (2, 2)),
}


# Three steps of eight or two of twelve are an epoch. Latents are in shards, too.
@pytest.mark.parametrize(
    ("source", "num_steps"),
    [
        *(("folder", num_steps) for num_steps in (2, 3, 5)),
        ("shards", 5),
        ("latents", 2),
        *(pytest.param("shards", num_steps, marks=pytest.mark.slow) for num_steps in (2, 3)),
        *(pytest.param("latents", num_steps, marks=pytest.mark.slow) for num_steps in (3, 5)),
    ],
)
@pytest.mark.parametrize("change", CHANGES)
def test_other_batches_go_on_with_the_images_that_are_left(roots, tmp_path, source, change, num_steps):
    (size, parts), (other_size, other_parts) = CHANGES[change]
    data = datamodule(roots, source, size)
    before = fit(tmp_path, data, parts, num_steps)
    after = fit(tmp_path, datamodule(roots, source, other_size), other_parts, max_epochs=4)
    seen = [before.seen.get(epoch, []) + after.seen.get(epoch, []) for epoch in range(4)]
    steps = itertools.chain([size * parts] * num_steps, itertools.repeat(other_size * other_parts))
    assert seen == expected(data, steps, 4)
    assert all(len(set(epoch)) == len(epoch) for epoch in seen)
    assert after.images_seen == sum(len(epoch) for epoch in seen)
    validated = before.validated + after.validated
    assert validated == list(range(3, after.trainer.global_step + 1, 3))


@pytest.mark.parametrize("num_steps", [2, 4])
@pytest.mark.parametrize("change", ["accumulated", "accumulated no more"])
def test_modules_that_accumulate_make_whole_steps(roots, tmp_path, change, num_steps):
    (size, parts), (other_size, other_parts) = CHANGES[change]
    data = datamodule(roots, "folder", size)
    before = fit(tmp_path, data, parts, num_steps, Manual(parts))
    after = fit(tmp_path, datamodule(roots, "folder", other_size), other_parts, 9, Manual(other_parts))
    assert (before.whole, after.whole) == ([parts] * num_steps, [other_parts] * (9 - num_steps))
    seen = [before.seen.get(epoch, []) + after.seen.get(epoch, []) for epoch in range(3)]
    assert seen == expected(data, itertools.repeat(8), 3)
    assert before.validated + after.validated == [3, 6, 9]


def test_stopped_twice_with_three_sizes(roots, tmp_path):
    data = datamodule(roots, "shards", 8)
    runs = [fit(tmp_path, data, 1, 2), fit(tmp_path, datamodule(roots, "shards", 2), 2, 3)]
    runs += [fit(tmp_path, datamodule(roots, "shards", 3), 1, max_epochs=3)]
    seen = [[index for run in runs for index in run.seen.get(epoch, [])] for epoch in range(3)]
    assert seen == expected(data, itertools.chain([8, 8, 4], itertools.repeat(3)), 3)


def test_validation_ends_each_epoch_as_before(roots, tmp_path):
    every = {"val_check_interval": 1.0, "check_val_every_n_epoch": 1}
    fit(tmp_path, datamodule(roots, "folder", 8), 1, 2, **every)
    after = fit(tmp_path, datamodule(roots, "folder", 4), 1, max_epochs=2, **every)
    assert after.validated == [2 + 3, 2 + 3 + 7]  # after what is left of the first epoch, and a whole one


def loaders(ranks, batch_size, parts=1, **kwargs):
    """One for each rank over `SIZE` numbers, batches of so many over all."""
    share = batch_size // ranks
    options = {"num_replicas": ranks, "batches_per_step": parts}
    samplers = [TrainingSampler(range(SIZE), share, rank=rank, **options | kwargs) for rank in range(ranks)]
    return [ResumableLoader(Indices(), batch_size=share, sampler=sampler) for sampler in samplers]


class Indices:
    """As a data set that holds its own positions."""

    def __getitem__(self, draw):
        return draw.index


def drawn(iterators):
    """The next batch of each rank, one after the other."""
    return [index for iterator in iterators for index in next(iterator).tolist()]


@pytest.mark.parametrize("shards", [None, np.arange(SIZE) // 4])
@pytest.mark.parametrize(("ranks", "others"), [(1, 2), (2, 1), (2, 4)])
@pytest.mark.parametrize(("size", "other_size"), [(8, 8), (8, 4), (4, 12)])
def test_other_ranks_go_on_with_the_images_that_are_left(ranks, others, size, other_size, shards):
    kwargs = {"seed": 1, "shards": shards, "mixed_shards": 2}
    before = loaders(ranks, size, **kwargs)
    iterators = [iter(loader) for loader in before]
    seen = drawn(iterators) + drawn(iterators)
    assert len({str(loader.state_dict()) for loader in before}) == 1  # so that one rank's is all that is kept

    after = loaders(others, other_size, **kwargs)
    for loader in after:
        loader.load_state_dict(before[0].state_dict())
    iterators = [iter(loader) for loader in after]
    left = (SIZE - 2 * size) // other_size
    seen += [index for _ in range(left) for index in drawn(iterators)]
    assert all(next(iterator, None) is None for iterator in iterators)
    assert seen == [draw.index for draw in TrainingSampler(range(SIZE), 1, **kwargs)][: 2 * size + left * other_size]


def counting_batches(folder, num_batches):
    """Makes the folder's checkpoint one of former versions."""
    checkpoint = torch.load(folder / "last.ckpt", weights_only=True)
    checkpoint["loops"]["fit_loop"]["state_dict"]["combined_loader"] = [{"num_batches": num_batches}]
    torch.save(checkpoint, folder / "last.ckpt")


@pytest.mark.parametrize("num_steps", [2, 3, 5])
def test_checkpoints_that_count_batches_go_on_unchanged(roots, tmp_path, num_steps):
    data = datamodule(roots, "folder", 8)
    before = fit(tmp_path, data, 1, num_steps)
    counting_batches(tmp_path, (num_steps - 1) % 3 + 1)
    after = fit(tmp_path, datamodule(roots, "folder", 8), max_epochs=3)
    seen = [before.seen.get(epoch, []) + after.seen.get(epoch, []) for epoch in range(3)]
    assert seen == expected(data, itertools.repeat(8), 3)


@pytest.mark.parametrize("num_steps", [2, 5])
@pytest.mark.parametrize("size", [4, 12])
def test_checkpoints_that_count_batches_of_another_size_are_refused(roots, tmp_path, num_steps, size):
    fit(tmp_path, datamodule(roots, "folder", 8), 1, num_steps)
    counting_batches(tmp_path, (num_steps - 1) % 3 + 1)
    with pytest.raises(ValueError, match=f"batch_size: .* from an earlier version, .* not of {size} images"):
        fit(tmp_path, datamodule(roots, "folder", size))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"seed": 1}, "seed 0, now 1"),
        ({"mixed_shards": 3}, "mixed_shards 2, now 3"),
        ({"source": "folder"}, "mixed_shards 2, now None"),
    ],
)
def test_another_order_of_the_epoch_is_said(roots, tmp_path, options, named):
    fit(tmp_path, datamodule(roots, "shards", 8), 1, 2)
    with pytest.warns(UserWarning, match=rf"data: the resumed epoch was begun in another order \({named}\)"):
        fit(tmp_path, datamodule(roots, **{"source": "shards", "batch_size": 8} | options), 1, 3)


def test_a_whole_epoch_of_fewer_images_was_whole(roots, tmp_path):
    """Images that came since belong to the next."""
    data = datamodule(roots, "folder", 8)
    data.train_set._names, data.train_set.labels = data.train_set._names[:24], data.train_set.labels[:24]
    fit(tmp_path, data, 1, 3)
    after = fit(tmp_path, datamodule(roots, "folder", 4), max_epochs=2)
    assert after.seen == {1: order(datamodule(roots, "folder", 4), 1)[:28]}


def test_a_limited_epoch_is_followed_by_a_whole_one(roots, tmp_path):
    """The place belongs to its epoch, and is none in the next."""
    data = datamodule(roots, "folder", 8)
    limit = {"limit_train_batches": 2, "limit_val_batches": 0}
    fit(tmp_path, data, 1, 2, **limit)
    after = fit(tmp_path, datamodule(roots, "folder", 8), 1, 4, **limit)
    assert after.seen == {1: order(data, 1)[:16]}
