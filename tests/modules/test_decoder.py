import pytest
import torch

from vfm_vae.modules.decoder import Decoder, Mapping
from vfm_vae.modules.modulated import ModulatedConvNeXt


@pytest.fixture
def decoder() -> Decoder:
    torch.manual_seed(0)
    return Decoder(
        latent_channels=8,
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
    arguments = {"latent_channels": 8, "channels": [8, 8], "route_channels": [8], "attention_depths": []}
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
    ],
)
def test_options_that_do_not_fit(arguments, message):
    defaults = {"latent_channels": 8, "route_channels": [8], "attention_depths": [], "w_channels": 8}
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
