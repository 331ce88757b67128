"""LightningDiT against published weights and outputs, in float32."""

import json
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ldm.condition import Labels
from ldm.guidance import Guidance
from ldm.models.lightningdit import LightningDiT
from ldm.published import lightningdit_from_published, to_published

DATA = Path(__file__).parent / "data"
OFFICIAL = json.loads((DATA / "lightningdit_keys.json").read_text())


@cache
def fixture(case: str) -> tuple[dict, dict, LightningDiT]:
    tensors = load_file(DATA / f"lightningdit_{case}.safetensors")
    settings = json.loads((DATA / f"lightningdit_{case}.json").read_text())
    weights = {name.removeprefix("weights/"): t for name, t in tensors.items() if name.startswith("weights/")}
    return tensors, settings, lightningdit_from_published(weights, settings["config"])


def close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 2e-5) -> None:
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= tolerance


@pytest.mark.parametrize("case", "ab")
@torch.no_grad()
def test_velocity_and_every_block(case):
    tensors, _, model = fixture(case)
    outputs = {}
    for number, block in enumerate(model.blocks):
        block.register_forward_hook(lambda *args, number=number: outputs.__setitem__(number, args[-1]))
    x, t, y = (tensors[f"inputs/{name}"] for name in "xty")
    prediction = model(x, t, Labels(y, model.num_classes))
    close(prediction.velocity, tensors["outputs/velocity"])
    for number, tokens in outputs.items():
        close(tokens, tensors[f"intermediate/block{number}_out"])
        close(tokens.mean(1), tensors[f"intermediate/block{number}_token_mean"])


@pytest.mark.parametrize("case", "ab")
@torch.no_grad()
def test_embeddings(case):
    tensors, _, model = fixture(case)
    x, t, y = (tensors[f"inputs/{name}"] for name in "xty")
    close(model.patch_embed(x), tensors["intermediate/patch_embed"])
    close(model.embed(x, t, Labels(y, model.num_classes))[0], tensors["intermediate/tokens_in"])
    close(model.time_embed(t), tensors["intermediate/t_emb"])
    close(model.label_embed(y), tensors["intermediate/y_emb"])
    labels = Labels(tensors["label_drop/labels"], model.num_classes)
    labels = labels.drop(tensors["label_drop/force_drop_ids"] == 1).labels
    assert torch.equal(labels, tensors["label_drop/effective_labels"])
    assert torch.equal(model.label_embed(labels), tensors["label_drop/embeddings"])


@pytest.mark.parametrize("time", ["below", "at", "above"])
@pytest.mark.parametrize("case", "ab")
@torch.no_grad()
def test_guidance(case, time):
    tensors, settings, model = fixture(case)
    x, y = tensors["cfg/x"][:3], tensors["cfg/y"][:3]
    t = tensors[f"cfg/{time}/t"][0]
    for start, name in ((settings["cfg_interval_start"], "on"), (0.0, "off")):
        guidance = Guidance(settings["cfg_scale"], start=start, channels=len(settings["guided_channels"]))
        velocity = guidance.field(model, Labels(y, settings["null_label"]))(x, t)
        close(velocity, tensors[f"cfg/{time}/out_interval_{name}"][:3], 5e-5)


@pytest.mark.parametrize("case", "ab")
def test_parameters(case):
    _, settings, model = fixture(case)
    trained = sum(parameter.numel() for parameter in model.parameters())
    assert trained == settings["trainable_params"]
    assert trained + model.position.numel() == settings["total_params"]


@pytest.mark.parametrize("variant", ["", "_without_qknorm"])
def test_every_full_size_key_is_taken(variant):
    shapes = OFFICIAL["models"]["LightningDiT-XL/1"]["state_dict"]
    official = OFFICIAL["models"][f"LightningDiT-XL/1{variant}"]
    with torch.device("meta"):
        weights = {
            name: torch.empty(shape) for name, (shape, _) in shapes.items() if not variant or "_norm." not in name
        }
        model = lightningdit_from_published(weights, official["config"])
    assert sum(p.numel() for p in model.parameters()) == official["trainable_params"]
    assert sum(p.numel() for p in model.parameters()) + model.position.numel() == official["total_params"]
    exported = {name: tensor.shape for name, tensor in to_published(model).items()}
    assert exported == {name: tensor.shape for name, tensor in weights.items()}


