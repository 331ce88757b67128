"""A VFM that is none of timm's, and in a file of its own, takes the place of FrozenVFM on the command line."""

import importlib
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from command_line import run

from ldm.alignment import REPA
from vfm_vae.data.latents import LatentDataset
from vfm_vae.tokenizer import VFMVAE, FrozenTokenizer
from vfm_vae.vfm import vfm_from

ROOT = Path(__file__).parents[2]
CONFIGS = ["-c", str(ROOT / "configs/demo/tokenizer.yaml"), "-c", str(ROOT / "tests/small.yaml"), "-c", "patches.yaml"]
CHECKPOINT = "runs/checkpoints/last.ckpt"
PATCHES = """
ckpt_path: null
run: {output: runs}
model:
  model:
    init_args:
      vfm: {class_path: patch_vfm.PatchVFM, init_args: {width: 16, layers: [0, 1, 1]}}
  objective:
    perceptual_loss:
      init_args:
        vfm: {class_path: patch_vfm.PatchVFM, init_args: {width: 8, layers: [0, 1]}}
  max_images: 24
trainer:
  callbacks:
  - CKNNACallback
  - RobustnessCallback
  - DistributionCallback
  - class_path: ModelCheckpoint
    init_args: {dirpath: runs/checkpoints, save_last: true, every_n_train_steps: 1, enable_version_counter: false}
  - class_path: Report
    init_args: {path: runs/metrics.json}
"""

OTHERS = """
from typing import Any

from torch import nn

from patch_vfm import PatchVFM


class OtherVFM(PatchVFM):
    def source(self) -> dict[str, Any]:
        return super().source() | {"class_path": "other_vfm.OtherVFM"}


class HalfVFM(nn.Module):
    width = 3
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory, photos):
    """Where the tokenizer was trained on the VFM."""
    folder = tmp_path_factory.mktemp("another_vfm")
    shutil.copy(Path(__file__).with_name("patch_vfm.py"), folder)
    (folder / "other_vfm.py").write_text(OTHERS)
    (folder / "patches.yaml").write_text(PATCHES)
    (folder / "photos").symlink_to(photos)
    ended = run(folder, "vfm_vae", "fit", *CONFIGS, "--trainer.limit_val_batches=0")
    assert ended.code == 0, ended.err
    return folder


@pytest.fixture(autouse=True)
def importable(folder, monkeypatch):
    monkeypatch.syspath_prepend(str(folder))


def test_validation_compares_with_the_modules_own(folder):
    ended = run(folder, "vfm_vae", "validate", *CONFIGS, "--ckpt_path", CHECKPOINT)
    assert ended.code == 0, ended.err
    (entry,) = json.loads((folder / "runs/metrics.json").read_text()).values()
    for name in ("cknna/latent", "robustness/patches16/mean", "fd_patches16"):
        assert f"val/{name}" in entry["metrics"]
    assert list(entry["settings"]["CKNNACallback"]["vfms"]) == ["patches16"]


def test_a_cache_holds_its_features_and_says_whose(folder):
    features = '{"class_path": "patch_vfm.PatchVFM", "init_args": {"width": 20}}'
    options = ["--model.predict=moments", f"--model.features={features}", "--data.predict=[val]"]
    options += ["--run.output=latents"]
    options += ['--trainer.callbacks=[{"class_path": "LatentWriter", "init_args": {"directory": "latents"}}]']
    ended = run(folder, "vfm_vae", "predict", *CONFIGS, *options, "--ckpt_path", CHECKPOINT)
    assert ended.code == 0, ended.err
    cache = LatentDataset(folder / "latents/val", train=False)
    assert cache.features_shape == (1 + 64, 20)
    vfm = vfm_from(cache.features_source)
    assert type(vfm).__name__ == "PatchVFM" and vfm.width == 20


def test_a_denoiser_is_aligned_to_it(folder):
    PatchVFM = importlib.import_module("patch_vfm").PatchVFM
    vfm, model = PatchVFM(20), SimpleNamespace(input_size=(8, 8), grid=(8, 8), align_channels=20, cls_channels=0)
    repa = REPA(vfm)
    repa.check_images(64, model)
    repa.check_features((1 + 64, 20), json.loads(json.dumps(vfm.source())), model, "cache")
    with pytest.raises(ValueError, match=r"of another VFM than model.alignment.vfm: \['fingerprint', 'seed'\]"):
        repa.check_features((1 + 64, 20), PatchVFM(20, seed=1).source(), model, "cache")
    repa.go_on_as(None)  # of a model that was trained on cached features
    repa.go_on_as(repa.identity())
    with pytest.raises(ValueError, match="trained on other weights of 'patches20'"):
        repa.go_on_as(REPA(PatchVFM(20, seed=1)).identity())


def test_checkpoints_and_folders_bring_it_back(folder):
    model = VFMVAE.from_checkpoint(folder / CHECKPOINT)
    assert type(model.vfm) is sys.modules["patch_vfm"].PatchVFM and model.vfm.layers == (0, 1, 1)
    assert not any("vfm" in name for name in model.state_dict()) and not any(model.vfm.parameters())
    model.save_pretrained(folder / "saved")
    again = FrozenTokenizer(str(folder / "saved"))
    images = torch.rand(1, 3, 64, 64) * 2 - 1
    assert type(again.network.vfm) is type(model.vfm) and again.identity == model.latent_identity()
    assert torch.equal(again.encode(images).mode(), model.encode(images).mode())


def test_a_folder_builds_no_class_that_was_not_imported(folder, monkeypatch):
    VFMVAE.from_checkpoint(folder / CHECKPOINT).save_pretrained(folder / "foreign")
    monkeypatch.delitem(sys.modules, "patch_vfm")
    with pytest.raises(ValueError, match=r"was trained on a patch_vfm\.PatchVFM, .* import its module first"):
        VFMVAE.from_pretrained(folder / "foreign")


def test_another_class_goes_on_with_no_checkpoint_of_it(folder):
    other = "--model.model.init_args.vfm.class_path=other_vfm.OtherVFM"
    ended = run(folder, "vfm_vae", "validate", *CONFIGS, other, "--ckpt_path", CHECKPOINT)
    assert ended.code != 0
    assert "trained on a patch_vfm.PatchVFM, but model.vfm is a other_vfm.OtherVFM; give that class" in ended.err


def test_a_class_that_lacks_something_is_refused(folder):
    half = "--model.model.init_args.vfm=other_vfm.HalfVFM"
    ended = run(folder, "vfm_vae", "fit", *CONFIGS, half)
    assert ended.code != 0 and "does not implement protocol VFM" in ended.err
    assert "; other_vfm.HalfVFM lacks differentiable, grid, " in ended.err
