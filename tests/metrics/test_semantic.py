"""Transformed images: what each transformation does, and that it depends on the image's number alone."""

import numpy as np
import pytest
import torch

from vfm_vae.images import from_uint8
from vfm_vae.metrics.semantic import (
    add_noise,
    draw_published,
    geometric_transformations,
    is_identity,
    names_of,
    published_numbers,
    rotate,
    scale,
    transformed,
)


@pytest.fixture
def images():
    return torch.randint(0, 256, (4, 3, 16, 16), generator=torch.Generator().manual_seed(0)).byte()


def test_noise_has_its_strength_and_belongs_to_the_image():
    grey = torch.full((2, 3, 64, 64), 128, dtype=torch.uint8)
    noisy = add_noise(grey, 0.1, torch.tensor([5, 9]))
    assert noisy.dtype == torch.uint8
    assert (noisy.float() / 255).std().item() == pytest.approx(0.1, rel=0.05)
    assert torch.equal(add_noise(grey[1:], 0.1, torch.tensor([9])), noisy[1:])
    assert not torch.equal(noisy[0], noisy[1])
    white = add_noise(torch.full((1, 3, 8, 8), 255, dtype=torch.uint8), 0.2, torch.tensor([0]))
    assert white.max() == 255 and (white == 255).float().mean() > 0.3  # clipped, not wrapped


def test_rotations_are_counter_clockwise_and_scales_keep_the_mean(images):
    corner = torch.zeros(1, 3, 4, 4, dtype=torch.uint8)
    corner[..., 0, -1] = 9  # above right
    assert rotate(corner, 90)[..., 0, 0].eq(9).all()
    assert torch.equal(rotate(rotate(images, 90), 270), images)
    half = scale(images, 0.5)
    assert half.shape == (4, 3, 8, 8) and half.dtype == torch.uint8
    assert half.float().mean().item() == pytest.approx(images.float().mean().item(), abs=2)
    assert scale(images, 1.0) is images


def test_single_transformations(images):
    parts = transformed("each", images, torch.arange(4))
    assert list(parts) == names_of("each") and len(parts) == 12
    for name, [(rows, result)] in parts.items():
        assert rows.tolist() == [0, 1, 2, 3]
        assert torch.equal(result, images) == is_identity(name)
    assert sum(map(is_identity, parts)) == 2
    z = torch.randn(2, 4, 8, 8)
    turns = geometric_transformations()
    assert turns["scale_0.25"](z).shape == (2, 4, 2, 2)
    torch.testing.assert_close(turns["rotation_90"](z).mean((2, 3)), z.mean((2, 3)))


def test_published_protocol_draws_rotation_and_scale_together(images):
    index = torch.tensor([3, 14, 15, 92])
    parts = transformed("published", images, index)
    assert list(parts) == names_of("published") == [f"noise_{s:.2f}" for s in (0.05, 0.1, 0.15, 0.2)] + ["equivariance"]
    rows = torch.cat([part.rows for part in parts["equivariance"]])
    assert sorted(rows.tolist()) == [0, 1, 2, 3]
    for part in parts["equivariance"]:
        for row, image in zip(part.rows.tolist(), part.maps, strict=True):
            angle, factor = draw_published(index[row].item())
            assert torch.equal(image, scale(rotate(images[row : row + 1].float(), angle), factor)[0])
    drawn = {draw_published(i) for i in range(400)}
    assert len(drawn) == 16  # every pair occurs


def test_published_draws_are_those_of_numpy():
    by_hand = [(180, 0.25), (0, 1.0), (0, 0.25), (270, 0.5), (90, 0.75), (270, 0.5), (0, 0.25), (180, 0.75)]
    assert [draw_published(i) for i in range(8)] == by_hand
    for i in (293, 9999):
        generator = np.random.RandomState(42 + i)
        rotation, factor = generator.randint(4), generator.randint(4)
        assert draw_published(i) == (90 * rotation, 1 - 0.25 * factor)


def test_published_numbers_are_places_of_stems_over_all_classes():
    names = ["b/val_0007.JPEG", "b/val_0002.JPEG", "a/val_0009.png", "a/val_0001.JPEG", "shard.tar/c/val_0003.jpg"]
    assert published_numbers(names).tolist() == [3, 1, 4, 0, 2]
    assert published_numbers(["b/1.png", "a/1.png", "a/0.png"]).tolist() == [2, 1, 0]
    assert published_numbers(["a/x.png", "a/x-1.png"]).tolist() == [0, 1]  # with endings, "-" would come before "."


def test_published_scaling_does_not_round(images):
    index = torch.arange(4)
    for part in transformed("published", images, index)["equivariance"]:
        assert part.maps.dtype == torch.float32 and part.maps.max() > 100
        factor = part.maps.shape[-1] / 16
        assert factor == 1 or not torch.equal(part.maps, part.maps.round())
        rounded = scale(rotate(images[part.rows], draw_published(part.rows[0].item())[0]), factor)
        assert (part.maps - rounded).abs().max() < 1
    (noisy,) = transformed("published", images, index)["noise_0.10"]
    assert noisy.maps.dtype == torch.uint8
    (single,) = transformed("each", images, index)["scale_0.5"]
    assert single.maps.dtype == torch.uint8
    assert torch.equal(from_uint8(images), from_uint8(images.float()))
