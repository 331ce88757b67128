"""Inception against torch-fidelity's network, and FID and Inception Score on it against others' metrics."""

from urllib.error import URLError

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3
from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torchmetrics.image.fid import FrechetInceptionDistance, NoTrainInceptionV3

from vfm_vae.frozen import sha256_of
from vfm_vae.metrics.distribution import FrechetDistance, InceptionScore
from vfm_vae.metrics.inception import Inception, resize_tf1

NUM = 8


def smooth_images(seed, contrast):
    grid = torch.rand(NUM, 3, 4, 4, generator=torch.Generator().manual_seed(seed)) * contrast
    return (F.interpolate(grid, size=(64, 64), mode="bicubic").clamp(0, 1) * 255).to(torch.uint8)


@pytest.fixture(scope="module")
def images():
    """Real ones, then as many generated ones."""
    return torch.cat((smooth_images(0, 1.0), smooth_images(1, 0.7)))


@pytest.fixture(scope="module")
def features(inception, images):
    return inception(images)


@pytest.fixture(scope="module")
def plain(inception_weights):
    return FeatureExtractorInceptionV3("plain", ["2048", "logits_unbiased"], str(inception_weights))


@pytest.fixture(scope="module")
def plain_features(plain, images):
    return plain(images)


def frechet(features, num=NUM):
    metric = FrechetDistance(features.shape[1])
    metric.update(features[:num], real=True)
    metric.update(features[NUM : NUM + num], real=False)
    return metric.compute().item()


def test_features_equal_those_of_the_plain_network(features, plain_features):
    pool, logits = plain_features
    assert pool.std(0).mean() > 1e-3 * pool.mean(), "images have to differ for a comparison"
    assert [x.dtype for x in features] == [torch.float32] * 3
    torch.testing.assert_close(features.pool, pool, rtol=1e-4, atol=1e-4 * pool.std().item())
    torch.testing.assert_close(features.logits, logits, rtol=1e-4, atol=1e-4 * logits.std().item())


def test_spatial_features_are_those_of_adm(plain, images, features):
    few = images[:2]
    x = interpolate_bilinear_2d_like_tensorflow1x(few.float(), size=(299, 299), align_corners=False)
    layers = ["1a_3x3", "2a_3x3", "2b_3x3", "pool", "3b_1x1", "4a_3x3", "pool", "5b", "5c", "5d", "6a", "6b", "6c"]
    x = (x - 128) / 128
    for layer in layers:
        if layer == "pool":
            x = F.max_pool2d(x, 3, 2)
        else:
            x = getattr(plain, f"Conv2d_{layer}" if "x" in layer else f"Mixed_{layer}")(x)
    branch = plain.Mixed_6d.branch1x1
    x = branch.bn(branch.conv(x)).relu()
    expected = [[x[i, c, h, w] for h in range(17) for w in range(17) for c in range(7)] for i in range(len(few))]
    expected = torch.tensor(expected)
    assert features.spatial.shape == (2 * NUM, 2023)
    torch.testing.assert_close(features.spatial[:2], expected, rtol=1e-4, atol=1e-4 * expected.std().item())


@pytest.mark.parametrize("width", [256, pytest.param(2048, marks=pytest.mark.slow)])
def test_fid_equals_torch_fidelity(features, plain_features, width):
    real, generated = (fid_features_to_statistics(part) for part in plain_features[0][:, :width].split(NUM))
    expected = fid_statistics_to_metric(real, generated, verbose=False)["frechet_inception_distance"]
    assert frechet(features.pool[:, :width]) == pytest.approx(expected, rel=1e-3)
    assert expected > 0.1


def test_fid_equals_torchmetrics(inception_weights, images, features):
    class Some(nn.Module):
        """A part of the features: torchmetrics takes long for the eigenvalues of them all."""

        num_features = 256

        def __init__(self):
            super().__init__()
            self.network = NoTrainInceptionV3("theirs", ["2048"], str(inception_weights), antialias=False)

        def forward(self, batch):
            return self.network(batch)[:, : self.num_features]

    theirs = FrechetInceptionDistance(feature=Some())
    few = NUM // 2  # of each kind: it is the same network again
    theirs.update(images[:few], real=True)
    theirs.update(images[NUM : NUM + few], real=False)
    assert frechet(features.pool[:, :256], few) == pytest.approx(theirs.compute().item(), rel=1e-3)


