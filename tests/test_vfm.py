import copy
import json

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

from vfm_vae.frozen import Frozen
from vfm_vae.vfm import FrozenVFM, check_frozen, vfm_from
from vfm_vae.vit import create_vit, family_of

# Real timm entry points, shrunk; (prefix tokens, has a class token)
FAMILIES = {
    "vit_large_patch16_siglip_512.v2_webli": (0, False),
    "vit_base_patch16_siglip_256.webli": (0, False),
    "vit_large_patch14_dinov2.lvd142m": (1, True),
    "vit_large_patch14_reg4_dinov2.lvd142m": (5, True),
    "vit_large_patch16_dinov3.lvd1689m": (5, True),
    "eva02_large_patch14_448.mim_m38m_ft_in22k_in1k": (1, True),
    "eva_giant_patch14_336.clip_ft_in1k": (1, True),
    "vit_large_patch16_224.mae": (1, True),
    "vit_large_patch14_clip_224.openai": (1, True),
    "vit_pe_core_large_patch14_336.fb": (1, True),
}
SIGLIP = "vit_large_patch16_siglip_512.v2_webli"
DEPTH, WIDTH = 3, 48


def tiny(name=SIGLIP, **kwargs):
    torch.manual_seed(0)
    model_args = {"depth": DEPTH, "embed_dim": WIDTH, "num_heads": 2, "img_size": 56 if "patch14" in name else 64}
    return FrozenVFM(name, pretrained=False, model_args=model_args, **kwargs)


def images_for(vfm, rows=4, columns=4, batch=2):
    side = vfm.patch_size / vfm.input_scale
    generator = torch.Generator().manual_seed(1)
    return torch.rand(batch, 3, int(rows * side), int(columns * side), generator=generator) * 2 - 1


def tokens_by_hand(vfm, images):
    """Tokens entering the first block, leaving each block, and after the final norm: a plain run, block by block."""
    network = vfm.network
    x = network.patch_embed(vfm.prepare(images))
    x = network._pos_embed(x)
    x, *rope = x if isinstance(x, tuple) else (x,)
    x = network.norm_pre(x)
    tokens = [x]
    for depth, block in enumerate(network.blocks):
        if rope and rope[0] is not None:
            mixed = getattr(network, "rope_mixed", False)
            x = block(x, rope=rope[0][depth] if mixed else rope[0])
        else:
            x = block(x)
        tokens.append(x)
    return [*tokens, network.norm(x)]


@pytest.mark.parametrize("name", FAMILIES)
def test_layers_tokens_and_pooled_feature_of_every_family(name):
    num_prefix, has_class_token = FAMILIES[name]
    layers = (-1, 0, 2, -2, -3, 2)
    vfm = tiny(name, layers=layers)
    images = images_for(vfm)

    features = vfm(images)

    by_hand = tokens_by_hand(vfm, images)  # index k: k blocks passed; the last: after the norm
    assert vfm.network.num_prefix_tokens == num_prefix
    for layer, tokens in zip(layers, features.layers, strict=True):
        assert tokens.shape == (2, 16, WIDTH)
        assert tokens.dtype == torch.float32
        torch.testing.assert_close(tokens, by_hand[layer][:, num_prefix:])
    torch.testing.assert_close(features.tokens, by_hand[-1][:, num_prefix:])
    pooled = by_hand[-1][:, 0] if has_class_token else by_hand[-1].mean(1)
    torch.testing.assert_close(features.pooled, pooled)
    assert vfm.width == WIDTH
    assert vfm.depth == DEPTH


@pytest.mark.parametrize("name", FAMILIES)
def test_any_size_that_the_patches_divide(name):
    vfm = tiny(name, layers=(0, -1))
    features = vfm(images_for(vfm, rows=3, columns=6))
    assert features.grid == (3, 6)
    assert features.tokens.shape == features.layers[0].shape == (2, 18, WIDTH)


def test_tokens_are_in_raster_order():
    vfm = tiny(layers=(0,))
    images = images_for(vfm, rows=3, columns=5)
    changed = images.clone()
    changed[:, :, 16:32, 48:64] = 0  # row 1, column 3
    moved = (vfm(images).layers[0] != vfm(changed).layers[0]).any(-1).any(0)
    assert moved.nonzero().flatten().tolist() == [1 * 5 + 3]


