"""Captions of images in folders: which images there are, what is said of them, and what is said of mistakes."""

import json
import warnings
from collections import Counter

import numpy as np
import pytest
import torch
import yaml
from building import CONFIGS
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image
from test_datamodule import Kill, Killed, Model, Ranks, datamodule

from vfm_vae.cli import short_errors
from vfm_vae.data.captions import METADATA
from vfm_vae.data.folder import ImageFolderDataset
from vfm_vae.data.identity import files_state
from vfm_vae.data.sampling import Draw
from vfm_vae.data.transforms import CentreCrop

SEVERAL = 3  # captions of each image


def texts_of(name):
    return [f"{name}, told {number}" for number in range(SEVERAL)]


def caption(root, split, entries, ending="\n"):
    lines = [json.dumps({"file_name": name, "text": text, "width": 20}) for name, text in entries]
    (root / split / METADATA).write_text("".join(line + ending for line in lines), newline="")


@pytest.fixture
def captioned(tree):
    """Each image has several captions, and the lines have an order of their own."""
    for split in ("train", "val"):
        names = sorted((str(file.relative_to(tree / split)) for file in (tree / split).rglob("*.JPEG")), reverse=True)
        caption(tree, split, [(name, texts_of(name)) for name in names])
    return tree


def dataset(root, split="train", captions="text", **kwargs):
    return ImageFolderDataset(root, split, CentreCrop(8), captions=captions, **kwargs)


def epochs(data, num_epochs=2):
    """All batches of training in so many epochs."""
    data.setup("fit")
    loader = data.train_dataloader()
    for epoch in range(num_epochs):
        loader.sampler.set_epoch(epoch)
        yield from loader


@pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_images_and_their_order_are_those_without_captions(captioned, num_workers):
    plain, told = (datamodule(captioned, captions=name, num_workers=num_workers) for name in (None, "text"))
    for one, other in zip(epochs(plain), epochs(told), strict=True):
        assert all(torch.equal(*pair) for pair in zip(one[:3], other[:3], strict=True)) and one.text is None
        names = [told.train_set.name(index) for index in other.index]
        assert all(text in texts_of(name) for text, name in zip(other.text.captions, names, strict=True))
    assert told.classes == plain.classes == ["apple", "pear"] and told.num_classes == plain.num_classes == 2
    assert [told.train_set.has_captions, plain.train_set.has_captions] == [True, False]
    assert plain.train_set.captions_of(0) == [""]


def test_training_draws_one_caption_in_each_epoch_and_evaluation_takes_the_first(captioned):
    train, other, evaluated = dataset(captioned), dataset(captioned, seed=1), dataset(captioned, replace_damaged=False)
    drawn = [train[Draw(1, epoch)][3].text for epoch in range(60)]
    assert drawn == [dataset(captioned)[Draw(1, epoch)][3].text for epoch in range(60)]
    counts = Counter(drawn)
    assert counts.keys() == set(train.captions_of(1)) == set(texts_of("apple/001.JPEG")) and min(counts.values()) > 10
    for draws in ([other[Draw(1, epoch)] for epoch in range(60)], [train[Draw(2, epoch)] for epoch in range(60)]):
        assert [sample[3].text[-1] for sample in draws] != [text[-1] for text in drawn]  # apart by seed and image
    assert {evaluated[Draw(1, epoch)][3].text for epoch in range(9)} == {"apple/001.JPEG, told 0"}


def test_a_million_captions_are_a_few_arrays(captioned):
    """A list of strings would be copied into every worker, page by page."""
    assert all(isinstance(values, np.ndarray) for values in vars(dataset(captioned).captions).values())


class Reader(Model):
    """Remembers what it was told."""

    def training_step(self, batch, batch_idx):
        self.seen.extend(zip(batch.index.tolist(), batch.text.captions, strict=True))
        return self.weight.sum()


def test_a_resumed_run_draws_the_same_captions(captioned, tmp_path):
    def run(*callbacks, **kwargs):
        model = Reader()
        trainer = Trainer(
            default_root_dir=tmp_path, max_epochs=4, accelerator="cpu", logger=False, enable_progress_bar=False,
            enable_model_summary=False, limit_val_batches=0, callbacks=list(callbacks),
            enable_checkpointing=bool(callbacks),
        )  # fmt: skip
        return model, lambda: trainer.fit(model, datamodule=datamodule(captioned, captions="text"), **kwargs)

    whole, fit = run()
    fit()
    stopped, fit = run(ModelCheckpoint(tmp_path, save_last=True, save_top_k=0, every_n_train_steps=5), Kill(5))
    with pytest.raises(Killed):
        fit()
    rest, fit = run(ckpt_path=tmp_path / "last.ckpt")
    fit()
    assert stopped.seen + rest.seen == whole.seen and len(whole.seen) == 4 * 12


