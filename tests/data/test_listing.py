"""Folders that are not quite ImageNet."""

import os
import warnings

import pytest
from PIL import Image

from vfm_vae.data.datamodule import ImageNetDataModule
from vfm_vae.data.folder import ImageFolderDataset
from vfm_vae.data.listing import EXTENSIONS, list_images
from vfm_vae.data.transforms import CentreCrop


def dataset(root, split="train", **kwargs):
    return ImageFolderDataset(root, split, CentreCrop(8), **kwargs)


def names(images):
    return [images.name(index) for index in range(len(images))]


def picture(path, value=153):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (16, 16), (value,) * 3).save(path, Image.registered_extensions()[path.suffix.lower()])
    return path


@pytest.fixture(autouse=True)
def every_warning():
    """Whatever was said before."""
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        yield


@pytest.mark.parametrize("ending", [*EXTENSIONS, ".TIF", ".JfIf"])
def test_the_usual_formats_are_read(tree, ending):
    for number in range(3):
        picture(tree / f"train/quince/{number}{ending}")
    images = dataset(tree)
    assert len(images) == 15 and images.classes == ["apple", "pear", "quince"]
    assert (images[12][0].int() - 153).abs().max() <= 2
    assert images.num_damaged == 0


def test_nested_images_belong_to_the_class_above(tree):
    picture(tree / "train/apple/000/one.png")
    picture(tree / "train/apple/images/more/two.JPEG")
    picture(tree / "train/apple/zz.png")
    images = dataset(tree)
    flat = [f"apple/{number:03d}.JPEG" for number in range(6)]
    nested = ["apple/images/more/two.JPEG", "apple/zz.png"]
    assert names(images)[:9] == sorted(["apple/000/one.png", *flat, *nested])
    assert images.labels.tolist() == [0] * 9 + [1] * 6
    assert len(dataset(tree, exclude=["apple/images/more/two.JPEG", "apple/000.JPEG"])) == 13


HIDDEN = ["apple/._000.JPEG", "apple/.DS_Store", "apple/.ipynb_checkpoints/000-checkpoint.jpg", "apple/@eaDir/000.jpg"]


@pytest.mark.parametrize("name", [*HIDDEN, ".ipynb_checkpoints/a/1.jpg", "__MACOSX/apple/._000.JPEG", "._0.JPEG"])
def test_what_a_system_puts_beside_files_is_left_alone(tree, name):
    before = names(dataset(tree))
    (tree / "train" / name).parent.mkdir(parents=True, exist_ok=True)
    (tree / "train" / name).write_bytes(b"no image")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        images = dataset(tree)
    assert names(images) == before and images.classes == ["apple", "pear"]


def test_what_is_left_out_is_counted(tree):
    for name in ("apple/a.txt", "pear/b.TXT", "pear/deep/c.heic", "pear/d", "apple/e.cr2", "apple/f.txt"):
        (tree / "train" / name).parent.mkdir(exist_ok=True)
        (tree / "train" / name).touch()
    picture(tree / "train/lost.png")
    with pytest.warns(UserWarning) as said:
        assert len(dataset(tree)) == 12
    assert len(said) == 1
    assert "train': 3 .txt, 1 .cr2, 1 " in str(said[0].message) and "and 2 more" in str(said[0].message)


def test_images_in_no_class_folder_are_counted(tree):
    for number in range(4):
        picture(tree / f"train/{number}.png")
    with pytest.warns(UserWarning, match="left out in '.*train': 4 images in no class folder; images end with .jpeg"):
        assert len(dataset(tree)) == 12


@pytest.mark.parametrize("content", [None, "notes.txt", ".hidden.png"])
def test_an_empty_class_is_refused_by_name(tree, content):
    for name in ("quince", "fig", "plum", "kiwi"):
        (tree / "train" / name).mkdir()
    if content:
        (tree / "train/quince" / content).touch()
    with pytest.raises(ValueError, match=r"class folders without images \(fig, kiwi, plum and 1 more\)"):
        dataset(tree)


def test_a_class_of_which_all_images_are_small_is_none_that_is_empty(tree):
    images = dataset(tree, exclude=[f"pear/{number:03d}.JPEG" for number in range(6)])
    assert images.classes == ["apple", "pear"] and len(images) == 6


def test_other_classes_in_val_are_named(tree):
    for split, name in [("train", "fig"), *(("val", name) for name in ("kiwi", "plum", "quince", "sloe", "yuzu"))]:
        picture(tree / split / name / "0.png")
    data = ImageNetDataModule(str(tree), image_size=8, batch_size=4)
    message = (
        r"other class folders in 'val' than in 'train' \(missing: fig; beyond: kiwi, plum, quince and 2 more\); make"
    )
    with pytest.raises(ValueError, match=message):
        data.setup("fit")


def test_links_are_followed_but_not_in_circles(tree, tmp_path):
    elsewhere = picture(tmp_path / "elsewhere/deep/1.png").parents[1]
    (tree / "train/quince").symlink_to(elsewhere)
    (elsewhere / "deep/again").symlink_to(elsewhere)
    (tree / "train/apple/itself").symlink_to(tree / "train/apple")
    images = dataset(tree)
    assert names(images)[6:] == [f"pear/{number:03d}.JPEG" for number in range(6)] + ["quince/deep/1.png"]


def test_a_folder_that_cannot_be_read_is_named(tree, monkeypatch):
    real = os.scandir

    def scandir(path):
        if str(path).endswith("pear"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(ValueError, match=r"root: can't read the folder '.*train/pear' \(Permission denied\)"):
        dataset(tree)


def test_a_list_of_small_images_that_names_none_is_said(tree):
    with pytest.warns(UserWarning, match="small_list: none of its 2 names is that of an image under '.*train'"):
        assert len(dataset(tree, exclude=["train/apple/000.JPEG", "000.JPEG"])) == 12


def test_a_folder_of_samples_is_listed_alike(tmp_path):
    for name in ("000001.png", "000000.png", "more/000002.jpg"):
        picture(tmp_path / name)
    (tmp_path / "._000000.png").touch()
    (tmp_path / "labels.npz").touch()
    with pytest.warns(UserWarning, match="1 .npz"):
        assert list_images(tmp_path) == ["000000.png", "000001.png", "more/000002.jpg"]
