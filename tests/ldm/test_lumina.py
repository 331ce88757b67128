"""Lumina-Next equals diffusers' own on the same weights, and does all that denoisers do."""

import json
import logging
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina
from diffusers.models.transformers.lumina_nextdit2d import LuminaNextDiT2DModel
from test_denoiser import condition, outputs_of_blocks
from torch.utils.flop_counter import FlopCounterMode

from ldm import path
from ldm.condition import Labels
from ldm.guidance import Guidance
from ldm.models.denoiser import Denoiser
from ldm.models.lumina import LuminaNextDiT
from ldm.objective import rehearse
from ldm.pipeline import LatentDiffusion
from ldm.samplers import Euler
from ldm.text import Captions, Text
from vfm_vae.compilation import is_compiled
from vfm_vae.data.latents import LatentStatistics
from vfm_vae.description import describe
from vfm_vae.pretrained import build
from vfm_vae.text import HashedWords

SMALL = {"in_channels": 3, "input_size": 4, "depth": 2, "width": 32, "num_heads": 4, "num_kv_heads": 2}
SMALL |= {"text_channels": 6, "multiple_of": 8}


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch):
    """The library advises to install another one."""
    monkeypatch.setattr(logging.getLogger("diffusers"), "disabled", True)


def small(**options) -> LuminaNextDiT:
    torch.manual_seed(0)
    return LuminaNextDiT(**SMALL | options)


def randomised(model: LuminaNextDiT, std: float = 0.3) -> LuminaNextDiT:
    """With weights that no path survives unnoticed."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=std)
    return model


def inputs(model: LuminaNextDiT, num: int = 3) -> tuple[torch.Tensor, torch.Tensor, Text]:
    torch.manual_seed(1)
    return torch.randn(num, *model.latent_shape), torch.rand(num), condition(model, num)


def by_diffusers(network: LuminaNextDiT2DModel, state: torch.Tensor, t: torch.Tensor, told: Text) -> torch.Tensor:
    """As the library's pipeline calls it at the size that it was trained for."""
    table = get_2d_rotary_pos_embed_lumina(network.head_dim, 384, 384, linear_factor=1.0, ntk_factor=1.0)
    return network(state, t, told.embeddings, told.mask, table, cross_attention_kwargs={}).sample


OPTIONS = {
    "plain": {},
    "not square": {"input_size": (4, 6)},
    "patches": {"input_size": (4, 8), "patch_size": 2},
    "as many heads": {"num_kv_heads": None},
    "one head for all": {"num_kv_heads": 1},
    "without norms": {"qk_norm": False},
    "another width": {"ffn_dim_multiplier": 1.5, "norm_eps": 1e-3},
    "wide": {"width": 1040, "depth": 1},  # conditions are 1024 wide at most
}


@torch.no_grad()
@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name == "wide")) for name in OPTIONS])
def test_it_is_the_librarys_both_ways(name: str, tmp_path: Path):
    model = randomised(small(**OPTIONS[name]), 0.1).eval()
    state, t, told = inputs(model)
    expected = model(state, t, told).velocity
    model.to_diffusers(tmp_path)
    network = LuminaNextDiT2DModel.from_pretrained(tmp_path)
    assert torch.equal(by_diffusers(network, state, t, told), expected) and expected.abs().max() > 1e-3
    network.save_pretrained(tmp_path / "saved")
    again = LuminaNextDiT.from_diffusers(tmp_path / "saved", input_size=model.input_size)
    assert torch.equal(again(state, t, told).velocity, expected)
    told_again = SMALL | OPTIONS[name] | {"input_size": model.input_size, "num_kv_heads": model.num_kv_heads}
    assert {option: again.arguments[option] for option in told_again} == told_again


@torch.no_grad()
def test_what_published_weights_predict_besides_is_left_out(tmp_path: Path):
    network = LuminaNextDiT2DModel(4, 2, 3, 32, 1, 4, 2, 8, cross_attention_dim=6, learn_sigma=True)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    network.save_pretrained(tmp_path)
    model = LuminaNextDiT.from_diffusers(tmp_path)
    state, t, told = inputs(model)
    expected = by_diffusers(network, state, t, told)
    assert expected.shape[1] == 6 and model.input_size == (4, 4)
    assert torch.equal(model(state, t, told).velocity, expected[:, :3])


