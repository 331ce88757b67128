"""A folder of photographs without splits and, perhaps, without classes."""

import logging
import shutil

import numpy as np
import pytest
from PIL import Image

from vfm_vae.data.datamodule import ImageNetDataModule
from vfm_vae.data.unsplit import held_out


def data_of(root, **kwargs):
    data = ImageNetDataModule(root, image_size=8, batch_size=4, num_workers=0, **kwargs)
    data.prepare_data()
    data.setup("fit")
    return data


def names(images):
    return [images.name(index) for index in range(len(images))]


@pytest.fixture
def flat(tree):
    """All images of `train`, side by side."""
    folder = tree.parent / "flat"
    folder.mkdir()
    for file in (tree / "train").rglob("*.JPEG"):
        shutil.copy(file, folder / f"{file.parent.name}_{file.name}")
    return folder


def test_a_flat_folder_is_one_class_of_which_a_share_is_held_out(flat, caplog):
    with caplog.at_level(logging.INFO):
        data = data_of(flat, val_fraction=0.25)
    train, val = names(data.train_set), names(data.val_set)
    assert sorted(train + val) == sorted(file.name for file in flat.iterdir())
    assert train and val and data.classes == ["images"] and data.num_classes == 1
    assert f"{len(val)} of its 12 images, by their names, are held out" in caplog.text
    assert next(iter(data.train_dataloader())).images.shape == (4, 3, 8, 8)
    assert next(iter(data.val_dataloader())).index.tolist() == list(range(min(4, len(val))))


def test_folders_are_classes(tree):
    data = data_of(tree / "train", val_fraction=0.3)
    assert data.classes == ["apple", "pear"]
    for images in (data.train_set, data.val_set):
        assert [data.classes[label] for label in images.labels] == [name.split("/")[0] for name in names(images)]


def test_no_folders_are_classes_where_an_image_lies_beside_them(tree):
    shutil.copy(tree / "train/apple/000.JPEG", tree / "train/zoo.JPEG")
    data = data_of(tree / "train")
    assert data.classes == ["images"] and len(data.train_set) + len(data.val_set) == 13


def test_an_image_stays_where_it_is_when_others_come_and_the_folder_moves(flat):
    before = set(names(data_of(flat, val_fraction=0.5).val_set))
    moved = flat.rename(flat.parent / "moved")
    for number in range(30):
        shutil.copy(moved / "apple_000.JPEG", moved / f"new_{number}.JPEG")
    after = set(names(data_of(moved, val_fraction=0.5).val_set))
    assert {name for name in after if not name.startswith("new")} == before


def test_the_share_is_about_what_was_asked_for_and_neither_side_is_empty():
    many = [f"IMG_{number:04d}.jpg" for number in range(5000)]
    assert abs(held_out(many, 0.1).mean() - 0.1) < 0.02
    assert not (held_out(many, 0.1) & ~held_out(many, 0.2)).any()
    for fraction in (1e-9, 1.0):
        assert held_out(many[:2], fraction).sum() == 1


def test_splits_of_ones_own_are_taken_as_they_are(tree):
    data = data_of(tree, val_fraction=0.9)
    assert (len(data.train_set), len(data.val_set)) == (12, 6)


def test_small_images_are_left_out_of_training_alone(flat):
    plain = data_of(flat)
    Image.new("RGB", (40, 15)).save(flat / plain.train_set.name(0))
    data = data_of(flat, min_size=16, cache_dir=str(flat.parent / "cache"))
    assert names(data.train_set) == names(plain.train_set)[1:] and names(data.val_set) == names(plain.val_set)


def test_prediction_goes_through_both_parts(flat):
    data = ImageNetDataModule(flat, image_size=8, batch_size=4, num_workers=0, predict=["train", "val"])
    data.setup("predict")
    assert sum(len(images) for images in data.predict_sets.values()) == 12
    indices = [index for loader in data.predict_dataloader() for batch in loader for index in batch.index.tolist()]
    assert len(indices) == 12 and np.all(np.array(indices) >= 0)


def test_what_is_missing_is_named(tree, tmp_path):
    lone = tmp_path / "lone"
    lone.mkdir()
    (lone / "phone.HEIC").touch()
    with (
        pytest.warns(UserWarning, match=r"left out in '.*lone': 1 .heic; images end with .jpeg"),
        pytest.raises(
            ValueError, match=r"root: '.*lone' holds neither folders 'train' and 'val' nor images, which end"
        ),
    ):
        data_of(lone)
    shutil.copy(tree / "train/apple/000.JPEG", lone)
    with pytest.raises(
        ValueError, match=r"root: '.*lone' has a single image, but training and validation take one each"
    ):
        data_of(lone)
    shutil.rmtree(tree / "val")
    with pytest.raises(ValueError, match=r"root: '.*' has no folder 'val'"):
        data_of(tree)
