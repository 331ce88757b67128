import logging
import shutil
import traceback

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from vfm_vae.data.folder import ImageFolderDataset
from vfm_vae.data.sampling import Draw
from vfm_vae.data.transforms import CentreCrop, RandomCrop


def dataset(root, split="train", transform=None, **kwargs):
    return ImageFolderDataset(root, split, transform or CentreCrop(8), **kwargs)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-200])


def test_lists_classes_and_images_in_order(tree):
    (tree / "train" / "pear" / "notes.txt").write_text("no image")
    shutil.copy(tree / "train" / "pear" / "000.JPEG", tree / "train" / "pear" / "zz.PnG")
    images = dataset(tree)
    assert images.classes == ["apple", "pear"]
    assert len(images) == 13
    assert images.labels.tolist() == [0] * 6 + [1] * 7
    assert images.name(0) == "apple/000.JPEG"
    assert images.name(12) == "pear/zz.PnG"
    image, label, index = images[6]
    assert (label, index) == (1, 6)
    assert torch.equal(image, CentreCrop(8)(Image.open(tree / "train" / "pear" / "000.JPEG")))


def test_augmentation_depends_on_seed_epoch_and_index_alone(tree):
    images = dataset(tree, transform=RandomCrop(8), seed=1)
    one = images[Draw(3, epoch=2)][0]
    images[Draw(4, epoch=2)]
    assert torch.equal(one, images[Draw(3, epoch=2)][0])
    assert torch.equal(one, dataset(tree, transform=RandomCrop(8), seed=1)[Draw(3, epoch=2)][0])
    assert not torch.equal(one, images[Draw(3, epoch=3)][0])
    assert not torch.equal(one, dataset(tree, transform=RandomCrop(8), seed=2)[Draw(3, epoch=2)][0])


@pytest.mark.parametrize("mode", ["L", "CMYK", "P", "I;16", "RGBA"])
def test_reads_every_colour_mode(tree, mode):
    ending = ".jpg" if mode in ("L", "CMYK") else ".png"
    path = tree / "train" / "apple" / f"000{ending}"
    if mode == "I;16":
        Image.fromarray(np.full((16, 16), 153 * 257, dtype=np.uint16)).save(path)
    else:
        Image.new("RGB", (16, 16), (153, 153, 153)).convert(mode).save(path)
    images = dataset(tree)
    index = next(i for i in range(len(images)) if images.name(i) == f"apple/000{ending}")
    assert (images[index][0].int() - 153).abs().max() <= 2
    assert images.num_damaged == 0


def test_images_by_name_are_left_out(tree):
    images = dataset(tree, exclude=["apple/001.JPEG", "pear/005.JPEG"])
    assert len(images) == 10
    assert "apple/001.JPEG" not in [images.name(i) for i in range(10)]


def test_small_images_are_found_by_their_header(tree):
    Image.new("RGB", (300, 12)).save(tree / "train" / "apple" / "003.JPEG")
    (tree / "train" / "pear" / "004.JPEG").write_bytes(b"no image at all")
    assert dataset(tree).small(16) == ["apple/003.JPEG"]
    assert len(dataset(tree).small(17)) == 11


def test_damaged_images_are_replaced_counted_and_named_once(tree, caplog):
    truncate(tree / "train" / "apple" / "001.JPEG")
    (tree / "train" / "apple" / "002.JPEG").write_bytes(b"no image at all")
    images = dataset(tree, max_bad_fraction=0.5)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            image, _, index = images[1]
            assert index == 3
            assert torch.equal(image, images[3][0])
    assert images.num_damaged == 2
    assert len(caplog.messages) == 2
    assert "apple/001.JPEG" in caplog.messages[0]
    assert "truncated" in caplog.messages[0]


def test_damage_at_the_end_wraps_around(tree):
    truncate(tree / "train" / "pear" / "005.JPEG")
    assert dataset(tree, max_bad_fraction=0.5)[11][2] == 0


def test_all_images_damaged_end_it_whatever_is_allowed(tree):
    for file in (tree / "train").rglob("*.JPEG"):
        file.write_bytes(b"no image at all")
    with pytest.raises(ValueError, match=r"12 of the 12 images in .* are damaged, all, the last 'apple/000.JPEG'"):
        dataset(tree, max_bad_fraction=1.0)[1]


def test_damaged_images_are_padding_in_evaluation(tree):
    truncate(tree / "val" / "apple" / "001.JPEG")
    images = dataset(tree, "val", replace_damaged=False, max_bad_fraction=0.5)
    assert [images[i][2] for i in range(6)] == [0, -1, 2, 3, 4, 5]
    assert images[Draw(3, padding=True)][2] == -1


def test_workers_count_damage_together(tree):
    for number in (1, 3, 5):
        truncate(tree / "train" / "pear" / f"00{number}.JPEG")
    images = dataset(tree, max_bad_fraction=0.5)
    list(DataLoader(images, batch_size=2, num_workers=2))
    assert images.num_damaged == 3


@pytest.mark.parametrize("num_workers", [0, 2])
def test_too_much_damage_stops_with_its_place(tree, num_workers):
    truncate(tree / "train" / "apple" / "001.JPEG")
    images = dataset(tree)
    expected = (
        r"max_bad_fraction: 1 of the 12 images in '.*train' are damaged, more than 1.00%, the last 'apple/001.JPEG'"
    )
    with pytest.raises(ValueError, match=expected) as raised:
        list(DataLoader(images, num_workers=num_workers))
    traceback.clear_frames(raised.tb)  # ends the workers; the garbage collector would take ten seconds for it


def test_one_percent_of_damage_is_borne(make_tree):
    tree = make_tree(train=50, size=(8, 8))
    (tree / "train" / "apple" / "007.JPEG").write_bytes(b"no image")
    images = dataset(tree)
    assert len([images[i] for i in range(100)]) == 100
    (tree / "train" / "apple" / "009.JPEG").write_bytes(b"no image")
    with pytest.raises(ValueError, match="2 of the 100 images"):
        [images[i] for i in range(100)]


def test_missing_folders_are_named(tree, tmp_path):
    with pytest.raises(
        ValueError, match=r"root: there is no folder '.*nowhere'; expected are images as .*train/<class>"
    ):
        dataset(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="has no folder 'test'"):
        dataset(tree, "test")
    (tmp_path / "flat" / "val").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"has no class folders; .* sort the images into one per class"):
        dataset(tmp_path / "flat", "val")
    (tmp_path / "flat" / "val" / "apple").mkdir()
    with pytest.raises(ValueError, match=r"no images under .*; known endings are .jpeg"):
        dataset(tmp_path / "flat", "val")