def test_a_folder_that_does_not_fit_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="holds no LuminaNextDiT2DModel of diffusers"):
        (tmp_path / "config.json").write_text("{}")
        LuminaNextDiT.from_diffusers(tmp_path)
    small().to_diffusers(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_layers": 3}))
    with pytest.raises(ValueError, match=r"the weights are of another model than its config.json: .* missing"):
        LuminaNextDiT.from_diffusers(tmp_path)


def test_nothing_that_is_unused_is_kept_or_left_to_chance(tmp_path: Path):
    """Data-parallel training refuses weights without gradients."""
    model = randomised(small())
    model(*inputs(model)).velocity.square().mean().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())
    parts = {name.partition(".")[0] for name in model.state_dict()}
    assert parts == {"blocks", "norm_out", "patch_embedder", "time_caption_embed"}
    model.to_diffusers(tmp_path)
    assert not LuminaNextDiT2DModel.from_pretrained(tmp_path).pad_token.any()


def test_an_untrained_model_predicts_zero_and_its_blocks_change_nothing():
    model = small()
    blocks = outputs_of_blocks(model)
    assert (model(*inputs(model)).velocity == 0).all()
    assert torch.equal(*blocks) and blocks[0].any()


def test_one_batch_trains_everything():
    model = small()
    data, noise = torch.randn(2, 6, *model.latent_shape)
    t, told = torch.rand(6), condition(model, 6)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.0)
    before, losses = {name: p.detach().clone() for name, p in model.named_parameters()}, []
    for _ in range(30):
        predicted = model(path.interpolate(data, noise, t), t, told).velocity
        losses.append((predicted - path.velocity(data, noise)).square().mean())
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]
    assert [name for name, p in model.named_parameters() if torch.equal(p, before[name])] == []


@torch.no_grad()
def test_padding_does_not_matter_and_words_do():
    model = randomised(small(), 0.1).eval()
    state, t, told = inputs(model)
    expected = model(state, t, told).velocity
    behind = replace(told, embeddings=torch.where(told.mask[..., None], told.embeddings, 1e3))
    assert torch.equal(model(state, t, behind).velocity, expected)
    changed = replace(told, embeddings=-told.embeddings)
    assert (model(state, t, changed).velocity - expected).abs().max() > 1e-3


@torch.no_grad()
def test_bfloat16_stays_close_and_rounds_no_positions():
    model = randomised(small(), 0.1).eval()
    state, t, told = inputs(model)
    expected, blocks, given = model(state, t, told).velocity, outputs_of_blocks(model), []
    model.blocks[0].register_forward_pre_hook(lambda _, inputs: given.append(inputs[0]))
    with torch.autocast("cpu", torch.bfloat16):
        half = model(state, t, told).velocity
    assert {tokens.dtype for tokens in (*given, *blocks)} == {torch.float32}  # what blocks add to
    table = model.rotary.clone()
    quarter = model.to(torch.bfloat16)(state, t, told).velocity
    assert torch.equal(model.rotary, table)
    for velocity in (half, quarter):
        assert velocity.dtype == torch.float32
        assert 0 < (velocity - expected).norm() / expected.norm() < 0.03


def test_activation_checkpointing_changes_no_gradient():
    gradients, calls = [], []
    for value in (False, True):
        model = randomised(small(activation_checkpointing=value))
        model.blocks[0].register_forward_pre_hook(lambda *_, value=value: calls.append(value))
        model(*inputs(model)).velocity.square().mean().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))
    assert calls == [False, True, True]


@torch.no_grad()
def test_block_features_are_means_of_the_blocks_outputs():
    model = randomised(small()).eval()
    blocks = outputs_of_blocks(model)
    features = model.block_features(*inputs(model))
    assert len(features) == 2
    assert all(torch.equal(mean, tokens.mean(1)) for mean, tokens in zip(features, blocks, strict=True))


