"""Weights of vision transformers from files: every tensor, in whatever layout and nest, or a refusal with names."""

import json

import pytest
import timm
import torch
from safetensors.torch import save_file

from vfm_vae.discriminators.projected import ProjectedDiscriminator
from vfm_vae.vfm import FrozenVFM
from vfm_vae.vit import create_vit

# Families, of which timm loads some strictly and some not; with what makes them tiny.
SIDES = {"embed_dim": 24, "depth": 2, "num_heads": 2}
FAMILIES = {
    "vit_base_patch16_clip_224.openai": SIDES,
    "vit_base_patch16_siglip_256.webli": SIDES,
    "vit_base_patch16_siglip_256.v2_webli": SIDES,
    "vit_base_patch16_siglip_gap_256.webli": SIDES,
    "vit_base_patch16_224.augreg_in21k": SIDES,
    "deit_base_patch16_224.fb_in1k": SIDES,
    "deit_base_distilled_patch16_224.fb_in1k": SIDES,
    "deit3_base_patch16_224.fb_in1k": SIDES,
    "vit_small_patch14_dinov2.lvd142m": SIDES | {"img_size": 56},
    "vit_small_patch14_reg4_dinov2.lvd142m": SIDES | {"img_size": 56},
    "vit_small_patch16_224.dino": SIDES,
    "vit_base_patch16_dinov3.lvd1689m": SIDES,
    "eva02_base_patch14_448.mim_in22k_ft_in22k_in1k": SIDES | {"img_size": 56},
    "vit_base_patch16_224.mae": SIDES,
    "vit_pe_core_base_patch16_224.fb": SIDES,
    "flexivit_small.1200ep_in1k": SIDES,
    "beit_base_patch16_224.in22k_ft_in22k_in1k": SIDES,
}
CLIP = "vit_base_patch16_clip_224.openai"
DEIT3 = "deit3_base_patch16_224.fb_in1k"


def random_network(name, **kwargs):
    torch.manual_seed(1)
    network = create_vit(name, pretrained=False, **FAMILIES[name] | kwargs)
    for parameter in network.parameters():  # none as it would be initialised
        parameter.data.normal_()
    return network


def saved(tensors, path):
    save = save_file if path.suffix == ".safetensors" else torch.save
    save({name: tensor.clone() for name, tensor in tensors.items()}, path)
    return path


def loaded(name, path, **kwargs):
    return create_vit(name, weights=path, **FAMILIES[name] | kwargs).state_dict()


def same(state, other):
    return state.keys() == other.keys() and all(torch.equal(state[name], other[name]) for name in state)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_right_file_is_taken_bit_for_bit_and_no_other(tmp_path, name):
    state = random_network(name).state_dict()
    classifier = {"head.weight": torch.zeros(10, 24), "head_dist.bias": torch.zeros(10)}
    right = saved(state | classifier, tmp_path / "right.safetensors")
    assert same(loaded(name, right), state)

    names = sorted(state)
    others = {
        "unrelated": {"something.else": torch.zeros(3)},
        "half": {name: state[name] for name in names[::2]},
        "but one": {name: state[name] for name in names[:-1]},
        "wider": random_network(name, embed_dim=32).state_dict(),
        "deeper": random_network(name, depth=3).state_dict(),
    }
    for kind, tensors in others.items():
        path = saved(tensors, tmp_path / f"{kind}.safetensors")
        with pytest.raises(ValueError, match=rf"^weights: '.*' does not hold the weights of '{name}'") as error:
            loaded(name, path)
        message = str(error.value)
        assert repr(str(path)) in message and "\n" not in message and len(message) < 600, kind
        fault = {"wider": "of another shape [", "deeper": "left over ['blocks.2."}.get(kind, "missing [")
        assert fault in message or (name.startswith("beit") and "can't be converted" in message), kind


