"""CKNNA against its definition, written down with full matrices."""

import math

import pytest
import torch

from vfm_vae.metrics import alignment
from vfm_vae.metrics.alignment import CKNNA, cknna, prepare_features


def dense_cknna(a, b, k, unbiased):
    """The definition, in float64. Neighbours by stable sort: of equals, the first."""
    a, b = a.double(), b.double()
    n = len(a)

    def mask(kernel):
        if unbiased:
            kernel = kernel.clone().fill_diagonal_(-math.inf)
        near = kernel.sort(dim=1, descending=True, stable=True).indices[:, :k]
        return torch.zeros_like(kernel).scatter_(1, near, 1)

    def hsic(p, q):
        if not unbiased:
            h = torch.eye(n, dtype=p.dtype) - 1 / n
            return torch.trace(p @ h @ q @ h)
        assert not p.diagonal().any()
        sums = p.sum() * q.sum() / ((n - 1) * (n - 2)) - 2 * (p @ q).sum() / (n - 2)
        return ((p * q.T).sum() + sums) / (n * (n - 3))

    def align(kernel_a, kernel_b):
        common = mask(kernel_a) * mask(kernel_b)
        return hsic(common * kernel_a, common * kernel_b)

    kernel_a, kernel_b = a @ a.T, b @ b.T
    return align(kernel_a, kernel_b) / ((align(kernel_a, kernel_a) * align(kernel_b, kernel_b)).sqrt() + 1e-6)


def related_features(n=120, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(n, 8, generator=generator)
    a = torch.cat((common, torch.randn(n, 4, generator=generator)), dim=1)
    b = torch.cat((common @ torch.randn(8, 12, generator=generator), torch.randn(n, 8, generator=generator)), dim=1)
    return prepare_features(a.to(dtype)), prepare_features(b.to(dtype))


@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("n, k", [(120, 10), (120, 1), (33, 32), (4, 3)])
@pytest.mark.parametrize("rows", [512, 7])
def test_equals_the_definition(monkeypatch, n, k, unbiased, rows):
    monkeypatch.setattr(alignment, "_BLOCK_ROWS", rows)
    a, b = related_features(n)
    expected = dense_cknna(a, b, k, unbiased).item()
    assert cknna(a, b, k, unbiased).item() == pytest.approx(expected, abs=1e-5, nan_ok=True)


def test_bfloat16_features_are_compared_in_float32():
    a, b = (x.bfloat16() for x in related_features())
    assert cknna(a, b).item() == pytest.approx(dense_cknna(a, b, 10, True).item(), abs=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        assert cknna(a, b).item() == pytest.approx(dense_cknna(a, b, 10, True).item(), abs=1e-6)


@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("rows", [512, 16])
def test_of_equally_near_neighbours_the_first_are_taken(monkeypatch, unbiased, rows):
    monkeypatch.setattr(alignment, "_BLOCK_ROWS", rows)
    generator = torch.Generator().manual_seed(0)
    # Small integers: inner products are exact, and hardly a row is without ties.
    a, b = (torch.randint(-2, 3, (90, 4), generator=generator).float() for _ in range(2))
    expected = dense_cknna(a, b, 10, unbiased).item()
    assert cknna(a, b, 10, unbiased).item() == pytest.approx(expected, abs=1e-6)


def test_same_features_align_perfectly_and_unrelated_ones_do_not():
    a, _ = related_features(300)
    rotation = torch.linalg.qr(torch.randn(a.shape[1], a.shape[1], generator=torch.Generator().manual_seed(1))).Q
    assert cknna(a, a @ rotation).item() == pytest.approx(1, abs=1e-2)  # but for the 1e-6 in the denominator
    assert abs(cknna(a, related_features(300, seed=5)[1]).item()) < 0.1


def test_features_that_are_not_finite_give_nan():
    a, b = related_features()
    a[3, 2] = math.nan
    assert cknna(a, b).isnan()


def test_bad_arguments_are_named():
    a, b = related_features(11)
    assert cknna(a, b, k=10).isfinite()
    with pytest.raises(ValueError, match="at least 12 samples; got 11"):
        cknna(a, b, k=11)
    with pytest.raises(ValueError, match="same samples"):
        cknna(a, b[:-1])
    with pytest.raises(ValueError, match="matrix"):
        prepare_features(torch.rand(3))
    with pytest.raises(ValueError, match=r"quantile.*got 95"):
        prepare_features(torch.rand(3, 3), quantile=95)


def test_preparing_clamps_at_the_quantile():
    features = torch.arange(1.0, 21).reshape(4, 5) * torch.tensor([1, -1, 1, -1, 1])
    expected = features.clamp(-16, 16)  # int(0.75 * 20) = 15: the 16th smallest
    torch.testing.assert_close(prepare_features(features, 0.75), expected / expected.norm(dim=1, keepdim=True))
    assert prepare_features(features.bfloat16(), 1).dtype == torch.float32


def test_metric_ignores_order_duplicates_and_padding():
    a, b = (torch.randn(60, 6, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    expected = cknna(prepare_features(a), prepare_features(b), k=5)
    metric = CKNNA(k=5)
    index = torch.cat((torch.randperm(60), torch.tensor([3, 7])))
    for part in index.split(9):
        metric.update(a[part], b[part], part)
    metric.update(torch.full((2, 6), 1e6), torch.full((2, 6), 1e6), torch.tensor([-1, -1]))
    torch.testing.assert_close(metric.compute(), expected)


def test_metric_over_two_ranks_equals_one():
    a, b = (torch.randn(41, 6, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    whole = CKNNA(k=5)
    whole.update(a, b, torch.arange(41))
    merged = CKNNA(k=5)
    other = CKNNA(k=5)
    merged.update(a[::2], b[::2], torch.arange(41)[::2])
    other.update(a[1::2], b[1::2], torch.arange(41)[1::2])
    merged.merge_state(other)
    torch.testing.assert_close(merged.compute(), whole.compute(), rtol=0, atol=0)


def test_metric_on_too_few_samples_says_why_it_is_nan():
    metric = CKNNA()
    metric.update(torch.rand(10, 3), torch.rand(10, 3), torch.arange(10))
    with pytest.warns(UserWarning, match="at least 11 samples; got 10"):
        assert metric.compute().isnan()
