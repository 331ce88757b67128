"""RAE: against diffusers' own, and what tells its latents from others'."""

import json
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from diffusers import AutoencoderRAE
from safetensors.torch import load_file, save_file
from small_rae import IMAGES, SMALL, VFM, build, of_diffusers, randomised, reconstructed

from ldm.models.lightningdit import LightningDiT
from ldm.pipeline import LatentDiffusion
from vfm_vae.rae import RAE
from vfm_vae.tokenizer import FrozenTokenizer
from vfm_vae.vfm import FrozenVFM

FILE = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def published(monkeypatch, tmp_path):
    """Writes a folder as diffusers does; arguments are those of `of_diffusers`."""
    # Diffusers looks for a part that newer versions of transformers have dissolved in the model.
    monkeypatch.setattr(transformers.SiglipVisionModel, "vision_model", property(lambda model: model), raising=False)

    def write(kind: str = "dinov2", **options) -> tuple[AutoencoderRAE, Path]:
        model = of_diffusers(kind, **options)
        model.save_pretrained(tmp_path / kind)
        return model, tmp_path / kind

    return write


@pytest.mark.parametrize("kind", ["dinov2", "siglip2", "mae"])
def test_it_equals_diffusers_bit_for_bit(published, kind):
    theirs, folder = published(kind)
    images = IMAGES[..., :32, :32]
    z, expected = reconstructed(theirs, images)
    ours = FrozenTokenizer(str(folder)).network
    assert torch.equal(ours.encode(images).mode(), z) and torch.equal(ours.decode(z).image, expected)
    assert z.std() > 0.1 and not ours.training
    decoder = RAE.from_diffusers(folder, vfm=False)
    assert torch.equal(decoder.decode(z).image, expected) and decoder.latent_identity() == ours.latent_identity()
    decoder.save_pretrained(folder / "ours")
    again = FrozenTokenizer(str(folder / "ours"), vfm_weights=str(folder / FILE))
    assert torch.equal(again.encode(images).mode(), z) and again.identity == ours.latent_identity()
    for read, option in (FrozenTokenizer, "model.tokenizer.vfm_weights"), (RAE.from_pretrained, "vfm_weights"):
        with pytest.raises(ValueError, match=f"^{option}: the encoder 'rae_{kind}_64x2' .* that folder's {FILE}"):
            read(str(folder / "ours"))


def test_a_folder_without_the_encoder_decodes(published, tmp_path):
    theirs, folder = published()
    z, expected = reconstructed(theirs, IMAGES[..., :32, :32])
    complete = tmp_path / "complete.safetensors"
    (folder / FILE).rename(complete)
    tensors = load_file(complete)
    save_file({name: tensor for name, tensor in tensors.items() if not name.startswith("encoder.")}, folder / FILE)
    decoder = RAE.from_diffusers(folder, vfm=False)
    assert torch.equal(decoder.decode(z).image, expected) and decoder.latent_identity()["fingerprint"] is None
    assert torch.equal(decoder.attach_vfm(str(complete)).encode(IMAGES[..., :32, :32]).mode(), z)
    assert FrozenTokenizer(str(folder), str(complete)).identity == decoder.latent_identity()
    message = rf"^checkpoint: '{folder}' has a decoder alone: its {FILE} lacks .* as model\.tokenizer\.vfm_weights"
    with pytest.raises(ValueError, match=message):
        FrozenTokenizer(str(folder))


# How tensors were called when folders were published, by how they are called now.
FORMER = {
    "dinov2": {r"attention\.([qkv])_proj": r"attention.attention.\1", "attention.o_proj": "attention.output.dense"},
    "siglip2": {r"^encoder\.": "encoder.vision_model."},
    "mae": {
        r"^encoder\.layers": "encoder.encoder.layer",
        r"attention\.([qkv])_proj": r"attention.attention.\1",
        r"attention\.o_proj": "attention.output.dense",
        r"mlp\.fc1": "intermediate.dense",
        r"mlp\.fc2": "output.dense",
    },
}
WORDS = {
    r"attention\.q\.": "attention.query.",
    r"attention\.k\.": "attention.key.",
    r"attention\.v\.": "attention.value.",
}


