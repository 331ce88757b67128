"""What all denoisers have in common: without alignment, with a projector (REPA), with a class token too (REG), and with
an internal head besides.
"""

from functools import partial

import pytest
import torch

from ldm import path
from ldm.condition import Condition, Labels
from ldm.models.denoiser import Denoiser, Prediction
from ldm.models.ditdh import DiTDH
from ldm.models.lightningdit import LightningDiT
from ldm.models.sit import SiT
from ldm.models.text_lightningdit import TextLightningDiT
from ldm.text import Text
from vfm_vae.description import describe
from vfm_vae.pretrained import build

SMALL = {"in_channels": 3, "input_size": 4, "depth": 2, "width": 16, "num_heads": 2, "num_classes": 5}
PROJECTOR = {"align_channels": 8, "align_depth": 1, "projector_width": 12}
ALIGNMENTS = {
    "none": {"cls_channels": 0, "align_channels": 0},
    "repa": {"cls_channels": 0} | PROJECTOR,
    "reg": {"cls_channels": 6} | PROJECTOR,
    "base": {"cls_channels": 6, "base_depth": 1, "projector": "conv"} | PROJECTOR,
}
ALL = {"align": True, "base": True}  # that can be asked for
CLASSES = {
    "lightningdit": LightningDiT,
    "sit": SiT,
    "ditdh": partial(DiTDH, head_depth=1, head_width=24, head_num_heads=3),
    "text": lambda num_classes, **options: TextLightningDiT(6, **options),
}

every_class = pytest.mark.parametrize("kind", CLASSES)
every_labelled = pytest.mark.parametrize("kind", [kind for kind in CLASSES if kind != "text"])
# Where another class takes seconds, and goes through the same code.
every_class_in_time = pytest.mark.parametrize(
    "kind", ["lightningdit", "sit", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("ditdh", "text"))]
)
one_class_in_time = pytest.mark.parametrize(
    "kind", ["lightningdit", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("sit", "ditdh", "text"))]
)
every_alignment = pytest.mark.parametrize("alignment", ALIGNMENTS)
with_all_or_nothing = pytest.mark.parametrize("alignment", ["none", "base"])


def small(kind: str, alignment: str = "reg", **options) -> Denoiser:
    torch.manual_seed(0)
    return CLASSES[kind](**SMALL | ALIGNMENTS[alignment] | options)


