"""Tokenizers side by side: numbers of the table, the picture, and what is refused."""

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import run
from PIL import Image

from callbacks.cknna import CKNNACallback
from callbacks.distribution import DistributionCallback
from vfm_vae.compare import compare
from vfm_vae.comparing import ComparedImages, Comparison, num_parameters, seconds_per_image
from vfm_vae.embedded.judge import Judge
from vfm_vae.metrics.side_by_side import markdown_table, picture
from vfm_vae.vfm import FrozenVFM

VFM = "vit_photos_patch8_64"
FILES = {"comparison.png", "comparison.json", "table.md"}
EXTEND = str(Path(__file__).parent / "extend")


@pytest.fixture
def conv_vae(monkeypatch):
    """Others' tokenizers, which no package holds."""
    monkeypatch.syspath_prepend(EXTEND)
    yield importlib.import_module("conv_vae")
    sys.modules.pop("conv_vae", None)


@pytest.fixture
def folders(tiny_model, conv_vae, tmp_path):
    """Two tokenizers, one with a VFM and one without, by name."""
    tiny_model().save_pretrained(tmp_path / "ours")
    torch.manual_seed(1)
    conv_vae.OwnVAE().save_pretrained(tmp_path / "conv")
    return {"ours": str(tmp_path / "ours"), "conv": str(tmp_path / "conv")}


def test_numbers_are_those_of_validation(tiny_module, data, trainer, photos, folders, tmp_path):
    module = tiny_module()  # of the weights that are in the first folder
    callbacks = [CKNNACallback(se_cknna="each"), DistributionCallback(Judge())]
    validation = trainer(callbacks=callbacks)
    validation.validate(module, data(), verbose=False)
    expected = {name.removeprefix("val/"): float(value) for name, value in validation.callback_metrics.items()}
    found = compare(folders, str(photos / "val"), str(tmp_path / "out"), image_size=64, batch_size=5, lpips=False)
    ours = found["tokenizers"]["ours"]["metrics"]
    assert {"psnr", "ssim", "fd_judge_photos", "cknna/latent", "se_cknna/latent/mean"} < ours.keys() and len(ours) == 17
    assert ours == {name: pytest.approx(expected[name], rel=1e-4, abs=1e-6) for name in ours}
    conv = found["tokenizers"]["conv"]["metrics"]
    assert conv.keys() == ours.keys() and all(conv[name] != ours[name] for name in ("psnr", "ssim", "cknna/latent"))

    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES
    assert json.loads((tmp_path / "out/comparison.json").read_text()) == json.loads(json.dumps(found))
    assert found["settings"]["vfm"]["network"] == VFM and found["settings"]["num_images"] == 26
    table = (tmp_path / "out/table.md").read_text()
    assert "| latent | 4x8x8 | 4x8x8 |" in table and f"{ours['psnr']:.4g}" in table
    with Image.open(tmp_path / "out/comparison.png") as image:
        assert image.width > 5 * 192 and image.height > 6 * 192  # input, two tokenizers, their errors
        assert np.asarray(image).std() > 20


def test_parameters_and_times(tiny_model, conv_vae):
    images = torch.zeros(2, 3, 64, 64)
    plain = conv_vae.OwnVAE().eval().requires_grad_(False)
    sizes = {part: sum(p.numel() for p in getattr(plain, part).parameters()) for part in ("encoder", "decoder")}
    assert num_parameters(plain, images) == sizes | {"vfm": 0}
    assert not any(parameter.requires_grad for parameter in plain.parameters())
    ours = tiny_model().eval()
    counts = num_parameters(ours, images)
    assert counts["vfm"] == sum(p.numel() for p in ours.vfm.network.parameters()) > 1e6
    used_by_both = counts["encoder"] + counts["decoder"] - sum(p.numel() for p in ours.parameters())
    assert counts["encoder"] > 1000 and counts["decoder"] > 1000 and used_by_both <= 0  # `align` alone is in neither
    aligned = conv_vae.AlignedVAE(vfm=FrozenVFM(VFM)).eval()
    assert num_parameters(aligned, images) == sizes | {"vfm": 0}  # it does not encode with it
    with torch.no_grad():
        seconds = seconds_per_image(plain, images)
    assert seconds.keys() == {"encode", "decode"} and all(0 < time < 10 for time in seconds.values())


