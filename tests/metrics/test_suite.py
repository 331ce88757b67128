"""The suite's numbers on Inception against formulas of their own, in float64, on the network's own features."""

import pytest
import torch
import torch.nn.functional as F

from vfm_vae.metrics.distribution import Gaussian
from vfm_vae.metrics.reference import Reference
from vfm_vae.metrics.suite import DistributionSuite

NUM_REAL, NUM = 20, 12


def smooth_images(seed, num, contrast):
    grid = torch.rand(num, 3, 4, 4, generator=torch.Generator().manual_seed(seed)) * contrast
    return (F.interpolate(grid, size=(64, 64), mode="bicubic").clamp(0, 1) * 255).to(torch.uint8)


@pytest.fixture(scope="module")
def images():
    """Real ones, and generated ones that partly resemble them."""
    real = smooth_images(0, NUM_REAL, 1.0)
    return real, torch.cat((smooth_images(1, NUM - 4, 0.5), (real[:4] * 0.97).to(torch.uint8)))


def features_of(inception, images):
    """Pooled and spatial ones as they pass through the layers, and classes' probabilities, all in float64."""
    seen = {}
    layers = {"spatial": inception.network.Mixed_6d, "pool": inception.network.Mixed_7c}
    hooks = [
        layer.register_forward_hook(lambda layer, args, output, name=name: seen.update({name: output.double()}))
        for name, layer in layers.items()
    ]
    inception(images)
    for hook in hooks:
        hook.remove()
    pool = seen["pool"].mean((2, 3))
    spatial = torch.stack([seen["spatial"][:, c].flatten(1) for c in range(7)], 2).flatten(1)
    return pool, spatial, (pool @ inception.network.fc.weight.double().T).softmax(1)


def frechet(real, generated):
    """The root's trace is the sum of the singular values of the centred samples' products: no eigenvalues, no d x d."""
    x, y = ((part - part.mean(0)) / (len(part) - 1) ** 0.5 for part in (real, generated))
    root = torch.linalg.svdvals(x @ y.T).sum()
    return ((real.mean(0) - generated.mean(0)).square().sum() + x.square().sum() + y.square().sum() - 2 * root).item()


def inside(points, centres, k=3):
    """The share of points within reach of any centre's k-th neighbour."""
    radii = torch.cdist(centres, centres).sort(1).values[:, k]
    return (torch.cdist(points, centres) <= radii).any(1).double().mean().item()


@pytest.fixture(scope="module")
def expected(inception, images):
    (real, real_spatial, _), (pool, spatial, p) = (features_of(inception, part) for part in images)
    values = {"fid": frechet(real, pool), "sfid": frechet(real_spatial, spatial)}
    values["score"] = (p * (p / p.mean(0)).log()).sum(1).mean().exp().item()
    values |= {"precision": inside(pool, real), "recall": inside(real, pool)}
    assert values["fid"] > 0.01 and values["sfid"] > 0.01 and values["score"] > 1.001
    assert 0 < values["precision"] < 1 and 0 < values["recall"] < 1
    return values


@pytest.mark.slow
def test_reconstructions_are_compared_with_the_images_given_along(inception, images, expected):
    suite = DistributionSuite(inception, NUM, precision_recall=True)
    real, generated = images
    for start in range(0, NUM_REAL, 8):
        suite.update(real[start : start + 8], torch.arange(NUM_REAL)[start : start + 8], real=True)
        suite.update(generated[start : start + 8], torch.arange(NUM)[start : start + 8])
    values = {name: value.item() for name, value in suite.compute().items()}
    names = {"fid": "rfid", "sfid": "rsfid", "score": "ris"}
    assert values == pytest.approx({names.get(name, name): value for name, value in expected.items()}, rel=1e-3)


@pytest.mark.slow
def test_samples_are_compared_with_a_reference(inception, images, expected):
    pool, spatial, _ = features_of(inception, images[0])
    known = Reference(*(Gaussian(x.mean(0), x.T.cov()) for x in (pool, spatial)), pool.float())
    suite = DistributionSuite(inception, NUM, known, precision_recall=True)
    suite.update(images[1], torch.arange(NUM))
    values = {name: value.item() for name, value in suite.compute().items()}
    names = {"fid": "gfid", "score": "inception_score"}
    assert values == pytest.approx({names.get(name, name): value for name, value in expected.items()}, rel=1e-3)
