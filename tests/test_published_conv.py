"""Original checkpoints of convolutional VAEs: SD-VAE's and VA-VAE's names by rule, and what becomes of small ones."""

import pytest
import torch
import yaml
from torch import Tensor
from torch.nn import functional as F

from vfm_vae.conv_vae import ConvVAE
from vfm_vae.convert import convert
from vfm_vae.published_conv import conv_vae_from_published, conv_vae_to_published, find_conv_vae
from vfm_vae.tokenizer import read_tokenizer

SD_VAE = {"latent": 4, "channels": [128, 256, 512, 512]}
VA_VAE = {"latent": 32, "channels": [128, 128, 256, 256, 512], "attention": [4], "vfm_width": 1024}


def shapes(latent, channels, attention=(), blocks=2, vfm_width=None):
    """Names and shapes of a checkpoint of the public code, from its architecture."""
    found = {}

    def conv(name, fan_in, fan_out, size=3):
        found[f"{name}.weight"], found[f"{name}.bias"] = (fan_out, fan_in, size, size), (fan_out,)

    def norm(name, width):
        found[f"{name}.weight"] = found[f"{name}.bias"] = (width,)

    def block(name, fan_in, fan_out):
        norm(f"{name}.norm1", fan_in)
        conv(f"{name}.conv1", fan_in, fan_out)
        norm(f"{name}.norm2", fan_out)
        conv(f"{name}.conv2", fan_out, fan_out)
        if fan_in != fan_out:
            conv(f"{name}.nin_shortcut", fan_in, fan_out, 1)

    def attend(name, width):
        norm(f"{name}.norm", width)
        for part in ("q", "k", "v", "proj_out"):
            conv(f"{name}.{part}", width, width, 1)

    last = len(channels) - 1
    for side, order in {"encoder": range(last + 1), "decoder": range(last, -1, -1)}.items():
        encodes = side == "encoder"
        width = channels[0] if encodes else channels[-1]
        conv(f"{side}.conv_in", 3 if encodes else latent, width)
        level_name, resample = ("down", "downsample") if encodes else ("up", "upsample")
        for level in order:
            for number in range(blocks if encodes else blocks + 1):
                block(f"{side}.{level_name}.{level}.block.{number}", width, channels[level])
                width = channels[level]
                if level in attention:
                    attend(f"{side}.{level_name}.{level}.attn.{number}", width)
            if level != (last if encodes else 0):
                conv(f"{side}.{level_name}.{level}.{resample}.conv", width, width)
        for part in ("block_1", "block_2"):
            block(f"{side}.mid.{part}", channels[-1], channels[-1])
        attend(f"{side}.mid.attn_1", channels[-1])
        norm(f"{side}.norm_out", width)
        conv(f"{side}.conv_out", width, 2 * latent if encodes else 3)
    conv("quant_conv", 2 * latent, 2 * latent, 1)
    conv("post_quant_conv", latent, latent, 1)
    if vfm_width is not None:
        found["linear_proj.weight"] = (vfm_width, latent, 1, 1)
    return found


def random(architecture):
    made = torch.Generator().manual_seed(0)
    return {n: torch.randn(shape, generator=made) * 0.1 for n, shape in shapes(**architecture).items()}


@pytest.fixture
def small():
    return random({"latent": 4, "channels": [32, 32, 64], "attention": [2], "blocks": 1, "vfm_width": 24})


