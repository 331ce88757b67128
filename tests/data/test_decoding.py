"""Photographs as cameras, scanners and programs save them."""

import io
import tarfile
import zlib

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from vfm_vae.data.datamodule import ImageNetDataModule
from vfm_vae.data.decoding import decode
from vfm_vae.files import read_image

CORNERS = np.array([[10, 60], [110, 160]], dtype=np.uint8)  # of an upright picture, wider than high

# What a camera makes of an upright picture, by the orientation that it notes (EXIF 2.3, tag 0x0112).
AS_SAVED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def picture():
    return Image.fromarray(CORNERS.repeat(8, 0).repeat(16, 1)).convert("RGB")


def turned(orientation):
    """As a camera saves it that was held otherwise: `orientation` says how to undo that."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return picture().transpose(AS_SAVED[orientation]), exif


def corners(image):
    """The grey values of an image's corners."""
    pixels = np.asarray(image)[..., 0].astype(int)
    return [pixels[y, x] for y in (1, -2) for x in (1, -2)]


def saved(image, kind="PNG", **kwargs):
    file = io.BytesIO()
    image.save(file, kind, **kwargs)
    file.seek(0)
    return file


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(2, 9))
def test_photographs_stand_upright(orientation, kind):
    image, exif = turned(orientation)
    file = saved(image, kind, exif=exif)
    upright = decode(file)
    assert upright.size == (32, 16)
    assert np.abs(np.array(corners(upright)) - CORNERS.flatten()).max() <= 4
    assert decode(file, exif_transpose=False).size == image.size


@pytest.mark.parametrize("orientation", [0, 1, 9])
def test_an_orientation_that_means_nothing_leaves_them(orientation):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    assert np.array_equal(decode(saved(picture(), exif=exif)), picture())


def test_a_damaged_exif_block_is_no_damage_to_the_picture():
    _, exif = turned(6)
    content = saved(picture(), "JPEG", exif=exif).getvalue()
    start = content.index(b"Exif\0\0") + 6
    for position in range(start, start + 20):
        broken = bytearray(content)
        broken[position] ^= 0xFF
        assert decode(io.BytesIO(broken)).size in ((32, 16), (16, 32))


@pytest.mark.parametrize("source", ["folder", "shards"])
@pytest.mark.parametrize("exif_transpose", [True, False])
def test_a_data_set_turns_its_images_unless_told_not_to(tmp_path, source, exif_transpose):
    image, exif = turned(6)
    content = saved(image, "JPEG", exif=exif, quality=95).getvalue()
    for split in ("train", "val"):
        if source == "folder":
            (tmp_path / split / "a").mkdir(parents=True)
            (tmp_path / split / "a/0.jpg").write_bytes(content)
        else:
            write_shard(tmp_path / f"photos-{split}-0.tar", {"0.jpg": content, "0.cls": b"0"})
    data = ImageNetDataModule(
        str(tmp_path), source=source, image_size=16, batch_size=1, exif_transpose=exif_transpose, crop="centre"
    )
    data.prepare_data()
    data.setup("fit")
    pixels, _, _ = data.val_set[0]
    top, bottom = pixels[0, 2].float().mean(), pixels[0, -3].float().mean()
    left, right = pixels[0, :, 2].float().mean(), pixels[0, :, -3].float().mean()
    assert (abs(bottom - top) > abs(right - left)) == exif_transpose  # rows differ more than columns
    assert data.train_set.exif_transpose == exif_transpose


def write_shard(path, members):
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def half_transparent(mode):
    """Left clear, whatever colour lies there; right opaque."""
    image = Image.new("RGBA", (8, 4), (40, 40, 40, 0))
    image.paste((40, 40, 40, 255), (4, 0, 8, 4))
    return image.convert(mode)


def with_palette():
    image = Image.new("P", (8, 4), 0)
    image.putpalette([40, 40, 40, 41, 41, 41])
    image.paste(1, (4, 0, 8, 4))
    return image