@pytest.mark.parametrize("loader", ["train_dataloader", "val_dataloader"])
def test_two_ranks_see_what_one_sees(captioned, loader):
    def told(rank, ranks):
        data = datamodule(captioned, captions="text", val_batch_size=4)
        data.trainer = Ranks(rank, ranks)
        data.setup("fit")
        batches = list(getattr(data, loader)())
        return [list(zip(batch.index.tolist(), batch.text.captions, strict=True)) for batch in batches]

    both = [one + other for one, other in zip(told(0, 2), told(1, 2), strict=True)]
    assert both == told(0, 1)


def test_lines_of_one_image_add_up_and_images_lie_anywhere(tree, make_tree_in):
    (tree / "train/apple/far/away").mkdir(parents=True)
    (tree / "train/apple/000.JPEG").rename(tree / "train/apple/far/away/a.JPEG")
    entries = [("apple/far/away/a.JPEG", "one"), ("pear/001.JPEG", ["x", "y"]), ("./apple//far/away/a.JPEG", ["two"])]
    caption(tree, "train", entries, ending="\r\n")
    file = tree / "train" / METADATA
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes() + b"\r\n\n")  # a byte order mark, and empty lines
    with pytest.warns(UserWarning, match=rf"left out in '.*train': 10 images that no line of {METADATA} names"):
        images = dataset(tree)
    assert [images.captions_of(index) for index in range(len(images))] == [["one", "two"], ["x", "y"]]
    assert images.name(0) == "apple/far/away/a.JPEG" and images.labels.tolist() == [0, 1]


