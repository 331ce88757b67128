import pytest
import torch

from vfm_vae.discriminators.augment import DifferentiableAugmentation

OFF = {"brightness": 0.0, "saturation": 0.0, "contrast": 0.0, "translation": 0.0, "cutout": 0.0}


def only(**strengths):
    return DifferentiableAugmentation(**(OFF | strengths))


def test_zero_strength_is_the_identity():
    images = torch.rand(3, 3, 16, 16)
    assert torch.equal(only()(images), images)


def test_brightness_shifts_each_sample_by_its_own_amount():
    torch.manual_seed(0)
    shifts = only(brightness=0.5)(torch.zeros(500, 3, 2, 2))
    assert torch.equal(shifts, shifts[:, :1, :1, :1].expand_as(shifts))
    shifts = shifts[:, 0, 0, 0]
    assert shifts.abs().max() <= 0.5
    assert shifts.min() < -0.48
    assert shifts.max() > 0.48


def test_saturation_scales_about_the_mean_over_channels():
    torch.manual_seed(0)
    images = torch.rand(500, 3, 4, 4)
    result = only(saturation=1.0)(images)
    mean = images.mean(1, keepdim=True)
    assert torch.allclose(result.mean(1, keepdim=True), mean, atol=1e-6)
    factors = ((result - mean) * (images - mean)).sum((1, 2, 3)) / (images - mean).square().sum((1, 2, 3))
    assert torch.allclose(result, mean + factors.view(-1, 1, 1, 1) * (images - mean), atol=1e-5)
    assert 0 <= factors.min() < 0.05
    assert 1.95 < factors.max() <= 2


def test_contrast_scales_about_the_mean_over_the_sample():
    torch.manual_seed(0)
    images = torch.rand(500, 3, 4, 4)
    result = only(contrast=0.5)(images)
    assert torch.allclose(result.mean((1, 2, 3)), images.mean((1, 2, 3)), atol=1e-6)
    factors = result.std((1, 2, 3)) / images.std((1, 2, 3))
    assert 0.499 < factors.min() < 0.52
    assert 1.48 < factors.max() < 1.501


def test_translation_moves_whole_pixels_and_fills_with_zeros():
    torch.manual_seed(0)
    images = torch.zeros(500, 2, 16, 24)
    images[:, :, 8, 12] = torch.tensor([0.7, -0.3])  # farther from every border than any shift
    result = only(translation=0.125)(images)
    assert torch.equal(result.sum((2, 3)), images.sum((2, 3)))
    rows, columns = result[:, 0].flatten(1).argmax(1) // 24 - 8, result[:, 0].flatten(1).argmax(1) % 24 - 12
    assert sorted(set(rows.tolist())) == [-2, -1, 0, 1, 2]
    assert sorted(set(columns.tolist())) == [-3, -2, -1, 0, 1, 2, 3]
    ones = only(translation=0.125)(torch.ones(200, 1, 16, 24))
    assert set(ones.unique().tolist()) == {0.0, 1.0}
    assert (ones.mean((1, 2, 3)) >= 14 / 16 * 21 / 24).all()
    halves = only(translation=0.125)(torch.ones(200, 1, 20, 20)).mean((1, 2, 3))  # of 2.5 pixels, 3
    assert halves.min() == pytest.approx((17 / 20) ** 2)


def test_cutout_zeroes_a_square_clipped_by_the_border():
    torch.manual_seed(0)
    for side, length in ((20, 4), (25, 5), (18, 4)):  # of 3.6 pixels, 4
        holes = (only(cutout=0.2)(torch.ones(500, 3, side, side)) == 0).float()
        assert torch.equal(holes[:, 0], holes[:, 2])
        rows, columns = holes[:, 0].amax(2).sum(1), holes[:, 0].amax(1).sum(1)
        assert torch.equal(rows * columns, holes[:, 0].sum((1, 2)))  # a rectangle
        assert rows.max() == columns.max() == length
        assert rows.min() >= length // 2
        assert holes[:, 0].amax(0).all()  # anywhere, corners included


def test_same_seed_same_draw_and_gradient_flows():
    images = torch.rand(4, 3, 16, 16).requires_grad_()
    augment = DifferentiableAugmentation()
    torch.manual_seed(1)
    first = augment(images)
    torch.manual_seed(1)
    assert torch.equal(first, augment(images))
    assert not torch.equal(first, augment(images))
    first.sum().backward()
    assert images.grad.abs().sum() > 0


def test_gradient_of_a_translated_image_is_its_visible_part():
    torch.manual_seed(0)
    images = torch.rand(1, 1, 16, 16).requires_grad_()
    result = only(translation=0.25)(images)
    result.sum().backward()
    assert set(images.grad.unique().tolist()) <= {0.0, 1.0}
    assert torch.isclose((images * images.grad).sum(), result.sum())