def test_an_image_is_encoded_once_and_few_at_a_time(conv_vae, photos, monkeypatch):
    tokenizer, sizes = conv_vae.OwnVAE().eval(), []
    encode = tokenizer.encode
    monkeypatch.setattr(tokenizer, "encode", lambda images: sizes.append(images.shape[::2]) or encode(images))
    images = ComparedImages(photos / "val", 64)
    comparison = Comparison(images, vfm=FrozenVFM(VFM), batch_size=8, se_cknna=False)
    comparison.look_at_originals()
    monkeypatch.setattr("vfm_vae.comparing.num_parameters", lambda *_: {})
    monkeypatch.setattr("vfm_vae.comparing.seconds_per_image", lambda *_: {})
    comparison.measure(tokenizer, "conv")
    assert [size[0] for size in sizes] == [8, 8, 8, 2]
    sizes.clear()
    comparison = Comparison(images, vfm=FrozenVFM(VFM), batch_size=26)
    comparison.look_at_originals()
    comparison.measure(tokenizer, "conv")
    assert sorted(sizes) == [(26, 16), (26, 32), (26, 48), *[(26, 64)] * 8]


def test_a_size_that_is_refused_leaves_one_transformation_out(tiny_model, photos):
    comparison = Comparison(ComparedImages(photos / "val", 64, 11), vfm=FrozenVFM(VFM), batch_size=11)
    comparison.look_at_originals()
    model = tiny_model(model_args={"dynamic_img_size": False}).eval()
    with pytest.warns(UserWarning, match=r"SE-CKNNA leaves out scale_0.5: images: .* takes 64x64 pixels only"):
        metrics = comparison.measure(model, "model").metrics
    assert "se_cknna/latent/rotation_90" in metrics and "se_cknna/latent/scale_1" in metrics
    assert not {"se_cknna/latent/scale_0.5", "se_cknna/latent/mean"} & metrics.keys()


def test_the_picture_shows_what_it_says():
    originals = torch.zeros(2, 3, 64, 64, dtype=torch.uint8)
    originals[1] = 200
    shifted = originals.clone()
    shifted[1, :, :, 32:] -= 40
    pixels = picture(originals, {"same": originals, "shifted": shifted})
    height, width, _ = pixels.shape
    assert height > 2 * 192 and width > 5 * 192
    columns = [10, 10 + 192 + 24]  # the input, and the first reconstruction
    for left in columns:
        assert (pixels[46:238, left : left + 192] == 0).all() and (pixels[264:456, left : left + 192] == 200).all()
    errors = pixels[264:456, width - 84 - 24 - 192 : width - 84 - 24]
    assert (errors[:, :96] == errors[0, 0]).all() and (errors[:, 96:] == errors[0, -1]).all()
    assert errors[0, 0].max() < 10 and errors[0, -1].min() > 150  # dark where nothing is wrong, and the brightest


