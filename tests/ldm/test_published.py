"""Public configurations and weights, there and back."""

import pytest
import torch

from ldm.condition import Labels
from ldm.models.lightningdit import LightningDiT
from ldm.models.sit import SiT
from ldm.published import (
    denoiser_from_published,
    lightningdit_from_published,
    published_name,
    read_config,
    reg_from_published,
    to_published,
)

SIZES = {"depth": 2, "hidden_size": 16, "num_heads": 2, "input_size": 4, "in_channels": 3, "num_classes": 5}
LIGHTNINGDIT = SIZES | {"use_qknorm": True, "use_swiglu": True, "use_rope": True, "use_rmsnorm": True}
ENCODER = {"z_dims": [6], "encoder_depth": 1, "projector_dim": 12}
REG_ARGUMENTS = SIZES | ENCODER | {"qk_norm": True, "use_cfg": True, "fused_attn": False}
YAML = {
    "ckpt_path": "somewhere",
    "data": {"image_size": 256, "num_classes": 1000, "num_workers": 8, "latent_norm": True},
    "vae": {"model_name": "vfm_vae_f16d32", "downsample_ratio": 16},
    "model": {
        "model_type": "LightningDiT-XL/1",
        "use_qknorm": True,
        "use_swiglu": True,
        "use_rope": True,
        "use_rmsnorm": True,
        "wo_shift": False,
        "in_chans": 32,
    },
    "train": {"max_steps": 600000},
    "transport": {"path_type": "Linear", "prediction": "velocity", "use_lognorm": True},
}
TRAINING = {
    "model": "SiT-XL/1",
    "num_classes": 1000,
    "encoder-depth": 8,
    "fused_attn": True,
    "qk_norm": True,
    "resolution": 256,
    "enc_type": "dinov2-vit-b",
    "path_type": "linear",
    "prediction": "v",
    "latent_size": 16,
    "vae_latent_dim": 32,
    "cls": 0.03,
    "learning_rate": 2e-4,
}


def randomised(model: torch.nn.Module) -> torch.nn.Module:
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.fixture
def lightningdit() -> LightningDiT:
    return randomised(LightningDiT(3, 4, 1, 2, 16, 2, num_classes=5))


@pytest.fixture
def reg() -> SiT:
    options = {"cls_channels": 6, "align_channels": 6, "align_depth": 1, "projector_width": 12}
    return randomised(SiT(3, 4, 1, 2, 16, 2, num_classes=5, **options))


def test_lightningdit_survives_the_way_there_and_back(lightningdit):
    back = denoiser_from_published(to_published(lightningdit), LIGHTNINGDIT | {"patch_size": 1})
    assert isinstance(back, LightningDiT)
    assert not back.training
    assert all(torch.equal(weight, back.state_dict()[name]) for name, weight in lightningdit.state_dict().items())


def test_reg_survives_the_way_there_and_back(reg):
    back = denoiser_from_published(to_published(reg), REG_ARGUMENTS)
    assert isinstance(back, SiT)
    assert not back.training
    for name, weight in reg.state_dict().items():
        assert torch.allclose(weight, back.state_dict()[name], rtol=0, atol=1e-6), name


def test_weights_of_repa_are_those_without_a_class_token(reg):
    repa = randomised(SiT(**reg.arguments | {"cls_channels": 0}))
    weights = to_published(repa)
    assert not {"cls_projectors2.weight", "wg_norm.weight", "final_layer.linear_cls.weight"} & weights.keys()
    back = denoiser_from_published(weights, REG_ARGUMENTS)
    assert back.arguments == repa.arguments
    for name, weight in repa.state_dict().items():
        assert torch.allclose(weight, back.state_dict()[name], rtol=0, atol=1e-6), name


def test_a_lightningdit_leaves_its_projector_and_takes_no_class_token_along(lightningdit):
    options = {"align_channels": 6, "align_depth": 1, "projector_width": 12}
    aligned = randomised(LightningDiT(**lightningdit.arguments | options))
    assert to_published(aligned).keys() == to_published(lightningdit).keys()
    with pytest.raises(ValueError, match="model: the public LightningDiT has no class token"):
        to_published(LightningDiT(**lightningdit.arguments | {"cls_channels": 6}))


