"""REG against published weights and outputs, in float32.

Published numbers have time and velocity in the other direction: their t is 1 − t here, their velocity minus ours.
"""

import json
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from ldm import path
from ldm.condition import Labels
from ldm.guidance import Guidance
from ldm.models.denoiser import Prediction
from ldm.models.sit import SIZES, SiT
from ldm.published import published_name, reg_from_published, to_published
from ldm.samplers import EulerMaruyama

DATA = Path(__file__).parent / "data"
OFFICIAL = json.loads((DATA / "reg_keys.json").read_text())
SETTINGS = json.loads((DATA / "reg_a.json").read_text())


@cache
def tensors() -> dict[str, torch.Tensor]:
    return load_file(DATA / "reg_a.safetensors")


def published() -> dict[str, torch.Tensor]:
    return {name.removeprefix("weights/"): t for name, t in tensors().items() if name.startswith("weights/")}


@pytest.fixture
def model() -> SiT:
    return reg_from_published(published(), SETTINGS["config"])


def close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 2e-5) -> None:
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= tolerance


def joined(model: SiT, latent: str, token: str) -> torch.Tensor:
    return model.join(tensors()[latent], tensors()[token])


def labels(name: str) -> Labels:
    return Labels(tensors()[name], SETTINGS["config"]["num_classes"])


@torch.no_grad()
def test_outputs_and_every_block(model):
    reference = tensors()
    blocks = []
    for block in model.blocks:
        block.register_forward_hook(lambda *args: blocks.append(args[-1]))
    inputs = joined(model, "inputs/x", "inputs/cls_token"), 1 - reference["inputs/t"], labels("inputs/y")
    prediction = model(*inputs, align=True)
    velocity, cls_velocity = model.split(prediction.velocity)
    close(velocity, -reference["outputs/velocity"])
    close(cls_velocity, -reference["outputs/cls"])
    close(prediction.projected, reference["outputs/zs_tilde"])
    assert len(blocks) == SETTINGS["config"]["depth"]
    for number, tokens in enumerate(blocks):
        close(tokens, reference[f"intermediate/block{number}_out"])
        close(tokens.mean(1), reference[f"intermediate/block{number}_token_mean"])
    for tokens, features in zip(list(blocks), model.block_features(*inputs), strict=True):
        close(features, tokens[:, 1:].mean(1))


@torch.no_grad()
def test_embeddings(model):
    reference = tensors()
    x, t, y = reference["inputs/x"], 1 - reference["inputs/t"], reference["inputs/y"]
    cls = model.cls_embed(reference["inputs/cls_token"])
    close(cls, reference["intermediate/cls_projected"])
    close(model.cls_norm(cls), reference["intermediate/cls_normed"])
    close(model.patch_embed(x), reference["intermediate/patch_embed"])
    close(model.time_embed(t), reference["intermediate/t_emb"])
    close(model.label_embed(y), reference["intermediate/y_emb"])
    tokens, modulation = model.embed(joined(model, "inputs/x", "inputs/cls_token"), t, labels("inputs/y"))
    close(tokens, reference["intermediate/tokens_in"])
    close(modulation, F.silu(reference["intermediate/cond"]))
    dropped = labels("label_drop/labels").drop(reference["label_drop/force_drop_ids"] == 1)
    assert torch.equal(dropped.labels, reference["label_drop/effective_labels"])


def loss(model: SiT, reference: dict) -> tuple[Prediction, dict[str, torch.Tensor]]:
    """The published objective, from this project's path."""
    data, noise, t = reference["loss/images"], reference["loss/noise"], 1 - reference["loss/time"]
    cls, cls_noise = reference["loss/cls_token"], reference["loss/noise_cls"]
    x_t, cls_t = path.interpolate(data, noise, t), path.interpolate(cls, cls_noise, t)
    close(x_t, reference["loss/model_input"], 1e-6)
    close(cls_t, reference["loss/cls_input"], 1e-6)
    output = model(model.join(x_t, cls_t), t, labels("loss/y"), align=True)
    velocity, cls_velocity = model.split(output.velocity)
    terms = {
        "denoising": path.squared_error(velocity, path.velocity(data, noise)).mean(),
        "proj": -F.cosine_similarity(output.projected, reference["loss/zs"], dim=-1).mean(),
        "cls": path.squared_error(cls_velocity, path.velocity(cls, cls_noise)).mean(),
    }
    return output, terms


def test_losses_and_gradients(model):
    reference = tensors()
    output, terms = loss(model, reference)
    velocity, cls_velocity = model.split(output.velocity)
    close(velocity, -reference["loss/velocity"])
    close(cls_velocity, -reference["loss/cls_output"])
    close(output.projected, reference["loss/zs_tilde"])
    for name, value in terms.items():
        close(value, reference[f"loss/{name}"], 1e-5)
    # REPA aligns the same features, and without a class token those of patches alone.
    close(terms["proj"], reference["loss/repa_proj_same_features"], 1e-5)
    patches = -F.cosine_similarity(output.projected[:, 1:], reference["loss/zs"][:, 1:], dim=-1).mean()
    close(patches, reference["loss/repa_proj_patch_tokens_only"], 1e-5)
    total = terms["denoising"] + SETTINGS["proj_coeff"] * terms["proj"] + SETTINGS["cls_coeff"] * terms["cls"]
    close(total, reference["loss/total"], 1e-5)
    total.backward()
    gradients = {published_name(name): parameter.grad for name, parameter in model.named_parameters()}
    gradients["final_layer.linear_cls.bias"] *= -1  # as the bias itself
    for name, gradient in gradients.items():
        if f"loss/grad/{name}" in reference:
            assert torch.allclose(gradient, reference[f"loss/grad/{name}"], rtol=1e-3, atol=2e-6), name