@pytest.mark.parametrize("kind", FORMER)
def test_folders_from_before_transformers_renamed_its_tensors(published, kind):
    _, folder = published(kind)
    ours = RAE.from_diffusers(folder)
    tensors = load_file(folder / FILE)
    for new, old in (FORMER[kind] | WORDS).items():
        tensors = {re.sub(new, old, name): value for name, value in tensors.items()}
    assert tensors.keys() != load_file(folder / FILE).keys()
    save_file(tensors, folder / FILE)
    again = RAE.from_diffusers(folder)
    images = IMAGES[..., :32, :32]
    assert torch.equal(again.encode(images).mode(), ours.encode(images).mode())
    assert again.latent_identity() == ours.latent_identity()


def test_a_scaling_factor_becomes_part_of_the_statistics(published):
    theirs, folder = published(scaling_factor=0.5)
    images = IMAGES[..., :32, :32]
    z, expected = reconstructed(theirs, images)
    ours = RAE.from_diffusers(folder)
    assert torch.allclose(ours.encode(images).mode(), z, atol=1e-5)
    assert torch.allclose(ours.decode(z).image, expected, atol=1e-5)


def test_options_that_a_folder_leaves_out_are_those_of_diffusers(published):
    _, folder = published()
    config = json.loads((folder / "config.json").read_text())
    assert config.pop("encoder_type") == "dinov2" and config.pop("reshape_to_2d")
    (folder / "config.json").write_text(json.dumps(config))
    assert RAE.from_diffusers(folder).latent_channels == 64
    del config["decoder_num_hidden_layers"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"do not fit: of .* missing"):
        RAE.from_diffusers(folder)


