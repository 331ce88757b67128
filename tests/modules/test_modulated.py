import pytest
import torch
import torch.nn.functional as F

from vfm_vae.modules import modulated
from vfm_vae.modules.modulated import (
    ModulatedConvNeXt,
    ToRGB,
    demodulate,
    modulate_activations,
    modulate_weights,
    modulated_pointwise,
)


@pytest.mark.parametrize("side", [2, 16])  # either side of the choice between the two forms
def test_equals_the_definition(side):
    x, weight, style, bias = torch.randn(3, 8, side, side), torch.randn(12, 8), torch.randn(3, 8), torch.randn(12)
    expected = []
    for sample, scale in zip(x, style, strict=True):
        scaled = weight * scale  # [O, I]
        scaled = scaled / (scaled.square().sum(1, keepdim=True) + 1e-8).sqrt()
        expected.append(torch.einsum("oi,ihw->ohw", scaled, sample) + bias[:, None, None])
    result = modulated_pointwise(x, weight, style, bias, demodulate(weight, style))
    torch.testing.assert_close(result, torch.stack(expected))


def test_both_forms_have_the_same_gradients():
    gradients = []
    for form in (modulate_activations, modulate_weights):
        torch.manual_seed(0)
        shapes = [(2, 8, 4, 4), (6, 8), (2, 8), (2, 6), (6,)]
        inputs = [torch.randn(shape, requires_grad=True) for shape in shapes]
        form(*inputs).square().sum().backward()
        gradients.append([x.grad for x in inputs])
    torch.testing.assert_close(*gradients)


def test_demodulation_gives_unit_variance():
    x, weight, style = torch.randn(4, 64, 32, 32), torch.randn(32, 64), torch.rand(4, 64) + 0.5
    assert modulated_pointwise(x, weight, style, torch.zeros(32), demodulate(weight, style)).std() == pytest.approx(
        1.0, abs=0.02
    )


def test_demodulation_of_next_to_nothing_stays_finite():
    factors = demodulate(torch.ones(1, 4), torch.tensor([[0.0] * 4, [1e-4] * 4]))
    torch.testing.assert_close(factors, torch.tensor([[1e4], [5e-8**-0.5]]))


def test_a_fresh_layer_is_nearly_the_identity():
    layer = ModulatedConvNeXt(8, 6, kernel=7)
    x = torch.randn(2, 8, 5, 5)
    difference = layer(x, torch.randn(2, 6)) - x
    assert 0 < difference.abs().max() < 1e-4
    layer.layer_scale.data.fill_(1.0)
    assert F.mse_loss(layer(x, torch.randn(2, 6)), x) > 1e-6


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_changes_no_image_and_no_gradient(monkeypatch, dtype, native):
    monkeypatch.setattr(modulated, "uses_native_kernels", lambda x: native)
    to_rgb, w = ToRGB(8, 6), torch.randn(2, 6)
    feature_sum = torch.randn(2, 8, 12, 12).to(dtype).requires_grad_()

    results = []
    for autocast in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            image = to_rgb(feature_sum, w)
        results.append([image, *torch.autograd.grad(image.square().sum(), [feature_sum, *to_rgb.parameters()])])
    assert results[1][0].dtype == torch.float32
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


def test_an_image_of_bfloat16_features_keeps_no_copy_of_them_in_float32(monkeypatch):
    monkeypatch.setattr(modulated, "uses_native_kernels", lambda x: False)
    to_rgb, feature_sum, kept = ToRGB(8, 6), torch.randn(2, 8, 12, 12).bfloat16().requires_grad_(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append((x.dtype, x.numel())) or x, lambda x: x):
        to_rgb(feature_sum, torch.randn(2, 6))
    assert (torch.bfloat16, feature_sum.numel()) in kept
    assert not [size for dtype, size in kept if dtype == torch.float32 and size >= feature_sum.numel()]
