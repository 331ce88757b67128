"""Internal heads: what they predict, who pays for them, and how they are trained; test_denoiser.py has the rest."""

import pytest
import torch
from test_denoiser import condition, every_class, every_class_in_time, every_labelled, inputs, randomised, small

from ldm import path
from ldm.condition import Labels
from ldm.guidance import Guidance
from ldm.models.layers import modulate, unpatchify
from ldm.models.lightningdit import LightningDiT
from ldm.objective import denoising_errors, rehearse
from ldm.pipeline import LatentDiffusion
from ldm.samplers import Euler
from vfm_vae.data.latents import LatentStatistics


def runs_of(model) -> list[int]:
    """Grows with every run of the internal head."""
    runs = []
    model.base_final.register_forward_hook(lambda *_: runs.append(1))
    return runs


@torch.no_grad()
@every_class
@pytest.mark.parametrize("base_depth", [1, 2])
@pytest.mark.parametrize("alignment", ["none", "reg"])
def test_the_base_is_a_final_layer_of_its_own_after_the_block_it_names(kind, base_depth, alignment):
    model = randomised(small(kind, alignment, base_depth=base_depth, patch_size=2)).eval()
    seen = []
    model.blocks[base_depth - 1].register_forward_hook(lambda _, given, tokens: seen.append((given[1], tokens)))
    prediction = model(*inputs(model), base=True)
    ((condition, tokens),) = seen
    head, prefix = model.base_final, model.num_prefix_tokens
    shift, scale = (condition @ head.modulation.weight.mT + head.modulation.bias).chunk(2, dim=-1)
    tokens = modulate(head.norm(tokens), shift, scale)
    patches = tokens[:, prefix:] @ head.out.weight.mT + head.out.bias
    token = tokens[:, 0] @ head.cls_out.weight.mT + head.cls_out.bias if prefix else None
    expected = model.join(unpatchify(patches, model.grid, 2), token)
    assert torch.allclose(prediction.base, expected, atol=1e-5)
    assert not torch.allclose(prediction.base, prediction.velocity, atol=0.1)


@torch.no_grad()
@every_labelled
def test_only_who_asks_for_the_base_pays_for_it(kind):
    model = randomised(small(kind, "none", base_depth=1)).eval()
    runs = runs_of(model)
    plain = model(*inputs(model), align=True)
    model.block_features(*inputs(model))
    diffusion = LatentDiffusion(model, Euler(3), Guidance(2.0))
    diffusion.normalization.take(LatentStatistics(torch.zeros(1, 3, 1, 1), torch.ones(1, 3, 1, 1)))
    diffusion.sample([0, 1])
    assert plain.base is None and not runs
    asked = model(*inputs(model), base=True)
    assert len(runs) == 1 and torch.equal(asked.velocity, plain.velocity)


@every_class
def test_the_base_alone_trains_what_is_up_to_it(kind):
    model = randomised(small(kind, "none", depth=3, base_depth=2))
    model(*inputs(model), base=True).base.square().mean().backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    beyond = ("blocks.2.", "final.", "blocks.3.", "to_head.", "head_embed.")  # the last three are DiTDH's
    assert trained == {name for name, _ in model.named_parameters() if not name.startswith(beyond)}
    assert all(model.get_parameter(name).grad.any() for name in trained)


@every_class
@pytest.mark.parametrize("alignment", ["none", "reg"])
def test_models_with_and_without_a_head_begin_alike(kind, alignment):
    without, following = small(kind, alignment), torch.rand(1)
    with_head = small(kind, alignment, base_depth=1)
    assert torch.equal(torch.rand(1), following)
    ours = with_head.state_dict()
    assert all(torch.equal(ours.pop(name), tensor) for name, tensor in without.state_dict().items())
    assert ours and all(name.startswith("base_final.") for name in ours)
    before = {name: tensor.clone() for name, tensor in with_head.state_dict().items()}
    with_head.base_final.out.weight.data += 1
    torch.manual_seed(0)
    with_head.reset_parameters()
    assert not with_head.base_final.out.weight.any() and before.keys() == with_head.state_dict().keys()


