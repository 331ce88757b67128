import contextlib
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from vfm_vae.embedded import photos
from vfm_vae.embedded.photos import MANIFEST, PHOTOS, Box, crop, held_out_tiles, load_photo, sample_box, write_photos


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_photos(tmp_path_factory.mktemp("data") / "photos", train_per_class=20, val_per_class=10)


def boxes_of(root, split, name):
    boxes = json.loads((root / MANIFEST).read_text())["boxes"]
    return [Box(*box) for file, box in boxes.items() if file.startswith(f"{split}/{name}/")]


def test_thirteen_balanced_classes(root):
    for split, count in (("train", 20), ("val", 10)):
        with contextlib.ExitStack() as stack:
            tars = [stack.enter_context(tarfile.open(tar)) for tar in (root / "shards").glob(f"photos-{split}-*.tar")]
            members = {member.name: tar.extractfile(member).read() for tar in tars for member in tar}
        assert len(members) == 2 * 13 * count
        for label, name in enumerate(PHOTOS):
            (file, *_) = (root / split / name).glob("*.JPEG")
            assert members[f"{file.stem}.jpg"] == file.read_bytes() and int(members[f"{file.stem}.cls"]) == label
        assert sorted(folder.name for folder in (root / split).iterdir()) == sorted(PHOTOS)
        for folder in (root / split).iterdir():
            files = sorted(folder.glob("*.JPEG"))
            assert len(files) == count
            assert {(Image.open(file).size, Image.open(file).mode) for file in files} == {((64, 64), "RGB")}
    assert len(PHOTOS) == 13


@pytest.mark.parametrize("name", PHOTOS)
def test_splits_share_no_pixel_and_spread_alike(root, name):
    width, height = load_photo(name).size
    train, val = boxes_of(root, "train", name), boxes_of(root, "val", name)
    generator = np.random.default_rng(1)
    train += [sample_box(generator, width, height, "train") for _ in range(300)]
    seen, held_out = np.zeros((2, height, width), bool)
    for covered, boxes in ((seen, train), (held_out, val)):
        for left, top, right, bottom in boxes:
            assert 0 <= left < right <= width and 0 <= top < bottom <= height and right - left == bottom - top
            covered[top:bottom, left:right] = True
    assert not (seen & held_out).any()
    for half in (held_out, seen):
        quadrants = [part for rows in np.array_split(half, 2) for part in np.array_split(rows, 2, axis=1)]
        assert all(part.mean() > 0.05 for part in quadrants)
    sides = [box.right - box.left for box in train]
    assert min(sides) <= min(box.right - box.left for box in val)
    assert max(sides) >= max(box.right - box.left for box in val)


def test_held_out_tiles_are_a_fifth():
    tiles = held_out_tiles(500, 300)
    assert sum((t.right - t.left) * (t.bottom - t.top) for t in tiles) == 500 * 300 // 5
    assert not any(a.overlaps(b) for a in tiles for b in tiles if a is not b)


def test_crop_reads_its_box_alone():
    photo, box = load_photo("cat"), Box(100, 100, 180, 180)
    painted = Image.new("RGB", photo.size, "red")
    painted.paste(photo.crop(box), box[:2])
    assert crop(painted, box, 64).tobytes() == crop(photo, box, 64).tobytes()


def test_files_are_the_crops_of_their_boxes(root):
    box = boxes_of(root, "val", "coffee")[3]
    written = np.asarray(Image.open(root / "val/coffee/coffee_0003.JPEG"), float)
    assert np.abs(written - np.asarray(crop(load_photo("coffee"), box, 64), float)).mean() < 4


def test_same_seed_writes_the_same_files(root, tmp_path, monkeypatch):
    monkeypatch.setattr(photos, "PHOTOS", {name: PHOTOS[name] for name in list(PHOTOS)[:2]})
    again = write_photos(tmp_path / "again", train_per_class=5, val_per_class=5)
    other = write_photos(tmp_path / "other", train_per_class=5, val_per_class=5, seed=1)
    for file in again.glob("*/*/*.JPEG"):
        file = file.relative_to(again)
        assert (again / file).read_bytes() == (root / file).read_bytes()
        assert (again / file).read_bytes() != (other / file).read_bytes()


def test_interrupted_write_is_done_again(tmp_path, monkeypatch):
    crops = 0

    def fail_later(*arguments):
        nonlocal crops
        crops += 1
        if crops > 3:
            raise KeyboardInterrupt
        return crop(*arguments)

    monkeypatch.setattr(photos, "PHOTOS", {"cat": PHOTOS["cat"]})
    monkeypatch.setattr(photos, "crop", fail_later)
    with pytest.raises(KeyboardInterrupt):
        write_photos(tmp_path / "photos", train_per_class=5, val_per_class=5)
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(photos, "crop", crop)
    root = write_photos(tmp_path / "photos", train_per_class=5, val_per_class=5)
    assert len(list(root.glob("*/*/*.JPEG"))) == 10


def test_written_once(root, monkeypatch):
    monkeypatch.setattr(photos, "load_photo", lambda name: pytest.fail("photographs are read again"))
    assert write_photos(root, train_per_class=20, val_per_class=10) == root


def test_refuses_what_it_did_not_write(root, tmp_path):
    with pytest.raises(ValueError, match="holds photos made with"):
        write_photos(root, train_per_class=21, val_per_class=10)
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="taken by something else"):
        write_photos(tmp_path)
    with pytest.raises(ValueError, match="choose one of astronaut"):
        load_photo("dog")


def test_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(photos, "PHOTOS", {"cat": PHOTOS["cat"]})
    root = tmp_path / "nested" / "photos"
    monkeypatch.setattr("sys.argv", ["photos", "--root", str(root), "--train-per-class", "2", "--val-per-class", "1"])
    photos.main()
    assert capsys.readouterr().out.strip() == str(root)
    assert len(list(root.glob("*/cat/*.JPEG"))) == 3