def test_inception_score_equals_torch_fidelity(features, plain_features):
    # Random weights prefer the same class for every image: what images have in common is taken off.
    common, scale = plain_features[1].mean(0), 3 / plain_features[1].std(0).mean()
    theirs, ours = ((logits - common) * scale for logits in (plain_features[1], features.logits))
    expected = isc_features_to_metric(theirs, splits=4)["inception_score_mean"]
    metric = InceptionScore(num_images=2 * NUM, split_size=NUM // 2)
    metric.update(ours, torch.arange(2 * NUM))
    assert metric.compute().item() == pytest.approx(expected, rel=1e-3)
    assert expected > 1.5


@pytest.mark.parametrize("size", [(64, 64), (256, 256), (299, 299), (333, 31), (1, 512)])
def test_resize_equals_torch_fidelity(size):
    images = torch.randint(256, (2, 3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    expected = interpolate_bilinear_2d_like_tensorflow1x(images.float(), size=(299, 299), align_corners=False)
    torch.testing.assert_close(resize_tf1(images, 299), expected, rtol=1e-5, atol=1e-5)


def test_it_is_frozen_and_keeps_to_float32(inception, images, features):
    assert not list(inception.parameters()) and not inception.state_dict()
    inception.train()
    with torch.autocast("cpu", torch.bfloat16):
        again = inception(images[:2])
    assert not again.pool.requires_grad
    for part, whole in zip(again, features, strict=True):
        torch.testing.assert_close(part, whole[:2], rtol=1e-4, atol=1e-4)


def test_an_empty_batch_has_no_features(inception):
    empty = inception(torch.zeros(0, 3, 64, 64, dtype=torch.uint8))
    assert [x.shape for x in empty] == [(0, 2048), (0, 2023), (0, 1008)]


def test_fingerprint_is_of_the_file(inception, inception_weights):
    assert inception.fingerprint() == sha256_of(torch.load(inception_weights, weights_only=True))


def test_other_images_are_refused(inception):
    with pytest.raises(ValueError, match=r"images: Inception takes uint8 \[B, 3, H, W\].*torch.float32 \(2, 3, 8, 8\)"):
        inception(torch.zeros(2, 3, 8, 8))
    with pytest.raises(ValueError, match=r"given torch.uint8 \(2, 1, 8, 8\)"):
        inception(torch.zeros(2, 1, 8, 8, dtype=torch.uint8))


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The usual place of weights, empty and without a network."""

    def no_network(*args, **kwargs):
        raise URLError("no network")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    (tmp_path / "checkpoints").mkdir()
    return tmp_path / "checkpoints"


def test_weights_lie_at_the_usual_place(hub, inception_weights, inception):
    (hub / URL_INCEPTION_V3.rpartition("/")[2]).symlink_to(inception_weights)
    assert Inception().fingerprint() == inception.fingerprint()


def test_weights_without_norms_counters_will_do(tmp_path, inception_weights, inception):
    state = torch.load(inception_weights, weights_only=True)
    state = {name: values for name, values in state.items() if not name.endswith("num_batches_tracked")}
    torch.save(state, tmp_path / "fewer.pth")
    weight = Inception(str(tmp_path / "fewer.pth")).network.Mixed_7c.branch_pool.conv.weight
    assert torch.equal(weight, inception.network.Mixed_7c.branch_pool.conv.weight)


def test_missing_weights_are_told(hub, tmp_path):
    with pytest.raises(
        ValueError, match=r"weights: those of Inception.*no network.*inception-2015.*`weights`"
    ) as error:
        Inception()
    assert str(hub) in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(
        ValueError, match=r"^weights: there is no file '.*none\.pth'; give the file of Inception, for FID"
    ):
        Inception(str(tmp_path / "none.pth"))


@pytest.mark.parametrize("content", ["nothing", "text", "list", "other network", "other shapes", "half"])
def test_other_files_are_told(tmp_path, content, inception_weights):
    path = tmp_path / "weights.pth"
    if content in ("nothing", "text"):
        path.write_text("" if content == "nothing" else "these are no weights")
    elif content == "other shapes":
        state = torch.load(inception_weights, weights_only=True)
        torch.save(state | {"fc.weight": torch.zeros(1000, 2048)}, path)
    elif content == "half":
        state = torch.load(inception_weights, weights_only=True)
        torch.save(dict(list(state.items())[::2]), path)
    else:
        torch.save([1, 2] if content == "list" else nn.Linear(2, 2).state_dict(), path)
    with pytest.raises(ValueError, match=r"^weights: '.*weights\.pth' .*[;,] give the file of .*nception") as error:
        Inception(str(path))
    assert "\n" not in str(error.value)
