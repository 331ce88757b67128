"""iREPA: targets without what tokens share, and a projector that sees neighbours."""

from functools import partial

import pytest
import torch

from ldm.alignment import REG, REPA, alignment_error, spatially_normalised
from ldm.condition import Labels
from ldm.models.lightningdit import LightningDiT
from ldm.models.projectors import ConvProjector
from ldm.module import DiffusionModule
from ldm.objective import denoising_errors

ALIGNMENTS = {"repa": REPA, "reg": REG}
every_alignment = pytest.mark.parametrize("alignment", ALIGNMENTS)


def test_two_tokens_become_plus_and_minus_one_and_their_mean_goes_as_far_as_gamma_says():
    """Mean and deviation of (a, b) are (a + b) / 2 and |a − b| / 2; a channel without deviation becomes zero."""
    patches = torch.tensor([[[1.0, 7.0, 4.0], [3.0, -1.0, 4.0]]])  # [B, N, D]
    whole, half, none = (spatially_normalised(patches, gamma) for gamma in (1.0, 0.5, 0.0))
    assert torch.allclose(whole, torch.tensor([[[-1.0, 1.0, 0.0], [1.0, -1.0, 0.0]]]), atol=1e-5)
    assert torch.allclose(half[..., :2], torch.tensor([[[0.0, 1.375], [2.0, -0.625]]]), atol=1e-5)
    assert torch.allclose(none[..., :2], torch.tensor([[[1.0, 1.75], [3.0, -0.25]]]), atol=1e-5)


def test_images_are_normalised_by_themselves_whatever_all_their_tokens_share():
    patches = torch.randn(3, 16, 8)
    shared = 5 * torch.randn(3, 1, 8)
    normal = spatially_normalised(patches, 1.0)
    assert torch.allclose(spatially_normalised(2 * patches + shared, 1.0), normal, atol=1e-4)
    assert torch.allclose(normal.mean(1), torch.zeros(3, 8), atol=1e-5)
    assert torch.allclose(normal.square().mean(1), torch.ones(3, 8), atol=1e-4)
    assert torch.equal(spatially_normalised(patches[:, :1], 1.0), torch.zeros(3, 1, 8))  # a single token is no NaN


@every_alignment
def test_targets_are_normalised_but_for_the_class_token(alignment):
    features, prefix = torch.randn(2, 17, 8) + 3, int(alignment == "reg")
    features[:, 0] = 5.0
    targets = torch.cat([features[:, :1], spatially_normalised(features[:, 1:], 0.6)], dim=1)[:, 1 - prefix :]
    kind = ALIGNMENTS[alignment]
    assert torch.allclose(kind(spatial_norm=0.6).error(targets, features), -torch.ones(2))
    assert (kind(spatial_norm=1.0).error(targets, features) > -0.95).all()
    plain = kind().error(targets, features)
    assert torch.equal(plain, alignment_error(targets, features[:, 1 - prefix :])) and (plain > -0.95).all()


@pytest.mark.parametrize("has_class_token", [False, True])
def test_the_projector_is_a_convolution_on_the_grid_of_tokens(has_class_token):
    """Each token gets a sum over its neighbours in the raster; outside the grid there are zeros."""
    rows, columns, prefix = 2, 3, int(has_class_token)
    projector = ConvProjector(4, 5, (rows, columns), has_class_token).double()
    tokens = torch.randn(2, prefix + rows * columns, 4, dtype=torch.float64, requires_grad=True)
    found = projector(tokens)
    weight, bias = projector.conv.weight, projector.conv.bias  # [5, 4, 3, 3], [5]
    for row in range(rows):
        for column in range(columns):
            near = [
                tokens[:, prefix + (row + i) * columns + column + j] @ weight[:, :, 1 + i, 1 + j].mT
                for i in (-1, 0, 1)
                for j in (-1, 0, 1)
                if 0 <= row + i < rows and 0 <= column + j < columns
            ]
            assert torch.allclose(found[:, prefix + row * columns + column], sum(near) + bias)
    assert found.shape == (2, prefix + rows * columns, 5)
    if has_class_token:
        assert torch.allclose(found[:, 0], tokens[:, 0] @ projector.cls.weight.mT + projector.cls.bias)
    assert torch.autograd.gradcheck(projector, tokens)


@every_alignment
def test_it_is_aligned_and_trains_all_of_the_projector(alignment):
    torch.manual_seed(0)
    parts = {"align_channels": 8, "cls_channels": 8 * (alignment == "reg"), "align_depth": 1, "projector": "conv"}
    network = LightningDiT(4, 4, 1, 2, 16, 2, 3, **parts)
    module = DiffusionModule(
        network, partial(torch.optim.Adam, lr=1e-2), alignment=ALIGNMENTS[alignment](spatial_norm=1.0)
    )
    state, noise = torch.randn(2, 4, *network.state_shape)
    features, t, condition = torch.randn(4, 17, 8), torch.rand(4), Labels(torch.arange(4), 3)
    optimizer, losses = module.configure_optimizers(), []
    for _ in range(40):
        errors = denoising_errors(network, module.alignment, state, features, noise, t, condition)
        losses.append(errors["align"].mean())
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0] - 0.5
    assert all(parameter.grad.any() for parameter in network.projector.parameters())
