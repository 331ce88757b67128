import numpy as np
import pytest
import torch
from PIL import Image

from vfm_vae.data.decoding import to_rgb
from vfm_vae.data.transforms import CentreCrop, RandomCrop, ResizeAndCrop, to_tensor


def ramp(width, height):
    """Red tells the column, green the row."""
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    return Image.fromarray(np.stack([x, y, np.zeros_like(x)], axis=-1).astype(np.uint8))


def rng(seed=0):
    return np.random.default_rng(seed)


@pytest.mark.parametrize("resampling", ["lanczos", "bicubic"])
def test_random_crop_is_a_function_of_the_generator(resampling):
    crop = RandomCrop(16, resampling=resampling)
    image = ramp(40, 30)
    first = crop(image, rng(1))
    assert first.shape == (3, 16, 16)
    assert first.dtype == torch.uint8
    assert torch.equal(first, crop(image, rng(1)))
    assert not torch.equal(first, crop(image, rng(2)))


def test_random_crop_takes_half_to_all_of_the_short_side_and_flips_half_the_time():
    crop, image = RandomCrop(16), ramp(200, 100)
    sides, flips = [], 0
    for seed in range(200):
        red, green, _ = crop(image, rng(seed)).float()
        step = (green[-1] - green[0]).mean() / 15  # pixels of the image per pixel of the result
        sides.append(16 * step.item())
        flips += bool(red[0, 0] > red[0, -1])
    assert 48 < min(sides) < 60
    assert 90 < max(sides) < 104
    assert 70 < flips < 130


def test_random_crop_at_full_scale_reaches_every_place():
    lefts = {RandomCrop(8, min_crop=1)(ramp(10, 8), rng(seed))[0].min().item() for seed in range(50)}
    assert lefts == {0, 1, 2}


def test_resizing_is_antialiased():
    stripes = np.zeros((64, 64, 3), dtype=np.uint8)
    stripes[:, ::2] = 255
    small = RandomCrop(8, min_crop=1)(Image.fromarray(stripes), rng())
    assert (small.float() - 127.5).abs().max() < 8
    small = CentreCrop(8)(Image.fromarray(stripes))
    assert (small.float() - 127.5).abs().max() < 8


def test_centre_crop_keeps_an_image_of_the_right_size():
    image = ramp(32, 32)
    assert torch.equal(CentreCrop(32)(image), to_tensor(image))


def test_centre_crop_halves_by_box_then_crops_the_middle():
    image = ramp(128, 64)
    halved = to_tensor(image.resize((64, 32), Image.Resampling.BOX))
    assert torch.equal(CentreCrop(32)(image), halved[:, :, 16:48])


@pytest.mark.parametrize("size", [(33, 47), (500, 375), (7, 90), (16, 16)])
def test_centre_crop_of_any_size(size):
    assert CentreCrop(16)(ramp(*size)).shape == (3, 16, 16)


@pytest.mark.parametrize("mode", ["L", "CMYK", "P", "RGBA", "LA", "1"])
def test_other_colour_modes_become_rgb(mode):
    grey = Image.fromarray(np.full((4, 4, 3), 255, dtype=np.uint8)).convert(mode)
    assert torch.equal(to_tensor(to_rgb(grey)), torch.full((3, 4, 4), 255, dtype=torch.uint8))


def test_sixteen_bit_images_are_scaled_not_clipped():
    image = Image.fromarray(np.array([[0, 32768], [65535, 255]], dtype=np.uint16))
    assert to_tensor(to_rgb(image))[0].tolist() == [[0, 128], [255, 0]]


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="min_crop"):
        RandomCrop(16, min_crop=0)
    with pytest.raises(ValueError, match="resampling: lanczos or bicubic, given 'nearest'"):
        RandomCrop(16, resampling="nearest")


@pytest.mark.parametrize("size", [(40, 30), (21, 50), (16, 16)])
def test_the_published_crop_is_torchvisions(size):
    from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize

    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    theirs = Compose([Resize(16, InterpolationMode.BILINEAR), CenterCrop(16)])(Image.fromarray(pixels))
    assert torch.equal(ResizeAndCrop(16)(Image.fromarray(pixels)), to_tensor(theirs))


@pytest.mark.parametrize("resampling", ["lanczos", "bicubic"])
def test_torch_and_pillow_resize_alike(resampling):
    """Which of the two does it depends on what torch has."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8))
    for size in (32, 64, 128):
        crop = RandomCrop(size, resampling=resampling)
        crops = []
        for crop._by_torch in (True, False):
            crops.append(crop(noise, np.random.default_rng(1)).int())
        assert (crops[0] - crops[1]).abs().max() <= 2
