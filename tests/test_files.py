"""Image files to tensors and back."""

import pytest
import torch
from PIL import Image

from vfm_vae.files import read_image, write_image


def test_what_is_written_is_read_again(tmp_path):
    pixels = torch.randint(256, (1, 3, 32, 32))
    write_image(tmp_path / "one.png", pixels / 127.5 - 1)
    assert torch.equal(((read_image(tmp_path / "one.png", 32) + 1) * 127.5).round().long(), pixels)


def test_several_images_stand_side_by_side(tmp_path):
    write_image(tmp_path / "row.png", torch.stack([torch.full((3, 8, 8), value) for value in (-1.0, 0.0, 2.0)]))
    with Image.open(tmp_path / "row.png") as image:
        assert image.size == (24, 8)
        assert [image.getpixel((x, 4))[0] for x in (4, 12, 20)] == [0, 128, 255]


def test_the_short_side_decides_the_crop(tmp_path):
    Image.new("L", (90, 40), 255).save(tmp_path / "wide.jpg")
    image = read_image(tmp_path / "wide.jpg", 16)
    assert image.shape == (1, 3, 16, 16)
    assert (image == 1).all()


def test_what_is_no_image_is_named(tmp_path):
    (tmp_path / "text.png").write_text("no image")
    for name in ("text.png", "nowhere.png", ""):
        with pytest.raises(ValueError, match=r"path: there is no image that can be read at '.*'"):
            read_image(tmp_path / name, 16)
