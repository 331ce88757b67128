import io
import logging
import os
import tarfile

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image
from torch.utils.data import DataLoader

from vfm_vae.data.datamodule import ImageNetDataModule
from vfm_vae.data.folder import ImageFolderDataset
from vfm_vae.data.sampling import TrainingSampler
from vfm_vae.data.shard_index import read_index
from vfm_vae.data.shards import READ_AT_ONCE, ImageShardDataset, list_shards
from vfm_vae.data.transforms import CentreCrop

SHARD = 5


def jpeg(number, size=(20, 16)):
    pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=95)
    return file.getvalue()


def write(path, samples):
    with webdataset.TarWriter(str(path)) as writer:
        for sample in samples:
            writer.write(sample)


def samples(first, count):
    return [{"__key__": f"n{i:04d}_{i}", "jpg": jpeg(i), "cls": i % 3} for i in range(first, first + count)]


@pytest.fixture
def root(tmp_path):
    """Thirteen training images in shards of five, six for validation in one."""
    folder = tmp_path / "shards"
    folder.mkdir()
    for shard in range(3):
        count = min(SHARD, 13 - SHARD * shard)
        write(folder / f"imagenet1k-train-{shard:04d}.tar", samples(SHARD * shard, count))
    write(folder / "imagenet1k-validation-00.tar", samples(100, 6))
    return folder


def dataset(root, split="train", **kwargs):
    return ImageShardDataset(root, split, CentreCrop(8), **kwargs)


def test_reads_every_image_with_its_label(root):
    images = dataset(root)
    assert len(images) == 13 and images.labels.tolist() == [i % 3 for i in range(13)]
    assert images.name(7) == "imagenet1k-train-0001.tar/n0007_7.jpg"
    assert images.shards.tolist() == [0] * 5 + [1] * 5 + [2] * 3
    assert images.classes == ["0", "1", "2"]
    for i in (0, 7, 12):
        image, label, index = images[i]
        assert (label, index) == (i % 3, i)
        assert torch.equal(image, CentreCrop(8)(Image.open(io.BytesIO(jpeg(i)))))
    assert len(dataset(root, "val")) == 6


def test_splits_may_have_folders_of_their_own(root, tmp_path):
    for split, word in (("train", "train"), ("val", "validation")):
        (tmp_path / "tree" / split).mkdir(parents=True)
        for path in root.glob(f"*{word}*.tar"):
            path.rename(tmp_path / "tree" / split / path.name.replace(f"imagenet1k-{word}-", ""))
    assert len(dataset(tmp_path / "tree")) == 13 and len(dataset(tmp_path / "tree", "val")) == 6


NAMES = {
    "retrieval-train-0000.tar": "train",
    "retrieval-val-0000.tar": "val",
    "interval_training.00.tar": "train",
    "trainable_valid7.tar": "val",
    "evaluation_Validation-001.tar": "val",
    "ImageNet1k.TRAIN.tar": "train",
}


def test_splits_are_whole_words_in_the_names_of_shards(tmp_path):
    for name in [*NAMES, "._retrieval-train-0000.tar", "retrieval-test-0.tar", "notes-train.txt"]:
        (tmp_path / name).touch()
    for split in ("train", "val"):
        expected = sorted(name for name, of in NAMES.items() if of == split)
        assert [path.name for path in list_shards(tmp_path, split)] == expected


@pytest.mark.parametrize("name", ["train-val-0000.tar", "validation_of_training.tar", "test.train.0.tar"])
def test_a_name_with_the_words_of_several_splits_is_refused(root, name):
    (root / name).touch()
    with pytest.raises(
        ValueError, match=rf"root: '.*{name}' has the words of several splits, \w+ and \w+, in its name"
    ):
        dataset(root)


def test_shards_with_no_word_of_a_split_are_said(root):
    for name in ("trainset-0.tar", "retrieval-0.tar"):
        (root / name).touch()
    with pytest.warns(
        UserWarning, match=r"left out in '.*shards': shards with no split's word .*, retrieval-0.tar, tr"
    ):
        assert len(dataset(root)) == 13
    for path in root.glob("*-train-*.tar"):
        path.unlink()
    with pytest.raises(ValueError, match="has no shards with the word train or training in their names; expected are"):
        dataset(root)


@pytest.mark.parametrize("hidden", ["._n0.jpg", "__MACOSX/._n0.jpg", ".ipynb_checkpoints/n0.jpg"])
def test_members_that_a_system_puts_beside_images_are_left_alone(root, hidden):
    with tarfile.open(root / "imagenet1k-train-0002.tar", "w") as tar:
        for name, content in ((hidden, b"no image"), ("./n0.jpg", jpeg(1)), ("./n0.cls", b"2")):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    images = dataset(root)
    assert len(images) == 11 and images.num_damaged == 0
    assert images.name(10) == "imagenet1k-train-0002.tar/./n0.jpg" and images[10][1] == 2


