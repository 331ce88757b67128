"""The forms of accelerators against PyTorch's own, on a CPU, values and gradients."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vfm_vae.discriminators.layers import LocalBatchNorm
from vfm_vae.modules import maps
from vfm_vae.modules.maps import Blur, GroupNorm, PixelShuffle, Pointwise, pixel_unshuffle, uses_native_kernels


@pytest.fixture
def accelerator(monkeypatch):
    """Lets the forms of accelerators run on the CPU."""
    for module in (maps, LocalBatchNorm.__module__):
        target = f"{module if isinstance(module, str) else module.__name__}.uses_native_kernels"
        monkeypatch.setattr(target, lambda x: False)


def channels_last(*shape: int) -> torch.Tensor:
    return torch.randn(shape).contiguous(memory_format=torch.channels_last).requires_grad_()


def agree(ours, theirs, x, *parameters):
    """Compares values, gradients and the layout."""
    results = []
    for function in (ours, theirs):
        y = function(x)
        torch.manual_seed(0)
        results.append((y, *torch.autograd.grad(y, [x, *parameters], torch.randn(y.shape))))
    for mine, reference in zip(*results, strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-5, atol=1e-5)
    assert results[0][0].is_contiguous(memory_format=torch.channels_last)


def test_a_cpu_takes_its_own_kernels():
    assert uses_native_kernels(torch.zeros(1))


def test_group_norm(accelerator):
    norm = GroupNorm(4, 16)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x = channels_last(2, 16, 5, 3)
    agree(norm, lambda y: F.group_norm(y, 4, norm.weight, norm.bias), x, norm.weight, norm.bias)


def test_group_norm_where_the_mean_is_much_larger_than_the_deviation(accelerator):
    x = 1000 + torch.randn(2, 8, 16, 16)
    exact = F.group_norm(x.double(), 2).float()
    torch.testing.assert_close(GroupNorm(2, 8)(x), exact, rtol=0, atol=1e-3)


def test_group_norm_keeps_bfloat16_and_sums_in_float32(accelerator):
    x = (3 + torch.randn(2, 8, 64, 64)).bfloat16()
    y = GroupNorm(2, 8)(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), F.group_norm(x.float(), 2), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("factor", [1, 2, 4])
def test_pixel_shuffles(accelerator, factor):
    agree(PixelShuffle(factor), lambda x: F.pixel_shuffle(x, factor), channels_last(2, 3 * factor**2, 2, 3))
    agree(lambda x: pixel_unshuffle(x, factor), lambda x: F.pixel_unshuffle(x, factor), channels_last(2, 3, 8, 4))


@pytest.mark.parametrize("bias", [True, False])
def test_pointwise(accelerator, bias):
    layer = Pointwise(6, 5, bias=bias)
    agree(layer, lambda x: F.conv2d(x, layer.weight, layer.bias), channels_last(2, 6, 3, 4), *layer.parameters())


@pytest.mark.parametrize("taps", [[1, 2, 1], [1, 4, 6, 4, 1]])
@pytest.mark.parametrize("sides", [(1, 1), (2, 3), (6, 5)])
def test_blur(accelerator, taps, sides):
    def definition(x):
        padded = F.pad(x, [len(taps) // 2] * 4, mode="replicate")
        kernel = torch.outer(torch.tensor(taps), torch.tensor(taps)) / sum(taps) ** 2
        return F.conv2d(padded, kernel.expand(4, 1, -1, -1), groups=4)

    agree(Blur(taps), definition, channels_last(2, 4, *sides))


def test_local_batch_norm(monkeypatch):
    norm, x = LocalBatchNorm(6, virtual_batch_size=4), channels_last(8, 6, 3, 2)
    folded = norm(x)
    monkeypatch.setattr(f"{LocalBatchNorm.__module__}.uses_native_kernels", lambda x: False)
    agree(norm, lambda _: folded, x)
