"""Distances of distributions against closed forms and against slow ways to compute them."""

import numpy as np
import pytest
import torch
from torch_fidelity.metric_isc import isc_features_to_metric

from vfm_vae.metrics import precision_recall
from vfm_vae.metrics.distribution import (
    FrechetDistance,
    InceptionScore,
    Moments,
    frechet_distance,
)
from vfm_vae.metrics.precision_recall import PrecisionRecall


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
    thin = torch.randn(9, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
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


def test_moments_equal_those_of_the_samples_and_add_up():
    features = torch.randn(40, 5, generator=torch.Generator().manual_seed(0)) + 100
    one, other = Moments(5), Moments(5)
    one.update(features[:7])
    other.update(features[7:20])
    other.update(features[20:])
    one.merge_state(other)
    mean, covariance = one.compute()
    torch.testing.assert_close(mean, features.double().mean(0))
    torch.testing.assert_close(covariance, features.double().T.cov())
    few = Moments(5)
    few.update(features[:1])
    with pytest.raises(ValueError, match="at least two samples; got 1"):
        few.compute()


def test_a_reference_stands_for_real_samples():
    generator = torch.Generator().manual_seed(0)
    real, generated = torch.randn(50, 4, generator=generator), torch.randn(30, 4, generator=generator) + 1
    both, moments = FrechetDistance(4), Moments(4)
    both.update(real, real=True)
    both.update(generated, real=False)
    moments.update(real)
    metric = FrechetDistance(4, reference=moments.compute())
    metric.update(generated[:0], real=False)
    with pytest.raises(ValueError, match="beside its reference; got 0"):
        metric.compute()
    metric.update(generated, real=False)
    assert torch.equal(metric.compute(), both.compute())
    with pytest.raises(ValueError, match="real: True was given, but the reference"):
        metric.update(real, real=True)
    with pytest.raises(ValueError, match=r"reference: a covariance of 5 features is \[5, 5\]; got \(4, 4\)"):
        FrechetDistance(5, reference=moments.compute())


def slow_inception_score(logits, split_size, num_images=None):
    """Of the first samples of so many, which torch-fidelity's permutation puts into splits."""
    permutation = np.random.RandomState(2020).permutation(num_images or len(logits))
    scores = []
    for numbers in torch.from_numpy(permutation).split(split_size):
        if not len(part := logits[numbers[numbers < len(logits)]].double()):
            continue
        p = part.softmax(1)
        divergences = [(row * (row / p.mean(0)).log()).sum() for row in p]
        scores.append(torch.stack(divergences).mean().exp())
    return torch.stack(scores).mean().float()


def test_inception_score_is_the_mean_over_splits():
    logits = torch.randn(23, 11, generator=torch.Generator().manual_seed(0)) * 3
    index = torch.arange(23)
    whole, one, other = (InceptionScore(23, split_size=5, num_classes=11) for _ in range(3))
    whole.update(logits, index)
    expected = slow_inception_score(logits, 5)  # of five splits, the last of three
    torch.testing.assert_close(whole.compute(), expected)
    order = torch.randperm(23, generator=torch.Generator().manual_seed(1))
    one.update(logits[order[:9]], index[order[:9]])
    padding = torch.tensor([-1, -1])
    other.update(torch.cat((logits[order[9:]], logits[:2])), torch.cat((index[order[9:]], padding)))
    other.update(logits[:0], index[:0])
    one.merge_state(other)
    torch.testing.assert_close(one.compute(), expected, rtol=1e-6, atol=0)


def test_splits_without_samples_do_not_count():
    logits = torch.randn(10, 11, generator=torch.Generator().manual_seed(0)) * 3
    metric = InceptionScore(1000, split_size=5, num_classes=11)
    metric.update(logits, torch.arange(10))
    assert 2 <= (metric.count > 0).sum() <= 10
    torch.testing.assert_close(metric.compute(), slow_inception_score(logits, 5, 1000))


def class_logits(labels):
    """What a good classifier says of images of these classes."""
    noise = torch.randn(len(labels), 100, generator=torch.Generator().manual_seed(0))
    return noise + 10 * torch.nn.functional.one_hot(labels, 100)


@pytest.mark.parametrize("labels", [torch.arange(2000) // 20, torch.arange(2000) % 100], ids=["sorted", "cyclic"])
def test_inception_score_does_not_depend_on_the_order_of_classes(labels):
    logits = class_logits(labels)
    metric = InceptionScore(2000, split_size=200, num_classes=100)
    for part in torch.randperm(2000, generator=torch.Generator().manual_seed(1)).split(300):
        metric.update(logits[part], part)
    expected = isc_features_to_metric(logits)["inception_score_mean"]
    assert metric.compute().item() == pytest.approx(expected, rel=1e-6)
    shuffled = class_logits(labels[torch.randperm(2000, generator=torch.Generator().manual_seed(2))])
    assert metric.compute().item() == pytest.approx(isc_features_to_metric(shuffled)["inception_score_mean"], rel=0.02)
    in_order = isc_features_to_metric(logits, shuffle=False)["inception_score_mean"]
    assert metric.compute().item() != pytest.approx(in_order, rel=0.1)
    assert not metric.state_dict()


def test_inception_score_knows_its_bounds():
    even, sure = InceptionScore(8, num_classes=4), InceptionScore(8, num_classes=4)
    even.update(torch.zeros(8, 4), torch.arange(8))
    sure.update(1000 * torch.eye(4).repeat(2, 1), torch.arange(8))
    assert even.compute().item() == pytest.approx(1) and sure.compute().item() == pytest.approx(4)
    with pytest.raises(ValueError, match="index must lie below num_images = 8; got 8"):
        even.update(torch.zeros(1, 4), torch.tensor([8]))
    with pytest.raises(ValueError, match=r"\[B, 4\] and \[B\]; got \(1, 5\) and \(1,\)"):
        even.update(torch.zeros(1, 5), torch.tensor([0]))
    with pytest.raises(ValueError, match="num_images = 0"):
        InceptionScore(0)


def slow_precision_recall(real, generated, k):
    def radii(x):
        distances = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
        return distances.fill_diagonal_(torch.inf).sort(1).values[:, k - 1]

    real, generated = real.double(), generated.double()
    distances = torch.cdist(generated, real, compute_mode="donot_use_mm_for_euclid_dist")
    precision = (distances <= radii(real)).any(1).float().mean()
    recall = (distances <= radii(generated)[:, None]).any(0).float().mean()
    return {"precision": precision, "recall": recall}


def samples(seed, count, spread=1.0, shift=0.0):
    return torch.randn(count, 6, generator=torch.Generator().manual_seed(seed)) * spread + shift


@pytest.mark.parametrize("block", [7, 1024])
@pytest.mark.parametrize("k", [1, 3])
def test_precision_and_recall_equal_full_matrices(k, block, monkeypatch):
    monkeypatch.setattr(precision_recall, "_BLOCK_ROWS", block)
    real, generated = samples(0, 90, 1.0, 50.0), samples(1, 110, 0.8, 50.3)
    generated[:20] = real[:20]  # copies, and several of one
    generated[20:25] = generated[40]
    real[60:66] = real[60]
    metric = PrecisionRecall(k)
    metric.update(generated, torch.arange(110))
    metric.update(real, torch.arange(90), real=True)
    expected = slow_precision_recall(real, generated, k)
    assert metric.compute() == expected
    assert all(0.2 < value < 1 for value in expected.values())


def test_copies_lie_in_balls_of_no_extent():
    real = 1000 + samples(0, 3).repeat_interleave(5, 0)  # each in five copies: radii are 0
    metric = PrecisionRecall(3)
    metric.update(real, torch.arange(15), real=True)
    metric.update(torch.cat((real[:10], samples(1, 10) + 1000)), torch.arange(20))
    assert metric.compute()["precision"] == 0.5


@pytest.mark.parametrize("known", [False, True])
def test_precision_and_recall_know_samples_by_their_number(known):
    real, generated = samples(0, 60), samples(1, 70, 0.7)
    expected = slow_precision_recall(real, generated, 3)
    one, other = (PrecisionRecall(reference=real if known else None) for _ in range(2))
    order = torch.randperm(70, generator=torch.Generator().manual_seed(2))
    one.update(generated[order[:40]], order[:40])
    again = torch.cat((order[30:], torch.tensor([-1, -1])))  # ten were seen, two are padding
    other.update(torch.cat((generated[order[30:]], torch.full((2, 6), 9.0))), again)
    if known:
        with pytest.raises(ValueError, match="real: True was given, but the reference"):
            one.update(real, torch.arange(60), real=True)
    else:
        one.update(real[:50], torch.arange(50), real=True)
        other.update(real[45:], torch.arange(45, 60), real=True)
    one.merge_state(other)
    assert one.compute() == expected
    assert 0 < expected["recall"] < 1


def test_precision_and_recall_need_more_samples_than_neighbours():
    metric = PrecisionRecall(k=3)
    metric.update(samples(0, 4), torch.arange(4), real=True)
    with pytest.raises(ValueError, match="k = 3 need more than 3 real and generated samples; got 4 and 0"):
        metric.compute()
    metric.update(samples(1, 3), torch.arange(3))
    with pytest.raises(ValueError, match="got 4 and 3"):
        metric.compute()
    metric.update(samples(2, 1), torch.tensor([3]))
    assert set(metric.compute()) == {"precision", "recall"}
    with pytest.raises(ValueError, match=r"got \(2, 6\) and \(3,\)"):
        metric.update(samples(0, 2), torch.arange(3))
