"""LightningDiT's options and the layers that parity alone does not pin down."""

import pytest
import torch

from ldm.models.layers import position_table, rotary_angles, rotate, unpatchify
from ldm.models.lightningdit import LightningDiT


def small(**options) -> LightningDiT:
    torch.manual_seed(0)
    return LightningDiT(**{"in_channels": 3, "input_size": 4, "depth": 2, "width": 16, "num_heads": 2} | options)


def randomised(model: LightningDiT) -> LightningDiT:
    """With weights that no path survives unnoticed."""
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize("option", ["qk_norm", "swiglu", "rotary", "rms_norm"])
def test_every_option_changes_the_output(option):
    x, t, y = torch.randn(2, 3, 4, 4), torch.tensor([0.2, 0.7]), torch.tensor([1, 1000])
    outputs = [randomised(small(**{option: value}))(x, t, y) for value in (True, False)]
    assert all(output.shape == x.shape for output in outputs)
    assert (outputs[0] - outputs[1]).abs().max() > 1e-3


@pytest.mark.parametrize(("input_size", "patch_size"), [(4, 2), ((4, 8), 1), ((8, 4), 2)])
def test_sizes_and_patches(input_size, patch_size):
    model = small(input_size=input_size, patch_size=patch_size)
    x = torch.randn(2, *model.latent_shape)
    assert model(x, torch.rand(2), torch.zeros(2, dtype=torch.int64)).shape == x.shape


def test_an_untrained_model_predicts_zero():
    assert (small()(torch.randn(2, 3, 4, 4), torch.rand(2), torch.tensor([0, 1])) == 0).all()


def test_nothing_that_is_fixed_is_stored_or_trained():
    model = small()
    assert not any("position" in name or "rotary" in name or "frequencies" in name for name in model.state_dict())


def test_unpatchify_is_the_inverse_of_cutting_patches():
    image = torch.arange(2 * 3 * 4 * 6.0).reshape(2, 3, 4, 6)
    patches = image.unfold(2, 2, 2).unfold(3, 2, 2)  # [B, C, 2, 3, p, p]
    tokens = patches.permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)
    assert torch.equal(unpatchify(tokens, (2, 3), 2), image)


def test_rotary_attention_sees_relative_positions_alone():
    """The product of a turned query and a turned key depends on how far they lie apart, on either axis."""
    angles = rotary_angles((5, 6), 8)
    query, key = torch.randn(2, 8, dtype=torch.float64)
    turned = [
        rotate(x.expand(1, 1, 30, 8), angles.cos(), angles.sin())[0, 0].unflatten(0, (5, 6)) for x in (query, key)
    ]
    products = torch.einsum("abd,ijd->abij", *turned)
    assert torch.allclose(products[0, 0, 2, 3], products[1, 2, 3, 5])
    assert not torch.allclose(products[0, 0, 2, 3], products[0, 0, 3, 2])


def test_activation_checkpointing_changes_no_gradient():
    x, t, y = torch.randn(2, 3, 4, 4), torch.tensor([0.2, 0.7]), torch.tensor([1, 2])
    gradients, calls = [], []
    for value in (False, True):
        torch.manual_seed(1)
        model = randomised(small(activation_checkpointing=value))
        model.blocks[0].register_forward_pre_hook(lambda *_, value=value: calls.append(value))
        model(x, t, y).square().mean().backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*gradients, strict=True))
    assert calls == [False, True, True]


def test_positions_are_all_different():
    table = position_table((8, 8), 32)
    distances = torch.cdist(table, table) + 9 * torch.eye(64)
    assert distances.min() > 0.1


def test_bf16_autocast_stays_close():
    model = randomised(small()).eval()
    for parameter in model.parameters():
        parameter.data.mul_(0.2)
    x, t, y = torch.randn(4, 3, 4, 4), torch.rand(4), torch.arange(4)
    with torch.no_grad():
        full = model(x, t, y)
        with torch.autocast("cpu", torch.bfloat16):
            half = model(x, t, y).float()
    assert (half - full).norm() / full.norm() < 0.05


@pytest.mark.parametrize(
    ("options", "message"),
    [({"width": 20, "num_heads": 2}, "width: 20 does not divide"), ({"patch_size": 3}, "patch_size: 3 does not")],
)
def test_sizes_that_do_not_divide_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        small(**options)


def test_unknown_size_is_named():
    with pytest.raises(ValueError, match="one of B, L, XL, 1p0B, 1p6B"):
        LightningDiT.of_size("H/2")
