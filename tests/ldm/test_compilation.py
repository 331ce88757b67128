"""Compiled by parts, a denoiser is what it was; compiled is each kind of part once, not each part."""

import copy
import shutil
from collections import Counter

import pytest
import torch
from test_denoiser import ALL, inputs, one_class_in_time, parts, randomised, small

import vfm_vae.compilation
from callbacks.ema import EMA
from callbacks.throughput import Throughput
from ldm.models.layers import FinalLayer
from ldm.models.projectors import ConvProjector
from ldm.pipeline import LatentDiffusion
from vfm_vae.compilation import is_compiled
from vfm_vae.data.latents import LatentStatistics


@pytest.fixture(autouse=True)
def fresh_compiler():
    """Nothing is compiled before a test, nor after it."""
    forget()
    yield
    forget()


def forget():
    torch.compiler.reset()
    vfm_vae.compilation.compiled.cache_clear()


@pytest.fixture
def graphs(monkeypatch):
    """How often each kind of part was compiled, by its class; kernels are not made."""
    counts, compile = Counter(), torch.compile

    def counted(function, **options):
        def backend(graph, _, **__):
            counts[function.__qualname__.split(".")[0]] += 1
            return graph.forward

        return compile(function, backend=backend, **options)

    monkeypatch.setattr(torch, "compile", counted)
    return counts


def regions(kind: str, alignment: str, sizes: int = 1) -> dict[str, int]:
    """How often what is compiled for so many sizes of batches; a wide head's parts are others than the body's."""
    towers = 1 + (kind == "ditdh")
    projector = {} if alignment == "none" else {"ConvProjector" if alignment == "base" else "Sequential": sizes}
    return {block_of(kind): sizes * towers, "FinalLayer": sizes * (towers if alignment == "base" else 1), **projector}


def block_of(kind: str) -> str:
    """The class of a denoiser's blocks."""
    return "TextBlock" if kind == "text" else "Block"


def gradients(model, *arguments):
    model.zero_grad()
    sum(part.float().square().mean() for part in parts(model(*arguments, **ALL))).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def assert_close(ours, theirs, tolerance=1e-5):
    assert ours.keys() == theirs.keys()
    scale = max(value.abs().max().item() for value in theirs.values())
    for name, value in theirs.items():
        assert torch.allclose(ours[name], value, rtol=10 * tolerance, atol=tolerance * scale), name


@one_class_in_time
@pytest.mark.parametrize("alignment", [pytest.param("none", marks=pytest.mark.slow), "base"])
def test_equal_blocks_are_compiled_once(kind, alignment, graphs):
    model = small(kind, alignment, depth=6)
    model.compile_regions()
    model.compile_regions()  # again, which changes nothing
    gradients(model, *inputs(model))
    assert graphs == regions(kind, alignment)
    compiled = [module for module in model.modules() if is_compiled(module)]
    after = [FinalLayer] if alignment == "none" else [FinalLayer, FinalLayer, ConvProjector]
    assert Counter(map(type, compiled)) == Counter([*map(type, model.blocks), *after])


@one_class_in_time
def test_all_sizes_of_batches_but_the_first_share_one_form(kind, graphs):
    model = small(kind, depth=3)
    model.compile_regions()
    for num, expected in ((2, 1), (5, 2), (4, 2), (2, 2)):
        gradients(model, *inputs(model, num))
        assert graphs == regions(kind, "reg", expected)


@one_class_in_time
@pytest.mark.parametrize("alignment", [pytest.param("none", marks=pytest.mark.slow), "base"])
@pytest.mark.parametrize("recompute", [pytest.param(False, marks=pytest.mark.slow), True])
def test_compiled_is_the_same(kind, alignment, recompute, graphs):
    plain = randomised(small(kind, alignment))
    compiled = randomised(small(kind, alignment, activation_checkpointing=recompute))
    names = list(compiled.state_dict())
    compiled.compile_regions()
    arguments = inputs(plain, 3)
    assert_close(gradients(compiled, *arguments), gradients(plain, *arguments))
    with torch.no_grad():
        outputs = [dict(enumerate(parts(model(*arguments, **ALL)))) for model in (compiled, plain)]
    assert_close(*outputs)
    features = [dict(enumerate(model.block_features(*arguments))) for model in (compiled, plain)]
    assert len(features[0]) == len(plain.blocks)
    assert_close(*features)
    assert list(compiled.state_dict()) == names == list(plain.state_dict())
    assert graphs[block_of(kind)] > 0