def randomised(model: Denoiser) -> Denoiser:
    """With weights that no path survives unnoticed."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def inputs(model: Denoiser, num: int = 2) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(1)
    x, t = torch.randn(num, *model.latent_shape), torch.rand(num)
    return model.join(x, torch.randn(num, model.cls_channels)), t, condition(model, num)


def condition(model: Denoiser, num: int) -> Condition:
    """A class for each, or a text of one to three words."""
    if not model.text_channels:
        return Labels(torch.arange(num) % (model.num_classes + 1), model.num_classes)
    tokens = torch.randn(num, 3, model.text_channels)
    return Text(tokens, torch.arange(3) <= torch.arange(num)[:, None] % 3, tokens[0, :1])


def parts(prediction: Prediction) -> list[torch.Tensor]:
    return [part for part in prediction if part is not None]


def outputs_of_blocks(model: Denoiser) -> list[torch.Tensor]:
    """Fills as the model runs."""
    blocks = []
    for block in model.blocks:
        block.register_forward_hook(lambda *args: blocks.append(args[-1]))
    return blocks


@every_class
@every_alignment
@pytest.mark.parametrize(("input_size", "patch_size"), [(4, 2), ((4, 8), 1)])
def test_predictions_are_of_what_the_model_has(kind, alignment, input_size, patch_size):
    model = small(kind, alignment, input_size=input_size, patch_size=patch_size)
    prefix, num_patches = int(alignment in ("reg", "base")), model.grid[0] * model.grid[1]
    assert model.num_prefix_tokens == prefix
    prediction = model(*inputs(model), **ALL)
    assert (prediction.base is not None) == (alignment == "base")
    for predicted in (prediction.velocity, *parts(prediction)[2:]):
        velocity, cls_velocity = model.split(predicted)
        assert velocity.shape == (2, *model.latent_shape)
        assert (cls_velocity is None) if not prefix else (cls_velocity.shape == (2, 6))
    if alignment == "none":
        assert prediction.projected is None
    else:
        assert prediction.projected.shape == (2, prefix + num_patches, 8)


@every_class
@every_alignment
def test_an_untrained_model_predicts_zero(kind, alignment):
    model = small(kind, alignment)
    velocity, projected, base = model(*inputs(model), **ALL)
    assert (velocity == 0).all()
    assert base is None or (base == 0).all()
    assert projected is None or (projected != 0).any()


@torch.no_grad()
@every_class
@pytest.mark.parametrize("align_depth", [1, 2])
def test_the_projector_reads_the_block_it_names_and_runs_where_asked_for(kind, align_depth):
    model = randomised(small(kind, align_depth=align_depth)).eval()
    runs, blocks = [], outputs_of_blocks(model)
    model.projector.register_forward_hook(lambda *args: runs.append(args[-1]))
    without = model(*inputs(model))
    assert without.projected is None and not runs
    blocks.clear()
    aligned = model(*inputs(model), align=True)
    assert len(runs) == 1 and torch.equal(aligned.projected, model.projector(blocks[align_depth - 1]))
    assert torch.equal(aligned.velocity, without.velocity)


@torch.no_grad()
@every_class
def test_latent_and_class_token_see_each_other(kind):
    model = randomised(small(kind)).eval()
    state, *told = inputs(model)
    x, cls_token = model.split(state)
    velocity, cls_velocity = model.split(model(state, *told).velocity)
    assert (model.split(model(model.join(x, cls_token + 1), *told).velocity)[0] - velocity).abs().max() > 1e-3
    assert (model.split(model(model.join(x + 1, cls_token), *told).velocity)[1] - cls_velocity).abs().max() > 1e-3


@every_class
def test_a_class_token_too_few_or_too_many_is_named(kind):
    with_token, without = small(kind, "reg"), small(kind, "repa")
    with pytest.raises(ValueError, match=r"state: the model's have the shape \(54,\), given \(3, 4, 4\)"):
        with_token(*inputs(without))
    with pytest.raises(ValueError, match=r"state: the model's have the shape \(3, 4, 4\), given \(54,\)"):
        without(*inputs(with_token))


@torch.no_grad()
@every_class
@every_alignment
def test_a_state_is_the_latent_with_the_class_token_behind_it(kind, alignment):
    model = randomised(small(kind, alignment)).eval()
    latents, token = torch.randn(2, *model.latent_shape), torch.randn(2, model.cls_channels)
    state = model.join(latents, token)
    assert torch.equal(state, torch.cat([latents.flatten(1), token], dim=1) if model.cls_channels else latents)
    assert state.shape[1:] == model.state_shape == model(*inputs(model)).velocity.shape[1:]
    first, second = model.split(state)
    assert torch.equal(first, latents)
    assert torch.equal(second, token) if model.cls_channels else second is None


@every_class
@every_alignment
def test_block_features_leave_the_class_token_out(kind, alignment):
    model = randomised(small(kind, alignment)).eval()
    blocks = outputs_of_blocks(model)
    features = model.block_features(*inputs(model))
    assert [f.shape for f in features] == [(2, 16)] * 2 + [(2, 24)] * (kind == "ditdh")
    prefix = model.num_prefix_tokens
    assert all(torch.equal(f, tokens[:, prefix:].mean(1)) for f, tokens in zip(features, blocks, strict=True))
    assert blocks[0].shape[1] == prefix + 16


@every_class_in_time
@pytest.mark.parametrize(
    "alignment", [*(pytest.param(name, marks=pytest.mark.slow) for name in ("none", "repa")), "base"]
)
def test_one_batch_trains_everything(kind, alignment):
    model = small(kind, alignment)
    data, noise = torch.randn(2, 8, 3, 4, 4)
    cls, cls_noise = torch.randn(2, 8, 6)
    t = torch.rand(8)
    target = torch.randn(8, model.num_prefix_tokens + 16, 8)
    told = t, condition(model, 8)
    noisy = model.join(path.interpolate(data, noise, t), path.interpolate(cls, cls_noise, t))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.0)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    losses = []
    for _ in range(100):
        prediction = model(noisy, *told, **ALL)
        losses.append(torch.zeros(()))
        for predicted in (prediction.velocity, *([prediction.base] if model.base_depth else [])):
            velocity, cls_velocity = model.split(predicted)
            losses[-1] = losses[-1] + path.squared_error(velocity, path.velocity(data, noise)).mean()
            if model.cls_channels:
                error = path.squared_error(cls_velocity, path.velocity(cls, cls_noise)).mean()
                losses[-1] = losses[-1] + 0.03 * error
        if model.align_channels:
            losses[-1] = losses[-1] - 0.5 * torch.cosine_similarity(prediction.projected, target, dim=-1).mean()
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]
    assert [name for name, p in model.named_parameters() if not p.grad.any() or torch.equal(p, before[name])] == []


@every_class
def test_without_alignment_gradients_reach_all_but_the_projector(kind):
    model = randomised(small(kind))
    model(*inputs(model)).velocity.square().mean().backward()
    left_out = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert left_out == {f"projector.{layer}.{part}" for layer in (0, 2, 4) for part in ("weight", "bias")}


@every_class
@with_all_or_nothing
def test_activation_checkpointing_changes_no_gradient(kind, alignment):
    gradients, calls = [], []
    for value in (False, True):
        model = randomised(small(kind, alignment, activation_checkpointing=value))
        model.blocks[0].register_forward_pre_hook(lambda *_, value=value: calls.append(value))
        sum(part.square().mean() for part in parts(model(*inputs(model), **ALL))).backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*gradients, strict=True))
    assert calls == [False, True, True]


@torch.no_grad()
@one_class_in_time
@pytest.mark.parametrize("alignment", [pytest.param("none", marks=pytest.mark.slow), "base"])
def test_compiled_in_one_graph_it_is_the_same(kind, alignment):
    torch.compiler.reset()  # forms of the other models count towards one limit
    model = randomised(small(kind, alignment)).eval()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for asked in ({}, ALL):
        expected, given = (parts(network(*inputs(model), **asked)) for network in (model, compiled))
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(given, expected, strict=True))


@torch.no_grad()
@every_class
@with_all_or_nothing
def test_bf16_autocast_stays_close(kind, alignment):
    model = randomised(small(kind, alignment)).eval()
    for parameter in model.parameters():
        parameter.data.mul_(0.2)
    full = parts(model(*inputs(model, 4), **ALL))
    with torch.autocast("cpu", torch.bfloat16):
        half = parts(model(*inputs(model, 4), **ALL))
    assert all((h.float() - f).norm() / f.norm() < 0.05 for h, f in zip(half, full, strict=True))


@every_class
@every_alignment
def test_a_model_is_made_again_from_its_description(kind, alignment):
    model = small(kind, alignment)
    again = build(Denoiser, describe(model))
    assert type(again) is type(model) and again.arguments == model.arguments
    assert again.state_dict().keys() == model.state_dict().keys()


@every_class
def test_what_is_fixed_is_not_stored(kind):
    parts = ["position", "rotary", "cos", "sin", *(["frequencies"] if kind != "ditdh" else [])]  # which are random
    assert not any(part in name for name in small(kind).state_dict() for part in parts)


@every_class
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patch_size": 3}, "patch_size: 3 does not"),
        ({"width": 18}, "width: 18 does not divide"),
        ({"align_depth": 3}, "align_depth: a block from 1 to depth = 2, given 3"),
        ({"base_depth": 3}, "base_depth: a block from 1 to depth = 2, or 0 for no head, given 3"),
        ({"predicts": "noise"}, "predicts: one of 'velocity', 'data', given 'noise'"),
        ({"projector": "linear"}, "projector: one of 'mlp', 'conv', given 'linear'"),
    ],
)
def test_options_out_of_range_are_named(kind, options, message):
    with pytest.raises(ValueError, match=message):
        small(kind, **options)


@every_class
def test_a_depth_of_alignment_is_not_asked_for_without_a_projector(kind):
    assert small(kind, "none", align_depth=8).projector is None
