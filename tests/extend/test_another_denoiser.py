"""A denoiser, and a condition, in a file of their own: trained, sampled and evaluated by the command line."""

import importlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import run
from latent_cache import write_split

from ldm.pipeline import LatentDiffusion

HERE = Path(__file__).parent
LAST = "runs/mixer/checkpoints/last.ckpt"
CONFIG = """
seed_everything: 0
run: {name: mixer}
model:
  model: {class_path: mixer.Mixer, init_args: {in_channels: 4, input_size: 8}}
  optimizer: {class_path: AdamW, init_args: {lr: 0.01}}
  sampler: {class_path: Euler, init_args: {steps: 3}}
  label_drop: 0.5
  tokenizer: {checkpoint: tokenizer}
data: {root: latents, source: latents, batch_size: 8, val_batch_size: 6, num_workers: 0}
trainer:
  accelerator: cpu
  max_steps: 4
  log_every_n_steps: 1
  enable_progress_bar: false
  callbacks:
  - {class_path: EMA, init_args: {decay: 0.5}}
  - {class_path: LinearProbeCallback}
  - class_path: DistributionCallback
    init_args:
      network: {class_path: FrozenVFM, init_args: {name: vit_photos_patch8_64}}
      reference: photos/train
      image_size: 64
  - {class_path: SampleImages, init_args: {classes: null, num_images: 2, guidance_scales: [1.0, 3.0]}}
  - {class_path: ModelCheckpoint, init_args: {save_last: true, enable_version_counter: false}}
  - Report
"""
TOLD = {
    "a class": ["--model.model.init_args.num_classes=3"],
    "brightness": ["--model.conditioning=brightness.MeanOfLatents", "--model.conditioning.init_args.scale=0.5"],
}


@pytest.fixture(params=[pytest.param("a class", marks=pytest.mark.slow), "brightness"])
def told(request):
    return request.param


@pytest.fixture
def folder(told, tmp_path, photos, tiny_model, monkeypatch):
    """With all that training reads, and both files importable."""
    tiny_model().save_pretrained(tmp_path / "tokenizer")
    for split, size in (("train", 24), ("val", 12)):
        write_split(tmp_path / "latents" / split, size, side=8)
    for name in ("mixer.py", "brightness.py"):
        shutil.copy(HERE / name, tmp_path)
    (tmp_path / "photos").symlink_to(photos)
    (tmp_path / "mixer.yaml").write_text(CONFIG)
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    return tmp_path


def test_it_is_trained_watched_sampled_and_evaluated(folder, told):
    def ldm(command, *options):
        ended = run(folder, "ldm", command, "-c", "mixer.yaml", *TOLD[told], *options)
        assert ended.code == 0, ended.err

    ldm("fit")
    assert (folder / "runs/mixer/images/samples_guidance_3.png").is_file()
    ldm("validate", "--ckpt_path", LAST)
    (entry,) = json.loads((folder / "runs/mixer/metrics.json").read_text()).values()
    for name in ("loss", "probe/block_01", "probe/block_02", "fd_vit_photos_patch8_64/train"):
        assert np.isfinite(entry["metrics"][f"val/{name}"])
    distance = "{class_path: DistributionCallback, init_args: {network: %s, reference: photos/train, image_size: 64}}"
    distance %= "{class_path: FrozenVFM, init_args: {name: vit_photos_patch8_64}}"
    ldm("test", "--ckpt_path", LAST, "--data.num_samples=6", f"--trainer.callbacks=[EMA, {distance}]")

    writer = "--trainer.callbacks=[EMA, {class_path: SampleWriter, init_args: {npz: true, directory: %s}}]"
    for name, scale in (("plain", 1), ("guided", 3)):
        options = [f"--model.guidance.scale={scale}", "--data.num_samples=5", writer % name]
        ldm("predict", "--ckpt_path", LAST, *options)
    with np.load(folder / "plain.npz") as plain, np.load(folder / "guided.npz") as guided:
        assert plain["arr_0"].shape == (5, 64, 64, 3)
        assert plain["arr_1"].dtype == (np.int64 if told == "a class" else np.float64)
        assert (plain["arr_1"] == guided["arr_1"]).all() and (plain["arr_0"] != guided["arr_0"]).any()
    noted = json.loads((folder / "plain/samples.json").read_text())
    expected = {"class_path": "brightness.MeanOfLatents", "init_args": {"scale": 0.5}}
    assert noted.get("conditioning", noted.get("label_mode")) == ("random" if told == "a class" else expected)

    model = LatentDiffusion.from_checkpoint(folder / LAST)
    values = [0, 2] if told == "a class" else [-1.0, 0.5]
    samples = model.sample(values, guidance_scale=2.0)
    assert samples.condition.plain() == values
    model.save_pretrained(folder / "saved")
    card = (folder / "saved/README.md").read_text()
    assert f"conditioned on {'3 classes' if told == 'a class' else 'MeanOfLatents'}." in card
    again = LatentDiffusion.from_pretrained(folder / "saved").sample(values, guidance_scale=2.0)
    assert torch.equal(samples.latents, again.latents)
    with pytest.raises(ValueError, match=r"labels: the classes are 0 to 2|brightness: a finite number"):
        model.sample([7 if told == "a class" else float("nan")])


@pytest.mark.parametrize("told", ["nothing", "something else"], indirect=True)
def test_a_denoiser_and_what_it_is_told_have_to_fit(folder, told):
    options = [] if told == "nothing" else ["--model.conditioning=brightness.MeanOfLatents", *TOLD["a class"]]
    ended = run(folder, "ldm", "fit", "-c", "mixer.yaml", *options)
    assert ended.code != 0
    expected = "model.conditioning: Mixer knows no classes; give what it is told"
    if told == "something else":
        expected = "model.num_classes: the denoiser has 3, but its conditioning has None; give both the same"
    assert expected in ended.err
