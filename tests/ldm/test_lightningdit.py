"""LightningDiT's options and the layers that parity alone does not pin down; test_denoiser.py has what SiT shares."""

import pytest
import torch

from ldm.condition import Labels
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
    x, t, labels = torch.randn(2, 3, 4, 4), torch.tensor([0.2, 0.7]), Labels(torch.tensor([1, 1000]), 1000)
    outputs = [randomised(small(**{option: value}))(x, t, labels).velocity for value in (True, False)]
    assert all(output.shape == x.shape for output in outputs)
    assert (outputs[0] - outputs[1]).abs().max() > 1e-3


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


def test_positions_are_all_different():
    table = position_table((8, 8), 32)
    distances = torch.cdist(table, table) + 9 * torch.eye(64)
    assert distances.min() > 0.1


@torch.no_grad()
def test_a_class_token_has_no_position_and_is_not_turned():
    plain, model = small(), small(cls_channels=6)
    for name, prefix in (("position", 0.0), ("rotary_cos", 1.0), ("rotary_sin", 0.0)):
        table = getattr(model, name)
        assert (table[0] == prefix).all(), name
        assert torch.equal(table[1:], getattr(plain, name)), name
    query = torch.randn(2, 2, 17, 8)
    turned = rotate(query, model.rotary_cos, model.rotary_sin)
    assert torch.equal(turned[:, :, 0], query[:, :, 0])
    assert torch.equal(turned[:, :, 1:], rotate(query[:, :, 1:], plain.rotary_cos, plain.rotary_sin))


def test_a_projector_leaves_all_other_weights_as_they_are_named():
    names = small().state_dict().keys()
    aligned = small(align_channels=8, align_depth=1, projector_width=12).state_dict().keys()
    assert aligned - names == {f"projector.{layer}.{part}" for layer in (0, 2, 4) for part in ("weight", "bias")}
    assert names <= aligned


def test_heads_have_to_turn_by_row_and_column():
    with pytest.raises(ValueError, match="width: 20 does not divide by 4 · num_heads = 8"):
        small(width=20)
    assert small(width=20, rotary=False).rotary_cos is None


def test_unknown_size_is_named():
    with pytest.raises(ValueError, match="one of B, L, XL, 1p0B, 1p6B"):
        LightningDiT.of_size("H/2")


def test_a_named_size_is_not_overridden():
    with pytest.raises(TypeError, match="multiple values for keyword argument 'depth'"):
        LightningDiT.of_size("B/1", depth=3)
