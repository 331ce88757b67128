"""The linear probe against scikit-learn's logistic regression."""

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from vfm_vae.metrics.probe import LinearProbe


@pytest.fixture
def samples():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 4, (240,), generator=generator) * 3 + 1  # classes 1, 4, 7, 10
    features = torch.randn(240, 9, generator=generator) * torch.logspace(-2, 2, 9)
    features[:, :3] += labels[:, None] * torch.tensor([0.004, 0.01, -0.02])
    return features, labels


def test_equals_scikit_learn(samples):
    features, labels = samples
    probe = LinearProbe(features[:160], labels[:160])
    scaler = StandardScaler().fit(features[:160])
    theirs = LogisticRegression(max_iter=1000).fit(scaler.transform(features[:160]), labels[:160])
    assert torch.allclose(probe._weight, torch.from_numpy(theirs.coef_).float(), atol=0.02)
    expected = torch.from_numpy(theirs.predict(scaler.transform(features[160:])))
    assert (probe.predict(features[160:]) == expected).float().mean() > 0.97
    assert (probe.predict(features[160:]) == labels[160:]).float().mean() > 0.5


def test_fits_where_gradients_are_off_and_features_are_bf16(samples):
    features, labels = samples
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        probe = LinearProbe(features.clone(), labels.clone())
        hits = probe.predict(features.bfloat16()) == labels
    assert hits.float().mean() > 0.5


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"there are 1"):
        LinearProbe(torch.rand(5, 2), torch.ones(5).long())
    with pytest.raises(ValueError, match=r"\(5, 2\) and \(4,\)"):
        LinearProbe(torch.rand(5, 2), torch.arange(4))
