"""Captions in tar shards: members of their own, fields of JSON, and an index apart from that of mere images."""

import io
import json
import tarfile

import numpy as np
import pytest
import torch
from test_datamodule import datamodule
from test_shards import jpeg, samples, write

from vfm_vae.cli import short_errors
from vfm_vae.data.sampling import Draw
from vfm_vae.data.shard_index import read_index
from vfm_vae.data.shards import ImageShardDataset
from vfm_vae.data.transforms import CentreCrop

TEXTS = {"txt": lambda i: [f"größer als {i}"], "json.text": lambda i: [f"{i}, told {number}" for number in range(3)]}


def told(first, count, **changes):
    """Samples with a text and with several captions, of which some are changed."""
    made = samples(first, count)
    for i, sample in enumerate(made, first):
        sample["txt"] = TEXTS["txt"](i)[0] + "\r\n"
        sample["json"] = {"text": TEXTS["json.text"](i), "caption": f"a {i}", "width": 20}
        sample |= {ending: content for ending, content in changes.items() if i % 5 == 1}
    return [{name: content for name, content in sample.items() if content is not None} for sample in made]


@pytest.fixture
def root(tmp_path):
    """Ten training images in two shards, and two for validation."""
    folder = tmp_path / "shards"
    folder.mkdir()
    for shard in range(2):
        write(folder / f"photos-train-{shard}.tar", told(5 * shard, 5))
    write(folder / "photos-val-0.tar", told(100, 2))
    return folder


def dataset(root, captions="txt", split="train", **kwargs):
    return ImageShardDataset(root, split, CentreCrop(8), captions=captions, **kwargs)


def arrays(index):
    with np.load(index) as stored:
        return {name: stored[name] for name in stored.files}


@pytest.mark.parametrize("captions", TEXTS)
def test_images_come_with_captions_and_are_otherwise_the_same(root, captions):
    plain, both = (datamodule(root, source="shards", captions=name, mixed_shards=1) for name in (None, captions))
    for data in (plain, both):
        data.prepare_data()
        data.setup("fit")
    for one, other in zip(plain.train_dataloader(), both.train_dataloader(), strict=True):
        assert all(torch.equal(*pair) for pair in zip(one[:3], other[:3], strict=True)) and one.text is None
        expected = [TEXTS[captions](index) for index in other.index.tolist()]
        assert all(text in texts for text, texts in zip(other.text.captions, expected, strict=True))
    assert next(iter(both.val_dataloader())).text.captions == tuple(TEXTS[captions](i)[0] for i in (100, 101))
    assert [both.train_set.captions_of(i) for i in range(10)] == [TEXTS[captions](i) for i in range(10)]
    drawn = {both.train_set[Draw(3, epoch)][3].text for epoch in range(30)}
    assert drawn == set(TEXTS[captions](3)) and both.num_classes == 3


def test_each_place_of_captions_has_an_index_of_its_own(root, monkeypatch):
    looked_at = []
    real = read_index.__globals__["index_shard"]
    monkeypatch.setitem(
        read_index.__globals__, "index_shard", lambda path, *args: looked_at.append(path.name) or real(path, *args)
    )
    files = {None: "train_shards.npz", "txt": "train_shards_txt.npz", "json.a/b": "train_shards_json.a%2Fb.npz"}
    for captions in files:
        datamodule(root, source="shards", captions=captions).prepare_data()
    assert len(looked_at) == 3 * 3 and all((root / name).is_file() for name in files.values())
    for captions in ("txt", None):
        data = datamodule(root, source="shards", captions=captions)
        data.prepare_data()
        data.setup("fit")
    assert len(looked_at) == 3 * 3
    plain, said = arrays(root / "train_shards.npz"), arrays(root / "train_shards_txt.npz")
    assert list(plain) == ["shards", "names", "offsets", "sizes", "labels"]
    assert all(np.array_equal(values, said[name]) for name, values in plain.items()) and len(said) == 6


def test_captioned_images_need_no_labels(root):
    write(root / "photos-train-0.tar", told(0, 5, cls=None))
    images = dataset(root)
    assert images.labels.tolist() == [0, 0, 2, 0, 1, 2, 0, 1, 2, 0] and images.num_damaged == 0
    assert images.classes == ["0", "1", "2"]
    with pytest.raises(ValueError, match=r"max_bad_fraction: 1 of the 10 .* 'n0001_1' has no label \(.cls\)"):
        dataset(root, None)


