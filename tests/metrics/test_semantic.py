"""Transformed images: what each transformation does, and that it depends on the image's number alone."""

import pytest
import torch

from vfm_vae.metrics.semantic import (
    add_noise,
    draw_published,
    geometric_transformations,
    is_identity,
    names_of,
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
            assert torch.equal(image, scale(rotate(images[row : row + 1], angle), factor)[0])
    drawn = {draw_published(i) for i in range(400)}
    assert len(drawn) == 16  # every pair occurs