class Published:
    """What the public code computes of these tensors, written down again from the papers' architecture."""

    def __init__(self, tensors: dict[str, Tensor], levels: int, blocks: int):
        self.tensors, self.levels, self.blocks = tensors, levels, blocks

    def conv(self, name, x, **options):
        return F.conv2d(x, self.tensors[f"{name}.weight"], self.tensors[f"{name}.bias"], **options)

    def norm(self, name, x):
        return F.group_norm(x, 32, self.tensors[f"{name}.weight"], self.tensors[f"{name}.bias"], 1e-6)

    def block(self, name, x):
        h = self.conv(f"{name}.conv1", F.silu(self.norm(f"{name}.norm1", x)), padding=1)
        h = self.conv(f"{name}.conv2", F.silu(self.norm(f"{name}.norm2", h)), padding=1)
        return h + (self.conv(f"{name}.nin_shortcut", x) if f"{name}.nin_shortcut.weight" in self.tensors else x)

    def attend(self, name, x):
        if f"{name}.q.weight" not in self.tensors:
            return x
        h = self.norm(f"{name}.norm", x)
        q, k, v = (self.conv(f"{name}.{part}", h).flatten(2) for part in "qkv")  # [B, C, N]
        weights = (q.mT @ k * q.shape[1] ** -0.5).softmax(dim=2)  # [B, N, N]
        return x + self.conv(f"{name}.proj_out", (v @ weights.mT).unflatten(2, x.shape[2:]))

    def middle(self, side, x):
        x = self.attend(f"{side}.mid.attn_1", self.block(f"{side}.mid.block_1", x))
        return self.block(f"{side}.mid.block_2", x)

    def out(self, side, x):
        return self.conv(f"{side}.conv_out", F.silu(self.norm(f"{side}.norm_out", x)), padding=1)

    def encode(self, x):
        x = self.conv("encoder.conv_in", x, padding=1)
        for level in range(self.levels):
            for number in range(self.blocks):
                x = self.block(f"encoder.down.{level}.block.{number}", x)
                x = self.attend(f"encoder.down.{level}.attn.{number}", x)
            if level < self.levels - 1:
                x = self.conv(f"encoder.down.{level}.downsample.conv", F.pad(x, (0, 1, 0, 1)), stride=2)
        return self.conv("quant_conv", self.out("encoder", self.middle("encoder", x)))

    def decode(self, z):
        x = self.middle("decoder", self.conv("decoder.conv_in", self.conv("post_quant_conv", z), padding=1))
        for level in reversed(range(self.levels)):
            for number in range(self.blocks + 1):
                x = self.block(f"decoder.up.{level}.block.{number}", x)
                x = self.attend(f"decoder.up.{level}.attn.{number}", x)
            if level > 0:
                x = F.interpolate(x, scale_factor=2.0, mode="nearest")
                x = self.conv(f"decoder.up.{level}.upsample.conv", x, padding=1)
        return self.out("decoder", x)


@pytest.mark.parametrize(
    ("architecture", "parameters", "arguments"),
    [
        (SD_VAE, 83_653_863, {"channels": [128, 256, 512, 512], "attention": [], "alignment_channels": None}),
        (
            VA_VAE,
            69_836_067 + 32 * 1024,
            {"channels": [128, 128, 256, 256, 512], "attention": [4], "alignment_channels": 1024},
        ),
    ],
    ids=["sd_vae", "va_vae"],
)
def test_every_tensor_of_the_published_models_has_its_place(architecture, parameters, arguments):
    with torch.device("meta"):
        published = {name: torch.empty(shape) for name, shape in shapes(**architecture).items()}
        model = conv_vae_from_published(published)
        again = conv_vae_to_published(model)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert arguments.items() <= model.arguments.items()
    assert {n: t.shape for n, t in again.items()} == {n: t.shape for n, t in published.items()}