def test_the_best_is_bold():
    entry = {"latent": (4, 8, 8), "parameters": {"encoder": 0, "decoder": 2_500_000, "vfm": 0}}
    entry["seconds"] = {"encode": 0.001, "decode": 0.002}
    entries = {
        "a|b": entry | {"metrics": {"psnr": 20.0, "fd_judge": 1.0, "cknna/latent": float("nan")}},
        "c": entry | {"metrics": {"psnr": float("inf"), "fd_judge": 2.0}, "latent": (32, 4, 4)},
    }
    assert markdown_table(entries, 64).splitlines() == [
        "|  | a\\|b | c |", "| --- | ---: | ---: |", "| PSNR in dB ↑ | 20 | **inf** |", "| FD, judge ↓ | **1** | 2 |",
        "| CKNNA ↑ | nan |  |", "| latent | 4x8x8 | 32x4x4 |", "| latent values per pixel | 0.0625 | 0.125 |",
        "| parameters, encoder | 0 | 0 |", "| parameters, decoder | 2.5 M | 2.5 M |",
        "| parameters, frozen VFM | 0 | 0 |", "| encode, ms per image | **1** | **1** |",
        "| decode, ms per image | **2** | **2** |",
    ]  # fmt: skip


def test_the_command_line(folders, photos, tmp_path, vgg_file, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", EXTEND)
    images = ["--images", str(photos / "train"), "--image_size=64"]
    command = ["ours=ours", "conv", *images, "--num_images=5", "--num_shown=2", "--batch_size=2", "--out=out"]
    command += ["--tokenizer_class", "conv_vae.OwnVAE", "--network=Inception", f"--network.weights={tmp_path}/no"]
    ended = run(tmp_path, "vfm_vae.compare", *command)
    assert ended.code == 2 and f"error: network: weights: there is no file '{tmp_path}/no'; give" in ended.err
    command = [*command[:-2], "--vfm=FrozenVFM", f"--vfm.name={VFM}", "--network=Judge"]
    with pytest.warns(UserWarning, match="images: CKNNA with 10 neighbours needs at least 11, given 5; it is left out"):
        ended = run(tmp_path, "vfm_vae.compare", *command, f"--vgg={vgg_file}")
    assert ended.code == 0 and "LPIPS ↓" in ended.out, ended.err
    entries = json.loads((tmp_path / "out/comparison.json").read_text())["tokenizers"]
    assert list(entries) == ["ours", "conv"] and entries["conv"]["metrics"]["lpips"] > 0
    assert (tmp_path / "out/comparison.json").read_text().count('"network": "judge_photos"') == 1
    ended = run(tmp_path, "vfm_vae.compare", *command)
    assert ended.code == 2 and "error: out: 'out' holds an earlier comparison (comparison.png, table.md" in ended.err
    for wrong, message in {
        "--images=nowhere": "images: can't read the folder 'nowhere'",
        "ours=conv": "tokenizers: two are called 'ours'; give each its own name",
        "other=no.ckpt": "tokenizers: other: there is no tokenizer at 'no.ckpt'; train one first",
        "other=folder": "tokenizers: other: there is no folder 'folder'; on the Hugging Face hub it would be",
        "--image_size=72": "tokenizers: ours: image_size: 72 does not fit this tokenizer",
        "=conv": "tokenizers: '=conv' lacks a name or a place; give name=place",
        "--device=abacus": "device: 'abacus' can't be used here (",
        "--vfm=vit_no": "vfm: timm knows no model 'vit_no'",
        "--vfm_weights=other=x": "vfm_weights: no tokenizer is called 'other'; their names are ['conv', 'ours']",
        "--vfm_weights=ours=x": "tokenizers: ours: --vfm_weights ours=FILE: no file at 'x'",
        "--tokenizer_class=nope.X": "tokenizer_class: there is no class 'nope.X': put the folder of module 'nope' on",
        "--tokenizer_class=json.JSONDecoder": "tokenizer_class: json.JSONDecoder is no PretrainedTokenizer",
    }.items():
        place = 1 if "=" in wrong and not wrong.startswith("--") else len(command)
        words = [*command[:place], wrong, *command[place:], "--out=other"]
        ended = run(tmp_path, "vfm_vae.compare", *words)
        assert ended.code == 2 and "Traceback" not in ended.err, ended.err
        assert message in next(line for line in ended.err.splitlines() if line.startswith("error: "))
    assert not (tmp_path / "other").exists()
