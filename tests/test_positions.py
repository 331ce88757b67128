"""Tables of positions at other grids than their own; what was made when timm resampled them all goes on so."""

import json
import warnings

import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader

from ldm.alignment import REG
from ldm.models.sit import SiT
from vfm_vae import positions
from vfm_vae.frozen import sha256_of
from vfm_vae.positions import resample_positions
from vfm_vae.published import vfm_source_of
from vfm_vae.tokenizer import VFMVAE
from vfm_vae.vfm import FrozenVFM, check_vfm, vfm_identity

VFM = "vit_photos_patch8_64"
# Whether there is a table; whether antialias is the published network's own way.
FAMILIES = {
    "vit_large_patch16_siglip_512.v2_webli": (True, False),
    "vit_large_patch14_dinov2.lvd142m": (True, False),
    "vit_large_patch14_reg4_dinov2.lvd142m": (True, True),
    "vit_large_patch16_224.mae": (True, False),
    "vit_large_patch14_clip_224.openai": (True, False),
    "eva02_large_patch14_448.mim_m38m_ft_in22k_in1k": (True, False),
    "vit_pe_core_large_patch14_336.fb": (True, False),
    "deit3_small_patch16_224": (True, False),
    "vit_large_patch16_dinov3.lvd1689m": (False, False),
    "beit_base_patch16_224": (False, False),
}
TIMM = {"mode": "bicubic", "antialias": True}


def tiny(name=VFM, **kwargs):
    """A network of random weights with a table of 4 x 4, or the embedded one of 8 x 8."""
    if name == VFM:
        return FrozenVFM(VFM, **kwargs)
    torch.manual_seed(0)
    size = {"img_size": 56 if "patch14" in name else 64, "embed_dim": 48, "depth": 1, "num_heads": 2}
    return FrozenVFM(name, pretrained=False, model_args=size, **kwargs)


def images_for(vfm, rows, columns):
    generator = torch.Generator().manual_seed(1)
    return torch.rand(2, 3, rows * vfm.patch_size, columns * vfm.patch_size, generator=generator) * 2 - 1


def tokens_with_positions(vfm, images):
    """Patch tokens before anything else than positions comes to them."""
    seen = []
    hook = vfm.network.norm_pre.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    vfm(images)
    hook.remove()
    return seen[0][:, vfm.network.num_prefix_tokens :]


@pytest.mark.parametrize("name", FAMILIES)
def test_families_resample_their_tables_without_antialias_and_leave_their_own_grid_alone(name):
    has_table, with_antialias = FAMILIES[name]
    vfm = tiny(name, layers=[0, -1], antialias_positions=False)
    timms = tiny(name, layers=[0, -1], antialias_positions=True)
    assert tiny(name).antialias_positions == (with_antialias or not has_table)
    assert vfm.antialias_positions != has_table
    at_home = images_for(vfm, 4, 4)
    assert torch.equal(vfm(at_home).sequence, timms(at_home).sequence)
    if vfm.network.patch_embed.strict_img_size:
        return
    interpolation = "bilinear" if "vit_pe" in name else "bicubic"
    for grid in ((2, 2), (3, 6), (7, 5)):
        found, other = (tokens_with_positions(v, images_for(v, *grid)) for v in (vfm, timms))
        if not has_table:
            assert torch.equal(found, other)
            continue
        table = vfm.network.pos_embed[:, -16:].mT.unflatten(2, (4, 4))
        plain, filtered = F.interpolate(table, grid, mode=interpolation), F.interpolate(table, grid, **TIMM)
        assert (plain - filtered).norm() > 0.05 * filtered.norm()
        torch.testing.assert_close(found - other, (plain - filtered).flatten(2).mT.expand_as(found), rtol=0, atol=1e-6)


def test_a_ramp_is_sampled_at_the_centres_of_cells_and_prefix_tokens_stay():
    ramp = torch.arange(16.0).view(1, 16, 1, 1).expand(1, 16, 12, 3).flatten(1, 2)
    table = torch.cat([torch.full((1, 5, 3), -7.0), ramp], 1)
    for dtype in (torch.float32, torch.bfloat16):
        found = resample_positions(table.to(dtype), (16, 12), (8, 3), "bilinear")
        assert found.dtype == dtype and found.shape == (1, 5 + 24, 3)
        assert (found[:, :5] == -7).all()
        assert torch.equal(found[0, 5:, 0].view(8, 3)[:, 1].float(), torch.arange(8.0) * 2 + 0.5)


