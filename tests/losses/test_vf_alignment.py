import pytest
import torch

from vfm_vae.losses.alignment import adaptive_weight, pool_tokens, vf_loss


def test_equal_directions_cost_nothing():
    features = torch.randn(2, 16, 4, 4)
    z = (features * torch.rand(2, 1, 4, 4).add(0.1)).requires_grad_()
    terms = vf_loss(z, features)
    terms.loss.backward()
    assert terms.loss.item() == pytest.approx(0, abs=1e-6)
    assert z.grad.isfinite().all()


def test_closed_form():
    # Features all alike; latents are orthogonal at the two positions, the first of them as the feature.
    features = torch.tensor([1.0, 0.0]).view(1, 2, 1, 1).expand(1, 2, 1, 2)
    z = torch.eye(2).view(1, 2, 1, 2)
    terms = vf_loss(z, features, distmat_weight=2.0, cos_weight=3.0)
    assert terms.distance.item() == pytest.approx(0.5)  # two of four similarities are off by one
    assert terms.cosine.item() == pytest.approx(0.5)
    assert terms.loss.item() == pytest.approx(2.5)
    terms = vf_loss(z, features, distmat_margin=0.25, cos_margin=0.5)
    assert terms.distance.item() == pytest.approx(0.375)
    assert terms.cosine.item() == pytest.approx(0.25)


def test_margins_wide_enough_leave_no_loss():
    terms = vf_loss(torch.randn(2, 8, 3, 3), torch.randn(2, 8, 3, 3), distmat_margin=2.0, cos_margin=2.0)
    assert terms.loss.item() == 0


def test_autocast_does_not_touch_the_precision():
    z, features = torch.randn(2, 32, 4, 4), torch.randn(2, 32, 4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        terms = vf_loss(z, features)
    assert torch.equal(terms.loss, vf_loss(z, features).loss)


def test_shapes_must_agree():
    with pytest.raises(ValueError, match=r"z: .*\(1, 8, 4, 4\)"):
        vf_loss(torch.zeros(1, 4, 4, 4), torch.zeros(1, 8, 4, 4))


def test_pool_tokens_averages_blocks():
    maps = torch.randn(2, 5, 4, 6)
    pooled = pool_tokens(maps.flatten(2).mT, (4, 6), (2, 3))
    assert torch.allclose(pooled[:, :, 1, 2], maps[:, :, 2:, 4:].mean((2, 3)), atol=1e-6)
    assert torch.equal(pool_tokens(maps.flatten(2).mT, (4, 6), (4, 6)), maps)
    with pytest.raises(ValueError, match=r"latent_grid: .*4x6"):
        pool_tokens(maps.flatten(2).mT, (4, 6), (3, 3))


def test_adaptive_weight_is_the_ratio_of_gradient_norms():
    weight = torch.tensor([3.0, 4.0], requires_grad=True)
    reconstruction, alignment = (6 * weight).sum(), (weight * weight).sum()
    balance = adaptive_weight(reconstruction, alignment, weight)
    assert balance.item() == pytest.approx(6 * 2**0.5 / (10 + 1e-4))
    assert not balance.requires_grad
    assert weight.grad is None
    (reconstruction + balance * alignment).backward()  # the graph is still there
    assert weight.grad is not None


def test_adaptive_weight_is_clamped_where_the_alignment_is_flat():
    weight = torch.ones(2, requires_grad=True)
    assert adaptive_weight((1e6 * weight).sum(), (0 * weight).sum(), weight).item() == 1e8
