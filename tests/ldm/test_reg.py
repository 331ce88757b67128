"""REG's options, and that all of it trains."""

import pytest
import torch

from ldm import path
from ldm.models.reg import REG

SMALL = {
    "in_channels": 3,
    "input_size": 4,
    "depth": 2,
    "width": 16,
    "num_heads": 2,
    "num_classes": 5,
    "cls_channels": 6,
    "align_channels": 8,
    "align_depth": 1,
    "projector_width": 12,
}


def small(**options) -> REG:
    torch.manual_seed(0)
    return REG(**SMALL | options)


def randomised(model: REG) -> REG:
    """With weights that no path survives unnoticed."""
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def inputs(model: REG, num: int = 2) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(1)
    x, cls_token = torch.randn(num, *model.latent_shape), torch.randn(num, model.cls_channels)
    return x, torch.rand(num), torch.arange(num), cls_token


@pytest.mark.parametrize(("input_size", "patch_size"), [(4, 2), ((4, 8), 1), ((8, 4), 2)])
def test_sizes_and_patches(input_size, patch_size):
    model = small(input_size=input_size, patch_size=patch_size)
    output = model(*inputs(model))
    num_patches = model.grid[0] * model.grid[1]
    assert output.velocity.shape == (2, *model.latent_shape)
    assert output.cls_velocity.shape == (2, 6)
    assert output.projected.shape == (2, 1 + num_patches, 8)
    assert model.num_prefix_tokens == 1


def test_an_untrained_model_predicts_zero():
    output = small()(*inputs(small()))
    assert (output.velocity == 0).all()
    assert (output.cls_velocity == 0).all()
    assert (output.projected != 0).any()


def test_the_table_of_positions_is_not_stored():
    assert not any("position" in name or "frequencies" in name for name in small().state_dict())


@torch.no_grad()
def test_latent_and_class_token_see_each_other():
    model = randomised(small()).eval()
    x, t, y, cls_token = inputs(model)
    output = model(x, t, y, cls_token)
    assert (model(x, t, y, cls_token + 1).velocity - output.velocity).abs().max() > 1e-3
    assert (model(x + 1, t, y, cls_token).cls_velocity - output.cls_velocity).abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("align_depth", [1, 2])
def test_alignment_reads_the_block_it_names(align_depth):
    model = randomised(small(align_depth=align_depth)).eval()
    blocks = []
    for block in model.blocks:
        block.register_forward_hook(lambda *args: blocks.append(args[-1]))
    assert torch.equal(model(*inputs(model)).projected, model.projector(blocks[align_depth - 1]))


def test_block_features_leave_the_class_token_out():
    model = randomised(small()).eval()
    blocks = []
    for block in model.blocks:
        block.register_forward_hook(lambda *args: blocks.append(args[-1]))
    features = model.block_features(*inputs(model))
    assert [f.shape for f in features] == [(2, 16)] * 2
    assert all(torch.equal(f, tokens[:, 1:].mean(1)) for f, tokens in zip(features, blocks, strict=True))


def test_one_batch_trains_everything():
    model = small()
    data, noise = torch.randn(2, 8, 3, 4, 4)
    cls, cls_noise = torch.randn(2, 8, 6)
    target, t, y = torch.randn(8, 17, 8), torch.rand(8), torch.arange(8) % 6
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.0)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    losses = []
    for _ in range(100):
        output = model(path.interpolate(data, noise, t), t, y, path.interpolate(cls, cls_noise, t))
        align = -torch.cosine_similarity(output.projected, target, dim=-1).mean()
        mse = path.squared_error(output.velocity, path.velocity(data, noise)).mean()
        mse_cls = path.squared_error(output.cls_velocity, path.velocity(cls, cls_noise)).mean()
        losses.append(mse + 0.5 * align + 0.03 * mse_cls)
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]
    assert [name for name, p in model.named_parameters() if not p.grad.any() or torch.equal(p, before[name])] == []


def test_activation_checkpointing_changes_no_gradient():
    gradients, calls = [], []
    for value in (False, True):
        model = randomised(small(activation_checkpointing=value))
        model.blocks[0].register_forward_pre_hook(lambda *_, value=value: calls.append(value))
        sum(part.square().mean() for part in model(*inputs(model))).backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*gradients, strict=True))
    assert calls == [False, True, True]


def test_bf16_autocast_stays_close():
    model = randomised(small()).eval()
    for parameter in model.parameters():
        parameter.data.mul_(0.2)
    with torch.no_grad():
        full = model(*inputs(model, 4))
        with torch.autocast("cpu", torch.bfloat16):
            half = model(*inputs(model, 4))
    assert all((h.float() - f).norm() / f.norm() < 0.05 for h, f in zip(half, full, strict=True))


@pytest.mark.parametrize("name", ["S/2", "B/4"])
def test_a_named_size_runs(name):
    model = REG.of_size(name, in_channels=3, input_size=8, num_classes=4)
    with torch.no_grad():
        assert model(*inputs(model)).velocity.shape == (2, 3, 8, 8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 18, "num_heads": 2}, "width: 18 does not divide"),
        ({"width": 20, "num_heads": 3}, "width: 20 does not divide"),
        ({"patch_size": 3}, "patch_size: 3 does not"),
        ({"align_depth": 3}, "align_depth: a block from 1 to depth = 2, given 3"),
        ({"align_depth": 0}, "align_depth"),
    ],
)
def test_options_out_of_range_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        small(**options)


def test_unknown_size_is_named():
    with pytest.raises(ValueError, match="one of S, B, L, XL, a slash"):
        REG.of_size("H/2")