def test_tables_of_less_precision_are_resampled_in_float32():
    table = torch.randn(1, 1 + 64, 8).bfloat16()
    found = resample_positions(table, (8, 8), (5, 7), "bicubic")
    assert torch.equal(found, resample_positions(table.float(), (8, 8), (5, 7), "bicubic").bfloat16())


def test_the_network_keeps_its_own_table(monkeypatch):
    vfm = tiny()
    table, grid, fingerprint = vfm.network.pos_embed, vfm.network.patch_embed.grid_size, tiny().fingerprint()
    vfm(images_for(vfm, 4, 6))
    monkeypatch.setattr(vfm.network, "forward_features", lambda inputs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        vfm(images_for(vfm, 4, 6))
    assert vfm.network.pos_embed is table and vfm.network.patch_embed.grid_size == grid == (8, 8)
    assert vfm.fingerprint() == fingerprint
    assert not list(vfm.parameters()) and not vfm.state_dict()


def test_a_table_is_resampled_once_for_each_grid_and_again_where_the_network_moves(monkeypatch):
    grids = []

    def resample(table, old, new, interpolation):
        grids.append(new)
        return resample_positions(table, old, new, interpolation)

    monkeypatch.setattr(positions, "resample_positions", resample)
    vfm = tiny()
    with torch.inference_mode():  # as validation before the first step
        expected = [vfm(images_for(vfm, *grid)).tokens for grid in ((4, 6), (8, 8), (4, 4), (4, 6))]
    assert grids == [(4, 6), (4, 4)]
    images = images_for(vfm, 4, 6).requires_grad_()
    found = vfm.differentiable(images).tokens
    found.square().mean().backward()
    assert images.grad.abs().sum() > 0 and torch.equal(found, expected[0])
    vfm.to(torch.float64)
    torch.testing.assert_close(vfm(images_for(vfm, 4, 6)).tokens, expected[0])
    assert grids == [(4, 6), (4, 4), (4, 6)]


def without_the_key(source):
    return {name: value for name, value in source.items() if name != "antialias_positions"}


def test_a_checkpoint_goes_on_as_it_was_trained():
    for stored, given, goes_on in ((None, None, True), (None, False, True), (True, None, True), (False, True, False)):
        vfm = tiny(antialias_positions=given)
        identity = without_the_key(vfm_identity(vfm)) | ({} if stored is None else {"antialias_positions": stored})
        way = "with" if goes_on else "without"
        with pytest.warns(UserWarning, match=rf"positions resampled {way} antialias, and goes on so; train"):
            check_vfm(vfm, {"vfm": identity})
        assert vfm.antialias_positions is goes_on is vfm_identity(vfm)["antialias_positions"]
        images = images_for(vfm, 4, 4)
        assert torch.equal(vfm(images).tokens, tiny(antialias_positions=goes_on)(images).tokens)


def test_nothing_is_said_where_nothing_differs():
    no_table = tiny("vit_large_patch16_dinov3.lvd1689m")
    cases = [(tiny(), vfm_identity(tiny())), (tiny(antialias_positions=True), without_the_key(vfm_identity(tiny())))]
    cases += [(no_table, without_the_key(vfm_identity(no_table)))]
    cases += [(no_table, vfm_identity(no_table) | {"antialias_positions": False})]  # as converted by name alone
    for vfm, identity in cases:
        before = vfm.antialias_positions
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            check_vfm(vfm, {"vfm": identity})
        assert vfm.antialias_positions is before


def test_descriptions_without_the_argument_have_its_former_meaning():
    described = {"init_args": {"name": VFM}}
    assert FrozenVFM.arguments_of(described)["antialias_positions"] is True
    described["init_args"]["antialias_positions"] = False
    assert FrozenVFM.arguments_of(described)["antialias_positions"] is False


def test_sources_name_it_where_it_differs_from_before():
    before = {"name": VFM, "layers": [-1], "input_scale": 1.0, "weights": None, "pretrained": True}
    before |= {"model_args": None, "antialias": None, "fingerprint": tiny().fingerprint()}
    assert tiny(antialias_positions=True).source() == before
    assert tiny().source() == tiny(antialias_positions=False).source() == before | {"antialias_positions": False}


@pytest.fixture
def former(tiny_module, trainer, batch, tmp_path):
    """A checkpoint as one was before: its VFM resampled positions as timm does, which it does not say."""
    module = tiny_module(vfm={"antialias_positions": True})
    run = trainer(max_steps=1)
    run.fit(module, DataLoader([batch], batch_size=None))
    run.save_checkpoint(tmp_path / "former.ckpt")
    stored = torch.load(tmp_path / "former.ckpt", weights_only=True)
    stored["vfm"] = without_the_key(stored["vfm"])
    description = module.model.arguments | {"vfm": {"init_args": {"name": VFM, "layers": [0, -1]}}}
    for part in ("adapter", "decoder"):
        given = description[part]
        path = f"{type(given).__module__}.{type(given).__qualname__}"
        description[part] = {"class_path": path, "init_args": given.arguments}
    stored["hyper_parameters"] = {"model": {"class_path": "vfm_vae.tokenizer.VFMVAE", "init_args": description}}
    for entry in ("format_version", "kind", "config"):
        del stored[entry]
    torch.save(stored, tmp_path / "former.ckpt")
    return tmp_path / "former.ckpt"


@pytest.mark.parametrize("way", ["resumed", "begun from"])
def test_training_goes_on_from_a_former_checkpoint_as_it_was(way, former, tiny_module, trainer, batch, tmp_path):
    module = tiny_module(init_from=None if way == "resumed" else str(former))
    assert module.model.vfm.antialias_positions is False
    identity = module.latent_identity()
    run = trainer(max_steps=2 if way == "resumed" else 1)
    with pytest.warns(UserWarning, match="resampled with antialias, and goes on so"):
        run.fit(module, DataLoader([batch], batch_size=None), ckpt_path=former if way == "resumed" else None)
    assert module.model.vfm.antialias_positions is True
    assert module.latent_identity() != identity
    run.save_checkpoint(tmp_path / "next.ckpt")
    stored = torch.load(tmp_path / "next.ckpt", weights_only=True)
    assert stored["vfm"]["antialias_positions"] is True
    # What the checkpoint is trained with counts, not what the run asked for.
    assert stored["config"]["vfm"].get("antialias_positions", True) is True
    loaded = VFMVAE.from_checkpoint(tmp_path / "next.ckpt")
    assert loaded.vfm.antialias_positions is True and loaded.latent_identity() == module.latent_identity()


def test_former_models_and_their_latents_are_the_same(former, tiny_model, tmp_path):
    model = VFMVAE.from_checkpoint(former)
    assert model.vfm.antialias_positions is True
    assert VFMVAE.from_checkpoint(former, vfm=False).latent_identity() == model.latent_identity()
    # The fingerprint as it was made before there was a choice.
    encoding = torch.nn.ModuleDict({"layers": model.adapter.layers, "fuse": model.adapter.fuse}).state_dict()
    expected = sha256_of(encoding, str([model.vfm.fingerprint(), [0, -1], 1.0, 1]))
    assert model.latent_identity()["fingerprint"] == expected
    model.vfm.antialias_positions = False
    assert model.latent_identity()["fingerprint"] != expected

    model.save_pretrained(tmp_path / "model")
    config = json.loads((tmp_path / "model/config.json").read_text())
    assert VFMVAE.from_pretrained(tmp_path / "model").vfm.antialias_positions is False
    config["vfm"] = without_the_key(config["vfm"])
    (tmp_path / "model/config.json").write_text(json.dumps(config))
    loaded = VFMVAE.from_pretrained(tmp_path / "model")
    assert loaded.vfm.antialias_positions is True and loaded.latent_identity()["fingerprint"] == expected
    assert VFMVAE.from_pretrained(tmp_path / "model", vfm=False).latent_identity()["fingerprint"] == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [("google/siglip2-large-patch16-512", False), ("facebook/dinov2-with-registers-base", True)],
)
def test_published_tokenizers_have_the_published_way(name, expected):
    config = {"vfm_name": name, "patch_from_layers": [0, -1], "scale_factor": 2.0}
    assert vfm_source_of(config, None)["antialias_positions"] is expected


def test_features_that_were_cached_before_fit_the_same_way_alone(tiny_module):
    vfm = tiny(input_scale=0.5, antialias_positions=True)
    before = without_the_key(tiny(input_scale=0.5).source())
    model = SiT(4, 4, 1, 1, 32, 2, 3, align_depth=1, align_channels=128, cls_channels=128)
    REG(vfm).check_features((17, 128), before, model, "'cache'")
    with pytest.raises(
        ValueError, match=r"'cache' are of another VFM .*\['antialias_positions'\]; give it these as the"
    ):
        REG(tiny(input_scale=0.5)).check_features((17, 128), before, model, "'cache'")
    # A cache that is half finished compares all that it noted.
    del before["weights"]
    assert tiny_module(predict="moments", features=vfm).features_source() == before
