"""How the parts fit together, and the import of published names."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from vfm_vae.description import describe
from vfm_vae.modules.adapter import Adapter
from vfm_vae.modules.decoder import Decoder
from vfm_vae.pretrained import build
from vfm_vae.published import tokenizer_from_published
from vfm_vae.tokenizer import VFMVAE
from vfm_vae.vfm import FrozenVFM

PUBLISHED = Path(__file__).parent / "parity/data/tiny_generator_b"


def parts(channels=(16, 16, 16, 16, 8), vfm=None, **adapter):
    defaults = {
        "feature_channels": [128],
        "layer_channels": [8],
        "latent_channels": 4,
        "unshuffle": 1,
        "decoded_channels": 16,
        "alignment_channels": 128,
    }
    decoder = Decoder(16, channels, [16], [], 0, w_channels=16)
    return Adapter(**defaults | adapter), decoder, vfm or FrozenVFM("vit_photos_patch8_64")


def test_encode_decode_on_any_grid_that_divides():
    model = VFMVAE(*parts())
    for height, width in [(64, 64), (32, 96)]:
        posterior = model.encode(torch.rand(2, 3, height, width) * 2 - 1)
        assert posterior.mean.shape == (2, 4, height // 8, width // 8)
        assert model.decode(posterior.mode()).image.shape == (2, 3, height, width)
    assert (model.compression, model.latent_channels) == (8, 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"feature_channels": [64]}, "feature_channels=\\[64\\]"),
        ({"alignment_channels": 64}, "alignment_channels=64"),
        ({"unshuffle": 2}, "compresses 16 times, but 5 decoder blocks enlarge 8 times"),
        ({"channels": (16, 16, 16, 8)}, "compresses 8 times, but 4 decoder blocks enlarge 4 times"),
    ],
)
def test_parts_that_do_not_fit_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        VFMVAE(*parts(**changes))


def test_latents_of_given_features_are_the_same_under_autocast():
    model, features = VFMVAE(*parts()[:2]), [torch.randn(1, 64, 128)]
    expected = model.encode_features(features)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        posterior = model.encode_features(features)
        assert torch.equal(posterior.mean, expected.mean) and torch.equal(posterior.logvar, expected.logvar)


def test_sizes_that_latents_come_in_follow_from_blocks_and_compression():
    adapter, _, vfm = parts()
    model = VFMVAE(adapter, Decoder(16, [8] * 4, [16], [], 0, w_channels=16, compression=8), vfm)
    for size in (16, 48):
        model.check_image_size(size)
    with pytest.raises(ValueError, match=r"image_size: 24 .* divide by 2: give a multiple of 16 \(2 cells of 8 pixels"):
        model.check_image_size(24)


def test_a_description_from_before_blocks_could_start_elsewhere_is_read():
    model = VFMVAE(*parts()[:2])
    described = describe(model)
    for option in ("compression", "route_downsampling"):
        del described["init_args"]["decoder"]["init_args"][option]
    loaded = build(VFMVAE, described).eval()
    loaded.load_state_dict(model.state_dict())
    latent = torch.randn(1, 4, 8, 8)
    assert torch.equal(loaded.decode(latent).image, model.eval().decode(latent).image)


def test_without_a_vfm_only_features_are_encoded():
    model = VFMVAE(*parts()[:2])
    with pytest.raises(ValueError, match="no VFM"):
        model.encode(torch.zeros(1, 3, 64, 64))
    with pytest.raises(ValueError, match="make no square"):
        model.encode_features([torch.zeros(1, 32, 128)])
    assert model.encode_features([torch.zeros(1, 32, 128)], (4, 8)).mean.shape == (1, 4, 4, 8)


def test_published_names_are_all_accounted_for():
    config = json.loads(PUBLISHED.with_suffix(".json").read_text())["config"]
    tensors = load_file(PUBLISHED.with_suffix(".safetensors"))
    weights = {name.removeprefix("weights/"): t for name, t in tensors.items() if name.startswith("weights/")}
    vfm = {"vfm_encoder.some.weight": torch.zeros(3)}
    assert tokenizer_from_published(weights | vfm, config).training is False
    name = "synthesis.blocks.1.conv0.dwconv.bias"
    without = {key: tensor for key, tensor in weights.items() if key != name}
    with pytest.raises(ValueError, match=r"missing \['synthesis\.blocks\.1\.conv0\.dwconv\.bias'\]; left over \[\]"):
        tokenizer_from_published(without, config)
    with pytest.raises(ValueError, match="left over"):
        tokenizer_from_published(weights | {"synthesis.unheard.of": torch.zeros(1)}, config)
    with pytest.raises(ValueError, match="compression_mode='discrete' is not supported"):
        tokenizer_from_published(weights, config | {"compression_mode": "discrete"})