@pytest.mark.parametrize(
    ("captions", "changes"),
    [
        ("txt", {"txt": None}),
        ("txt", {"txt": " \n"}),
        ("json.text", {"json": None}),
        ("json.text", {"json": {}}),
        ("json.text", {"json": {"text": ["", None]}}),
        ("json.text", {"json": {"text": None}}),
    ],
)
def test_images_without_captions_are_told_nothing_which_is_said_once(root, captions, changes):
    write(root / "photos-train-0.tar", told(0, 5, **changes))
    with pytest.warns(UserWarning, match=r"captions: 1 of the 10 images in .* the first is '.*-0.tar/n0001_1.jpg'"):
        images = dataset(root, captions)
    assert images[1][3].text == "" and images.captions_of(1) == [""] and images.captions_of(2) == TEXTS[captions](2)
    assert images.num_damaged == 0


@pytest.mark.parametrize(
    ("captions", "changes", "message"),
    [
        ("txt", {"txt": "größer".encode("latin-1")}, "unreadable captions: 'n0001_1.txt' is not UTF-8"),
        ("txt", {"txt": "a house".encode("utf-16")}, "unreadable captions: 'n0001_1.txt' is not UTF-8"),
        ("json.text", {"json": b"{'text'"}, r"unreadable captions: 'n0001_1.json' is no JSON \(Expecting property"),
        ("json.text", {"json": b"[1]"}, "unreadable captions: 'n0001_1.json' is not an object"),
        (
            "json.text",
            {"json": b'{"text": 3}'},
            "unreadable captions: 'n0001_1.json': 'text' is neither a text nor a list",
        ),
    ],
)
def test_captions_that_cannot_be_read_count_as_damage(root, captions, changes, message):
    write(root / "photos-train-0.tar", told(0, 5, **changes))
    images = dataset(root, captions, max_bad_fraction=0.1)
    assert images.num_damaged == 1 and [images.captions_of(i) for i in (0, 1)] == [TEXTS[captions](i) for i in (0, 2)]
    with pytest.raises(ValueError, match=rf"max_bad_fraction: 1 of the 10 images .*sample 'n0001_1' has {message}"):
        dataset(root, captions)


def test_other_fields_and_other_encodings_throughout_end_a_run_with_one_line(root, capsys):
    for shard in range(2):
        write(root / f"photos-train-{shard}.tar", [s | {"txt": b"\xe4"} for s in told(5 * shard, 5)])
    for captions, message in {
        "json.words": "captions: no image in '.*' has any; expected is the field 'words' in members <key>.json beside",
        "txt": "root: no images under '.*' that can be used; the first sample 'n0000_0' has unreadable captions: 'n00",
    }.items():
        with pytest.raises(ValueError, match=message):
            dataset(root, captions)
        with pytest.raises(SystemExit, match="2"), short_errors():
            dataset(root, captions)
        assert len(capsys.readouterr().err.splitlines()) == 2  # the error, and how to learn more


def test_small_images_take_their_captions_along(root):
    write(
        root / "photos-train-0.tar",
        [s | ({"jpg": jpeg(9, (6, 6))} if i == 1 else {}) for i, s in enumerate(told(0, 5))],
    )
    data = datamodule(root, source="shards", captions="txt", min_size=8)
    data.prepare_data()
    data.setup("fit")
    assert [data.train_set.captions_of(i) for i in range(9)] == [TEXTS["txt"](i) for i in (0, *range(2, 10))]


def test_a_list_of_small_images_is_made_again_after_the_shards(root):
    """The index that it is younger than is that of the captions."""
    data = datamodule(root, source="shards", captions="txt", min_size=8)
    data.prepare_data()
    data.setup("fit")
    assert len(data.train_set) == 10
    small = [s | ({"jpg": jpeg(9, (6, 6))} if i == 1 else {}) for i, s in enumerate(told(0, 5))]
    write(root / "photos-train-0.tar", small)
    again = datamodule(root, source="shards", captions="txt", min_size=8)
    again.prepare_data()
    again.setup("fit")
    assert len(again.train_set) == 9


def test_captions_are_read_wherever_they_lie_in_a_sample(tmp_path):
    members = {
        "a/b.JSON": json.dumps({"text": "x"}),
        "a/b.jpg": jpeg(1),
        "a/c.jpg": jpeg(2),
        "a/c.json": '{"text": "y"}',
    }
    with tarfile.open(tmp_path / "train.tar", "w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            content = content.encode() if isinstance(content, str) else content
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    images = dataset(tmp_path, "json.text")
    assert [images.captions_of(i) for i in range(2)] == [["x"], ["y"]] and images.name(0) == "train.tar/a/b.jpg"