@torch.no_grad()
def test_a_converted_model_computes_what_the_public_code_does(small):
    model, public = conv_vae_from_published(small), Published(small, levels=3, blocks=1)
    images, z = torch.rand(2, 3, 32, 32) * 2 - 1, torch.randn(2, 4, 8, 8)
    mean, logvar = public.encode(images).chunk(2, dim=1)
    posterior = model.encode(images)
    torch.testing.assert_close(posterior.mode(), mean, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(posterior.logvar, logvar.clamp(-30, 20), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(model.decode(z).image, public.decode(z), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(model.align(z), F.conv2d(z, small["linear_proj.weight"]))
    assert model.alignment.bias is None
    again = conv_vae_to_published(model)
    assert again.keys() == small.keys() and all(torch.equal(again[name], small[name]) for name in small)


@pytest.mark.parametrize("prefix", ["", "first_stage_model."])
def test_a_file_is_converted_with_all_that_belongs_to_it_and_nothing_else(small, prefix, tmp_path):
    state = {f"{prefix}{name}": tensor for name, tensor in small.items()}
    others = ["loss.logvar", "foundation_model.model.norm.weight", "model_ema.decay"]
    state |= {f"{prefix}{name}": torch.zeros(3) for name in others}
    if prefix:
        state |= {"model.diffusion_model.out.weight": torch.zeros(3), "cond_stage_model.weight": torch.zeros(3)}
    moments = {"state": {0: {"exp_avg": torch.zeros(3)}}}
    torch.save({"state_dict": state, "optimizer_states": [moments], "global_step": 7}, tmp_path / "vae.ckpt")
    convert(str(tmp_path / "vae.ckpt"), str(tmp_path / "converted"))
    model, images = read_tokenizer(tmp_path / "converted"), torch.rand(1, 3, 32, 32)
    assert isinstance(model, ConvVAE) and model.vfm_source() is None
    expected = conv_vae_from_published(small)
    assert model.latent_identity() == expected.latent_identity()
    z = expected.encode(images).mode()
    assert torch.equal(model.encode(images).mode(), z) and torch.equal(model.decode(z).image, expected.decode(z).image)
    training = read_tokenizer(tmp_path / "converted/training.ckpt")
    assert all(torch.equal(tensor, training.state_dict()[name]) for name, tensor in expected.state_dict().items())
    described = yaml.safe_load((tmp_path / "converted/model.yaml").read_text())["model"]["model"]
    assert described["class_path"] == "vfm_vae.conv_vae.ConvVAE" and "vfm" not in described["init_args"]


def test_the_vfm_that_it_was_aligned_to_is_named(small, tmp_path):
    torch.save(small, tmp_path / "vae.pt")
    convert(str(tmp_path / "vae.pt"), str(tmp_path), vfm="vit_large_patch14_dinov2.lvd142m")
    source = read_tokenizer(tmp_path).vfm_source()
    assert (source["name"], source["input_scale"]) == ("vit_large_patch14_dinov2.lvd142m", 14 / 4)
    described = yaml.safe_load((tmp_path / "model.yaml").read_text())["model"]["model"]["init_args"]["vfm"]
    assert described["class_path"] == "vfm_vae.vfm.FrozenVFM" and described["init_args"]["input_scale"] == 14 / 4


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (
            lambda t: t | {"encoder.down.0.attn.0.gate": torch.zeros(1)},
            {},
            r"left over \['encoder\.down\.0\.attn\.0\.gate",
        ),
        (
            lambda t: {n: x for n, x in t.items() if n != "decoder.norm_out.bias"},
            {},
            r"missing \['decoder\.norm_out\.bias",
        ),
        (
            lambda t: t | {"decoder.conv_out.bias": torch.zeros(4)},
            {},
            r"decoder\.conv_out\.bias: \(4,\) instead of \(3,\)",
        ),
        (
            lambda t: {n: x for n, x in t.items() if n != "decoder.conv_in.weight"},
            {},
            "there is no 'decoder.conv_in.weight'",
        ),
        (
            lambda t: {n: x for n, x in t.items() if n != "linear_proj.weight"},
            {"vfm": "a_patch8"},
            "have no linear_proj",
        ),
        (lambda t: t, {"vfm": "resnet50"}, "vfm: 'resnet50' does not tell its patch size"),
        (lambda t: t, {"vfm_weights": "w.pth"}, "vfm_weights: ConvVAE does not encode with a VFM"),
        (lambda t: t, {"config": "vae.yaml"}, "config: given 'vae.yaml', but '.*vae.pt' tells that itself"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(small, tmp_path, change, options, message):
    torch.save(change(small), tmp_path / "vae.pt")
    with pytest.raises(ValueError, match=message):
        convert(str(tmp_path / "vae.pt"), str(tmp_path / "out"), **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("option", ["config", "vfm"])
def test_options_that_would_change_nothing_are_refused(small, tmp_path, option):
    torch.save(small, tmp_path / "vae.pt")
    convert(str(tmp_path / "vae.pt"), str(tmp_path / "folder"))
    for source in ("folder", "folder/training.ckpt"):
        with pytest.raises(ValueError, match=f"{option}: given 'x', but '.*{source}' tells that itself; leave it out"):
            convert(str(tmp_path / source), str(tmp_path / "out"), **{option: "x"})


def test_averages_come_before_trained_weights(small):
    averages = {name: tensor + 1 for name, tensor in small.items()}
    found = find_conv_vae({"state_dict": small, "ema": averages})
    assert torch.equal(found["quant_conv.bias"], averages["quant_conv.bias"])
    assert find_conv_vae({"state_dict": {"ldm_adapter.weight": torch.zeros(1)}}) is None
