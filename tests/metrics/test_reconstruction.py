"""Reconstruction metrics: per image, over 8 bits, and the same however images are spread."""

import math

import pytest
import torch
from skimage.metrics import structural_similarity

from vfm_vae.images import quantised, to_uint8
from vfm_vae.metrics.reconstruction import PSNR, SSIM, MeanOverImages, ReconstructionMetrics


@pytest.fixture
def pairs():
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(7, 3, 24, 24, generator=generator) * 2 - 1
    return images + torch.randn(images.shape, generator=generator) * 0.2, images


def test_eight_bits_round_and_clamp():
    levels = torch.arange(256)
    assert (to_uint8(levels / 127.5 - 1 + 0.49 / 127.5) == levels).all()
    assert to_uint8(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]
    images = torch.rand(2, 3, 4, 4) * 2 - 1
    assert (quantised(images) - images).abs().max() <= 0.5 / 127.5 + 1e-6
    assert torch.equal(quantised(quantised(images)), quantised(images))


def test_psnr_is_the_mean_of_each_images_own():
    images = torch.zeros(2, 3, 8, 8)
    shift = torch.tensor([2.0, 20.0]).view(2, 1, 1, 1)  # in grey levels
    metric = PSNR()
    metric.update(quantised(images) + shift / 127.5, images)
    expected = sum(20 * math.log10(255 / s) for s in (2, 20)) / 2
    assert metric.compute().item() == pytest.approx(expected, rel=1e-6)


def test_ssim_equals_an_independent_implementation(pairs):
    reconstructions, images = pairs
    metric = SSIM()
    metric.update(reconstructions, images)
    full = [
        structural_similarity(
            *(quantised(x)[i].double().numpy() for x in pairs),
            channel_axis=0,
            data_range=2,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
            full=True,
        )[1].mean()
        for i in range(len(images))
    ]
    assert metric.compute().item() == pytest.approx(sum(full) / len(full), abs=2e-3)  # borders are mirrored otherwise
    same = SSIM()
    same.update(images, images)
    assert same.compute().item() == pytest.approx(1)


def test_uneven_batches_and_ranks_change_nothing(pairs):
    reconstructions, images = pairs

    def metrics():
        return ReconstructionMetrics({"distance": lambda x, y: (x - y).abs().mean(dim=(1, 2, 3))})

    whole, one, other = metrics(), metrics(), metrics()
    whole.update(reconstructions, images)
    one.update(reconstructions[:1], images[:1])
    one.update(reconstructions[:0], images[:0])  # a batch of padding alone
    other.update(reconstructions[1:3], images[1:3])
    other.update(reconstructions[3:], images[3:])
    for name in one:
        one[name].merge_state(other[name])
    results = one.compute()
    assert results.keys() == {"psnr", "ssim", "distance"}
    for name, value in whole.compute().items():
        torch.testing.assert_close(results[name], value, rtol=1e-6, atol=0)


def test_perceptual_networks_see_eight_bits_and_stay_out_of_checkpoints(pairs):
    class Distance(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(1))

        def forward(self, reconstructions, images):
            assert torch.equal(quantised(images), images) and torch.equal(quantised(reconstructions), reconstructions)
            return (self.weight * (reconstructions - images).abs()).mean()

    metrics = ReconstructionMetrics({"distance": Distance()})
    assert not metrics.state_dict() and not list(metrics.parameters())
    for part in torch.arange(7).split(3):
        metrics.update(pairs[0][part], pairs[1][part])
    expected = (quantised(pairs[0]) - quantised(pairs[1])).abs().mean()
    torch.testing.assert_close(metrics.compute()["distance"], expected)


def test_a_mean_wants_one_number_per_image():
    with pytest.raises(ValueError, match=r"one number per image.*\(2, 1\)"):
        MeanOverImages().update(torch.rand(2, 1))
