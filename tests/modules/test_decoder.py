import pytest
import torch
import torch.nn.functional as F

from vfm_vae.modules.decoder import Decoder, Mapping
from vfm_vae.modules.modulated import ModulatedConvNeXt


@pytest.fixture
def decoder() -> Decoder:
    torch.manual_seed(0)
    return Decoder(
        in_channels=8,
        channels=[16, 16, 16, 8],
        route_channels=[16, 8, 8],
        attention_depths=[1],
        num_res_blocks=1,
        w_channels=8,
    )


@pytest.mark.parametrize("grid", [(4, 4), (8, 4), (8, 12)])
def test_images_of_every_block_small_to_large(decoder, grid):
    decoded = decoder(torch.randn(2, 8, *grid))
    sides = [(grid[0] * 2**i // 2, grid[1] * 2**i // 2) for i in range(4)]
    images = [*decoded.multiscale, decoded.image]
    assert [tuple(image.shape) for image in images] == [(2, 3, *side) for side in sides]
    assert decoder.upscaling == 4


@pytest.mark.parametrize("downsampling", ["unshuffle", "pooling"])
@pytest.mark.parametrize(
    ("num_blocks", "compression", "cells", "scales"),
    [
        (6, 16, 4, [1 / 4, 1 / 2, 1, 2, 4, 8]),
        (5, 16, 2, [1 / 2, 1, 2, 4, 8]),
        (5, 8, 4, [1 / 4, 1 / 2, 1, 2, 4]),
        (4, 8, 2, [1 / 2, 1, 2, 4]),
        (3, 8, 1, [1, 2, 4]),
    ],
)
def test_blocks_start_where_their_number_and_compression_say(num_blocks, compression, cells, scales, downsampling):
    options = {"compression": compression, "route_downsampling": downsampling}
    decoder = Decoder(8, [8] * num_blocks, [8] * num_blocks, [], 0, w_channels=8, **options)
    assert (decoder.upscaling, decoder.side_multiple) == (compression, cells)
    taken = []
    for route in decoder.routes:
        route.register_forward_hook(lambda module, args, out: taken.append(tuple(out.shape[2:])))
    rows, columns = cells, 3 * cells
    decoded = decoder(torch.randn(1, 8, rows, columns))
    assert taken == [(rows * scale, columns * scale) for scale in scales]
    sides = [tuple(image.shape[2:]) for image in (*decoded.multiscale, decoded.image)]
    assert sides == [(2 * height, 2 * width) for height, width in taken]
    assert sides[-1] == (compression * rows, compression * columns)
    if cells > 1:
        with pytest.raises(ValueError, match=f"divide by {cells}, got {rows + 1}x{columns}"):
            decoder(torch.randn(1, 8, rows + 1, columns))


def test_the_first_block_takes_a_quarter_of_the_latent_if_nothing_else_is_said():
    arguments = {"in_channels": 8, "channels": [8] * 4, "route_channels": [8] * 4, "attention_depths": []}
    told, silent = Decoder(**arguments, w_channels=8, compression=4), Decoder(**arguments, w_channels=8)
    told.load_state_dict(silent.state_dict())
    latent = torch.randn(1, 8, 4, 8)
    assert (silent.upscaling, silent.side_multiple) == (4, 4)
    assert torch.equal(told(latent).image, silent(latent).image)


def test_pooled_routes_get_averages_and_only_coarse_ones_are_pooled():
    decoder = Decoder(8, [8] * 4, [8] * 4, [], 0, w_channels=8, route_downsampling="pooling")
    latent = torch.randn(2, 8, 4, 12)
    for route, size in zip(decoder.routes, [(1, 3), (2, 6)], strict=False):
        torch.testing.assert_close(route[0](latent), F.adaptive_avg_pool2d(latent, size))
        assert route[1].in_channels == 8
    for route in decoder.routes[2:]:
        assert torch.equal(route[0](latent), latent)


def test_memory_layouts_agree(decoder):
    latent = torch.randn(2, 8, 8, 8)
    channels_last = decoder(latent).image
    decoder.memory_format = torch.contiguous_format
    torch.testing.assert_close(decoder(latent).image, channels_last)


def test_samples_do_not_see_each_other(decoder):
    latent = torch.randn(2, 8, 8, 8)
    torch.testing.assert_close(decoder(latent).image[:1], decoder(latent[:1]).image)


def test_every_parameter_gets_a_gradient(decoder):
    for module in decoder.modules():  # zero-initialised outputs would stop gradients at the start
        if hasattr(module, "null_kv"):
            torch.nn.init.normal_(module.out.weight)
            torch.nn.init.normal_(module.feed_forward[-1].weight)
    decoded = decoder(torch.randn(2, 8, 4, 4))
    sum(image.square().mean() for image in (*decoded.multiscale, decoded.image)).backward()
    assert not [name for name, parameter in decoder.named_parameters() if parameter.grad is None]


def test_under_autocast_maps_are_bfloat16_and_images_float32(decoder):
    maps, sums = set(), []
    for route in decoder.routes:
        route.register_forward_hook(lambda module, args, out: maps.add(out.dtype))
    for block in decoder.blocks:
        for part in (block.upsample, block.upsample_sum, *block.layers, *block.attention):
            if part is not None:
                part.register_forward_hook(lambda module, args, out: maps.add(out.dtype))
        block.to_rgb.register_forward_hook(lambda module, args, out: sums.append((module, *args)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        decoded = decoder(torch.randn(2, 8, 8, 8))
    assert maps == {torch.bfloat16} == {feature_sum.dtype for _, feature_sum, _ in sums}
    images = [to_rgb(feature_sum.float(), w) for to_rgb, feature_sum, w in list(sums)]
    assert all(torch.equal(*pair) for pair in zip((*decoded.multiscale, decoded.image), images, strict=True))


def test_truncation_draws_towards_the_average():
    mapping = Mapping(8, 6)
    latent = torch.randn(4, 8, 4, 4)
    w = mapping(latent)  # in training, the average moves
    torch.testing.assert_close(mapping.average, 0.005 * w.mean(0))
    mapping.eval()
    before = mapping.average.clone()
    torch.testing.assert_close(mapping(latent, truncation=0.0), before.expand_as(w))
    torch.testing.assert_close(mapping(latent, truncation=0.5), (before + w) / 2)
    assert torch.equal(mapping.average, before)


def test_legacy_noise_is_off_by_default_and_silent_at_the_start():
    arguments = {"in_channels": 8, "channels": [8, 8], "route_channels": [8], "attention_depths": []}
    assert not [name for name in Decoder(**arguments, w_channels=8).state_dict() if "noise" in name]
    noisy = Decoder(**arguments, w_channels=8, legacy_noise=True)
    latent = torch.randn(1, 8, 8, 8)
    before = noisy(latent).image
    noisy.blocks[0].layers[0].noise.map.zero_()
    assert torch.equal(noisy(latent).image, before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"channels": [10, 8]}, "channels must divide by 4"),
        ({"channels": [8, 8], "route_channels": [8, 8, 8]}, "route_channels"),
        ({"channels": [8, 8], "attention_depths": [1, 1, 1]}, "attention_depths"),
        ({"channels": [8, 8], "attention_depths": [1], "attention_heads": 3}, "attention_heads=3"),
        ({"channels": [8, 8], "route_activation": "relu"}, "activation 'relu' is unknown"),
        ({"channels": [8, 8], "compression": 8}, "compression: 2 blocks .* a power of two up to 4, given 8"),
        ({"channels": [8, 8], "compression": 3}, "compression: .* power of two up to 4, given 3"),
        ({"channels": [8, 8], "compression": 0}, "compression: .* given 0"),
        ({"channels": [8, 8], "route_downsampling": "mean"}, "route_downsampling: choose .* given 'mean'"),
    ],
)
def test_options_that_do_not_fit(arguments, message):
    defaults = {"in_channels": 8, "route_channels": [8], "attention_depths": [], "w_channels": 8}
    with pytest.raises(ValueError, match=message):
        Decoder(**defaults | arguments)


def test_a_grid_that_does_not_divide_by_four(decoder):
    with pytest.raises(ValueError, match="divide by 4, got 6x8"):
        decoder(torch.randn(1, 8, 6, 8))


def test_activation_checkpointing_changes_memory_alone(decoder):
    latent = torch.randn(2, 8, 8, 8)

    def measure(checkpointing: bool) -> tuple[list[torch.Tensor], int]:
        """Gradients, and the numbers that wait for the backward pass."""
        sizes = []
        for module in decoder.modules():
            if isinstance(module, ModulatedConvNeXt):
                module.recompute = checkpointing
        decoder.zero_grad()
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
            loss = decoder(latent).image.square().mean()
        loss.backward()
        return [parameter.grad.clone() for parameter in decoder.parameters() if parameter.grad is not None], sum(sizes)

    (expected, all_kept), (gradients, kept) = measure(False), measure(True)
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(expected, gradients, strict=True))
    assert kept < 0.6 * all_kept
