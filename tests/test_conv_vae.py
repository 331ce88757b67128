"""ConvVAE: diffusers' numbers, its folders, and what tells its latents from others'."""

import json

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file

from ldm.models.lightningdit import LightningDiT
from ldm.pipeline import LatentDiffusion
from vfm_vae import pretrained
from vfm_vae.conv_vae import ConvVAE
from vfm_vae.tokenizer import VFMVAE, FrozenTokenizer, read_tokenizer
from vfm_vae.vfm import FrozenVFM

SMALL = {"channels": [32, 32, 64, 64], "num_res_blocks": 1}
VFM = "vit_photos_patch8_64"
WEIGHTS = "diffusion_pytorch_model.safetensors"


def published(channels=(32, 32, 64, 64), layers=1, attention=(), **options):
    """The model of diffusers, with random weights."""
    attends = [level in attention for level in range(len(channels))]
    return AutoencoderKL(
        down_block_types=["AttnDownEncoderBlock2D" if attending else "DownEncoderBlock2D" for attending in attends],
        up_block_types=["AttnUpDecoderBlock2D" if attending else "UpDecoderBlock2D" for attending in attends[::-1]],
        block_out_channels=channels,
        layers_per_block=layers,
        **options,
    ).eval()


def conv_vae(seed=0, **options):
    torch.manual_seed(seed)
    return ConvVAE(**SMALL | options).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where diffusers saved a model."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("published")
    published(scaling_factor=0.5).save_pretrained(folder)
    return folder


@torch.no_grad()
def assert_equal_outputs(model, other, size=32):
    """Every bit of encoder, posterior and decoder is that of diffusers' model."""
    images = torch.rand(2, 3, size, size) * 2 - 1
    ours, theirs = model.encode(images), other.encode(images).latent_dist
    assert torch.equal(ours.mode(), theirs.mode()) and torch.equal(ours.logvar, theirs.logvar)
    assert torch.equal(ours.moments(), torch.cat([theirs.mean, theirs.std], dim=1))
    torch.testing.assert_close(ours.kl(), theirs.kl())  # added up in another order
    torch.manual_seed(1)
    z = ours.sample()
    assert torch.equal(z, theirs.sample(torch.manual_seed(1)))
    assert torch.equal(model.decode(z).image, other.decode(z).sample)


@pytest.mark.parametrize(
    ("options", "theirs"),
    [
        ({}, {}),
        ({"attention": [2, 3], "latent_channels": 8}, {"attention": [2, 3], "latent_channels": 8}),
        ({"quant_conv": False}, {"use_quant_conv": False, "use_post_quant_conv": False}),
        ({"middle_attention": False, "norm_groups": 8}, {"mid_block_add_attention": False, "norm_num_groups": 8}),
    ],
)
def test_it_is_diffusers_model_from_the_first_weights_on(options, theirs):
    model = conv_vae(**options)
    torch.manual_seed(0)
    other = published(**theirs)
    assert {n: t.shape for n, t in model.state_dict().items()} == {n: t.shape for n, t in other.state_dict().items()}
    assert_equal_outputs(model, other)


def test_log_variances_are_clamped_as_diffusers_clamps_them():
    model = conv_vae()
    torch.manual_seed(0)
    other = published()
    for conv in (model.quant_conv, other.quant_conv):
        conv.bias.data[4:] = torch.tensor([-100.0, 100.0, 0.0, 25.0])
    assert model.encode(torch.zeros(1, 3, 32, 32)).logvar.unique().numel() > 2
    assert_equal_outputs(model, other)


@pytest.mark.slow
def test_the_defaults_are_sd_vae():
    torch.manual_seed(0)
    model = ConvVAE().eval()
    torch.manual_seed(0)
    other = published((128, 256, 512, 512), layers=2)
    assert sum(p.numel() for p in model.parameters()) == 83_653_863
    assert_equal_outputs(model, other, size=64)


def test_a_folder_of_diffusers_is_a_tokenizer(folder):
    other, model = AutoencoderKL.from_pretrained(folder).eval(), read_tokenizer(folder)
    assert type(model) is ConvVAE and not model.training
    assert (model.latent_channels, model.compression, model.side_multiple) == (4, 8, 1)
    assert_equal_outputs(model, other)
    frozen = FrozenTokenizer(str(folder))
    with torch.no_grad():  # of the scaling factor nothing is left
        images = torch.rand(1, 3, 32, 32)
        z = frozen.encode(images).mode()
        assert torch.equal(z, other.encode(images).latent_dist.mode())
        assert torch.equal(frozen.decode(z), other.decode(z).sample.clamp(-1, 1))
    with pytest.raises(ValueError, match="image_size: 36 does not fit"):
        model.check_image_size(36)


