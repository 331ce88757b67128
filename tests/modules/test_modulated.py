import pytest
import torch
import torch.nn.functional as F

from vfm_vae.modules.modulated import ModulatedConvNeXt, modulate_activations, modulate_weights, modulated_pointwise


def reference(x, weight, style, bias, demodulate):
    """The definition, sample by sample."""
    outputs = []
    for sample, scale in zip(x, style, strict=True):
        scaled = weight * scale  # [O, I]
        if demodulate:
            scaled = scaled / (scaled.square().sum(1, keepdim=True) + 1e-8).sqrt()
        outputs.append(torch.einsum("oi,ihw->ohw", scaled, sample))
    return torch.stack(outputs) + bias[:, None, None]


@pytest.mark.parametrize("side", [2, 16])  # either side of the choice between the two forms
@pytest.mark.parametrize("demodulate", [True, False])
def test_equals_the_definition(side, demodulate):
    inputs = torch.randn(3, 8, side, side), torch.randn(12, 8), torch.randn(3, 8), torch.randn(12)
    torch.testing.assert_close(modulated_pointwise(*inputs, demodulate), reference(*inputs, demodulate))


def test_both_forms_have_the_same_gradients():
    gradients = []
    for form in (modulate_activations, modulate_weights):
        torch.manual_seed(0)
        shapes = [(2, 8, 4, 4), (6, 8), (2, 8), (2, 6), (6,)]
        inputs = [torch.randn(shape, requires_grad=True) for shape in shapes]
        form(*inputs).square().sum().backward()
        gradients.append([x.grad for x in inputs])
    torch.testing.assert_close(*gradients)


def test_batched_form_of_accelerators_equals_the_one_of_cpus():
    x, weight, style = torch.randn(2, 8, 4, 6), torch.randn(6, 8), torch.randn(2, 8)
    ones, bias = torch.ones(2, 6), torch.randn(6)
    pixels = x.permute(0, 2, 3, 1).flatten(1, 2)
    batched = torch.baddbmm(bias, pixels, (weight * style[:, None]).mT).unflatten(1, (4, 6)).permute(0, 3, 1, 2)
    torch.testing.assert_close(modulate_weights(x, weight, style, ones, bias), batched)


def test_demodulation_gives_unit_variance():
    x, weight, style = torch.randn(4, 64, 32, 32), torch.randn(32, 64), torch.rand(4, 64) + 0.5
    assert modulated_pointwise(x, weight, style, torch.zeros(32)).std() == pytest.approx(1.0, abs=0.02)


def test_a_fresh_layer_is_nearly_the_identity():
    layer = ModulatedConvNeXt(8, 6, kernel=7)
    x = torch.randn(2, 8, 5, 5)
    difference = layer(x, torch.randn(2, 6)) - x
    assert 0 < difference.abs().max() < 1e-4
    layer.layer_scale.data.fill_(1.0)
    assert F.mse_loss(layer(x, torch.randn(2, 6)), x) > 1e-6
