"""No number comes of images or features that hold nan or inf."""

import math

import pytest
import torch

from vfm_vae.images import quantised, to_uint8
from vfm_vae.metrics.alignment import CKNNA
from vfm_vae.metrics.distribution import FrechetDistance, Gaussian, InceptionScore, Moments
from vfm_vae.metrics.features import FeatureStore
from vfm_vae.metrics.precision_recall import PrecisionRecall
from vfm_vae.metrics.probe import LinearProbe
from vfm_vae.metrics.reconstruction import PSNR, SSIM, MeanOverImages, PerceptualDistance

SAID = r"nan or inf; either the weights are broken \(give another --ckpt_path\), or numbers overflowed"
BROKEN = pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])


def images(value: float | None = None) -> torch.Tensor:
    images = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    if value is not None:
        images[1, 2, 5, 7] = images[3, 0, 0, 0] = value
    return images


@BROKEN
@pytest.mark.parametrize("function", [to_uint8, quantised])
def test_what_is_not_finite_is_no_black_image(function, value):
    with pytest.raises(ValueError, match=rf"^images: 2 of 4 hold {SAID}"):
        function(images(value))
    function(images(1e30))  # clamped, as anything beyond [-1, 1] is
    assert function(images()[:0]).shape == (0, 3, 16, 16)


@BROKEN
@pytest.mark.parametrize("metric", [PSNR(), SSIM(), PerceptualDistance(lambda a, b: (a - b).abs().mean())])
def test_no_score_of_images_that_are_not_finite(metric, value):
    with pytest.raises(ValueError, match=f"^images: 2 of 4 hold {SAID}"):
        metric.update(images(value), images())


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_mean_that_is_not_finite_is_said(value):
    mean = PerceptualDistance(lambda a, b: torch.tensor(value))  # a network whose own numbers overflow
    mean.update(images(), images())
    with pytest.raises(ValueError, match=f"^PerceptualDistance: over 4 images it is {value}; either the weights"):
        mean.compute()


def test_what_is_rightly_infinite_or_undefined_stays_so():
    exact = PSNR()
    exact.update(images(), images())
    assert exact.compute().isinf() and MeanOverImages().compute().isnan()


def features(value: float | None = None, size: int = 12) -> torch.Tensor:
    features = torch.randn(size, 5, generator=torch.Generator().manual_seed(1))
    if value is not None:
        features[3, 2] = value
    return features


def moments(value: float) -> Moments:
    metric = Moments(5)
    metric.update(features(value))
    return metric


def distance(value: float) -> FrechetDistance:
    metric = FrechetDistance(5)
    metric.update(features(), real=True)
    metric.update(features(value), real=False)
    return metric


def score(value: float) -> InceptionScore:
    metric = InceptionScore(12, num_classes=5)
    metric.update(features(value), torch.arange(12))
    return metric


def neighbours(value: float) -> PrecisionRecall:
    metric = PrecisionRecall(reference=features())
    metric.update(features(value), torch.arange(12))
    return metric


def alignment(value: float) -> CKNNA:
    metric = CKNNA(k=3)
    metric.update(features(), features(value), torch.arange(12))
    return metric


def store(value: float) -> FeatureStore:
    metric = FeatureStore()
    metric.update(features(value), torch.arange(12))
    return metric


@BROKEN
@pytest.mark.parametrize("metric", [moments, distance, score, neighbours, alignment, store])
def test_no_number_of_features_that_are_not_finite(metric, value):
    with pytest.raises(ValueError, match=SAID):
        metric(value).compute()


@BROKEN
def test_a_probe_neither_learns_nor_judges_them(value):
    labels = torch.arange(12) % 3
    probe = LinearProbe(features(), labels)
    for use in (lambda: LinearProbe(features(value), labels), lambda: probe.predict(features(value))):
        with pytest.raises(ValueError, match=f"^features: 1 of 12 hold {SAID}"):
            use()


@BROKEN
def test_no_reference_that_is_not_finite(value):
    with pytest.raises(ValueError, match=r"^reference: its features: 1 of 12 hold nan or inf"):
        PrecisionRecall(reference=features(value))
    with pytest.raises(ValueError, match=r"^reference: its statistics hold nan or inf; measure it anew"):
        FrechetDistance(5, Gaussian(features(value)[3], torch.eye(5)))