def test_a_model_of_the_hub_is_one_too(folder, monkeypatch):
    fetched = []

    def download(name: str, allow_patterns: list[str], **_) -> str:
        fetched.append((name, *allow_patterns))
        return str(folder)

    monkeypatch.setattr(pretrained, "snapshot_download", download)
    assert FrozenTokenizer("someone/vae").identity == read_tokenizer(folder).latent_identity()
    assert {name for name, *_ in fetched} == {"someone/vae"}
    assert fetched[0][1:] == ("config.json",) and WEIGHTS in fetched[1]


def change(folder, tmp_path, tensors=None, **config):
    """A copy of a folder with other tensors, or other entries in its config."""
    described = json.loads((folder / "config.json").read_text()) | config
    (tmp_path / "config.json").write_text(json.dumps(described))
    weights = load_file(folder / WEIGHTS)
    save_file(weights if tensors is None else tensors(weights), tmp_path / WEIGHTS)
    return tmp_path


def test_former_names_of_attention_layers_are_read(folder, tmp_path):
    former = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def rename(name: str) -> str:
        return next((name.replace(now, then) for now, then in former.items() if f".{now}." in name), name)

    renamed = change(folder, tmp_path, lambda tensors: {rename(name): tensor for name, tensor in tensors.items()})
    assert any("proj_attn" in name for name in load_file(renamed / WEIGHTS))
    assert_equal_outputs(read_tokenizer(renamed), AutoencoderKL.from_pretrained(folder).eval())


def test_weights_that_torch_wrote_are_read(folder, tmp_path):
    torch.save(load_file(folder / WEIGHTS), change(folder, tmp_path) / "diffusion_pytorch_model.bin")
    (tmp_path / WEIGHTS).unlink()
    assert read_tokenizer(tmp_path).latent_identity() == read_tokenizer(folder).latent_identity()


@pytest.mark.parametrize(
    ("tensors", "config", "message"),
    [
        (lambda t: {n: x for n, x in t.items() if n != "decoder.conv_in.bias"}, {}, "missing .'decoder.conv_in.bias'"),
        (lambda t: t | {"discriminator.weight": torch.zeros(1)}, {}, r"left over \['discriminator\.weight'\]"),
        (None, {"act_fn": "gelu", "in_channels": 4}, "act_fn=gelu, in_channels=4, which a ConvVAE can't have"),
        (None, {"use_post_quant_conv": False}, "use_post_quant_conv=False, which a ConvVAE can't have"),
        (None, {"up_block_types": ["AttnUpDecoderBlock2D"] * 4}, "up_block_types=.*, which a ConvVAE can't have"),
        (None, {"rotary": True}, "rotary=True, which a ConvVAE can't have"),
        (None, {"block_out_channels": None}, r"block_out_channels=None, but that is a list such as \[64\]"),
        (None, {"down_block_types": [1]}, r"down_block_types=\[1\], but that is a list such as"),
        (None, {"use_quant_conv": 1}, "use_quant_conv=1, but that is true or false"),
    ],
)
def test_a_folder_that_does_not_fit_is_refused(folder, tmp_path, tensors, config, message):
    with pytest.raises(ValueError, match=f"^checkpoint: '{tmp_path}'.*{message}"):
        FrozenTokenizer(str(change(folder, tmp_path, tensors, **config)))


def test_another_kind_of_folder_is_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="holds a ConvVAE, and no VFMVAE"):
        read_tokenizer(folder, VFMVAE)
    with pytest.raises(ValueError, match="vfm_weights: ConvVAE does not encode with a VFM"):
        read_tokenizer(folder, vfm_weights="weights.pth")
    other = change(folder, tmp_path, _class_name="VQModel")
    with pytest.raises(ValueError, match="holds no AutoencoderKL of diffusers"):
        ConvVAE.from_diffusers(other)
    with pytest.raises(ValueError, match="holds the class 'VQModel' of diffusers; known are AutoencoderKL and Autoenc"):
        read_tokenizer(other)
    (other / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="holds no AutoencoderKL of diffusers"):
        ConvVAE.from_diffusers(other)


def test_weights_of_a_variant_are_named_with_what_would_do(folder, tmp_path):
    variant = "diffusion_pytorch_model.fp16.safetensors"
    (change(folder, tmp_path) / WEIGHTS).rename(tmp_path / variant)
    with pytest.raises(ValueError, match=rf"has no {WEIGHTS} but \['{variant}'\]; .* without a variant and in one"):
        read_tokenizer(tmp_path)


