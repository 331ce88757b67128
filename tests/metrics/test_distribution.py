"""The Fréchet distance against closed forms."""

import pytest
import torch

from vfm_vae.metrics.distribution import FrechetDistance, frechet_distance


def spd(d, seed):
    root = torch.randn(d, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return root @ root.T / d


def test_commuting_covariances_have_a_closed_form():
    basis = torch.linalg.qr(spd(6, 0)).Q
    a, b = torch.rand(6, dtype=torch.float64) * 4, torch.rand(6, dtype=torch.float64)
    shift = torch.randn(6, dtype=torch.float64)
    expected = shift.square().sum() + (a.sqrt() - b.sqrt()).square().sum()
    zero = torch.zeros(6)
    value = frechet_distance(zero, basis * a @ basis.T, shift, basis * b @ basis.T)
    torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-10)


def test_general_covariances_equal_the_product_eigenvalues():
    a, b = spd(7, 1), spd(7, 2)
    root_trace = torch.linalg.eigvals(a @ b).sqrt().sum().real
    zero = torch.zeros(7)
    torch.testing.assert_close(frechet_distance(zero, a, zero, b), a.trace() + b.trace() - 2 * root_trace)
    torch.testing.assert_close(frechet_distance(zero, a, zero, b), frechet_distance(zero, b, zero, a))


def test_equal_and_singular_covariances():
    zero = torch.zeros(9)
    thin = torch.randn(9, 3, dtype=torch.float64)
    singular = thin @ thin.T
    assert frechet_distance(zero, singular, zero, singular).abs() < 1e-6
    assert frechet_distance(zero, singular, zero, torch.zeros(9, 9)).item() == pytest.approx(singular.trace().item())


def test_metric_equals_the_moments_of_the_samples():
    generator = torch.Generator().manual_seed(0)
    real = torch.randn(500, 5, generator=generator) + 100  # far from zero: float32 sums would be off
    generated = torch.randn(300, 5, generator=generator) * 2 + 100
    metric = FrechetDistance(num_features=5)
    for part in real.split(64):
        metric.update(part, real=True)
    for part in generated.split(64):
        metric.update(part, real=False)
    real, generated = real.double(), generated.double()
    expected = frechet_distance(real.mean(0), real.T.cov(), generated.mean(0), generated.T.cov())
    torch.testing.assert_close(metric.compute(), expected.float())


def test_gaussian_samples_approach_the_closed_form():
    generator = torch.Generator().manual_seed(0)
    metric = FrechetDistance(num_features=3)
    metric.update(torch.randn(200_000, 3, generator=generator), real=True)
    metric.update(torch.randn(200_000, 3, generator=generator) * 3 + 1, real=False)
    assert metric.compute().item() == pytest.approx(3 * 1 + 3 * (3 - 1) ** 2, rel=0.02)


def test_ranks_add_up():
    features = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    whole, one, other = (FrechetDistance(4) for _ in range(3))
    whole.update(features[:30], real=True)
    whole.update(features[30:], real=False)
    one.update(features[:11], real=True)
    one.update(features[30:33], real=False)
    other.update(features[11:30], real=True)
    other.update(features[33:], real=False)
    one.merge_state(other)
    torch.testing.assert_close(one.compute(), whole.compute(), rtol=1e-6, atol=0)


def test_bad_input_is_named():
    metric = FrechetDistance(4)
    with pytest.raises(ValueError, match=r"\[B, 4\].*\(2, 5\)"):
        metric.update(torch.rand(2, 5), real=True)
    metric.update(torch.rand(2, 4), real=True)
    with pytest.raises(ValueError, match="at least two real and two generated samples; got 2 and 0"):
        metric.compute()