def test_parameters(model):
    trained = sum(parameter.numel() for parameter in model.parameters())
    assert trained == SETTINGS["trainable_params"]
    assert trained + model.position.numel() == SETTINGS["total_params"]


def test_export_gives_the_published_weights_back(model):
    weights, exported = published(), to_published(model)
    assert exported.keys() == weights.keys()
    for name, weight in weights.items():
        if name in ("t_embedder.mlp.0.weight", "pos_embed"):  # turned there and back; made anew
            close(exported[name], weight, 1e-6 * weight.abs().max())
        else:
            assert torch.equal(exported[name], weight), name


@pytest.mark.parametrize("variant", ["", "_without_qk_norm"])
def test_every_full_size_key_is_taken_and_given_back(variant):
    shapes = OFFICIAL["models"]["REG-SiT-XL/1"]["state_dict"]
    official = OFFICIAL["models"][f"REG-SiT-XL/1{variant}"]
    with torch.device("meta"):
        weights = {
            name: torch.empty(shape) for name, (shape, _) in shapes.items() if not variant or "_norm." not in name[8:]
        }
        model = reg_from_published(weights, official["config"])
    assert sum(p.numel() for p in model.parameters()) == official["trainable_params"]
    assert sum(p.numel() for p in model.parameters()) + model.position.numel() == official["total_params"]
    assert sum(p.numel() for p in model.projector.parameters()) == official["projector_params"]
    exported = {name: tensor.shape for name, tensor in to_published(model).items()}
    assert exported == {name: tensor.shape for name, tensor in weights.items()}


def test_full_size_has_the_published_parameters():
    with torch.device("meta"):
        model = SiT.of_size("XL/1")
    assert model.position.numel() == 296_064
    assert sum(parameter.numel() for parameter in model.parameters()) + model.position.numel() == 685_062_304


def test_position_table_is_the_published_one():
    constants = OFFICIAL["models"]["REG-SiT-XL/1"]["constants"]
    table = SiT(depth=1, align_depth=1).position
    assert (table[0] == 0).all()
    assert table[18, :4].tolist() == pytest.approx(constants["pos_embed[0,18,:4]"])
    assert table.double().sum().item() == pytest.approx(constants["pos_embed_sum"], abs=0.01)


@pytest.mark.parametrize("name", OFFICIAL["registries"]["REG_SiT_vfmvae_adaptation"])
def test_named_sizes(name):
    expected = OFFICIAL["registries"]["REG_SiT_vfmvae_adaptation"][name]
    with torch.device("meta"):
        model = SiT.of_size(name.removeprefix("SiT-"))
    assert name.removeprefix("SiT-").split("/")[0] in SIZES
    assert len(model.blocks) == expected["depth"]
    assert model.position.shape[1] == expected["width"]
    assert model.patch_size == expected["patch"]
    assert model.blocks[0].attention.num_heads == expected["heads"]
    assert model.blocks[0].attention.query_norm.normalized_shape == (expected["head_dim"],)
    # The public S leaves its output layer wider than its blocks and can't run; here it follows them.
    assert model.final.out.in_features == min(expected["width"], expected["output_layer_width"])


def test_initialisation_is_the_published_one():
    torch.manual_seed(0)
    ours = SiT(8, 4, 1, 3, 48, 4, cls_channels=24, align_channels=24, align_depth=2, projector_width=64)
    expected = SETTINGS["official_init_before_rerandomising"]
    for name, weight in ours.named_parameters():
        statistics = expected[published_name(name)]
        assert weight.std().item() == pytest.approx(statistics["std"], rel=0.1), name
        assert weight.mean().item() == pytest.approx(statistics["mean"], abs=0.02), name
        assert weight.abs().max().item() <= statistics["absmax"] * 1.5, name


def test_weights_that_do_not_fit_are_named():
    weights = published()
    without = {name: t for name, t in weights.items() if name != "wg_norm.bias"}
    with pytest.raises(ValueError, match=r"missing \['wg_norm.bias'\]; left over \['extra'\]"):
        reg_from_published(without | {"extra": torch.zeros(1)}, SETTINGS["config"])
    with pytest.raises(ValueError, match="pos_embed"):
        reg_from_published(weights | {"pos_embed": weights["pos_embed"] + 1}, SETTINGS["config"])
    with pytest.raises(ValueError, match=r"cls_projectors2.weight: \(48, 24\) instead of \(48, 32\)"):
        reg_from_published(weights, SETTINGS["config"] | {"cls_token_dim": 32})


@pytest.mark.parametrize(
    ("run", "scale", "cls_scale"), [("guided", 4.0, 4.0), ("guided_cls_conditional", 4.0, 0.0), ("unguided", 1.0, 0.0)]
)
@torch.no_grad()
def test_stochastic_samples(model, run, scale, cls_scale):
    """Latent and class token together, with the noise of every step given."""
    reference, sizes = tensors(), []
    model.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    sampler = EulerMaruyama(SETTINGS["sampler"]["num_steps"])
    noises = map(model.join, reference["sampler/noises"], reference["sampler/cls_noises"])
    assert (1 - sampler.times - reference["sampler/t_grid"]).abs().max() <= 1e-12
    guidance = Guidance(scale, start=1 - SETTINGS["sampler"]["guidance_high"], cls_scale=cls_scale)
    field = guidance.field(model, labels("sampler/y"))
    state = sampler(field, joined(model, "sampler/latents", "sampler/cls_latents"), lambda: next(noises))
    latents, cls = model.split(state)
    close(latents, reference[f"sampler/{run}/final"].float(), 1e-4)
    close(cls, reference[f"sampler/{run}/cls_final"].float(), 1e-4)
    assert next(noises, None) is None
    assert sizes == reference[f"sampler/{run}/model_batch"].tolist()