@torch.no_grad()
@one_class_in_time
def test_a_copy_runs_its_own_weights(kind, graphs):
    model = randomised(small(kind))
    model.compile_regions()
    expected, other = parts(model(*inputs(model))), copy.deepcopy(model)
    for parameter in other.parameters():
        parameter.mul_(0.5)
    plain = randomised(small(kind))
    for parameter in plain.parameters():
        parameter.mul_(0.5)
    assert_close(*(dict(enumerate(parts(m(*inputs(m))))) for m in (other, plain)))
    assert all(torch.equal(*pair) for pair in zip(parts(model(*inputs(model))), expected, strict=True))
    assert graphs[block_of(kind)] == regions(kind, "reg")[block_of(kind)]


@one_class_in_time
def test_under_autocast_blocks_hand_float32_on_and_compute_in_bfloat16(kind, graphs):
    plain, compiled = (randomised(small(kind)) for _ in range(2))
    for model in (plain, compiled):
        for parameter in model.parameters():
            parameter.data.mul_(0.2)
    compiled.compile_regions()
    seen = []
    for part in (*compiled.blocks, compiled.blocks[0].mlp):
        part.register_forward_hook(lambda *args: seen.append(args[-1].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = (parts(model(*inputs(model, 4), align=True)) for model in (compiled, plain))
    assert all((a.float() - b.float()).norm() / b.float().norm() < 0.03 for a, b in zip(ours, theirs, strict=True))
    assert seen[0] == torch.bfloat16 and seen[1:] == [torch.float32] * len(plain.blocks)


def test_training_evaluation_and_sampling_run_compiled(diffusion, latents, trainer, graphs):
    modules = {how: diffusion(torch_compile=how) for how in (False, True)}
    results = {}
    for how, module in modules.items():
        run = trainer(max_steps=4, limit_train_batches=2, callbacks=[Throughput(), EMA(decay=0.5)])
        run.fit(module, datamodule=latents())
        assert graphs["Block"] == (2 if how else 0)  # in training, and without gradients
        loss = run.validate(module, datamodule=latents(), verbose=False)[0]["val/loss"]
        drawn = run.predict(module, datamodule=latents(num_samples=5))
        results[how] = module.state_dict(), {"loss": torch.tensor(loss)}, {"z": drawn[0].latents}
    for ours, theirs in zip(results[True], results[False], strict=True):
        assert_close(ours, theirs, 1e-4)
    assert all(is_compiled(block) for block in modules[True].model.blocks)


def test_sampling_alone_compiles_and_auto_leaves_a_cpu_alone(diffusion, latents, trainer, graphs):
    for how, compiled in (("auto", False), (False, False), (True, True)):
        module = diffusion(torch_compile=how)
        module.normalization.take(LatentStatistics(torch.zeros(1, 4, 1, 1), torch.ones(1, 4, 1, 1)))
        trainer().predict(module, datamodule=latents(num_samples=3))
        assert is_compiled(module.model.final) == compiled == bool(graphs)


def test_the_pipeline_samples_the_same_compiled(graphs):
    model = LatentDiffusion(randomised(small("lightningdit", "none"))).eval()
    model.normalization.take(LatentStatistics(torch.zeros(1, 3, 1, 1), torch.ones(1, 3, 1, 1)))
    model.sampler = type(model.sampler)(5)
    expected = model.sample([0, 1, 2], guidance_scale=2.0)
    drawn = model.compile_regions().sample([0, 1, 2], guidance_scale=2.0)
    torch.testing.assert_close(drawn.latents, expected.latents, rtol=1e-4, atol=1e-4)
    assert graphs == {"Block": 1, "FinalLayer": 1}


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="on the CPU, torch.compile needs a C++ compiler")
@one_class_in_time
@pytest.mark.parametrize("recompute", [False, True])
def test_compiled_for_good_it_is_the_same(kind, recompute):
    plain = randomised(small(kind))
    compiled = randomised(small(kind, activation_checkpointing=recompute))
    compiled.compile_regions()
    for num in (3, 4, 5):
        arguments = inputs(plain, num)
        assert_close(gradients(compiled, *arguments), gradients(plain, *arguments), 1e-4)
    exact = gradients(plain, *arguments)
    with torch.autocast("cpu", torch.bfloat16):
        errors = [error(gradients(model, *arguments), exact) for model in (compiled, plain)]
    assert errors[0] < 1.5 * errors[1]  # it rounds less often, if anything


def error(gradients, exact):
    return sum((gradients[name] - value).square().sum() for name, value in exact.items()).sqrt()