def test_diffusers_reads_what_it_is_given_back(tmp_path):
    model = conv_vae(attention=[3], alignment_channels=16)
    model.to_diffusers(tmp_path, scaling_factor=0.25, sample_size=64)
    other = AutoencoderKL.from_pretrained(tmp_path).eval()
    assert (other.config.scaling_factor, other.config.sample_size) == (0.25, 64)
    assert_equal_outputs(model, other)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"channels": [32, 48]}, r"channels: must be multiples of norm_groups=32, given \[48\]"),
        ({"channels": []}, "channels: needs a number for each level, given none"),
        ({"channels": [32, 0]}, "channels: must be at least 1"),
        ({"attention": [4]}, r"attention: must be in \[0, 3\], given \[4\]"),
        ({"num_res_blocks": 0}, "num_res_blocks: must be at least 1"),
        ({"latent_channels": 0}, "latent_channels: must be at least 1"),
    ],
)
def test_options_that_make_no_model_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        conv_vae(**options)


def test_it_is_aligned_to_a_vfm_that_it_does_without(tmp_path):
    model = conv_vae(vfm=FrozenVFM(VFM))
    assert model.alignment.weight.shape == (128, 4, 1, 1) and model.alignment.bias is None
    images = torch.rand(2, 3, 64, 64) * 2 - 1
    posterior, features = model.encode_with_features(images)
    z = posterior.mode()
    target = model.alignment_target(features, z)
    assert target.shape == model.align(z).shape == (2, 128, 8, 8)
    assert torch.equal(target[:, :, 1, 2], features.tokens[:, 8 + 2])
    with torch.autocast("cpu", torch.bfloat16):
        assert model.align(z).dtype == torch.float32
    model.save_pretrained(tmp_path)
    loaded = read_tokenizer(tmp_path)
    assert loaded.vfm is None and loaded.vfm_source()["name"] == VFM
    assert torch.equal(loaded.align(z), model.align(z)) and torch.equal(loaded.encode(images).mode(), z)
    model.check_image_size(64)
    with pytest.raises(ValueError, match=r"whose latent has a position for every 8x8 pixels: give a multiple of 8$"):
        model.check_image_size(60)
    coarse = conv_vae(channels=[32, 32], vfm=FrozenVFM(VFM))
    with pytest.raises(ValueError, match=f"vfm: {VFM} has 8 tokens along a side of 64 pixels, .* the 32 positions"):
        coarse.check_image_size(64)
    with pytest.raises(ValueError, match=f"alignment_channels: {VFM} is 128 wide, given 64"):
        conv_vae(vfm=FrozenVFM(VFM), alignment_channels=64)
    with pytest.raises(ValueError, match="alignment_channels: this ConvVAE was made without a VFM"):
        conv_vae().align(z)


def test_gradients_are_compared_where_published_training_compares_them():
    model = conv_vae(alignment_channels=16)
    assert model.last_encoding_weight is model.encoder.conv_out.weight
    assert model.last_decoding_weight is model.decoder.conv_out.weight
    z = model.encode(torch.rand(1, 3, 32, 32)).sample()
    (model.decode(z).image.mean() + model.align(z).mean()).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_its_latents_are_told_by_what_encodes_alone():
    model, identity = conv_vae(), conv_vae().latent_identity()
    assert conv_vae(seed=1).latent_identity()["fingerprint"] != identity["fingerprint"]
    assert conv_vae(norm_groups=16).latent_identity()["fingerprint"] != identity["fingerprint"]
    for part in (model.decoder.conv_in, model.post_quant_conv):
        torch.nn.init.ones_(part.weight)
    assert model.latent_identity() == identity
    aligned = conv_vae(alignment_channels=16)
    aligned.load_state_dict(model.state_dict() | {"alignment.weight": torch.ones(16, 4, 1, 1)})
    assert aligned.latent_identity() == identity
    torch.nn.init.ones_(model.quant_conv.bias)
    assert model.latent_identity() != identity


def test_a_denoiser_refuses_latents_of_another_of_the_same_shape(folder, tmp_path, tiny_model):
    network = LightningDiT(in_channels=4, input_size=4, depth=1, width=16, num_heads=2, num_classes=3)
    model = LatentDiffusion(network)
    model.latent_source = read_tokenizer(folder).latent_identity()
    model.use_tokenizer(str(folder))
    conv_vae(seed=1).save_pretrained(tmp_path)
    message = r"tokenizer: it is of another tokenizer \(ConvVAE, .*expected \(ConvVAE, .*: its weights differ; give"
    with pytest.raises(ValueError, match=message):
        model.use_tokenizer(str(tmp_path))
    other, kind = tiny_model(), ("channels", "compression")
    ours, theirs = model.latent_source, other.latent_identity()
    assert [ours[name] for name in kind] == [theirs[name] for name in kind]
    with pytest.raises(ValueError, match=r"tokenizer: it is of another tokenizer \(vit_photos.*expected \(ConvVAE"):
        model.use_tokenizer(other)
