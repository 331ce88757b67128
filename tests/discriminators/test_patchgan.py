import pytest
import torch
from torch import nn
from torch.nn import functional as F

from vfm_vae.discriminators.patchgan import PatchGAN
from vfm_vae.losses.adversarial import feature_matching_loss, least_squares_discriminator_loss


@pytest.fixture
def patchgan():
    torch.manual_seed(0)
    return PatchGAN(base_channels=8)


def images(batch_size: int = 2, size: int = 64) -> torch.Tensor:
    return torch.rand(batch_size, 3, size, size) * 2 - 1


def test_published_size():
    with torch.device("meta"):
        patchgan = PatchGAN()
    assert sum(parameter.numel() for parameter in patchgan.parameters()) == 8_299_587
    assert not list(patchgan.buffers())


def test_shapes_at_every_scale(patchgan):
    outputs = patchgan(images())
    sizes = [[33, 17, 9, 10, 11], [17, 9, 5, 6, 7], [9, 5, 3, 4, 5]]
    expected = [
        [(2, width, size, size) for width, size in zip((8, 16, 32, 64, 1), of_scale, strict=True)] for of_scale in sizes
    ]
    assert [[tuple(output.shape) for output in layers] for layers in outputs] == expected


def test_channels_are_capped():
    patchgan = PatchGAN(num_scales=1, num_layers=4, base_channels=8, max_channels=32)
    assert [output.shape[1] for output in patchgan(images())[0]] == [8, 16, 32, 32, 32, 1]


def test_weights_start_small_and_norms_neutral():
    torch.manual_seed(0)
    for module in PatchGAN().scales[0].modules():
        if isinstance(module, nn.Conv2d):
            assert abs(module.weight.mean()) < 1e-3
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.05)
    norms = [layer.norm for layer in PatchGAN(base_channels=8).scales[0].layers if hasattr(layer, "norm")]
    assert len(norms) == 3
    assert all((norm.weight == 1).all() and not norm.bias.any() for norm in norms)


def test_scales_are_separate_and_see_smaller_images(patchgan):
    full = images()
    outputs = patchgan(full)
    # The mean of a constant is that constant at borders too: padding is left out of the count.
    assert torch.equal(F.avg_pool2d(torch.ones(1, 1, 8, 8), 3, 2, 1, count_include_pad=False), torch.ones(1, 1, 4, 4))
    half = F.avg_pool2d(full, 3, 2, 1, count_include_pad=False)
    assert torch.equal(patchgan.scales[1](half)[-1], outputs[1][-1])
    assert not torch.equal(patchgan.scales[0](half)[-1], outputs[1][-1])


@torch.no_grad()
def test_training_and_evaluation_agree(patchgan):
    batch = images(16)
    state = {name: value.clone() for name, value in patchgan.state_dict().items()}
    trained, evaluated = patchgan.train()(batch), patchgan.eval()(batch)
    for of_training, of_evaluation in zip(trained, evaluated, strict=True):
        for output, same in zip(of_training, of_evaluation, strict=True):
            assert torch.equal(output, same)
    assert all(torch.equal(value, state[name]) for name, value in patchgan.state_dict().items())


@torch.no_grad()
def test_groups_of_a_batch_do_not_mix(patchgan):
    batch = images(16, 32)
    for together, first in zip(patchgan(batch), patchgan(batch[:8]), strict=True):
        assert torch.allclose(together[-1][:8], first[-1], atol=1e-5)


def test_batch_that_does_not_divide(patchgan):
    with pytest.raises(ValueError, match=r"batch size: 9 .* 2 equal groups"):
        patchgan(images(9, 16))


def test_generator_loss_reaches_the_images_and_no_frozen_weight(patchgan):
    real, generated = images(), images().requires_grad_()
    patchgan.requires_grad_(False)
    feature_matching_loss(patchgan(real), patchgan(generated)).backward()
    assert generated.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in patchgan.parameters())


def test_discriminator_loss_trains_every_weight(patchgan):
    real, generated = ([layers[-1] for layers in patchgan(batch)] for batch in (images(), images()))
    sum(least_squares_discriminator_loss(real, generated)).backward()
    assert all(parameter.grad is not None for parameter in patchgan.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_float32_under_autocast(patchgan, dtype):
    batch = images().to(dtype)
    expected = patchgan(batch.float())
    with torch.autocast("cpu", torch.bfloat16):
        outputs = patchgan(batch)
    for layers, expected_layers in zip(outputs, expected, strict=True):
        for output, same in zip(layers, expected_layers, strict=True):
            assert output.dtype == torch.float32
            assert torch.equal(output, same)
