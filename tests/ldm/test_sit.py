"""What is SiT's own; what it shares with LightningDiT is in test_denoiser.py."""

import pytest
import torch

from ldm.condition import Labels
from ldm.models.lightningdit import LightningDiT
from ldm.models.sit import SiT

SMALL = {"in_channels": 3, "input_size": 4, "depth": 2, "width": 16, "num_heads": 2, "num_classes": 5}


def test_without_alignment_it_is_a_lightningdit_of_former_parts():
    models = []
    for kind, options in (
        (SiT, {"cls_channels": 0, "align_channels": 0}),
        (LightningDiT, {"swiglu": False, "rotary": False, "rms_norm": False}),
    ):
        torch.manual_seed(0)
        models.append(kind(**SMALL | options))
    first, second = (model.state_dict() for model in models)
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_by_default_it_is_that_of_reg():
    with torch.device("meta"):
        model = SiT()
    assert (model.cls_channels, model.align_channels, model.align_depth) == (768, 768, 8)
    assert model.cls_embed.in_features == model.final.cls_out.out_features == model.projector[-1].out_features == 768
    assert model.projector[0].out_features == 2048
    assert model.rotary_cos is None


def test_its_class_token_has_no_position():
    model = SiT(**SMALL, align_depth=1)
    assert (model.position[0] == 0).all()
    assert torch.equal(model.position[1:], SiT(**SMALL, cls_channels=0, align_depth=1).position)


def test_it_remembers_its_own_arguments():
    arguments = SiT(**SMALL, cls_channels=6, align_channels=0).arguments
    assert arguments.keys().isdisjoint({"swiglu", "rotary", "rms_norm"})
    assert arguments["cls_channels"] == 6 and arguments["align_channels"] == 0


@pytest.mark.parametrize("name", ["S/2", pytest.param("B/4", marks=pytest.mark.slow)])
def test_a_named_size_runs(name):
    model = SiT.of_size(name, in_channels=3, input_size=8, num_classes=4, cls_channels=6)
    with torch.no_grad():
        prediction = model(torch.randn(2, 198), torch.rand(2), Labels(torch.arange(2), 4))
    assert prediction.velocity.shape == (2, 3 * 8 * 8 + 6)


def test_heads_of_any_width_are_taken():
    assert SiT(**SMALL | {"width": 12}, align_depth=1).blocks[0].attention.query_norm.normalized_shape == (6,)
    with pytest.raises(ValueError, match="width: 20 does not divide by both 4 and num_heads = 3"):
        SiT(**SMALL | {"width": 20, "num_heads": 3}, align_depth=1)


def test_unknown_size_is_named():
    with pytest.raises(ValueError, match="one of S, B, L, XL, a slash"):
        SiT.of_size("H/2")