def test_a_rehearsal_counts_what_a_step_takes():
    model, counts = small(), []
    state, t, told = inputs(model)
    for step in (lambda: rehearse(model, None, told), lambda: model(state, t, told).velocity.sum().backward()):
        with FlopCounterMode(display=False) as counter:
            step()
        counts.append(counter.get_total_flops())
    tokens, words = 16, told.mask.shape[1]
    attention = 4 * len(state) * 32 * tokens * (tokens + words)  # two products of each block, not counted on a CPU
    assert counts[0] == counts[1] + 3 * 2 * attention  # forward, and backward to both factors; in two blocks


def num_parameters(text: int, channels: int, depth: int, width: int, heads: int, kv_heads: int, hidden: int) -> int:
    """By the parts of the network, with patches of one place."""
    kv, told = width * kv_heads // heads, min(width, 1024)
    to_image = 2 * width * width + 2 * width * kv + 2 * (width + kv)  # queries, outputs, keys, values, two norms
    to_text = width * width + 2 * text * kv + 2 * (width + kv)
    block = to_image + to_text + 3 * width * hidden + 4 * width * (told + 1) + 4 * width + text + heads
    time_and_text = 257 * told + (told + 1) * told + 2 * text + (text + 1) * told
    return depth * block + time_and_text + (channels + 1) * width + (told + 1) * width + (width + 1) * channels


def test_the_papers_size():
    with torch.device("meta"):
        model = LuminaNextDiT()
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == num_parameters(2048, 32, 24, 2304, 32, 8, 6144) == 1_754_933_536


def test_it_is_made_again_from_its_description():
    model = small()
    again = build(Denoiser, describe(model))
    assert type(again) is LuminaNextDiT and again.arguments == model.arguments
    assert again.state_dict().keys() == model.state_dict().keys()


@torch.no_grad()
def test_guided_samples_are_drawn_for_prompts(tmp_path: Path):
    model = LatentDiffusion(randomised(small(), 0.1), Euler(3), Guidance(2.0), Captions(HashedWords(6, 5))).eval()
    model.normalization.take(LatentStatistics(torch.zeros(1, 3, 1, 1), torch.ones(1, 3, 1, 1)))
    first, second = model.sample(prompts=["a cat", "a small dog"]).latents
    assert (first - second).abs().max() > 1e-3
    model.save_pretrained(tmp_path)
    again = LatentDiffusion.from_pretrained(tmp_path)
    assert torch.equal(again.sample(prompts=["a cat"]).latents[0], model.sample(prompts=["a cat"]).latents[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 40}, "width: 40 does not divide by 4 · num_heads = 16"),
        ({"num_kv_heads": 3}, "num_kv_heads: 3 does not divide num_heads = 4"),
        ({"patch_size": 3}, "patch_size: 3 does not divide"),
        ({"ffn_dim_multiplier": 0.0}, "ffn_dim_multiplier: must be above 0, given 0.0"),
        ({"predicts": "noise"}, "predicts: one of 'velocity', 'data', given 'noise'"),
    ],
)
def test_options_out_of_range_are_named(options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        small(**options)


def test_labels_are_refused():
    model = small()
    with pytest.raises(ValueError, match="gives Labels, but the denoiser takes texts"):
        model(*inputs(model)[:2], Labels(torch.tensor([0, 1, 2]), 5))


@pytest.mark.slow
def test_denoisers_are_imported_without_diffusers():
    command = "import sys, ldm.models; assert 'diffusers' not in sys.modules"
    subprocess.run([sys.executable, "-c", command], check=True, stdin=subprocess.DEVNULL, timeout=60)


@pytest.mark.slow
@pytest.mark.parametrize("recompute", [False, True])
def test_compiled_is_the_same_and_says_little(recompute: bool):
    torch.compiler.reset()
    compiled, plain = (randomised(small(activation_checkpointing=value)) for value in (recompute, False))
    compiled.compile_regions()
    with warnings.catch_warnings(record=True) as told:
        outputs = [model(*inputs(model)).velocity for model in (compiled, plain)]
        for output in outputs:
            output.square().mean().backward()
    assert all(is_compiled(block) for block in compiled.blocks)
    assert torch.allclose(*outputs, atol=1e-5)
    for (name, ours), theirs in zip(compiled.named_parameters(), plain.parameters(), strict=True):
        assert torch.allclose(ours.grad, theirs.grad, rtol=1e-4, atol=1e-4), name
    assert len({str(one.message) for one in told if "complex" in str(one.message)}) <= 1
    torch.compiler.reset()
