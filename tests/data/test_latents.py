"""Caches of latents: written in shards, read by rows, drawn by seed and epoch."""

import json

import pytest
import torch
from lightning.fabric.utilities import move_data_to_device
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader
from torch.utils.data._utils.pin_memory import pin_memory

from vfm_vae.data.datamodule import ImageNetDataModule
from vfm_vae.data.latents import (
    STATISTICS,
    LatentDataset,
    LatentStatistics,
    RunningStatistics,
    ShardPlan,
    measure_shards,
)
from vfm_vae.data.sampling import Draw, EvaluationSampler, IndexedNoise, seed_of
from vfm_vae.types import LatentBatch
from vfm_vae.writing import write_tensors


def write(folder, size=10, shard_size=4, moments=False, features=None):
    folder.mkdir(parents=True, exist_ok=True)
    plan, generator = ShardPlan(folder, size, shard_size), torch.Generator().manual_seed(0)
    for shard in range(len(plan)):
        count = len(plan.images(shard))
        labels = torch.tensor(plan.images(shard)) % 3
        if moments:
            mean, std = torch.randn(2, count, 2, 3, 3, generator=generator)
            tensors = {"moments": torch.cat([mean, std.abs()], 1)}
        else:
            latents = 5 + 2 * torch.randn(count, 2, 3, 3, generator=generator)
            tensors = {"latents": latents, "latents_flip": -latents}
        if features is not None:
            tensors["features"] = torch.randn(count, 5, 6, generator=generator).to(features)
        write_tensors(plan.path(shard), tensors | {"labels": labels})
    measure_shards(plan, chunk=3).compute().write(folder / STATISTICS)
    return plan


def everything(folder, name):
    return torch.cat([load_file(path)[name] for path in sorted(folder.glob("*.safetensors"))])


def test_rows_labels_and_statistics(tmp_path):
    write(tmp_path)
    latents, dataset = everything(tmp_path, "latents"), LatentDataset(tmp_path, train=False)
    assert len(dataset) == 10 and dataset.shape == (2, 3, 3)
    rows = [dataset[index] for index in range(10)]
    assert torch.equal(torch.stack([row[0] for row in rows]), latents)
    assert [row[1] for row in rows] == [index % 3 for index in range(10)]
    assert [row[2] for row in rows] == list(range(10))
    assert dataset[Draw(3, padding=True)][2] == -1
    by_channel = latents.double().transpose(0, 1).flatten(1)
    statistics = LatentStatistics.read(tmp_path)
    assert torch.allclose(statistics.mean.flatten().double(), by_channel.mean(1), atol=1e-6)
    assert torch.allclose(statistics.std.flatten().double(), by_channel.std(1), atol=1e-6)


def test_parts_of_ranks_add_up(tmp_path):
    plan = write(tmp_path)
    parts = [measure_shards(plan, rank, 4) for rank in range(4)]  # three shards: the last rank has none
    assert torch.allclose(sum(part.sums for part in parts), measure_shards(plan).sums)


def test_statistics_stay_exact_far_from_zero():
    values = 1e4 + torch.randn(500, 1, 8, 8, generator=torch.Generator().manual_seed(0)).double()
    running = RunningStatistics(1)
    for part in values.split(64):
        running.add(part)
    assert running.compute().std.item() == pytest.approx(values.std().item(), rel=1e-4)


def test_statistics_of_moments_are_those_of_samples():
    mean, std = torch.randn(4000, 1, 4, 4), 0.1 + torch.rand(4000, 1, 4, 4)
    running = RunningStatistics(1)
    running.add(mean, std)
    samples = mean + std * torch.randn_like(std)
    assert running.compute().std.item() == pytest.approx(samples.std().item(), rel=0.02)


def test_views_are_drawn_by_seed_epoch_and_index(tmp_path):
    write(tmp_path, size=200, shard_size=100)
    plain = everything(tmp_path, "latents")

    def views(epoch, seed=0):
        dataset = LatentDataset(tmp_path, train=True, seed=seed)
        rows = torch.stack([dataset[Draw(index, epoch)][0] for index in range(200)])
        is_plain = (rows == plain).flatten(1).all(1)
        assert torch.equal(rows[~is_plain], -plain[~is_plain])
        return is_plain

    assert 70 < views(0).sum() < 130
    assert torch.equal(views(0), views(0))
    assert not torch.equal(views(0), views(1)) and not torch.equal(views(0), views(0, seed=1))


