"""The layer that keeps its input alone, against autograd."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from vfm_vae.modules import convnext
from vfm_vae.modules.modulated import ModulatedConvNeXt

SIDES = (12, 8)  # more pixels than channels


@pytest.fixture(params=[None, 8], ids=["plain", "legacy noise"])
def layers(request) -> tuple[ModulatedConvNeXt, ModulatedConvNeXt]:
    """Two layers with the same weights; the second recomputes."""
    torch.manual_seed(0)
    plain, recomputing = (ModulatedConvNeXt(16, 8, 5, request.param, recompute) for recompute in (False, True))
    for parameter in plain.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    recomputing.load_state_dict(plain.state_dict())
    return plain, recomputing


@pytest.fixture
def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Features, global latents, and a gradient of the output."""
    x = torch.randn(2, 16, *SIDES).contiguous(memory_format=torch.channels_last)
    return x.requires_grad_(), torch.randn(2, 8, requires_grad=True), torch.randn(2, 16, *SIDES)


def gradients(layer, x, w, gradient):
    y = layer(x, w)
    return y, *torch.autograd.grad(y, [x, w, *layer.parameters()], gradient)


def test_values_and_all_gradients_are_autograds(layers, inputs):
    expected, ours = (gradients(layer, *inputs) for layer in layers)
    names = ["value", "x", "w", *(name for name, _ in layers[0].named_parameters())]
    for name, mine, reference in zip(names, ours, expected, strict=True):
        assert torch.linalg.norm(mine - reference) < 1e-5 * torch.linalg.norm(reference), name


def test_a_few_samples_at_a_time_give_the_same(layers, inputs, monkeypatch):
    expected = gradients(layers[1], *inputs)
    monkeypatch.setattr(convnext, "LARGEST_EXPANDED", 1)  # one sample
    torch.testing.assert_close(gradients(layers[1], *inputs), expected)


def test_nothing_but_the_input_is_kept(layers, inputs):
    def kept(layer):
        given = {tensor.untyped_storage().data_ptr() for tensor in (*inputs, *layer.parameters())}
        storages = {}

        def keep(tensor):
            storages[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            layer(*inputs[:2])
        return [t.numel() for place, t in storages.items() if place not in given and t.numel() >= inputs[0].numel()]

    plain, ours = (kept(layer) for layer in layers)
    assert not ours and len(plain) >= 4


def test_a_pass_to_the_input_alone_leaves_the_weights_out(layers, inputs):
    x, w, gradient = inputs
    layer = layers[1]
    whole = gradients(layer, x, w, gradient)[1:3]
    y = layer(x, w)
    flops = []
    for switch in (convnext.no_gradients_of_weights, torch.enable_grad):
        with switch(), FlopCounterMode(display=False) as counter:
            partial = torch.autograd.grad(y, [x, w], gradient, retain_graph=True)
        torch.testing.assert_close(partial, whole, rtol=1e-4, atol=2e-5)  # the style's is summed in another order
        flops.append(counter.get_total_flops())
    products = 2 * 2 * SIDES[0] * SIDES[1] * 4 * 16 * 16  # of one product over all pixels
    assert flops[1] - flops[0] > 2 * products  # those of both weights, and the convolution's


def test_bfloat16_under_autocast_follows_float32(layers, inputs):
    x, w, gradient = inputs
    exact = gradients(layers[1], x, w, gradient)
    with torch.autocast("cpu", torch.bfloat16):
        y = layers[1](x.detach().bfloat16().requires_grad_(), w)
    assert y.dtype == torch.bfloat16
    rounded = torch.autograd.grad(y, list(layers[1].parameters()), gradient.bfloat16())
    assert all(g.dtype == torch.float32 for g in rounded)
    for mine, reference in zip(rounded, exact[3:], strict=True):
        assert torch.linalg.norm(mine - reference) < 0.1 * torch.linalg.norm(reference)