def test_images_in_no_folder_are_of_one_class(tree):
    (tree / "train/apple/000.JPEG").rename(tree / "train/ä.JPEG")
    caption(tree, "train", [("ä.JPEG", "größer"), ("pear/001.JPEG", "y")])
    caption(tree, "val", [("pear/001.JPEG", "z")])
    data = datamodule(tree, captions="text", batch_size=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data.setup("fit")
    assert (data.classes, data.num_classes, data.train_set.labels.tolist()) == (["images"], 1, [0, 0])
    assert {text for batch in epochs(data) for text in batch.text.captions} == {"größer", "y"}
    assert next(iter(data.val_dataloader())).text.captions == ("z",)


def test_classes_with_other_numbers_in_validation_are_told_of(captioned, recwarn):
    datamodule(captioned, captions="text").setup("fit")
    assert not recwarn.list
    caption(captioned, "val", [("pear/000.JPEG", "x")])
    with pytest.warns(UserWarning, match=r"captions: images in 'pear' have the label 1 in training and 0 in val"):
        datamodule(captioned, captions="text").setup("fit")


def test_images_that_nothing_is_said_of_have_the_empty_caption_which_is_said_once(tree):
    said = [("apple/000.JPEG", "x"), ("apple/001.JPEG", ""), ("pear/000.JPEG", [" \n", None]), ("pear/001.JPEG", None)]
    caption(tree, "train", [*said, ("pear/002.JPEG", ["", " y "])])
    with pytest.warns(UserWarning) as said:
        images = dataset(tree)
    (told,) = [str(warning.message) for warning in said if "have none, or an empty one" in str(warning.message)]
    assert "captions: 3 of the 5 images in" in told and told.endswith("the first is 'apple/001.JPEG'")
    assert [images[index][3].text for index in range(5)] == ["x", "", "", "", "y"]
    assert images.captions_of(1) == [""]


def test_halves_of_characters_do_not_stop_a_run(tree):
    caption(tree, "train", [("apple/000.JPEG", "a \ud83d smile"), ("apple/\ud83d.JPEG", "x")])
    images = dataset(tree)
    assert images.captions_of(0) == ["a ? smile"] and images.name(1) == "apple/?.JPEG"  # which is not there


def test_small_images_take_their_captions_along(captioned):
    Image.new("RGB", (4, 4)).save(captioned / "train/apple/001.JPEG")
    data = datamodule(captioned, captions="text", min_size=8)
    data.prepare_data()
    data.setup("fit")
    images = data.train_set
    assert len(images) == 11
    assert all(images.captions_of(index) == texts_of(images.name(index)) for index in range(11))


def test_what_stands_in_for_a_damaged_image_brings_its_own_caption(captioned):
    (captioned / "train/apple/003.JPEG").write_bytes(b"no image")
    images = dataset(captioned, max_bad_fraction=0.5)
    assert all(images[Draw(3, epoch)][3].text in texts_of("apple/004.JPEG") for epoch in range(9))


def test_listed_images_that_do_not_exist_count_as_damaged(captioned):
    (captioned / "train/apple/003.JPEG").unlink()
    images = dataset(captioned, max_bad_fraction=0.1)
    assert len(images) == 12 and images[3][2] == 4 and images.num_damaged == 1
    assert files_state(images) != files_state(dataset(captioned, "val"))
    (captioned / "train/apple/004.JPEG").unlink()
    with pytest.raises(
        ValueError, match=r"max_bad_fraction: 2 of the 12 .* the last 'apple/004.JPEG' \(.*No such file"
    ):
        images[4]


def test_names_that_no_file_can_have_are_those_of_images_that_do_not_exist(captioned):
    caption(captioned, "train", [("apple/000.JPEG", "x"), ("apple/000.JPEG/000.JPEG", "y"), ("apple/\0.JPEG", "z")])
    images = dataset(captioned, max_bad_fraction=0.7)
    assert files_state(images).newest > 0  # the one file's
    assert [image[3].text for image in images] == ["x", "x", "x"]


GOOD = b'{"file_name": "apple/000.JPEG", "text": "x"}\n'
BAD = {  # second lines, or whole files, and what is said of them
    "no JSON": (GOOD + b"{'file_name'}\n", "line 2 is no JSON (Expecting property name enclosed in double quotes"),
    "cut off": (GOOD + GOOD[:30], "metadata.jsonl', line 2 is no JSON (Expecting ',' delimiter at column 31)"),
    "too deep": (GOOD + b"[" * 100_000, "metadata.jsonl', line 2 can't be read as JSON"),
    "no object": (GOOD + b"[1]\n", "metadata.jsonl', line 2 is not an object such as"),
    "no name": (GOOD + b'\n{"text": "y"}\n', "metadata.jsonl', line 3 has no file_name, the path of an image"),
    "a number for a name": (GOOD + b'{"file_name": 3}\n', "metadata.jsonl', line 2 has no file_name"),
    "above": (b'{"file_name": "apple/../../val/pear/000.JPEG"}', "line 1 has a file_name that is not below the folder"),
    "absolute": (b'{"file_name": "/etc/a.jpg", "text": "x"}', "the folder, '/etc/a.jpg'; give its path from there"),
    "a number": (GOOD.replace(b'"x"', b"[1]"), "line 1: 'text' is neither a text nor a list of texts, but [1]"),
    "other fields": (GOOD.replace(b"text", b"words"), "in a field 'text'; the first line has file_name, words; exp"),
    "nothing": (b"\n", """in a field 'text'; expected is a line such as {"file_name": "some/image.jpg", "text": "it"""),
    "empty captions": (GOOD.replace(b'"x"', b'""'), "has no caption in a field 'text'; the first line has file_name"),
    "Latin-1": (GOOD + GOOD.replace(b"x", b"\xe4"), "2 is not UTF-8; convert the file, for instance with `iconv -f L"),
    "UTF-16": (GOOD.decode().encode("utf-16"), "1 is not UTF-8; convert the file, for instance with `iconv -f UTF-16"),
    "UTF-16 unmarked": (GOOD.decode().encode("utf-16-le"), "line 1 is not UTF-8; convert the file, for instance"),
    "missing": (None, "metadata.jsonl'; expected is a line such as"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_mistakes_end_a_run_with_one_line(captioned, capsys, case):
    content, message = BAD[case]
    (captioned / "train" / METADATA).unlink()
    if content is not None:
        (captioned / "train" / METADATA).write_bytes(content)
    with pytest.raises(SystemExit, match="2"), short_errors():
        datamodule(captioned, captions="text").setup("fit")
    told = capsys.readouterr().err.splitlines()
    assert told[0].startswith("error: captions: ") and message in told[0] and len(told) == 2  # and how to learn more


@pytest.mark.parametrize(
    ("source", "captions", "message"),
    [
        ("latents", "text", "captions: cached latents bring the captions"),
        ("shards", "text", r"captions: in shards, one of 'txt' and 'json.FIELD', given 'text'"),
        ("shards", "json.", "captions: in shards, one of 'txt'"),
        ("folder", "", "captions: the name of a field of metadata.jsonl"),
    ],
)
def test_other_places_of_captions_are_refused(tmp_path, source, captions, message):
    with pytest.raises(ValueError, match=message):
        datamodule(tmp_path, source=source, captions=captions)


def test_images_with_captions_are_not_mirrored_in_a_centre_crop(tmp_path):
    def mirrors(captions):
        return datamodule(tmp_path, crop="centre", captions=captions).train_transform.flip

    assert mirrors(None) and not mirrors("text")


@pytest.mark.parametrize("config", ["captions", "captions_wds"])
def test_configs_crop_as_evaluation_does(config):
    given = yaml.safe_load((CONFIGS / f"data/{config}.yaml").read_text())["data"]
    assert datamodule(**given).train_transform.image_size == 256 and given["crop"] == "centre"
