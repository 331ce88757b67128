"""CKNNA, mutual neighbours and CKA against their definitions, written down with full matrices."""

import math

import pytest
import torch

from vfm_vae.metrics import alignment, neighbours
from vfm_vae.metrics.alignment import (
    CKNNA,
    cka,
    cknna,
    cknna_of_neighbours,
    hsic,
    mutual_knn,
    prepare_features,
)
from vfm_vae.metrics.neighbours import nearest_neighbours


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


def dense_mutual_knn(a, b, k):
    near = []
    for x in (a.double(), b.double()):
        order = (x @ x.T).fill_diagonal_(-math.inf).sort(dim=1, descending=True, stable=True).indices
        near.append([set(row) for row in order[:, :k].tolist()])
    return sum(len(one & other) for one, other in zip(*near, strict=True)) / (len(a) * k)


def dense_hsic(a, b, unbiased):
    n = len(a)
    kernel_a, kernel_b = (x.double() @ x.double().T for x in (a, b))
    if not unbiased:
        h = torch.eye(n, dtype=torch.float64) - 1 / n
        return torch.trace(kernel_a @ h @ kernel_b @ h)
    kernel_a, kernel_b = (kernel.fill_diagonal_(0) for kernel in (kernel_a, kernel_b))
    sums = kernel_a.sum() * kernel_b.sum() / ((n - 1) * (n - 2)) - 2 * (kernel_a @ kernel_b).sum() / (n - 2)
    return ((kernel_a * kernel_b).sum() + sums) / (n * (n - 3))


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
    monkeypatch.setattr(neighbours, "_TILE_ROWS", rows)
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
    monkeypatch.setattr(neighbours, "_TILE_ROWS", rows)
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


@pytest.mark.parametrize("unbiased", [True, False])
def test_neighbours_are_searched_once_for_many_comparisons(unbiased):
    a, b = related_features()
    near_a, near_b = (nearest_neighbours(x, 10, exclude_self=unbiased) for x in (a, b))
    assert torch.equal(cknna_of_neighbours(near_a, near_b, unbiased), cknna(a, b, 10, unbiased))
    assert torch.equal(cknna_of_neighbours(near_b, near_a, unbiased), cknna(b, a, 10, unbiased))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mutual_neighbours_equal_the_definition(dtype):
    a, b = (x.to(dtype) for x in related_features())
    for k in (1, 10, 119):
        share = mutual_knn(a, b, k)
        assert share.dtype == torch.float32 and share.shape == ()
        assert share.item() == pytest.approx(dense_mutual_knn(a, b, k), rel=1e-6)
    assert mutual_knn(a, a) == 1
    assert mutual_knn(a, b, 119) == 1


def test_mutual_neighbours_of_equally_near_ones_are_the_first():
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randint(-2, 3, (90, 4), generator=generator).float() for _ in range(2))
    assert mutual_knn(a, b).item() == pytest.approx(dense_mutual_knn(a, b, 10), rel=1e-6)


@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [4096, 7])
def test_cka_equals_the_definition(monkeypatch, dtype, unbiased, rows):
    monkeypatch.setattr(alignment, "_PART_ROWS", rows)
    # Far from the origin, and of more channels than samples.
    a, b = (x[:20].to(dtype) * 3 + 5 for x in related_features())
    b = b.repeat(1, 2)
    expected = dense_hsic(a, b, unbiased)
    assert hsic(a, b, unbiased).item() == pytest.approx(expected.item(), rel=1e-9)
    expected /= (dense_hsic(a, a, unbiased) * dense_hsic(b, b, unbiased)).sqrt()
    value = cka(a, b, unbiased)
    assert value.dtype == torch.float32 and value.shape == ()
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)


def test_cka_of_same_unrelated_and_constant_features():
    a, b = torch.randn(2, 2000, 8, generator=torch.Generator().manual_seed(0))
    rotation = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(1))).Q
    for unbiased in (True, False):
        assert cka(a, 3 * a @ rotation + 1, unbiased).item() == pytest.approx(1, abs=1e-5)
        assert abs(cka(a, b, unbiased).item()) < 0.01
    assert cka(a, torch.ones_like(b)) == 0


def test_features_that_are_not_finite_give_nan():
    a, b = related_features()
    a[3, 2] = math.nan
    assert cknna(a, b).isnan() and cknna(b, a, unbiased=False).isnan()
    assert mutual_knn(a, b).isnan() and mutual_knn(b, a).isnan()
    assert cka(a, b).isnan() and cka(a, b, unbiased=True).isnan()


def test_bad_arguments_are_named():
    a, b = related_features(11)
    assert cknna(a, b, k=10).isfinite()
    with pytest.raises(ValueError, match="at least 12 samples; got 11"):
        cknna(a, b, k=11)
    with pytest.raises(ValueError, match="same samples"):
        cknna(a, b[:-1])
    with pytest.raises(ValueError, match="matrix"):
        prepare_features(torch.rand(3))
    with pytest.raises(ValueError, match=r"q must lie.*got 95"):
        prepare_features(torch.rand(3, 3), q=95)
    near = nearest_neighbours(a, 5)
    with pytest.raises(ValueError, match=r"near_a: unbiased=False needs.*exclude_self=False"):
        cknna_of_neighbours(near, near, unbiased=False)
    with pytest.raises(ValueError, match="got 5 of 11 and 4 of 11"):
        cknna_of_neighbours(near, nearest_neighbours(a, 4))
    with pytest.raises(ValueError, match="same samples"):
        mutual_knn(a, b[:-1])
    with pytest.raises(ValueError, match="at least 12 samples; got 11"):
        mutual_knn(a, b, k=11)
    with pytest.raises(ValueError, match="same samples"):
        cka(a, b[:-1])
    with pytest.raises(ValueError, match="at least 4 samples; got 3"):
        cka(a[:3], b[:3], unbiased=True)


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
