"""Compiled regions of the tokenizer: how many graphs there are, and that nothing else changes.

Graphs run eagerly here; that Inductor's code gives the same is a slow test of `test_module`.
"""

import copy
from collections import Counter

import pytest
import torch
from torch import nn

from callbacks.evaluation import rows_of
from vfm_vae import compilation
from vfm_vae.compilation import compile_regions, should_compile
from vfm_vae.conv_vae import ConvVAE
from vfm_vae.discriminators.layers import LocalBatchNorm
from vfm_vae.modules import layers, maps, modulated
from vfm_vae.modules.decoder import Decoder
from vfm_vae.modules.equivariance import EquivarianceRegularizer
from vfm_vae.vfm import FrozenVFM


@pytest.fixture
def graphs(monkeypatch) -> Counter[str]:
    """Numbers of compilations by function, of which only Dynamo's part is done."""
    compiled: Counter[str] = Counter()
    compile_eagerly = torch.compile

    def compile(function, **kwargs):
        def backend(graph, example_inputs, **_):
            compiled[function.__qualname__] += 1
            return graph.forward

        return compile_eagerly(function, backend=backend, **kwargs)

    monkeypatch.setattr(torch, "compile", compile)
    torch._dynamo.reset()
    compilation.compiled.cache_clear()
    yield compiled
    torch._dynamo.reset()
    compilation.compiled.cache_clear()


@pytest.fixture
def accelerator(monkeypatch):
    """Lets the forms of accelerators run on the CPU."""
    for module in (maps, modulated):
        monkeypatch.setattr(module, "uses_native_kernels", lambda x: False)
    monkeypatch.setattr(f"{LocalBatchNorm.__module__}.uses_native_kernels", lambda x: False)


@pytest.fixture
def decoder() -> Decoder:
    """Four blocks of two widths, whose attention is not silent."""
    torch.manual_seed(0)
    decoder = Decoder(
        in_channels=32,
        channels=[64, 64, 64, 32],
        route_channels=[64, 64],
        attention_depths=[1, 1],
        num_res_blocks=1,
        w_channels=16,
        activation_checkpointing=True,
    )
    for module in decoder.modules():
        if isinstance(module, layers.SelfAttentionLayer):
            nn.init.normal_(module.out.weight, std=0.2)
            nn.init.normal_(module.feed_forward[-1].weight, std=0.2)
    for layer in layers_of(decoder):
        nn.init.normal_(layer.layer_scale)
    return decoder


def run(decoder: Decoder, latent: torch.Tensor) -> list[torch.Tensor]:
    """Images, and all gradients."""
    decoder.zero_grad()
    decoded = decoder(latent)
    images = [*decoded.multiscale, decoded.image]
    sum(image.square().mean() for image in images).backward()
    return [*(image.detach() for image in images), *(parameter.grad.clone() for parameter in decoder.parameters())]


def layers_of(decoder: Decoder) -> list[modulated.ModulatedConvNeXt]:
    return [module for module in decoder.modules() if isinstance(module, modulated.ModulatedConvNeXt)]