def test_input_scale_enlarges_the_token_grid():
    vfm = tiny(input_scale=2.0)
    assert vfm(images_for(vfm, rows=4, columns=6)).grid == (4, 6)
    assert vfm.prepare(torch.zeros(1, 3, 32, 48)).shape == (1, 3, 64, 96)


@pytest.mark.parametrize(("name", "mode"), [("vit_base_patch14_dinov2.lvd142m", "bicubic"), (SIGLIP, "bilinear")])
@pytest.mark.parametrize(("scale", "side"), [(0.875, 224), (1.25, 320)])
@pytest.mark.parametrize("antialias", [None, False, True])
def test_antialiasing_follows_the_scale_unless_it_is_given(name, mode, scale, side, antialias):
    vfm = tiny(name, input_scale=scale, **({} if antialias is None else {"antialias": antialias}))
    images = torch.rand(1, 3, 256, 256, generator=torch.Generator().manual_seed(0))
    expected = scale < 1 if antialias is None else antialias
    resized = F.interpolate(images, size=(side, side), mode=mode, antialias=expected)
    torch.testing.assert_close(vfm.prepare(images * 2 - 1), (resized - vfm.mean) / vfm.std, rtol=0, atol=1e-5)
    assert vfm.arguments["antialias"] is vfm.source()["antialias"] is antialias
    assert vfm.fingerprint() == tiny(name).fingerprint()  # which is of the weights alone


def test_a_description_without_antialiasing_has_the_rule():
    described = {"class_path": "vfm_vae.vfm.FrozenVFM", "init_args": {"name": SIGLIP, "input_scale": 0.5}}
    assert FrozenVFM.arguments_of(described)["antialias"] is None


def test_interpolation_follows_the_family():
    def interpolations(name):
        return family_of(name)[:2]

    assert interpolations(SIGLIP) == interpolations("vit_large_patch16_224.mae") == ("bilinear", "bilinear")
    for dino in ("vit_large_patch14_dinov2.lvd142m", "vit_base_patch14_reg4_dinov2", "vit_small_patch16_224.dino"):
        assert interpolations(dino) == ("bicubic", "bicubic")
    for eva in ("eva_large_patch14_196.in22k_ft_in22k", "eva02_large_patch14_224.mim_m38m"):
        assert interpolations(eva) == ("bilinear", "bicubic")


def test_an_interpolation_that_is_given_counts_and_is_told():
    usual = FrozenVFM("vit_photos_patch8_64", input_scale=2.0)
    other = FrozenVFM("vit_photos_patch8_64", input_scale=2.0, interpolation="bicubic", target_interpolation="bicubic")
    images = torch.rand(1, 3, 32, 32) * 2 - 1
    assert not torch.equal(other(images).tokens, usual(images).tokens)
    assert usual.target_interpolation == "bilinear" and other.target_interpolation == "bicubic"
    assert "interpolation" not in usual.source() and "interpolation" not in usual.view()
    assert other.source()["interpolation"] == other.view()["interpolation"] == "bicubic"
    assert torch.equal(vfm_from(other.source())(images).tokens, other(images).tokens)


def test_the_family_of_a_source_is_that_of_its_architecture(tmp_path):
    config = {"architecture": "vit_small_patch14_reg4_dinov2", "pretrained_cfg": {"num_classes": 0}}
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_args": {"img_size": 56}}))
    vfm = FrozenVFM(f"local-dir:{tmp_path}", pretrained=False, model_args={"depth": 1})
    assert (vfm.interpolation, vfm.antialias_positions) == ("bicubic", True)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_shape_is_known_without_building_and_without_drawing(name):
    vfm = tiny(name, layers=(0, -1), input_scale=0.5)
    before = torch.get_rng_state()
    shape = FrozenVFM.shape_of(**vfm.arguments)
    assert torch.equal(torch.get_rng_state(), before)
    told = vfm.width, vfm.widths, vfm.stride, vfm.target_interpolation
    assert shape == told and vfm.widths == (WIDTH, WIDTH) and vfm.stride == 2 * vfm.patch_size


def test_grid_is_of_the_images_before_they_are_resized():
    vfm = tiny(input_scale=2.0)
    assert vfm.grid(32, 48) == vfm(torch.zeros(1, 3, 32, 48)).grid == (4, 6)
    with pytest.raises(ValueError, match=r"don't divide 66x64 \(images resized by input_scale = 2.0\)"):
        vfm.grid(33, 32)