TRANSPARENT = {
    "RGBA": (half_transparent("RGBA"), "PNG", {}),
    "LA": (half_transparent("LA"), "PNG", {}),
    "P": (with_palette(), "PNG", {"transparency": 0}),
    "GIF": (with_palette(), "GIF", {"transparency": 0}),
    "RGB": (half_transparent("RGBA").convert("RGB"), "PNG", {"transparency": (41, 40, 40)}),
    "WEBP": (half_transparent("RGBA"), "WEBP", {"lossless": True}),
}


@pytest.mark.parametrize("name", TRANSPARENT)
def test_what_is_transparent_lies_on_white(name):
    image, kind, options = TRANSPARENT[name]
    if name == "RGB":
        image.paste((41, 40, 40), (0, 0, 4, 4))
    pixels = np.asarray(decode(saved(image, kind, **options))).astype(int)
    assert (pixels[:, :4] == 255).all() and (np.abs(pixels[:, 4:] - 40) <= 1).all()


def test_what_is_half_transparent_is_mixed_with_white():
    assert decode(saved(Image.new("RGBA", (4, 4), (55, 155, 255, 128)))).getpixel((0, 0)) == (155, 205, 255)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "TIFF", "PNG"])
def test_of_several_frames_the_first_is_taken(kind):
    frames = [Image.new("RGB", (8, 8), (value,) * 3) for value in (40, 200)]
    options = {} if kind == "TIFF" else {"duration": 100}
    file = saved(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    with Image.open(file) as image:
        assert image.n_frames == 2
    assert abs(decode(file).getpixel((4, 4))[0] - 40) <= 2


@pytest.mark.parametrize("pixels", [np.full((4, 4), 0.5, np.float32), np.full((4, 4), 70000, np.int32)])
def test_pixels_of_unknown_range_are_refused(pixels):
    with pytest.raises(ValueError, match="pixels of 32 bits, whose range is not known; save the image with 8 or 16"):
        decode(saved(Image.fromarray(pixels), "TIFF"))


def damaged(path, how):
    content = saved(Image.effect_noise((64, 64), 50), "PNG" if path.suffix == ".png" else "JPEG").getvalue()
    path.write_bytes({"cut": content[: len(content) // 2], "header": content[:30], "empty": b"", "text": b"text"}[how])
    return path


@pytest.mark.parametrize("name", ["a.png", "a.jpg"])
@pytest.mark.parametrize("how", ["cut", "header", "empty", "text"])
def test_a_damaged_file_is_one_line_with_its_path(tmp_path, name, how):
    path = damaged(tmp_path / name, how)
    with pytest.raises(ValueError, match=rf"^path: there is no image that can be read at '{path}' \(.*\)$") as error:
        read_image(path, 16)
    assert "\n" not in str(error.value)


@pytest.mark.filterwarnings("error")
def test_too_many_pixels_are_one_line_with_the_path(tmp_path):
    path = tmp_path / "huge.png"
    header = bytearray(saved(Image.new("1", (8, 8))).getvalue())
    header[16:24] = (14_000).to_bytes(4, "big") * 2  # 196 MP, though the file has 8 x 8
    header[29:33] = zlib.crc32(header[12:29]).to_bytes(4, "big")
    path.write_bytes(header)
    with pytest.raises(ValueError, match=rf"^path: .* at '{path}' \(Image size \(196000000 pixels\) exceeds limit"):
        read_image(path, 16)


def test_read_image_turns_and_lays_on_white(tmp_path):
    image, exif = turned(6)
    image.save(tmp_path / "photo.jpg", exif=exif, quality=95)
    Image.new("RGBA", (16, 16)).save(tmp_path / "clear.png")
    pixels = read_image(tmp_path / "photo.jpg", 16)
    assert pixels[0, 0, -2].mean() > pixels[0, 0, 1].mean() + 0.4
    assert torch.equal(read_image(tmp_path / "clear.png", 16), torch.ones(1, 3, 16, 16))


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_images_as_imagenet_has_them_are_read_as_ever(mode):
    file = saved(Image.effect_noise((40, 30), 60).convert(mode), "JPEG")
    with Image.open(file) as image:
        expected = np.asarray(image.convert("RGB"))
    for exif_transpose in (True, False):
        assert np.array_equal(decode(file, exif_transpose), expected)
