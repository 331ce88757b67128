"""Memory layouts of full-size models on a GPU, followed by fake tensors: no GPU is needed, and nothing is computed."""

from collections import Counter
from collections.abc import Iterator

import pytest
import torch
import torch.cuda.amp.common
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from vfm_vae.discriminators.patchgan import PatchGAN
from vfm_vae.modules import convnext
from vfm_vae.modules.adapter import Adapter
from vfm_vae.modules.decoder import Decoder
from vfm_vae.modules.equivariance import Transform

BATCH, LARGE = 16, 1_000_000
COPIES = ("clone", "contiguous", "copy_", "_to_copy")


class Watch(TorchDispatchMode):
    """Notes what convolutions are given, and which operations copy large maps from one layout to another."""

    def __init__(self) -> None:
        super().__init__()
        self.convolutions: list[tuple[bool, bool, torch.dtype]] = []  # grouped, channels-last, precision
        self.copies: Counter[tuple[str, tuple[int, ...]]] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name == "convolution":
            x = args[0]
            self.convolutions.append((args[8] > 1, x.is_contiguous(memory_format=torch.channels_last), x.dtype))
        if name in COPIES and out.numel() > LARGE and (name != "_to_copy" or out.stride() != args[0].stride()):
            self.copies[name, tuple(out.shape)] += 1
        return out


def flash_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """What a GPU would choose; without one, fake tensors take the form that keeps all products."""
    return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[0]


@pytest.fixture
def cuda(monkeypatch) -> Iterator[torch.device]:
    """Fake tensors on a GPU, under autocast to bfloat16."""
    monkeypatch.setattr(nn.init, "trunc_normal_", lambda tensor, **_: tensor)  # asks for what it has drawn
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
    monkeypatch.setattr(F, "scaled_dot_product_attention", flash_attention)
    device = torch.device("cuda")
    with FakeTensorMode(), device, torch.autocast("cuda", torch.bfloat16):
        yield device


def test_fake_group_norm_is_as_bad_as_the_real_one(cuda):
    x = torch.empty(2, 8, 4, 4).contiguous(memory_format=torch.channels_last)
    assert not F.group_norm(x, 2).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize(
    "transform",
    [
        Transform(),
        Transform(0.5),
        *(pytest.param(other, marks=pytest.mark.slow) for other in (Transform(0.75, 1), Transform(0.25, 2))),
    ],
)
def test_the_generator_stays_channels_last(cuda, monkeypatch, transform, recompute):
    monkeypatch.setattr(convnext, "LARGEST_EXPANDED", 2**40)  # all samples at once, to count layers
    adapter, decoder = Adapter([1024] * 3, [64] * 3, 32, 2, 512, 1024), Decoder(activation_checkpointing=recompute)
    features = [torch.empty(BATCH, 1024, 1024) for _ in range(3)]
    with Watch() as watch:
        z = adapter.encode(features, (32, 32)).chunk(2, dim=1)[0].float()
        latent = adapter.decode(transform.latent(z))
    with watch:
        decoded = decoder(latent)
    grouped = [(channels_last, dtype) for is_grouped, channels_last, dtype in watch.convolutions if is_grouped]
    assert len(grouped) == 53 and set(grouped) == {(True, torch.bfloat16)}
    assert all(channels_last for _, channels_last, _ in watch.convolutions)
    assert decoded.image.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("grid", [pytest.param((16, 16), marks=pytest.mark.slow), (10, 22)])
def test_routes_of_averages_stay_channels_last(cuda, grid):
    decoder = Decoder(channels=[512, 512, 512, 256, 128], compression=16, route_downsampling="pooling")
    with Watch() as watch:
        decoded = decoder(torch.empty(BATCH, 512, *grid))
    assert watch.convolutions and all(channels_last for _, channels_last, _ in watch.convolutions)
    assert decoded.image.shape[2:] == (16 * grid[0], 16 * grid[1])
    assert decoded.image.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("recompute", [True, False])
def test_the_decoder_copies_no_large_map(cuda, recompute):
    decoder = Decoder(activation_checkpointing=recompute)
    latent = torch.empty(BATCH, 16, 16, 512, dtype=torch.bfloat16).permute(0, 3, 1, 2)
    with Watch() as watch:
        decoder(latent)
    assert not watch.copies


def test_the_decoder_keeps_bfloat16_from_layer_to_layer(cuda):
    decoder, seen = Decoder(), set()
    for block in decoder.blocks:
        for layer in (*block.layers, *block.attention):
            layer.register_forward_hook(lambda module, args, out: seen.add(out.dtype))
    decoder(torch.empty(BATCH, 512, 16, 16))
    assert seen == {torch.bfloat16}


def test_the_patchgan_stays_channels_last(cuda):
    patchgan, images = PatchGAN(), torch.empty(BATCH, 3, 256, 256)
    with Watch() as watch:
        patchgan(images)
    assert len(watch.convolutions) == 15 and all(channels_last for _, channels_last, _ in watch.convolutions)