def test_a_vfm_whose_weights_would_be_trained_is_refused():
    vfm = tiny()
    check_frozen(vfm)
    vfm.head = nn.Linear(2, 2)
    with pytest.raises(
        ValueError, match=r"^FrozenVFM would be trained and saved .* derive it from vfm_vae.frozen.Frozen"
    ):
        check_frozen(vfm)


def test_frozen_stays_frozen_in_training():
    vfm = tiny()
    model = nn.ModuleDict({"vfm": vfm, "head": nn.Linear(WIDTH, 1)})
    before = copy.deepcopy(vfm.network.state_dict())
    model.train().requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0)
    for _ in range(2):
        optimizer.zero_grad()
        model["head"](model["vfm"].differentiable(images_for(vfm)).pooled).sum().backward()
        optimizer.step()
    assert not any(module.training for module in vfm.network.modules())
    assert not any(parameter.requires_grad for parameter in vfm.network.parameters())
    assert all(torch.equal(value, before[key]) for key, value in vfm.network.state_dict().items())


def test_is_in_no_parameters_and_no_checkpoint():
    model = nn.ModuleDict({"vfm": tiny(), "head": nn.Linear(WIDTH, 1)})
    assert set(model.state_dict()) == {"head.weight", "head.bias"}
    assert {name for name, _ in model.named_parameters()} == {"head.weight", "head.bias"}
    model.load_state_dict(model.state_dict())


def test_gradients_reach_the_images_only_when_asked():
    vfm = tiny(layers=(1, -1))
    images = images_for(vfm).requires_grad_()
    assert not vfm(images).tokens.requires_grad
    vfm.differentiable(images).tokens.square().mean().backward()
    assert images.grad.abs().sum() > 0


def test_follows_to_and_still_answers_in_float32():
    vfm = tiny(layers=(0, -1))
    images = images_for(vfm)
    expected = vfm(images).tokens
    nn.Sequential(vfm).to(torch.float64)
    assert next(vfm.network.parameters()).dtype == torch.float64
    features = vfm(images)
    assert {features.tokens.dtype, features.pooled.dtype, features.layers[0].dtype} == {torch.float32}
    torch.testing.assert_close(features.tokens, expected)
    assert next(nn.Sequential(vfm).to("meta")[0].network.parameters()).device.type == "meta"


@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
def test_stays_in_float32_under_autocast_on_cpu(precision):
    vfm = tiny(precision=precision)
    images = images_for(vfm)
    with torch.autocast("cpu", torch.bfloat16):
        features = vfm(images)
    assert torch.equal(features.tokens, vfm(images).tokens)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
def test_runs_on_cuda_in_the_precision_asked_for(precision):
    torch.backends.cudnn.allow_tf32 = False  # which float32 convolutions would take by default
    vfm = tiny(layers=(0, -1), precision=precision).cuda()
    vfm.hold_products_in(torch.bfloat16)
    with torch.autocast("cuda", torch.bfloat16):
        features = vfm(images_for(vfm).cuda())
    assert features.tokens.dtype == torch.float32
    expected = tiny(layers=(0, -1))(images_for(vfm)).tokens
    error = ((features.tokens.cpu() - expected).norm() / expected.norm()).item()
    assert error < 1e-4 if precision == "float32" else 1e-3 < error < 0.05


def test_float32_stays_when_products_are_held_in_less():
    vfm, images = tiny(precision="float32"), images_for(tiny())
    expected = vfm(images).tokens
    vfm.hold_products_in(torch.bfloat16)
    assert {parameter.dtype for parameter in vfm.network.parameters()} == {torch.float32}
    assert torch.equal(vfm(images).tokens, expected)


def test_precision_is_named_where_it_is_another_than_it_was_before():
    assert "precision" not in tiny().source()
    assert tiny(precision="float32").source()["precision"] == "float32"
    described = {"init_args": {"name": SIGLIP}}
    assert FrozenVFM.arguments_of(described)["precision"] == "bfloat16"
    with pytest.raises(ValueError, match="precision: one of 'bfloat16', 'float32', given 'float16'"):
        tiny(precision="float16")


def test_copies_are_independent_and_leave_no_hooks():
    vfm = tiny(layers=(0, 1, -1))
    images = images_for(vfm)
    expected = vfm(images).tokens
    duplicate = copy.deepcopy(vfm)
    with torch.no_grad():
        vfm.network.blocks[0].mlp.fc1.weight.zero_()
    torch.testing.assert_close(duplicate(images).tokens, expected)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in duplicate.network.modules())