@pytest.mark.parametrize("ending", ["gif", "tiff", "bmp"])
def test_shards_hold_the_usual_formats(root, ending):
    content = io.BytesIO()
    Image.new("RGB", (16, 16), (153,) * 3).save(content, ending)
    sample = {"__key__": "n0", ending: content.getvalue(), "jpg": jpeg(0), "cls": 1}
    write(root / "imagenet1k-train-0002.tar", [sample, sample | {"__key__": "n1"}])
    write(root / "imagenet1k-train-0003.tar", [{k: v for k, v in sample.items() if k != "jpg"}])
    images = dataset(root)
    assert [images.name(index)[-6:] for index in (10, 11)] == ["n0.jpg", "n1.jpg"]  # as ever where there are several
    assert (images[12][0].int() - 153).abs().max() <= 2 and images.num_damaged == 0


def test_the_index_is_made_once_and_follows_the_shards(root, tmp_path, monkeypatch):
    looked_at = []
    real = read_index.__globals__["index_shard"]
    monkeypatch.setitem(
        read_index.__globals__, "index_shard", lambda path, *args: looked_at.append(path.name) or real(path, *args)
    )
    index = tmp_path / "index.npz"
    first = dataset(root, index=index)
    assert len(looked_at) == 3
    again = dataset(root, index=index)
    assert len(looked_at) == 3
    assert all(np.array_equal(getattr(first, x), getattr(again, x)) for x in ("offsets", "sizes", "labels", "shards"))
    write(root / "imagenet1k-train-0001.tar", samples(50, 2))
    assert len(dataset(root, index=index)) == 10
    assert looked_at[3:] == ["imagenet1k-train-0001.tar"]
    index.write_bytes(b"something else")
    with pytest.raises(ValueError, match=r"cache_dir: '.*index.npz' is no index of shards .*; delete it"):
        dataset(root, index=index)


def test_is_what_a_folder_of_the_same_images_is(photos):
    """The embedded photographs come both ways."""

    def contents(dataset):
        return sorted((dataset.labels[i].item(), dataset.open(i).read()) for i in range(len(dataset)))

    assert contents(dataset(photos / "shards")) == contents(ImageFolderDataset(photos, "train", CentreCrop(8)))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_workers_read_beside_each_other(root, num_workers):
    images = dataset(root)
    images[0]  # the parent's open file is inherited
    indices = torch.cat([batch[2] for batch in DataLoader(images, batch_size=2, num_workers=num_workers)])
    assert indices.tolist() == list(range(13))


def test_small_images_are_found_in_shards(root):
    write(root / "imagenet1k-train-0002.tar", [{"__key__": "wide", "jpg": jpeg(1, (300, 12)), "cls": 1}])
    data = ImageNetDataModule(str(root), source="shards", image_size=8, batch_size=4, num_workers=0, min_size=16)
    data.prepare_data()
    data.setup("fit")
    assert (root / "train_under_16px.txt").read_text().splitlines()[1:] == ["imagenet1k-train-0002.tar/wide.jpg"]
    assert len(data.train_set) == 10 and len(data.val_set) == 6
    assert {path.name for path in root.glob("*.npz")} == {"train_shards.npz", "val_shards.npz"}


def test_the_list_of_small_images_follows_the_shards(root):
    def data():
        data = ImageNetDataModule(str(root), source="shards", image_size=8, batch_size=4, num_workers=0, min_size=16)
        data.prepare_data()
        data.setup("fit")
        return data

    assert len(data().train_set) == 13
    write(root / "imagenet1k-train-0002.tar", [{"__key__": "wide", "jpg": jpeg(1, (300, 12)), "cls": 1}])
    assert len(data().train_set) == 10


def test_headers_alone_are_read_to_find_small_images(root, monkeypatch):
    write(root / "imagenet1k-train-0002.tar", [{"__key__": "large", "jpg": jpeg(1, (600, 500)), "cls": 1}])
    images, read = dataset(root), []
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda file, size, offset: read.append(size) or pread(file, size, offset))
    assert images.sizes[10] > 3 * READ_AT_ONCE
    assert images.small(16) == []
    assert sum(read) == images.sizes[:10].sum() + READ_AT_ONCE
    with images.open(10) as file:
        assert file.read() == jpeg(1, (600, 500))


def test_validation_shards_alone_are_enough_to_measure(root):
    for path in root.glob("*train*.tar"):
        path.unlink()
    data = ImageNetDataModule(str(root), source="shards", image_size=8, batch_size=4, num_workers=0)
    data.prepare_data()
    data.setup("test")
    assert len(data.val_set) == 6
    with pytest.raises(ValueError, match="has no shards with the word train or training"):
        data.setup("fit")