def test_moments_give_fresh_samples_in_training_and_the_mean_otherwise(tmp_path):
    write(tmp_path, moments=True)
    mean, std = everything(tmp_path, "moments").chunk(2, dim=1)
    dataset = LatentDataset(tmp_path, train=True)
    assert dataset.shape == (2, 3, 3)
    first, again, second = (torch.stack([dataset[Draw(i, epoch)][0] for i in range(10)]) for epoch in (0, 0, 1))
    assert torch.equal(first, again) and not torch.allclose(first, second)
    assert ((first - mean) / std).abs().max() < 5
    still = LatentDataset(tmp_path, train=False)
    assert torch.equal(torch.stack([still[index][0] for index in range(10)]), mean)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_read_as_float32(tmp_path, dtype):
    plan = ShardPlan(tmp_path, 4, 4)
    latents = torch.randn(4, 2, 3, 3)
    write_tensors(plan.path(0), {"latents": latents.to(dtype), "labels": torch.zeros(4).long()})
    measure_shards(plan).compute().write(tmp_path / STATISTICS)
    row = LatentDataset(tmp_path, train=True)[2][0]
    assert row.dtype == torch.float32 and torch.equal(row, latents[2].to(dtype).float())


def test_an_unfinished_shard_is_missing(tmp_path):
    plan = write(tmp_path)
    assert plan.missing() == []
    plan.path(1).rename(plan.path(1).with_name("latents_shard00001.safetensors.partial"))
    assert plan.missing() == [1]
    assert [ShardPlan(tmp_path / "none", 100, 10).missing(rank, 3) for rank in range(3)] == [
        [0, 3, 6, 9], [1, 4, 7], [2, 5, 8]
    ]  # fmt: skip


@pytest.fixture
def cache(tmp_path):
    write(tmp_path / "cache/train", size=40)
    write(tmp_path / "cache/val", size=7)
    return tmp_path / "cache"


def data(root, **kwargs):
    options = {"source": "latents", "batch_size": 8, "val_batch_size": 4, "num_workers": 0}
    return ImageNetDataModule(root, **options | kwargs)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_datamodule_serves_latents(cache, num_workers):
    module = data(cache, num_workers=num_workers)
    module.setup("fit")
    batch = next(iter(module.train_dataloader()))
    assert isinstance(batch, LatentBatch)
    assert batch.latents.shape == (8, 2, 3, 3) and batch.latents.dtype == torch.float32
    assert module.num_classes == 3
    seen = [index for batch in module.val_dataloader() for index in batch.index.tolist()]
    assert seen == list(range(7))


def test_a_flat_folder_is_training_data_without_validation(cache, tmp_path):
    module = data(cache / "train")
    module.setup("fit")
    assert len(module.train_set) == 40 and module.val_dataloader() == []
    for root in (cache / "train", tmp_path / "nowhere"):
        with pytest.raises(ValueError, match="there are no validation latents in"):
            data(root).setup("validate")


def test_bad_caches_are_named(cache, tmp_path):
    (cache / "train/latents_stats.pt").unlink()
    with pytest.raises(ValueError, match=r"has no latents_stats\.pt, so the cache is unfinished"):
        data(cache).setup("fit")
    with pytest.raises(ValueError, match=r"no latents \(\*.safetensors\) in"):
        data(tmp_path / "nowhere").setup("fit")
    (cache / "val/latents_shard00001.safetensors").write_bytes(b"not a shard")
    with pytest.raises(ValueError, match=r"^root: '.*safetensors' can't be read as weights: it is text"):
        LatentDataset(cache / "val", train=False)
    save_file({"labels": torch.zeros(1)}, cache / "val/latents_shard00001.safetensors")
    with pytest.raises(ValueError, match="holds neither 'latents' nor 'moments'"):
        LatentDataset(cache / "val", train=False)
    other = {"latents": torch.zeros(1, 5, 3, 3), "labels": torch.zeros(1).long()}
    save_file(other, cache / "val/latents_shard00001.safetensors")
    with pytest.raises(ValueError, match="differ in what they hold"):
        LatentDataset(cache / "val", train=False)
    (tmp_path / "stats.pt").write_bytes((cache / "val/latents_stats.pt").read_bytes())
    assert LatentStatistics.read(tmp_path / "stats.pt").mean.shape == (1, 2, 1, 1)
    torch.save({"mean": torch.zeros(1)}, tmp_path / "stats.pt")
    with pytest.raises(ValueError, match="holds no 'mean' and 'std'"):
        LatentStatistics.read(tmp_path / "stats.pt")


def test_the_tokenizer_is_read_from_the_cache(cache):
    (cache / "val/latents.json").write_text(json.dumps({"tokenizer": {"vfm": "a", "fingerprint": "b"}}))
    assert LatentDataset(cache / "val", train=False).tokenizer == {"vfm": "a", "fingerprint": "b"}