def test_fingerprint_tells_weights_apart():
    vfm, same = tiny(), tiny(layers=(0,), input_scale=2.0)
    other = tiny()
    with torch.no_grad():
        other.network.norm.bias[0] += 1e-6
    assert vfm.fingerprint() == same.fingerprint() == copy.deepcopy(vfm).fingerprint()
    assert vfm.fingerprint() != other.fingerprint()
    assert len(vfm.fingerprint()) == 64


def test_frozen_runs_any_network():
    frozen = Frozen(nn.Sequential(nn.Linear(2, 2), nn.Dropout()))
    frozen.train()
    x = torch.ones(1, 2, requires_grad=True)
    assert torch.equal(frozen(x), frozen(x))
    assert frozen(x).requires_grad
    assert not list(frozen.parameters())


def test_weights_from_a_local_file(tmp_path):
    vfm = tiny()
    model_args = {"depth": DEPTH, "embed_dim": WIDTH, "num_heads": 2, "img_size": 64}
    torch.save(vfm.network.state_dict(), tmp_path / "vit.pth")
    again = FrozenVFM(SIGLIP, weights=str(tmp_path / "vit.pth"), model_args=model_args)
    assert again.fingerprint() == vfm.fingerprint()


def test_unknown_names_are_refused_with_a_suggestion():
    with pytest.raises(ValueError, match="no model 'vit_large_patch16_siglip_521'; did you mean 'vit_large_"):
        create_vit("vit_large_patch16_siglip_521")
    with pytest.raises(ValueError, match=r"no weights called 'webli2'; there are \['v2_webli'\]"):
        create_vit("vit_large_patch16_siglip_512.webli2")
    with pytest.raises(ValueError, match="is no plain vision transformer"):
        create_vit("resnet18", pretrained=False)


def test_missing_and_unreadable_weights_are_refused(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"no file at '/nowhere/vit.safetensors' for 'vit_"):
        create_vit(SIGLIP, weights="/nowhere/vit.safetensors")
    (tmp_path / "vit.pth").write_bytes(b"no weights")
    with pytest.raises(ValueError, match=r"weights: '.*vit\.pth' can't be read as weights: it is text"):
        create_vit(SIGLIP, weights=tmp_path / "vit.pth", depth=1, embed_dim=16, num_heads=1)

    def offline(*args, **kwargs):
        raise OSError("no route to host\nmore")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(ValueError, match=r"by download \(OSError: no route to host\); give a local file") as error:
        create_vit(SIGLIP)
    assert "\n" not in str(error.value)


def test_sizes_that_do_not_fit_are_refused():
    vfm = tiny(input_scale=2.0)
    with pytest.raises(ValueError, match=r"patches of 16 pixels, which don't divide 64x68 \(images resized by"):
        vfm(torch.zeros(1, 3, 32, 34))
    fixed = tiny("beit_base_patch16_224")
    assert fixed(torch.zeros(1, 3, 64, 64)).grid == (4, 4)
    with pytest.raises(ValueError, match="beit_base_patch16_224 takes 64x64 pixels only, given 48x64"):
        fixed(torch.zeros(1, 3, 48, 64))
    with pytest.raises(ValueError, match=r"float images in \[-1, 1\], given torch.uint8"):
        vfm(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))


@pytest.mark.parametrize("layer", [DEPTH + 1, -DEPTH - 3])
def test_layers_that_do_not_exist_are_refused(layer):
    with pytest.raises(ValueError, match=f"layers: {SIGLIP} has no layer {layer}; its 3 blocks give layers 0 to 3"):
        tiny(layers=(layer,))


def test_products_held_in_bfloat16_give_the_same_under_autocast():
    vfm, images = FrozenVFM("vit_photos_patch8_64"), torch.rand(2, 3, 64, 64)
    fingerprint = FrozenVFM("vit_photos_patch8_64").fingerprint()

    def features():
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            return vfm.network.forward_features(images)

    expected = features()
    vfm.hold_products_in(torch.bfloat16)
    assert torch.equal(features(), expected)
    assert vfm.fingerprint() == fingerprint
    assert vfm.network.blocks[0].mlp.fc1.weight.dtype == torch.bfloat16
    assert vfm.network.blocks[0].norm1.weight.dtype == torch.float32
