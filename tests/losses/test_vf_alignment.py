import pytest
import torch
from torch import nn

from vfm_vae.losses.alignment import adaptive_weight, pool_tokens, settle, vf_loss
from vfm_vae.losses.objective import Objective


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


def test_a_settled_loss_has_the_same_gradients_and_is_passed_once():
    passes = []
    weight = torch.randn(3, requires_grad=True)
    image, small, unused = weight * 2, weight.sum(), weight * 3
    loss = image.pow(3).sum() + small.square()
    loss.register_hook(lambda gradient: passes.append(gradient))
    expected = torch.autograd.grad(4 * loss, weight, retain_graph=True)
    passes.clear()
    settled = settle(loss, [image, small, unused, torch.zeros(2)])
    assert torch.equal(settled, loss)
    for _ in range(2):
        torch.testing.assert_close(torch.autograd.grad(4 * settled, weight, retain_graph=True), expected)
    assert len(passes) == 1


def test_a_loss_of_no_weight_is_settled():
    assert settle(torch.zeros(()), [torch.ones(2, requires_grad=True)]) == 0


class Latent(nn.Module):
    """As much of a tokenizer as the alignment loss asks for."""

    def __init__(self):
        super().__init__()
        self.last_encoding_weight = nn.Parameter(torch.randn(2, 4, 1, 1))
        self.align = nn.Conv2d(2, 4, 1)

    def alignment_target(self, features, z):
        return pool_tokens(features.tokens, features.grid, z.shape[2:])


def test_the_adaptive_weight_is_kept_for_as_long_as_asked():
    objective, tokenizer = Objective(kl=0.0, alignment_every=3), Latent()
    seen = []
    for scale in (1.0, 2.0, 3.0, 4.0, float("nan"), 6.0, 7.0):
        z = nn.functional.conv2d(torch.ones(1, 4, 2, 2), tokenizer.last_encoding_weight)
        target = torch.randn(1, 4, 2, 2, generator=torch.Generator().manual_seed(0))
        features = type("Features", (), {"tokens": target.flatten(2).mT, "grid": (2, 2)})
        _, scalars = objective.latent(None, z, features, tokenizer, scale * z.sum())
        seen.append(scalars["alignment_weight"].item() / seen[0] if seen else scalars["alignment_weight"].item())
    assert seen[1:] == pytest.approx([1, 1, 4, 4, 4, 7], rel=1e-4)
    with pytest.raises(ValueError, match="alignment_every: must be at least 1, given 0"):
        Objective(alignment_every=0)


def test_what_is_not_finite_is_not_kept():
    objective, tokenizer = Objective(kl=0.0, alignment_every=2), Latent()
    seen = []
    for scale in (1.0, 1.0, float("nan"), 1.0, 2.0):
        z = nn.functional.conv2d(torch.ones(1, 4, 2, 2), tokenizer.last_encoding_weight)
        features = type("Features", (), {"tokens": torch.eye(4)[None], "grid": (2, 2)})
        _, scalars = objective.latent(None, z, features, tokenizer, scale * z.sum())
        seen.append(scalars["alignment_weight"].item())
    assert seen == pytest.approx([seen[0]] * 4 + [2 * seen[0]], rel=1e-4)