def test_folders_of_something_else_are_refused(published, tmp_path):
    _, folder = published()
    config = json.loads((folder / "config.json").read_text())
    for change, message in (
        ({"_class_name": "AutoencoderKL"}, "holds no AutoencoderRAE of diffusers"),
        ({"encoder_type": "clip"}, "has encoder_type='clip'; known are dinov2, siglip2, mae"),
        ({"reshape_to_2d": False}, "has reshape_to_2d=false"),
        ({"decoder_num_hidden_layers": 2}, "do not fit: of .* missing"),
        ({"decoder_hidden_size": "a"}, "config.json has decoder_hidden_size='a', but that is a whole number above 0"),
        ({"encoder_patch_size": 0}, "has encoder_patch_size=0, but that is a whole number"),
        ({"scaling_factor": "a"}, "has scaling_factor='a', but that is a number"),
    ):
        (folder / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(ValueError, match=message):
            RAE.from_diffusers(folder)
    with pytest.raises(ValueError, match=r"name: .* holds no AutoencoderRAE"):
        RAE.from_diffusers(tmp_path)


def test_the_latent_is_a_sum_of_normalised_layers_and_then_normalised_itself():
    model = randomised(build(layers=[2, 5, -2]))
    layers = FrozenVFM(VFM, layers=[2, 5, 6])(IMAGES).layers
    tokens = sum(F.layer_norm(layer, (128,), eps=1e-6) for layer in layers)
    raw = tokens.mT.reshape(2, 128, 8, 8)
    posterior = model.encode(IMAGES)
    assert torch.allclose(posterior.mode(), (raw - model.mean) / (model.std + 1e-5), atol=1e-5)
    assert torch.equal(posterior.sample(torch.randn_like(raw)), posterior.mode())
    mean, std = posterior.moments().chunk(2, dim=1)
    assert torch.equal(mean, posterior.mode()) and not std.any()


def test_other_sizes_are_encoded_by_statistics_of_their_surroundings():
    model = randomised(build())
    smaller, larger = IMAGES[..., :32, :32], IMAGES.repeat_interleave(2, 2).repeat_interleave(2, 3)
    for images, resized in (
        (smaller, lambda x: F.avg_pool2d(x, 2)),
        (larger, lambda x: F.interpolate(x[None], None, 2)[0]),
    ):
        expected = (model.raw_latents(images) - resized(model.mean)) / (resized(model.std) + 1e-5)
        assert torch.allclose(model.encode(images).mode(), expected, atol=1e-5)


def test_what_follows_from_the_vfm_need_not_be_given():
    vfm = {"class_path": "vfm_vae.vfm.FrozenVFM", "init_args": {"name": VFM, "layers": [1, 2], "input_scale": 0.5}}
    assert RAE.complete({"vfm": vfm}) == {"vfm": vfm, "latent_channels": 128, "compression": 16}
    assert RAE.complete({"vfm": vfm, "compression": 8})["compression"] == 8
    model = build()
    assert (model.latent_channels, model.compression, model.latent_shape) == (128, 8, (128, 8, 8))


def test_the_identity_is_of_what_encodes_alone():
    def fingerprint(model: RAE) -> str:
        return model.latent_identity()["fingerprint"]

    model = build()
    assert fingerprint(model) == fingerprint(build(seed=1, decoder_depth=2, statistics_images=5))
    assert model.latent_identity() | {"fingerprint": ""} == {
        "tokenizer": "RAE",
        "fingerprint": "",
        "channels": 128,
        "compression": 8,
    }
    others = [randomised(build()), build(layers=[-1]), build(layers=[-2, -3]), build(norm_eps=1e-12)]
    others += [build(vfm={"pretrained": False})]
    assert len({fingerprint(other) for other in [model, *others]}) == 6


def test_a_denoiser_refuses_latents_of_another_rae():
    diffusion = LatentDiffusion(LightningDiT(128, 8, 1, 1, 8, 2))
    diffusion.latent_source = build().latent_identity()
    diffusion.use_tokenizer(build(seed=1))
    with pytest.raises(ValueError, match=r"tokenizer: it is of another tokenizer \(RAE, .*expected \(RAE"):
        diffusion.use_tokenizer(randomised(build()))


def test_a_folder_brings_it_back_without_the_vfms_weights(tmp_path):
    model = randomised(build())
    model.save_pretrained(tmp_path)
    assert not any(name.startswith("vfm") for name in load_file(tmp_path / "model.safetensors"))
    z = model.encode(IMAGES).mode()
    again, decoder = RAE.from_pretrained(tmp_path), RAE.from_pretrained(tmp_path, vfm=False)
    assert torch.equal(again.encode(IMAGES).mode(), z) and again.latent_identity() == model.latent_identity()
    assert torch.equal(decoder.decode(z).image, model.decode(z).image)
    for ask in (decoder.encode, lambda images: decoder.interpolation):
        with pytest.raises(ValueError, match="this RAE has no VFM to encode with"):
            ask(IMAGES)
    with pytest.raises(ValueError, match="trained on other weights of"):
        RAE.from_pretrained(tmp_path, vfm=False).attach_vfm(str(other_weights(tmp_path)))


def other_weights(folder: Path) -> Path:
    save_file(FrozenVFM(VFM, pretrained=False).network.state_dict(), folder / "other.safetensors")
    return folder / "other.safetensors"


def test_images_of_another_size_take_the_average_of_the_statistics():
    """As shrunk images do, whose latents are compared, and never decoded."""
    model = build(image_size=64)
    model.take_statistics(torch.randn(model.latent_shape), torch.rand(model.latent_shape) + 0.5)
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        raw, z = model.raw_latents(images), model.encode(images).mode()
    assert z.shape[2:] == (4, 4)
    mean, std = (values.unflatten(1, (4, 2)).unflatten(3, (4, 2)).mean((2, 4)) for values in (model.mean, model.std))
    assert torch.allclose(z, (raw - mean) / std, atol=1e-4)


def test_mistakes_are_named():
    model = build()
    model.check_image_size(64)
    for call, message in (
        (lambda: model.check_image_size(128), "image_size: 128 does not fit this RAE, .* give 64"),
        (lambda: model.decode(torch.zeros(1, 128, 4, 4)), r"latents: this RAE decodes \[128, 8, 8\] alone"),
        (lambda: RAE(**SMALL), "latent_channels, compression: a RAE without a VFM needs both"),
        (lambda: build(latent_channels=64), r"widths \[128\], but this RAE has latent_channels=64"),
        (lambda: build(compression=16), "a token for every 8 pixels, but this RAE has compression=16"),
        (lambda: build(image_size=60), "image_size: must be a multiple of 8"),
        (lambda: build(decoder_heads=3), "decoder_width: must be a multiple of 12 with decoder_heads=3"),
        (lambda: build(pixel_std=[0.2, 0.0, 0.2]), "pixel_std: must be above 0"),
        (lambda: build(pixel_mean=[0.5]), "pixel_mean, pixel_std: 3 numbers each"),
        (lambda: build(statistics_images=-1), "statistics_images: must be at least 0"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