@pytest.mark.parametrize("case", "ab")
def test_export_gives_the_published_weights_back(case):
    tensors, _, model = fixture(case)
    exported = to_published(model)
    weights = {name.removeprefix("weights/"): t for name, t in tensors.items() if name.startswith("weights/")}
    assert exported.keys() == weights.keys()
    for name, weight in weights.items():
        if name == "pos_embed" or name.startswith("feat_rope."):
            close(exported[name], weight, 1e-6)
        else:
            assert torch.equal(exported[name], weight), name


def test_full_size_has_the_published_parameters():
    with torch.device("meta"):
        model = LightningDiT.of_size("XL/1", in_channels=32, input_size=16)
    assert sum(parameter.numel() for parameter in model.parameters()) + model.position.numel() == 675_260_768


@pytest.mark.parametrize("name", OFFICIAL["registries"]["LightningDiT"])
def test_named_sizes(name):
    expected = OFFICIAL["registries"]["LightningDiT"][name]
    with torch.device("meta"):
        model = LightningDiT.of_size(name.removeprefix("LightningDiT-"))
    block = model.blocks[0]
    assert len(model.blocks) == expected["depth"]
    assert model.position.shape[1] == expected["width"]
    assert model.patch_size == expected["patch"]
    assert block.attention.num_heads == expected["heads"]
    assert 2 * model.rotary_cos.shape[1] == expected["head_dim"]
    assert block.mlp.out.in_features == expected["swiglu_hidden"]


def test_initialisation_is_the_published_one():
    _, settings, _ = fixture("a")
    torch.manual_seed(0)
    ours = LightningDiT(8, 4, 1, 3, 48, 4, num_classes=10)
    expected = settings["official_init_before_rerandomising"]
    for name, weight in (
        ("x_embedder.proj.weight", ours.patch_embed.proj.weight),
        ("blocks.0.attn.qkv.weight", ours.blocks[0].attention.qkv.weight),
        ("blocks.1.mlp.w12.weight", ours.blocks[1].mlp.gate_value.weight),
        ("t_embedder.mlp.2.weight", ours.time_embed.mlp[2].weight),
        ("y_embedder.embedding_table.weight", ours.label_embed.weight),
        ("blocks.0.adaLN_modulation.1.weight", ours.blocks[0].modulation.weight),
        ("final_layer.linear.weight", ours.final.out.weight),
    ):
        assert weight.std().item() == pytest.approx(expected[name]["std"], rel=0.1), name
        assert weight.abs().max().item() <= expected[name]["absmax"] * 1.5, name
    assert all((p == 0).all() for n, p in ours.named_parameters() if n.endswith("bias"))


def test_weights_that_do_not_fit_are_named():
    tensors, settings, _ = fixture("a")
    weights = {name.removeprefix("weights/"): t for name, t in tensors.items() if name.startswith("weights/")}
    with pytest.raises(ValueError, match=r"missing \['blocks.0.norm2.weight'\]; left over \['extra'\]"):
        lightningdit_from_published(
            {n: t for n, t in weights.items() if n != "blocks.0.norm2.weight"} | {"extra": torch.zeros(1)},
            settings["config"],
        )
    with pytest.raises(ValueError, match="pos_embed"):
        lightningdit_from_published(weights | {"pos_embed": weights["pos_embed"] + 1}, settings["config"])
    with pytest.raises(ValueError, match="registry_name already sets"):
        lightningdit_from_published(weights, settings["config"] | {"registry_name": "LightningDiT-B/1"})
    with pytest.raises(ValueError, match="learn_sigma"):
        lightningdit_from_published(weights, settings["config"] | {"learn_sigma": True})
