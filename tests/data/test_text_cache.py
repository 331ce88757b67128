"""Captions and their embeddings in caches of latents: read by slices, drawn by epoch, refused where they don't fit."""

import pickle

import pytest
import torch
from lightning.fabric.utilities import move_data_to_device
from safetensors.torch import load_file

from vfm_vae.data import latents as reading
from vfm_vae.data.datamodule import ImageNetDataModule
from vfm_vae.data.latents import STATISTICS, LatentDataset, ShardPlan, measure_shards
from vfm_vae.data.sampling import Draw
from vfm_vae.data.texts import EMPTY, EmptyCaption, pack_texts
from vfm_vae.text import HashedWords
from vfm_vae.types import Caption, LatentBatch
from vfm_vae.writing import write_tensors, write_torch

ENCODER = HashedWords(width=8, max_tokens=5)
CAPTIONS = [
    ["a cat", "a small cat on a mat with a hat", "ein Kätzchen 🐈"],
    [""],
    ["a rocket"],
    ["a cup of coffee", "coffee"],
    ["the moon", "a disc", "a white disc", "night"],
]
CPU = torch.device("cpu")


def embedded(captions):
    return [Caption(text, *ENCODER.tokens([text], CPU)) for text in captions]


def write(folder, captions=CAPTIONS, shard_size=2, features=False, moments=True):
    """A cache of made-up latents, with captions or, where those are None, without."""
    size = len(captions or CAPTIONS)
    plan, generator = ShardPlan(folder, size, shard_size), torch.Generator().manual_seed(0)
    for shard in range(len(plan)):
        images = plan.images(shard)
        values = torch.randn(2, len(images), 2, 3, 3, generator=generator).abs()
        views = {"latents": values[0], "latents_flip": values[1]}
        tensors = {"moments": torch.cat([*values], 1)} if moments else views
        if features:
            tensors["features"] = torch.randn(len(images), 5, 6, generator=generator).bfloat16()
        if captions is not None:
            tensors |= pack_texts([embedded(captions[image]) for image in images], ENCODER.width)
        write_tensors(plan.path(shard), tensors | {"labels": torch.zeros(len(images)).long()})
    measure_shards(plan).compute().write(folder / STATISTICS)
    if captions is not None:
        EmptyCaption(ENCODER.empty(), ENCODER.max_tokens).write(folder)
    return plan


@pytest.fixture
def cache(tmp_path):
    write(tmp_path / "z")
    return tmp_path / "z"


def test_captions_come_back_as_they_were_written(cache):
    dataset = LatentDataset(cache, train=False)
    assert dataset.text_shape == (5, 8) and dataset.text_source is None
    assert [dataset.captions_of(index) for index in range(5)] == CAPTIONS
    batch = dataset.collate([dataset[index] for index in range(5)])
    expected = ENCODER.encode([captions[0] for captions in CAPTIONS])
    assert isinstance(batch, LatentBatch) and batch.features is None
    assert batch.text.captions == expected.captions
    for name in ("embeddings", "mask", "empty"):
        assert torch.equal(getattr(batch.text, name), getattr(expected, name))
    assert batch.text.embeddings.dtype == torch.bfloat16 and batch.text.empty.shape == (1, 8)


def test_no_shard_is_loaded_whole(cache, monkeypatch):
    read = []

    class Watched:
        def __init__(self, *args):
            self.file = opened(*args)

        def get_slice(self, name):
            rows = self.file.get_slice(name)
            return type("Rows", (), {"__getitem__": lambda _, key: read.append((name, key)) or rows[key]})()

    opened = reading.safe_open
    monkeypatch.setattr(reading, "safe_open", Watched)
    dataset = LatentDataset(cache, train=False)
    dataset[4]
    words, letters = 3, len("the moon")
    assert read == [("moments", 0), ("captions", slice(0, letters)), ("text", slice(0, words))]
    dataset[1]
    assert read[-2:] == [("captions", slice(54, 54)), ("text", slice(11, 12))]


def test_training_draws_a_caption_for_each_epoch(cache):
    train = LatentDataset(cache, train=True, seed=3)

    def drawn(dataset, index, epochs=40):
        return [dataset[Draw(index, epoch)][4].text for epoch in range(epochs)]

    for index, captions in enumerate(CAPTIONS):
        assert set(drawn(train, index)) == set(captions)
    assert drawn(train, 4) == drawn(LatentDataset(cache, train=True, seed=3), 4)
    assert drawn(train, 4) != drawn(LatentDataset(cache, train=True, seed=4), 4)
    caption = train[Draw(0, next(epoch for epoch in range(40) if "mat" in drawn(train, 0)[epoch]))][4]
    assert torch.equal(caption.tokens, *ENCODER.tokens([caption.text], CPU)) and len(caption.tokens) == 5
    assert set(drawn(LatentDataset(cache, train=False), 4)) == {"the moon"}