def agree(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> None:
    for mine, reference in zip(ours, theirs, strict=True):
        assert torch.linalg.norm(mine - reference) <= 1e-5 * torch.linalg.norm(reference)


def test_sizes_that_are_equal_by_accident_are_not_compiled_for(graphs, accelerator):
    norm = maps.GroupNorm(4, 8)
    compile_regions([norm], "normalise", dynamic=True)
    for batch, side in ((16, 4), (2, 4), (3, 8)):  # as many samples as pixels, and then not
        norm(torch.randn(batch, 8, side, side).to(memory_format=torch.channels_last))
    assert sum(graphs.values()) == 1


def test_compiled_equals_eager_and_equal_layers_share_their_graphs(decoder, graphs, accelerator):
    eager, names = copy.deepcopy(decoder), list(decoder.state_dict())
    decoder.compile_regions()
    decoder.compile_regions()  # once more changes nothing
    assert list(decoder.state_dict()) == names
    latent = torch.randn(3, 32, 12, 12)  # no two sizes are the same number
    agree(run(decoder, latent), run(eager, latent))
    # Two widths; norms also of what is brought together from features and routes, and blurs of two kernels.
    widths = {"forward": 2, "backward": 2, "ModulatedConvNeXt.modulation": 2, "SelfAttentionLayer.on_tokens": 1}
    assert {name: graphs[name] for name in widths} == widths
    norms = {(m.num_groups, m.num_channels) for m in decoder.modules() if isinstance(m, nn.GroupNorm)}
    assert graphs["GroupNorm.normalise"] <= len(norms) + 1
    assert graphs["Blur.on_pixels"] <= 2 + 1 and graphs["PixelShuffle.on_pixels"] <= 2 + 1


@pytest.mark.slow
def test_other_sizes_and_batches_need_no_new_graphs(decoder, graphs, accelerator):
    eager = copy.deepcopy(decoder)
    decoder.compile_regions()
    run(decoder, torch.randn(3, 32, 12, 12))
    run(decoder, torch.randn(2, 32, 8, 20))
    before = graphs.total()
    for shape in ((2, 32, 12, 12), (5, 32, 8, 8), (4, 32, 16, 8), (3, 32, 20, 20)):
        latent = torch.randn(shape)
        agree(run(decoder, latent), run(eager, latent))
    assert graphs.total() == before


def test_autocast_compiles_nothing_of_the_adapter_anew(tiny_model, graphs):
    eager = tiny_model()
    model, features, z = copy.deepcopy(eager), [torch.randn(2, 24, 128)] * 2, torch.randn(2, 4, 4, 6)
    model.compile_regions()

    def run(model: nn.Module) -> list[torch.Tensor]:
        return [model.encode_features(features, (4, 6)).mean, model.adapter.decode(z), model.adapter.align(z)]

    agree(run(model), run(eager))
    before = graphs["AttentionProjection.forward"]
    with torch.autocast("cpu", torch.bfloat16):
        agree(run(model), run(eager))
    assert graphs["AttentionProjection.forward"] == before > 0


def test_a_copy_of_a_compiled_decoder_runs_its_own_weights(decoder, graphs):
    decoder.compile_regions()
    other, latent = copy.deepcopy(decoder), torch.randn(1, 32, 8, 8)
    nn.init.zeros_(other.blocks[-1].to_rgb.weight)
    for layer in layers_of(other):
        nn.init.zeros_(layer.layer_scale)
    assert not torch.allclose(decoder(latent).multiscale[0], other(latent).multiscale[0])


@pytest.mark.slow
def test_ten_steps_with_equivariance_recompile_no_more_often_than_there_are_shapes(
    tiny_module, trainer, batch, graphs, accelerator
):
    module = tiny_module(torch_compile=True, equivariance=EquivarianceRegularizer(0.6, 0.5))
    for part in module.model.decoder.modules():
        if isinstance(part, modulated.ModulatedConvNeXt):
            part.recompute = True
    shapes = set()  # of the layers' inputs
    for layer in layers_of(module.model.decoder):
        layer.recompute = True
        layer.register_forward_pre_hook(lambda _, args: shapes.add(tuple(args[0].shape)))
    batches = [batch] * 9 + [rows_of(batch, slice(4))]  # the last is smaller
    trainer(max_steps=10).fit(module, torch.utils.data.DataLoader(batches, batch_size=None))
    assert module.guard.num_skipped == 0 and len(shapes) > 10
    # Passes to the input alone, for the adaptive weight, are graphs of their own.
    assert 0 < graphs["forward"] <= len(shapes) and 0 < graphs["backward"] <= 2 * len(shapes)
    seen = graphs.total()
    trainer(max_steps=20).fit(module, torch.utils.data.DataLoader(batches, batch_size=None))
    assert graphs.total() == seen


@pytest.mark.parametrize(
    "name",
    [
        "vit_large_patch16_siglip_512.v2_webli",
        "vit_large_patch14_reg4_dinov2.lvd142m",
        pytest.param("vit_large_patch16_dinov3.lvd1689m", marks=pytest.mark.slow),
        "eva02_large_patch14_448.mim_in22k_ft_in22k_in1k",
        pytest.param("vit_large_patch14_clip_224.openai", marks=pytest.mark.slow),
    ],
)
def test_frozen_networks_of_any_family_compile_block_by_block(graphs, name):
    vfm = FrozenVFM(name, layers=[0, -1], pretrained=False, model_args={"depth": 3, "embed_dim": 64, "num_heads": 2})
    images = torch.rand(2, 3, 4 * vfm.patch_size, 4 * vfm.patch_size) * 2 - 1
    if vfm.network.patch_embed.strict_img_size:
        images = torch.rand(2, 3, *vfm.network.patch_embed.img_size) * 2 - 1
    eager = vfm(images)
    compile_regions(vfm.network.blocks, dynamic=True)
    torch.testing.assert_close(vfm(images), eager)
    assert graphs.total() == 1
    vfm(torch.cat([images, images[:1]]))
    assert graphs.total() == 1


def test_auto_compiles_large_models_on_gpus_alone(tiny_model):
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    with torch.device("meta"):
        large = Decoder()
    assert should_compile("auto", gpu, large) and not should_compile("auto", cpu, large)
    assert not should_compile("auto", gpu, tiny_model())
    assert should_compile(True, cpu, tiny_model()) and not should_compile(False, gpu, large)


def test_a_break_in_a_region_is_an_error(graphs):
    class Breaks(nn.Module):
        def forward(self, x):
            torch._dynamo.graph_break()
            return x + 1

    region = Breaks()
    compile_regions([region])
    with pytest.raises(torch._dynamo.exc.Unsupported):
        region(torch.ones(2))


def test_more_shapes_than_pytorchs_limit_compile(graphs):
    region = nn.Linear(4, 4)
    compile_regions([region], dynamic=False)
    for batch in range(2, 14):
        region(torch.ones(batch, 4))
    assert graphs["Linear.forward"] == 12


@pytest.mark.slow
def test_a_convolutional_vae_compiles_its_residual_blocks(graphs):
    torch.manual_seed(0)
    model, images = ConvVAE(channels=[8, 8], num_res_blocks=1, norm_groups=8), torch.rand(2, 3, 16, 16)
    expected = model.decode(model.encode(images).mode()).image
    model.compile_regions()
    image = model.decode(model.encode(images).mode()).image
    image.mean().backward()
    assert torch.equal(image, expected) and graphs["ResnetBlock2D.forward"] == graphs.total() > 0
