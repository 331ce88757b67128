import pytest
import torch
import torch.nn.functional as F

from vfm_vae.modules.adapter import Adapter, projection, unshuffle_tokens
from vfm_vae.modules.posterior import DiagonalGaussian


def adapter(**kwargs) -> Adapter:
    defaults = {
        "feature_channels": [32, 16],
        "layer_channels": [8, 8],
        "latent_channels": 8,
        "unshuffle": 2,
        "decoded_channels": 16,
        "alignment_channels": 32,
    }
    return Adapter(**defaults | kwargs)


@pytest.mark.parametrize("kind", ["attention", "conv"])
@pytest.mark.parametrize("num_layers", [1, 2])
def test_shapes_on_a_non_square_grid(kind, num_layers):
    module = adapter(encode_projection=kind, decode_projection=kind, encode_layers=num_layers, decode_layers=num_layers)
    features = [torch.randn(2, 8 * 4, channels) for channels in (32, 16)]
    moments = module.encode(features, (8, 4))
    assert moments.shape == (2, 16, 4, 2)
    z = DiagonalGaussian(moments).mode()
    assert module.decode(z).shape == (2, 16, 4, 2)
    assert module.align(z).shape == (2, 32, 4, 2)
    assert any(module.last_encoding_weight is parameter for parameter in module.fuse.parameters())


def test_unshuffle_puts_neighbours_into_channels():
    maps = torch.arange(2 * 3 * 4 * 6.0).view(2, 3, 4, 6)
    tokens = unshuffle_tokens(maps.flatten(2).mT, (4, 6), 2)
    assert torch.equal(tokens, F.pixel_unshuffle(maps, 2).flatten(2).mT)
    assert torch.equal(tokens[0, 0], maps[0, :, :2, :2].flatten())  # channel, row, column


@pytest.mark.parametrize("encode", [True, False])
def test_stacks_change_width_at_the_latent_s_end_and_keep_their_heads(encode):
    widths = (32, 8) if encode else (8, 32)
    stack = projection("attention", *widths, num_layers=3, encode=encode)
    assert [block.proj.in_features for block in stack] == ([32, 32, 32] if encode else [8, 32, 32])
    assert {block.attention.num_heads for block in stack} == {4}


@pytest.mark.parametrize("kind", ["attention", "conv"])
def test_autocast_changes_nothing(kind):
    module = adapter(encode_projection=kind, decode_projection=kind)
    features, z = [torch.randn(2, 32, channels) for channels in (32, 16)], torch.randn(2, 8, 4, 2)

    results = []
    for autocast in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            posterior = DiagonalGaussian(module.encode(features, (8, 4)))
            outputs = [posterior.mean, posterior.logvar, module.decode(z), module.align(z)]
        gradients = torch.autograd.grad(sum(x.square().sum() for x in outputs), list(module.parameters()))
        results.append([*outputs, *gradients])
    assert {x.dtype for x in results[1]} == {torch.float32}
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


def test_it_computes_in_the_precision_of_its_weights():
    module = adapter().bfloat16()
    moments = module.encode([torch.randn(2, 32, channels) for channels in (32, 16)], (8, 4))
    assert moments.dtype == module.decode(torch.randn(2, 8, 4, 2)).dtype == torch.bfloat16


def test_options_that_do_not_fit():
    with pytest.raises(
        ValueError, match="no config describes the VFM that they follow from, or its class has no shape_of"
    ):
        Adapter()
    with pytest.raises(ValueError, match="from 32 to 12 channels"):
        adapter(layer_channels=[12, 8])
    with pytest.raises(ValueError, match="projection 'mlp' is unknown"):
        adapter(encode_projection="mlp")
    with pytest.raises(ValueError, match="2 layers of features, but was given 1"):
        adapter().encode([torch.randn(1, 16, 32)], (4, 4))
    with pytest.raises(ValueError, match="3x4 does not divide by unshuffle=2"):
        adapter().encode([torch.randn(1, 12, 32), torch.randn(1, 12, 16)], (3, 4))


def test_posterior_against_closed_forms():
    moments = torch.randn(3, 8, 2, 2)
    posterior = DiagonalGaussian(moments)
    normal = torch.distributions.Normal(posterior.mean, (posterior.logvar / 2).exp())
    expected = torch.distributions.kl_divergence(normal, torch.distributions.Normal(0.0, 1.0)).sum((1, 2, 3))
    torch.testing.assert_close(posterior.kl(), expected)
    noise = torch.randn(3, 4, 2, 2)
    torch.testing.assert_close(posterior.sample(noise), posterior.mean + (posterior.logvar / 2).exp() * noise)
    torch.manual_seed(0)
    many = torch.stack([posterior.sample() for _ in range(4000)])
    torch.testing.assert_close(many.mean(0), posterior.mean, atol=0.25, rtol=0.1)


def test_posterior_clamps_and_stays_in_float32():
    posterior = DiagonalGaussian(torch.full((1, 2, 1, 1), 1e4, dtype=torch.bfloat16))
    assert posterior.logvar.max() == 20.0
    assert DiagonalGaussian(torch.full((1, 2, 1, 1), -1e4)).logvar.max() == -30.0
    assert posterior.sample().dtype == torch.float32


def test_weights_start_with_their_spread():
    module = adapter(feature_channels=[128, 64], layer_channels=[32, 32], latent_channels=64, decoded_channels=64)
    linear = torch.cat([m.weight.flatten() for m in module.modules() if isinstance(m, torch.nn.Linear)])
    assert linear.std().item() == pytest.approx(0.02, rel=0.02)
    xavier = 0.5 * (2 / sum(module.alignment.weight.shape[:2])) ** 0.5
    assert module.alignment.weight.std().item() == pytest.approx(xavier, rel=0.05)