@pytest.mark.parametrize("moments", [True, False])
@pytest.mark.parametrize("features", [True, False])
def test_captions_change_nothing_else(tmp_path, features, moments):
    if features and not moments:  # which are refused
        return
    write(tmp_path / "with", features=features, moments=moments)
    write(tmp_path / "without", captions=None, features=features, moments=moments)
    with_text, without = (LatentDataset(tmp_path / name, train=True) for name in ("with", "without"))
    assert without.text_shape is None and without.captions_of(0) == [""]
    for draw in (Draw(index, epoch) for index in range(5) for epoch in (0, 1)):
        ours, plain = with_text[draw], without[draw]
        assert len(plain) == 3 + features and len(ours) == 5
        assert ours[1:3] == plain[1:3] and torch.equal(ours[0], plain[0])
        assert torch.equal(ours[3], plain[3]) if features else ours[3] is None


@pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_the_datamodule_serves_captions(tmp_path, num_workers):
    for split in ("train", "val"):
        write(tmp_path / split, features=True)
    data = ImageNetDataModule(tmp_path, source="latents", batch_size=2, val_batch_size=2, num_workers=num_workers)
    data.setup("fit")
    for loader in (data.train_dataloader(), data.val_dataloader()):
        for batch in loader:
            assert batch.features.shape[1:] == (5, 6) and batch.text.embeddings.shape == (len(batch.index), 5, 8)
            for caption, index in zip(batch.text.captions, batch.index.tolist(), strict=True):
                assert caption in CAPTIONS[index]
    moved = move_data_to_device(batch, torch.device("meta"))
    assert moved.text.embeddings.is_meta and moved.text.empty.is_meta and moved.text.captions == batch.text.captions


def test_a_dataset_with_captions_goes_to_other_processes(cache):
    dataset = LatentDataset(cache, train=False)
    sample = dataset[4]
    copy = pickle.loads(pickle.dumps(dataset))
    assert copy[4][4].text == sample[4].text and torch.equal(copy[4][4].tokens, sample[4].tokens)


def without(tensors, name):
    return {other: tensor for other, tensor in tensors.items() if other != name}


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda x: without(x, "captions"), r"lack \['captions'\]; make the cache again"),
        (lambda x: x | {"text": x["text"][1:].contiguous()}, r"'text_ends' does not divide 'text', which has 11 rows"),
        (lambda x: x | {"text_ends": x["text_ends"].flip(0).contiguous()}, "'text_ends' does not divide 'text'"),
        (lambda x: x | {"captions": x["captions"][:9].contiguous()}, "'captions_ends' does not divide 'captions'"),
        (lambda x: x | {"image_ends": x["image_ends"][:1] + 1}, "they are of 1 images instead of 2"),
        (lambda x: x | {"captions_ends": x["captions_ends"][1:].contiguous()}, "captions and embeddings differ in"),
        (lambda x: without(x, "text"), "differ in what they hold"),
    ],
)
def test_texts_that_do_not_fit_are_refused(cache, change, found):
    file = cache / "latents_shard00000.safetensors"
    write_tensors(file, change(load_file(file)))
    with pytest.raises(ValueError, match=rf"^root: [^\n]*{found}[^\n]*$"):
        LatentDataset(cache, train=False)


def test_the_empty_caption_is_asked_for(cache):
    write_torch(cache / EMPTY, {"tokens": torch.zeros(1, 8)})
    with pytest.raises(ValueError, match=r"^root: '.*text_empty.pt' holds no 'tokens' and 'length'; make the cache"):
        LatentDataset(cache, train=False)
    (cache / EMPTY).unlink()
    with pytest.raises(ValueError, match=r"^root: there is no file '.*text_empty.pt'"):
        LatentDataset(cache, train=False)


def test_a_shard_without_good_images_has_no_texts(tmp_path):
    packed = pack_texts([], 8)
    assert packed["text"].shape == (0, 8) and packed["text"].dtype == torch.bfloat16
    write(tmp_path)
    shard = tmp_path / "latents_shard00001.safetensors"
    write_tensors(shard, {name: tensor[:0] for name, tensor in load_file(shard).items()} | packed)
    dataset = LatentDataset(tmp_path, train=False)
    assert [dataset.captions_of(index) for index in range(3)] == [*CAPTIONS[:2], CAPTIONS[4]]