def test_the_loss_has_the_whole_loss_of_the_base_by_its_weight():
    """With a class token: squared error, cosine and the token's, weighted as those of the output."""
    model = randomised(small("sit", "reg", base_depth=1))
    state, noise = torch.randn(2, 2, *model.state_shape)
    t, condition = torch.rand(2), Labels(torch.tensor([0, 5]), 5)
    weights = {"mse": 1.0, "cosine": 0.5, "cls": 0.03}
    errors = denoising_errors(model, None, state, None, noise, t, condition, weights)
    (base, token), (target, target_token) = (
        model.split(velocity)
        for velocity in (model(path.interpolate(state, noise, t), t, condition, base=True).base, state - noise)
    )
    cosine = 1 - torch.cosine_similarity(base, target, dim=1).mean((1, 2))
    expected = (base - target).square().mean((1, 2, 3)) + 0.5 * cosine
    expected = expected + 0.03 * (token - target_token).square().mean(1)
    assert set(errors) == {"mse", "cosine", "cls", "base"}
    assert torch.allclose(errors["base"], expected, rtol=1e-5)


@pytest.mark.parametrize("weight", [0.5, 0.0])
def test_training_and_validation_add_the_base(weight, diffusion, latents, trainer):
    module = diffusion({"base_depth": 1}, base_weight=weight, cosine_weight=0.5)
    run = trainer(max_steps=2, limit_val_batches=0, log_every_n_steps=1)
    run.fit(module, latents())
    logged = {name.removeprefix("train/loss"): float(value) for name, value in run.callback_metrics.items()}
    total = logged["_mse"] + 0.5 * logged["_cosine"] + weight * logged["_base"]
    assert logged[""] == pytest.approx(total, rel=1e-5) and logged["_base"] > 0
    assert bool(module.model.base_final.out.weight.any()) == bool(weight)
    (found,) = trainer().validate(module, latents(), verbose=False)
    module.weights["base"] = 0.0
    (without,) = trainer().validate(module, latents(), verbose=False)
    assert (found["val/loss"] > without["val/loss"] + 0.1) == bool(weight)


@every_class_in_time
def test_a_rehearsal_counts_the_head(kind):
    counts = []
    for base_depth in (0, 1):
        with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
            model = small(kind, "none", base_depth=base_depth)
            rehearse(model, None, condition(model, 2))
        counts.append(counter.get_total_flops())
    without, with_head = counts
    final = 2 * 2 * 16 * 3 * 16 + 2 * 2 * 16 * 32  # multiplications and additions of two images' output and modulation
    assert with_head - without == 3 * final  # forward, and backward to tokens and weights


def test_a_folder_brings_the_head_back(tmp_path):
    model = LatentDiffusion(randomised(small("lightningdit", "none", base_depth=1, predicts="data"))).eval()
    model.normalization.take(LatentStatistics(torch.zeros(1, 3, 1, 1), torch.ones(1, 3, 1, 1)))
    model.save_pretrained(tmp_path)
    again = LatentDiffusion.from_pretrained(tmp_path)
    expected = model.model(*inputs(model.model), base=True)
    found = again.model(*inputs(model.model), base=True)
    assert torch.equal(found.base, expected.base) and torch.equal(found.velocity, expected.velocity)


def test_weights_of_a_head_are_not_taken_for_those_of_another_depth(diffusion, latents, trainer, tmp_path):
    run, file = trainer(max_steps=1, limit_val_batches=0), tmp_path / "last.ckpt"
    run.fit(diffusion({"base_depth": 1}), latents())
    run.save_checkpoint(file)
    message = "the checkpoint's denoiser has its internal head at 1, but model.base_depth is 2; set it to 1"
    for command in (trainer().validate, trainer(max_steps=2).fit):
        with pytest.raises(ValueError, match=f"^ckpt_path: {message}"):
            command(diffusion({"base_depth": 2}), latents(), ckpt_path=file, weights_only=True)
    with pytest.raises(ValueError, match=f"^init_from: {message}"):
        trainer(max_steps=1).fit(diffusion({"base_depth": 2}, init_from=str(file)), latents())
    trainer().validate(diffusion({"base_depth": 1}), latents(), ckpt_path=file, weights_only=True, verbose=False)


class Settled(LightningDiT):
    """Predicts data, by a head after its first block, and has no options for that."""

    def __init__(self, in_channels: int, input_size: int, depth: int, width: int, num_heads: int, num_classes: int):
        sizes = {"depth": depth, "width": width, "num_heads": num_heads, "num_classes": num_classes}
        super().__init__(in_channels, input_size, **sizes, base_depth=1, predicts="data")


def test_a_class_may_settle_what_it_predicts_and_where(diffusion, latents, trainer, tmp_path):
    run, file = trainer(max_steps=1, limit_val_batches=0), tmp_path / "last.ckpt"
    run.fit(diffusion(kind=Settled), latents())
    run.save_checkpoint(file)
    trainer(max_steps=2, limit_val_batches=0).fit(diffusion(kind=Settled), latents(), ckpt_path=file, weights_only=True)