def test_noise_belongs_to_the_sample():
    together = IndexedNoise("test", 3, torch.arange(6))
    first, second, whole = together.normal(2, 2), together.normal(), together.integers(1000)
    for index in range(6):
        alone = IndexedNoise("test", 3, torch.tensor([index]))
        assert torch.equal(alone.normal(2, 2)[0], first[index])
        assert torch.equal(alone.normal()[0], second[index])
        assert torch.equal(alone.integers(1000)[0], whole[index])
    assert len(first.flatten().unique()) == 24
    assert not torch.equal(IndexedNoise("test", 4, torch.arange(6)).normal(2, 2), first)
    assert seed_of(1, 2) != seed_of(2, 1)
    assert not torch.equal(IndexedNoise("other", 3, torch.arange(6)).normal(2, 2), first)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_features_come_as_they_are_stored(tmp_path, dtype):
    write(tmp_path, moments=True, features=dtype)
    (tmp_path / "latents.json").write_text(json.dumps({"tokenizer": {}, "features": {"name": "a", "input_scale": 0.5}}))
    dataset = LatentDataset(tmp_path, train=True)
    assert dataset.features_shape == (5, 6) and dataset.shape == (2, 3, 3)
    assert dataset.features_source == {"name": "a", "input_scale": 0.5}
    stored = everything(tmp_path, "features")
    for epoch in (0, 1):
        rows = [dataset[Draw(index, epoch)] for index in range(10)]
        assert torch.equal(torch.stack([row[3] for row in rows]), stored) and rows[0][3].dtype == dtype
    assert rows[0][0].dtype == torch.float32


def test_features_change_nothing_else(tmp_path):
    write(tmp_path / "with", moments=True, features=torch.bfloat16, size=4)
    write(tmp_path / "without", moments=True, size=4)
    ours, plain = (LatentDataset(tmp_path / name, train=True) for name in ("with", "without"))
    assert (plain.features_shape, plain.features_source, len(plain[0])) == (None, None, 3)
    assert all(torch.equal(ours[index][0], plain[index][0]) for index in range(4))
    assert torch.equal(*(LatentStatistics.read(tmp_path / name).std for name in ("with", "without")))


@pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_the_datamodule_serves_features(tmp_path, num_workers):
    for split, size in (("train", 40), ("val", 7)):
        write(tmp_path / split, size=size, moments=True, features=torch.bfloat16)
    module = data(tmp_path, num_workers=num_workers)
    module.setup("fit")
    for loader, split in ((module.train_dataloader(), "train"), (module.val_dataloader(), "val")):
        stored = everything(tmp_path / split, "features")
        for batch in loader:
            assert isinstance(batch, LatentBatch) and batch.features.dtype == torch.bfloat16
            assert torch.equal(batch.features, stored[batch.index])


@pytest.mark.parametrize("features", [None, torch.bfloat16])
def test_padding_has_the_shape_of_all_others(tmp_path, features):
    write(tmp_path, size=7, moments=True, features=features)
    dataset = LatentDataset(tmp_path, train=False)
    sampler = EvaluationSampler(dataset, 4, num_replicas=2, rank=1)
    (batch,) = DataLoader(dataset, batch_size=4, sampler=sampler, collate_fn=dataset.collate)
    assert batch.real.sum() == 3 and len(batch.latents) == 4
    assert batch.features is None if features is None else batch.features.shape == (4, 5, 6)


@pytest.mark.parametrize("features", [None, torch.bfloat16])
def test_a_batch_is_moved_and_pinned_with_its_features_or_without(tmp_path, features, monkeypatch):
    write(tmp_path, moments=True, features=features)
    dataset = LatentDataset(tmp_path, train=False)
    batch = dataset.collate([dataset[index] for index in range(3)])
    moved = move_data_to_device(batch, torch.device("meta"))
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor.clone())  # which needs a GPU
    pinned = pin_memory(batch)
    assert isinstance(moved, LatentBatch) and isinstance(pinned, LatentBatch)
    assert moved.latents.is_meta and torch.equal(pinned.latents, batch.latents)
    if features is None:
        assert batch.features is moved.features is pinned.features is None
    else:
        assert moved.features.is_meta and torch.equal(pinned.features, batch.features)


def test_features_that_do_not_fit_are_refused(tmp_path):
    write(tmp_path / "mirrored", features=torch.bfloat16)
    with pytest.raises(ValueError, match=r"root: .*mirrored' holds mirrored views beside features.*: moments"):
        LatentDataset(tmp_path / "mirrored", train=False)
    plan = write(tmp_path / "mixed", moments=True, features=torch.bfloat16)
    shard = load_file(plan.path(2))
    for features in ({}, {"features": shard["features"][:, 1:].contiguous()}):
        write_tensors(plan.path(2), {"moments": shard["moments"], "labels": shard["labels"], **features})
        with pytest.raises(ValueError, match="differ in what they hold"):
            LatentDataset(tmp_path / "mixed", train=False)
    plan = write(tmp_path / "flat", size=4, moments=True)
    write_tensors(plan.path(0), load_file(plan.path(0)) | {"features": torch.zeros(4, 6)})
    with pytest.raises(ValueError, match=r"features in .*flat' are not \[n, 1 \+ N, D\]"):
        LatentDataset(tmp_path / "flat", train=False)
