"""The search of neighbours against a sort of the whole matrix."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from vfm_vae.metrics import neighbours
from vfm_vae.metrics.neighbours import nearest_neighbours


def by_sorting(features, k, exclude_self):
    """Keys and values by a stable sort of all products in float64."""
    kernel = features.double() @ features.double().T
    if exclude_self:
        kernel.fill_diagonal_(-math.inf)
    columns = kernel.sort(dim=1, descending=True, stable=True).indices[:, :k].sort(dim=1).values
    keys = torch.arange(len(features))[:, None] * len(features) + columns
    return keys.flatten(), kernel.gather(1, columns).flatten()


def integers(n, width=4, highest=2):
    """Features whose products are exact in float32, with many ties among them."""
    return torch.randint(-highest, highest + 1, (n, width), generator=torch.Generator().manual_seed(n)).float()


def gaussian(n, width=24):
    return torch.randn(n, width, generator=torch.Generator().manual_seed(n))


@pytest.fixture(params=[(1024, 4096, 16, 0.4), (32, 64, 16, 0.4), (7, 11, 4, 1.0), (8, 5, 3, 0.0)], ids=str)
def tiles(request, monkeypatch):
    for name, value in zip(("_TILE_ROWS", "_TILE_COLUMNS", "_GROUP", "_CROWDED"), request.param, strict=True):
        monkeypatch.setattr(neighbours, name, value)


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("exclude_self", [True, False])
@pytest.mark.parametrize("n, k", [(150, 10), (150, 1), (97, 40), (33, 32), (2, 1)])
@pytest.mark.parametrize("make", [gaussian, integers])
def test_finds_what_sorting_finds(make, n, k, exclude_self):
    features = make(n)
    found = nearest_neighbours(features, k, exclude_self)
    keys, values = by_sorting(features, k, exclude_self)
    assert torch.equal(found.keys, keys)
    torch.testing.assert_close(found.values, values, rtol=1e-5, atol=1e-5)
    assert (found.num_samples, found.k, found.excludes_self) == (n, k, exclude_self)


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("flip", [False, True])
def test_order_of_samples_is_no_matter(flip):
    # The nearest come last, or first: every tile has something new, or none has.
    features = torch.stack((torch.linspace(1, 2, 200), torch.linspace(0, 1, 200)), dim=1)
    features = features.flip(0) if flip else features
    assert torch.equal(nearest_neighbours(features, 10).keys, by_sorting(features, 10, True)[0])


@pytest.mark.usefixtures("tiles")
def test_one_point_has_the_first_samples_for_neighbours(monkeypatch):
    monkeypatch.setattr(neighbours, "_TIE_ENTRIES", 1000)
    features = torch.ones(150, 4)
    assert torch.equal(nearest_neighbours(features, 10).keys, by_sorting(features, 10, True)[0])
    assert nearest_neighbours(features, 10, exclude_self=False).keys[-10:].tolist() == [
        149 * 150 + i for i in range(10)
    ]


def test_all_samples_may_be_neighbours():
    found = nearest_neighbours(gaussian(20), 20, exclude_self=False)
    assert torch.equal(found.keys, torch.arange(400))


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e25])
def test_what_is_not_finite_makes_all_values_nan(value):
    features = gaussian(40)
    features[3, 2] = value
    found = nearest_neighbours(features, 5)
    assert found.values.isnan().all() and len(found.keys) == 200


class LargestTensor(TorchDispatchMode):
    """Notes how many entries the largest tensor has that any operation returns."""

    entries = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            self.entries = max(self.entries, tensor.numel() if isinstance(tensor, torch.Tensor) else 0)
        return result


@pytest.mark.parametrize("make", [gaussian, integers])
def test_nothing_larger_than_a_tile_is_held(monkeypatch, make):
    for name, value in (("_TILE_ROWS", 64), ("_TILE_COLUMNS", 128), ("_TIE_ENTRIES", 8192)):
        monkeypatch.setattr(neighbours, name, value)
    features = make(1000)
    with LargestTensor() as largest:
        nearest_neighbours(features, 5)
    assert 64 * 128 <= largest.entries <= 1000 * 24  # by far not 1000 x 1000


def test_gradients_and_types_do_not_matter():
    features = gaussian(50).bfloat16().requires_grad_()
    found = nearest_neighbours(features, 5)
    assert not found.values.requires_grad and found.values.dtype == torch.float64
    assert torch.equal(found.keys, by_sorting(features.detach(), 5, True)[0])


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"features must be a matrix.*\(3,\)"):
        nearest_neighbours(torch.rand(3), 1)
    with pytest.raises(ValueError, match="at least 11 samples; got 10"):
        nearest_neighbours(torch.rand(10, 2), 10)
    with pytest.raises(ValueError, match="k >= 1"):
        nearest_neighbours(torch.rand(10, 2), 0)
