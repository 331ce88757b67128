"""Which towers of transformers are taken, from which files, and what is said of others."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_towers import CONFIGS, TEXT, WIDTH, Folders, check_close, images_of, library
from torch import nn
from torch.nn import functional as F

from vfm_vae import towers
from vfm_vae.transformers_vfm import TransformersVFM
from vfm_vae.vfm import vfm_from


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return Folders(tmp_path_factory.mktemp("towers"))


def test_the_vision_tower_of_two_is_taken_and_nothing_else_read(folder):
    tensors = load_file(f"{folder.two_towers()}/model.safetensors")
    prefix = next(name for name in tensors if name.endswith("embeddings.patch_embedding.weight"))
    alone = library(folder.two_towers()).vision_model
    vfm, images = TransformersVFM(folder.two_towers()), torch.rand(1, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        expected = alone(pixel_values=vfm.prepare(images)).last_hidden_state
    check_close(vfm(images).tokens, expected)
    assert prefix.startswith("vision_model.") and not any("text" in name for name in vfm.network.state_dict())
    assert not any(name.startswith("head") for name in vfm.network.state_dict())


def test_a_model_in_several_files_is_read_from_those_that_hold_the_tower(folder):
    text = TEXT | {"num_key_value_heads": 1, "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]}}
    place = folder("qwen2_5_vl", shards="20KB", vision_config=CONFIGS["qwen2_5_vl_vision"], text_config=text)
    files = json.loads(Path(place, "model.safetensors.index.json").read_text())["weight_map"]
    others = set(files.values()) - {file for name, file in files.items() if "visual." in name}
    assert others and len(set(files.values()) - others) > 1
    visual = library(place).visual
    for file in others:
        Path(place, file).write_bytes(b"")
    vfm = TransformersVFM(place)
    images = images_of(vfm, 2, 2)
    assert torch.equal(vfm.network.blocks[2].mlp.up_proj.weight, visual.blocks[2].mlp.up_proj.weight)
    assert vfm(images).tokens.shape == (2, 4, 24)


def test_needs_no_hub_where_the_type_is_given(monkeypatch):
    monkeypatch.setattr("vfm_vae.tower_weights.model_folder", lambda *_: pytest.fail("looked something up"))
    options = {"pretrained": False, "model_args": {"model_type": "dinov3_vit"} | CONFIGS["dinov3_vit"]}
    vfm = TransformersVFM("facebook/dinov3-vits16-pretrain-lvd1689m", layers=[1], **options)
    assert vfm.shape_of(**vfm.arguments).widths == vfm.widths == (WIDTH,)
    assert torch.equal(vfm.mean.flatten(), torch.tensor([0.485, 0.456, 0.406]))
    with torch.device("meta"):
        assert TransformersVFM(vfm.name, **options).network.norm.weight.is_meta


def test_mean_and_std_are_the_image_processors(folder, tmp_path):
    shutil.copytree(folder("vit_mae"), tmp_path / "other")
    said = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.25, 1.0]}
    (tmp_path / "other/preprocessor_config.json").write_text(json.dumps(said))
    vfm = TransformersVFM(str(tmp_path / "other"))
    pixels = torch.zeros(1, 3, 64, 64)
    assert torch.allclose(vfm.prepare(pixels)[0, :, 0, 0], torch.tensor([0.8, 1.2, 0.2]))
    given = TransformersVFM(vfm.name, mean=[0.5] * 3, std=[0.5] * 3)
    assert torch.equal(given.prepare(pixels), pixels)
    (tmp_path / "other/preprocessor_config.json").unlink()
    assert torch.equal(vfm_from(vfm.source()).prepare(pixels), vfm.prepare(pixels))


def test_weights_of_a_rae_are_its_encoders(folder, tmp_path):
    network = library(folder("dinov2_with_registers"))
    tensors = {
        f"encoder.{name}": tensor for name, tensor in load_file(f"{network.name_or_path}/model.safetensors").items()
    }
    without_norm = {name: tensor for name, tensor in tensors.items() if "encoder.layernorm." not in name}
    save_file(without_norm | {"decoder.weight": torch.zeros(2)}, tmp_path / "rae.safetensors")
    arguments = {"layers": [-2, -1], "weights": str(tmp_path / "rae.safetensors")}
    vfm = TransformersVFM(network.name_or_path, norm_affine=False, **arguments)
    before, after = vfm(images_of(vfm, 4, 4)).layers
    normalised = F.layer_norm(before, (WIDTH,), eps=network.config.layer_norm_eps)
    check_close(after, normalised)
    whole = TransformersVFM(network.name_or_path, norm_affine=False)
    assert vfm.fingerprint() == whole.fingerprint() != TransformersVFM(network.name_or_path).fingerprint()
    with pytest.raises(ValueError, match=r"of 62 tensors 2 missing \['layernorm.bias', 'layernorm.weight'\]"):
        TransformersVFM(network.name_or_path, **arguments)
    with pytest.raises(ValueError, match=r"norm_affine: '.*' has no final norm to take gain and bias from"):
        TransformersVFM(folder("qwen2_5_vl_vision"), norm_affine=False)


def test_what_is_no_vision_tower_is_refused(folder, tmp_path):
    with pytest.raises(
        ValueError, match=r"^name: there is no folder 'siglip'; on the Hugging Face hub it would be owner/m"
    ):
        TransformersVFM("siglip")
    with pytest.raises(ValueError, match=r"^name: '.*' has no config.json of transformers'"):
        TransformersVFM(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "vits16"}')
    with pytest.raises(ValueError, match=r"^name: transformers makes no config of 'vits16' for '"):
        TransformersVFM(str(tmp_path))
    text = folder("bert", **TEXT)
    with pytest.raises(ValueError, match=r"^name: '.*bert' is a 'bert', and no plain vision transformer; choose one"):
        TransformersVFM(text)
    for kind, why in (("siglip2_vision_model", "a NaFlex tower, .* fixed resolution"), ("dinov3_convnext", "a convol")):
        with pytest.raises(ValueError, match=rf"^model_args: 'x/y' is {why}"):
            TransformersVFM.shape_of("x/y", model_args={"model_type": kind})
    swin = {"model_type": "swin", "image_size": 64, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 1]}
    with pytest.raises(
        ValueError, match=r"^name: 'x/y' \(SwinModel\) is no plain vision transformer; choose one with pa"
    ):
        TransformersVFM("x/y", pretrained=False, model_args=swin)


def test_why_an_unknown_family_could_not_be_tried_is_told(monkeypatch):
    def broken(*_):
        raise RuntimeError("the mistake\nitself")

    monkeypatch.setattr(towers, "run_tower", broken)
    args = {"model_type": "vit", "image_size": 32, "patch_size": 8, "hidden_size": 8, "num_hidden_layers": 1}
    with pytest.raises(ValueError, match=r"tried with an image: RuntimeError: the mistake itself\)$") as told:
        TransformersVFM("x/y", pretrained=False, model_args=args | {"num_attention_heads": 1})
    assert isinstance(told.value.__cause__, RuntimeError)


def test_options_that_do_not_fit_are_refused(folder):
    place = folder("siglip_vision_model")
    with pytest.raises(ValueError, match=r"layers: .* has no layer 4; its 3 blocks give layers 0 to 3 and -5 to -1"):
        TransformersVFM(place, layers=[4])
    with pytest.raises(ValueError, match=r"^model_args: a 'siglip_vision_model' has no options \['depht'\]"):
        TransformersVFM(place, model_args={"depht": 2})
    with pytest.raises(
        ValueError, match=r"^model_args: transformers makes no config of 'siglip_vision_model' for .*hidden"
    ):
        TransformersVFM(place, model_args={"hidden_size": "wide"})
    with pytest.raises(ValueError, match=r"^mean: must be three numbers, for red, green and blue, given \[0.5\]"):
        TransformersVFM(place, mean=[0.5])
    with pytest.raises(ValueError, match="precision: one of 'bfloat16', 'float32', given 'half'"):
        TransformersVFM(place, precision="half")
    vfm = TransformersVFM(place, input_scale=2.0)
    assert vfm.grid(32, 48) == (4, 6)
    with pytest.raises(
        ValueError, match=r"patches of 16 pixels, which don't divide 64x72 \(images resized by input_scale"
    ):
        vfm(torch.zeros(1, 3, 32, 36))
    qwen = TransformersVFM(folder("qwen2_5_vl_vision"))
    with pytest.raises(ValueError, match=r"has patches of 28 pixels, which don't divide 42x56; height and width"):
        qwen.grid(42, 56)
    with pytest.raises(ValueError, match=r"takes float images in \[-1, 1\], given torch.uint8"):
        qwen(torch.zeros(1, 3, 56, 56, dtype=torch.uint8))


def test_weights_that_are_not_whole_are_refused(folder, tmp_path):
    place = folder("dinov2")
    tensors = load_file(f"{place}/model.safetensors")

    def refused(message, changed, name="weights.safetensors"):
        save_file(changed, tmp_path / name)
        with pytest.raises(ValueError, match=message):
            TransformersVFM(place, weights=str(tmp_path / name))

    begin = r"^weights: '.*weights.safetensors' (does not hold the weights of '.*dinov2': of 61 tensors|holds) "
    lacking = {name: tensor for name, tensor in tensors.items() if name != "encoder.layer.2.norm1.bias"}
    refused(begin + r"1 missing \['encoder.layer.2.norm1.bias'\]$", lacking)
    refused(
        begin + r"1 left over \['encoder.layer.3.norm1.bias'\]$",
        tensors | {"encoder.layer.3.norm1.bias": torch.zeros(2)},
    )
    refused(begin + r"1 of another shape \['layernorm.bias'\]$", tensors | {"layernorm.bias": torch.zeros(3)})
    refused(begin + "no tensor 'embeddings.patch_embeddings.projection.weight'", {"x": torch.zeros(1)})
    both = {f"{part}.{name}": tensor.clone() for name, tensor in tensors.items() for part in ("teacher", "student")}
    refused(begin + r"several vision towers \['student.', 'teacher.'\]; save one alone", both)
    torch.save(nn.Linear(2, 2), tmp_path / "pickle.pth")
    with pytest.raises(ValueError, match="reading it would run code"):
        TransformersVFM(place, weights=str(tmp_path / "pickle.pth"))
    shutil.copytree(place, tmp_path / "empty", ignore=lambda *_: ["model.safetensors"])
    with pytest.raises(ValueError, match=r"^name: '.*empty' holds no model.safetensors; give a file with its weights"):
        TransformersVFM(str(tmp_path / "empty"))
    torch.save(tensors, tmp_path / "whole.pth")
    assert (
        TransformersVFM(place, weights=str(tmp_path / "whole.pth")).fingerprint()
        == TransformersVFM(place).fingerprint()
    )