@torch.no_grad()
def test_published_reg_has_time_and_velocity_in_the_other_direction(reg):
    """Weights as exported, read under our names without the importer, are a network of 1 − t."""
    weights = to_published(reg)
    public = SiT(**reg.arguments)
    public.load_state_dict({name: weights[published_name(name)] for name in public.state_dict()})
    t = torch.tensor([0.0, 0.3, 0.7, 1.0])
    state, labels = torch.randn(4, *reg.state_shape), Labels(torch.arange(4), 5)
    ours, theirs = reg(state, t, labels, align=True), public(state, 1 - t, labels, align=True)
    assert torch.allclose(ours.velocity, -theirs.velocity, atol=1e-4)
    assert torch.allclose(ours.projected, theirs.projected, atol=1e-4)


def test_weights_in_half_precision_are_turned_in_full(reg):
    half = {name: tensor.bfloat16() for name, tensor in to_published(reg).items()}
    full = {name: tensor.float() for name, tensor in half.items()} | {"pos_embed": to_published(reg)["pos_embed"]}
    for first, second in zip(*(reg_from_published(w, REG_ARGUMENTS).parameters() for w in (half, full)), strict=True):
        assert torch.equal(first, second)


def test_export_leaves_the_model_alone(reg):
    before = {name: tensor.clone() for name, tensor in reg.state_dict().items()}
    to_published(reg)
    assert all(torch.equal(tensor, before[name]) for name, tensor in reg.state_dict().items())


def test_only_known_models_are_exported():
    with pytest.raises(ValueError, match="model: LightningDiT, SiT or DiTDH, given Linear"):
        to_published(torch.nn.Linear(1, 1))


def test_shapes_that_do_not_fit_are_named(lightningdit):
    with pytest.raises(ValueError, match=r"x_embedder.proj.weight: \(16, 3, 1, 1\) instead of \(16, 4, 1, 1\)"):
        lightningdit_from_published(to_published(lightningdit), LIGHTNINGDIT | {"in_channels": 4, "patch_size": 1})


def test_yaml_of_lightningdit():
    assert read_config(YAML) == {
        "registry_name": "LightningDiT-XL/1",
        "input_size": 16,
        "in_channels": 32,
        "num_classes": 1000,
        "use_qknorm": True,
        "use_swiglu": True,
        "use_rope": True,
        "use_rmsnorm": True,
        "wo_shift": False,
    }


def test_training_arguments_of_reg():
    expected = {
        "registry_name": "SiT-XL/1",
        "num_classes": 1000,
        "encoder_depth": 8,
        "qk_norm": True,
        "input_size": 16,
        "in_channels": 32,
        "path_type": "linear",
        "prediction": "v",
    }
    assert read_config(TRAINING) == expected
    assert read_config(TRAINING | {"projector-embed-dims": "768"}) == expected | {"z_dims": [768]}


@pytest.mark.parametrize("config", [LIGHTNINGDIT, REG_ARGUMENTS])
def test_class_arguments_are_read_as_they_are(config):
    assert read_config(config) == config


@pytest.mark.parametrize(("config", "model"), [(YAML, LightningDiT.of_size), (TRAINING, SiT.of_size)])
def test_public_configurations_build_the_full_size(config, model):
    with torch.device("meta"):
        weights = to_published(model("XL/1"))
        shapes = {name: tensor.shape for name, tensor in weights.items()}
        assert {n: t.shape for n, t in to_published(denoiser_from_published(weights, config)).items()} == shapes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": {"num_classes": 1000}}, "data.image_size is missing"),
        ({"vae": None}, "vae.downsample_ratio is missing"),
        ({"model": {"model_type": "LightningDiT-XL/1"}}, "model.in_chans is missing"),
        ({"transport": {"prediction": "noise"}}, "transport.prediction must be velocity"),
    ],
)
def test_what_a_yaml_lacks_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        read_config(YAML | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dropout": 0.1}, r"\['dropout'\] is not supported"),
        ({"use_cfg": False}, r"\['use_cfg'\] is not supported"),
        ({"path_type": "cosine"}, r"\['path_type'\] is not supported"),
        ({"z_dims": [6, 8]}, "z_dims is a list with the width of one VFM"),
        ({"decoder_hidden_size": 32}, "decoder_hidden_size other than hidden_size"),
        ({"registry_name": "SiT-B/2"}, "registry_name already sets"),
    ],
)
def test_arguments_of_reg_that_are_not_supported_are_named(reg, change, message):
    with pytest.raises(ValueError, match=message):
        reg_from_published(to_published(reg), REG_ARGUMENTS | change)