def test_what_the_disk_did_not_give_is_tried_again_the_next_time(root, tmp_path, monkeypatch):
    index, real = tmp_path / "index.npz", tarfile.open

    def stale(path, *args, **kwargs):
        if path.name == "imagenet1k-train-0001.tar":
            raise OSError("stale file handle")
        return real(path, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(tarfile, "open", stale)
        read_index(list_shards(root, "train"), index, retry=True)
    assert len(dataset(root, index=index, max_bad_fraction=0.9)) == 8  # all ranks take what the first one found
    assert len(read_index(list_shards(root, "train"), index, retry=True)[1].names) == 5
    assert len(dataset(root, index=index)) == 13


def test_shuffling_stays_within_a_few_shards():
    shards = np.repeat(np.arange(8), 10)
    sampler = TrainingSampler(range(80), 5, seed=1, shards=shards, mixed_shards=2)
    epochs = []
    for epoch in range(2):
        sampler.set_epoch(epoch)
        order = np.array([draw.index for draw in sampler])
        assert sorted(order) == list(range(80))
        windows = [set(shards[order[start : start + 20]]) for start in range(0, 80, 20)]
        assert all(len(window) == 2 for window in windows)
        assert (np.diff(shards[order[:20]]) != 0).sum() > 4  # the two are mixed
        epochs.append((order.tolist(), windows))
    assert epochs[0] != epochs[1] and epochs[0][1] != epochs[1][1]


def lose(path, keep):
    path.write_bytes(path.read_bytes()[:keep])


def test_samples_without_label_or_image_are_damage(root, caplog):
    broken = [
        {"__key__": "a", "jpg": jpeg(1)},
        {"__key__": "b", "cls": 2},
        {"__key__": "c", "jpg": jpeg(1), "cls": "x"},
    ]
    write(root / "imagenet1k-train-0002.tar", broken + samples(60, 2))
    with caplog.at_level(logging.WARNING):
        images = dataset(root, max_bad_fraction=0.25)
    assert len(images) == 12 and images.num_damaged == 3
    assert [message.split(": ", 2)[2] for message in caplog.messages] == [
        "sample 'a' has no label (.cls)",
        "sample 'b' has no image, only .cls",
        "sample 'c' has no whole number as its label (invalid literal for int() with base 10: b'x')",
    ]
    with pytest.raises(ValueError, match=r"max_bad_fraction: 3 of the 15 images .* more than 1.00%, the last in "):
        dataset(root)


@pytest.mark.parametrize("where", ["header", "content", "no tar", "empty"])
def test_a_broken_shard_costs_what_the_others_hold(root, where, caplog):
    path = root / "imagenet1k-train-0001.tar"
    member = dataset(root)
    offset = int(member.offsets[7])
    if where in ("header", "content"):
        lose(path, offset - 600 if where == "header" else offset + 100)
    else:
        path.write_bytes(b"" if where == "empty" else b"no tar" * 1000)
    with caplog.at_level(logging.WARNING):
        images = dataset(root, max_bad_fraction=0.9)
    left = len(images) - 8  # of the broken shard
    assert left == {"header": 2, "content": 2, "no tar": 0, "empty": 0}[where]
    assert images.num_damaged == 4 - left  # whole ones hold (5 + 3) / 2
    assert len(caplog.messages) == 1 and "imagenet1k-train-0001.tar" in caplog.messages[0]
    assert [images[i][2] for i in range(len(images))] == list(range(len(images)))


def test_one_percent_of_damage_is_borne_and_ten_are_not(root):
    def spoil(share):
        rows = samples(0, 100)
        for row in rows[: int(100 * share)]:
            row["jpg"] = row["jpg"][:150]
        write(root / "imagenet1k-train-0000.tar", rows)
        for shard in (1, 2):
            (root / f"imagenet1k-train-{shard:04d}.tar").unlink(missing_ok=True)
        return dataset(root)

    images = spoil(0.01)
    assert len({images[i][2] for i in range(100)}) == 99 and images.num_damaged == 1
    images = spoil(0.1)
    with pytest.raises(ValueError, match=r"max_bad_fraction: 2 of the 100 images .*n0001_1.jpg.*; repair the data set"):
        [images[i] for i in range(100)]


def test_missing_shards_are_named(root, tmp_path):
    with pytest.raises(ValueError, match=r"root: there is no folder '.*nowhere'; expected are tar shards"):
        list_shards(tmp_path / "nowhere", "train")
    with pytest.raises(ValueError, match="has no shards with the word test or testing in their names; expected are"):
        list_shards(root, "test")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"cache_dir: .*file/index.npz"):
        dataset(root, index=tmp_path / "file" / "index.npz")


def test_a_negative_label_names_its_image(root):
    write(root / "imagenet1k-train-0002.tar", [{"__key__": "unknown", "jpg": jpeg(1), "cls": -1}])
    message = r"^root: '.*imagenet1k-train-0002.tar/unknown.jpg' has the label -1, but classes are numbered from 0 on"
    with pytest.raises(ValueError, match=message):
        dataset(root)