@pytest.mark.parametrize("name", FAMILIES)
def test_tables_of_another_grid_are_resampled_as_timm_does(tmp_path, name):
    larger = {"img_size": 2 * FAMILIES[name].get("img_size", 64)}
    path = saved(random_network(name, **larger).state_dict(), tmp_path / "larger.pth")
    ours = FAMILIES[name] | {"img_size": larger["img_size"] // 2, "num_classes": 0}
    by_timm = timm.create_model(name, pretrained=True, pretrained_cfg_overlay={"file": str(path)}, **ours)
    assert same(loaded(name, path, img_size=larger["img_size"] // 2), by_timm.state_dict())


NESTS = {
    "plain": lambda state: state,
    "nested": lambda state: {"model": state, "epoch": 3},
    "averages first": lambda s: {"state_dict": {n: -t for n, t in s.items()}, "state_dict_ema": s},
    "twice": lambda state: {"state_dict": {"model": state}, "optimizer": {"lr": 1}},
    "distributed": lambda state: {f"module.{name}": t for name, t in state.items()},
    "compiled": lambda state: {f"_orig_mod.module.{name}": t for name, t in state.items()},
    "lightning": lambda state: {"state_dict": {f"model.{name}": t for name, t in state.items()}},
    "tower": lambda s: {f"visual.trunk.{n}": t for n, t in s.items()} | {"text.token_embedding.weight": torch.ones(2)},
    "backbone": lambda state: {f"backbone.{name}": t for name, t in state.items()},
    "encoder": lambda state: {f"encoder.{name}": t for name, t in state.items()} | {"decoder.blocks.0": torch.ones(1)},
    "teacher": lambda s: {"student": {n: -t for n, t in s.items()}, "teacher": {f"backbone.{n}": s[n] for n in s}},
    "two": lambda s: {f"student.{n}": -t for n, t in s.items()} | {f"teacher.{n}": t for n, t in s.items()},
}


@pytest.mark.parametrize("nest", NESTS)
def test_nests_and_prefixes_are_seen_through(tmp_path, nest):
    for name in (CLIP, DEIT3, "vit_base_patch16_siglip_256.v2_webli", "vit_small_patch16_224.dino"):
        state = random_network(name).state_dict()
        torch.save(NESTS[nest](state), tmp_path / "file.pth")
        assert same(loaded(name, tmp_path / "file.pth"), state)


def test_published_layouts_are_still_converted(tmp_path):
    """As OpenAI's CLIP and DeiT III have their tensors."""
    state = random_network(CLIP).state_dict()
    names = {"cls_token": "class_embedding", "pos_embed": "positional_embedding", "patch_embed.proj": "conv1"}
    names |= {"norm_pre": "ln_pre", "norm": "ln_post", "blocks": "transformer.resblocks", "norm1": "ln_1"}
    names |= {"norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj", "attn.proj": "attn.out_proj"}
    names |= {"attn.qkv.": "attn.in_proj_"}
    published = {}
    for name, tensor in state.items():
        theirs = name
        for ours, their in names.items():
            if f".{ours}." in f".{name}." or (ours.endswith(".") and ours in name):
                theirs = theirs.replace(ours, their)
        squeezed = tensor.squeeze(0) if name == "pos_embed" else tensor.flatten() if name == "cls_token" else tensor
        published[f"module.visual.{theirs}"] = squeezed
    torch.save({"state_dict": published | {"module.logit_scale": torch.ones(())}}, tmp_path / "clip.pt")
    assert same(loaded(CLIP, tmp_path / "clip.pt"), state)
    state = random_network(DEIT3).state_dict()
    published = {name.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"): t for name, t in state.items()}
    torch.save({"model": published}, tmp_path / "deit3.pth")
    assert same(loaded(DEIT3, tmp_path / "deit3.pth"), state)


def test_two_networks_in_a_file_are_told_apart_or_refused(tmp_path):
    state = random_network(CLIP).state_dict()
    torch.save({f"{part}.{name}": t for part in ("left", "right") for name, t in state.items()}, tmp_path / "two.pth")
    with pytest.raises(ValueError, match=r"holds several networks \(left\., right\.\); save one alone"):
        loaded(CLIP, tmp_path / "two.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="holds a list, and no tensors by name"):
        loaded(CLIP, tmp_path / "list.pth")


def test_a_folder_of_timms_own_kind_is_held_to_the_same(tmp_path):
    """`local-dir:`, which timm would load leniently, too."""
    state = random_network(CLIP).state_dict()
    config = {"architecture": CLIP.partition(".")[0], "pretrained_cfg": {"num_classes": 0}, "model_args": SIDES}
    (tmp_path / "config.json").write_text(json.dumps(config))
    name = f"local-dir:{tmp_path}"
    with pytest.raises(ValueError, match=r"^name: '.*' holds no weights"):
        create_vit(name)
    saved(state, tmp_path / "model.safetensors")
    assert same(create_vit(name).state_dict(), state)
    saved({"other": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"does not hold the weights of 'local-dir:.* missing \["):
        create_vit(name)


def test_a_model_of_the_hub_is_held_to_the_same(monkeypatch):
    """`hf-hub:`, whose files are whoever's."""
    state = random_network(CLIP).state_dict()
    config = timm.models.get_pretrained_cfg(CLIP).to_dict() | {"hf_hub_id": "owner/model", "source": "hf-hub"}
    network = (config, CLIP.partition(".")[0], SIDES)
    monkeypatch.setattr("timm.models._factory.load_model_config_from_hf", lambda *_, **__: network)
    for tensors in (state, {"other": torch.ones(1)}):
        monkeypatch.setattr("vfm_vae.vit_weights.load_state_dict_from_hf", lambda name, tensors=tensors, **_: tensors)
        if tensors is state:
            assert same(create_vit("hf-hub:owner/model").state_dict(), state)
        else:
            with pytest.raises(ValueError, match=r"does not hold the weights of 'hf-hub:owner/model'.* missing \["):
                create_vit("hf-hub:owner/model")


def test_every_user_of_such_a_network_refuses_alike(tmp_path):
    """The encoder, the discriminator's backbone; before, both went on with random weights, without a word."""
    path = str(saved({"something.else": torch.zeros(3)}, tmp_path / "other.pth"))
    for build in (
        lambda: FrozenVFM(CLIP, weights=path, model_args=SIDES),
        lambda: ProjectedDiscriminator("vit_tiny_patch16_224.augreg_in21k", weights=path),
    ):
        with pytest.raises(ValueError, match=r"^weights: '.*other\.pth' does not hold the weights of 'vit_"):
            build()
