"""The command line as a user meets it: commands, mistakes, and a run that is killed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
DEMO = ["-c", str(ROOT / "configs/demo/tokenizer.yaml")]
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "VFM_VAE_DEBUG"} | {"OMP_NUM_THREADS": "1"}

# The demo's tokenizer at a size that trains in seconds; files go to the working directory.
SMALL = """
ckpt_path: null
model:
  max_images: 48
  model:
    init_args:
      adapter: {init_args: {layer_channels: [8, 8, 8], latent_channels: 4, decoded_channels: 16}}
      decoder:
        init_args:
          latent_channels: 16
          channels: [16, 16, 16, 16, 8]
          route_channels: [16, 16]
          attention_depths: []
          num_res_blocks: 0
          w_channels: 16
data:
  root: photos
  photos: {size: 64, train_per_class: 4, val_per_class: 2}
  batch_size: 8
  val_batch_size: 26
trainer:
  logger:
    class_path: lightning.pytorch.loggers.TensorBoardLogger
    init_args: {save_dir: runs, name: small, version: ""}
  callbacks:
  - class_path: callbacks.ema.EMA
  - class_path: callbacks.report.Report
  - class_path: lightning.pytorch.callbacks.RichProgressBar
  - class_path: lightning.pytorch.callbacks.RichModelSummary
  - class_path: lightning.pytorch.callbacks.ModelCheckpoint
    init_args: {save_last: true, every_n_train_steps: 1, enable_version_counter: false}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "small.yaml").write_text(SMALL)
    return tmp_path


def start(folder: Path, *arguments: str, **kwargs) -> subprocess.Popen:
    command = [sys.executable, "-m", "vfm_vae", *arguments]
    return subprocess.Popen(
        command,
        cwd=folder,
        env=ENVIRONMENT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(folder: Path, *arguments: str) -> tuple[int, str, str]:
    process = start(folder, *arguments)
    out, err = process.communicate(timeout=240)
    return process.returncode, out, err


def small(command: str, *options: str) -> list[str]:
    return [command, *DEMO, "-c", "small.yaml", *options]


def test_fit_validate_predict(folder: Path):
    code, _, err = run(folder, *small("fit"))
    assert code == 0, err
    last = "runs/small/checkpoints/last.ckpt"
    assert torch.load(folder / last, weights_only=True)["images_seen"] == 48
    assert list((folder / "runs/small").glob("events*"))

    trained = ["-c", "runs/small/config.yaml", "--ckpt_path", last]
    code, out, err = run(folder, "validate", *trained)
    assert code == 0, err
    metrics = json.loads((folder / "runs/small/metrics.json").read_text())["run"]["metrics"]
    assert metrics["val/psnr"] > 5
    assert "val/psnr" in out

    writer = "--trainer.callbacks+=callbacks.writers.ReconstructionWriter"
    code, _, err = run(folder, "predict", *trained, writer, "--trainer.callbacks.directory=reconstructions")
    assert code == 0, err
    assert len(list((folder / "reconstructions").glob("*.png"))) == 26


def test_killed_and_resumed_equals_uninterrupted(folder: Path):
    assert run(folder, *small("fit", "--trainer.logger.init_args.name=whole"))[0] == 0
    name = "--trainer.logger.init_args.name=killed"
    last = folder / "runs/killed/checkpoints/last.ckpt"
    process = start(folder, *small("fit", name, "--model.max_images=4800"))
    deadline = time.monotonic() + 200
    while not last.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 0 < torch.load(last, weights_only=True)["images_seen"] < 48  # in the middle of the first epoch
    code, _, err = run(folder, *small("fit", name, "--ckpt_path=last"))
    assert code == 0, err
    whole, resumed = (
        torch.load(folder / f"runs/{name}/checkpoints/last.ckpt", weights_only=True) for name in ("whole", "killed")
    )
    assert resumed["images_seen"] == whole["images_seen"] == 48
    for key in ("state_dict", "ema"):
        theirs, ours = whole[key], resumed[key]
        theirs, ours = (theirs, ours) if key == "state_dict" else (theirs["weights"], ours["weights"])
        assert theirs.keys() == ours.keys()
        assert all(torch.equal(theirs[name], ours[name]) for name in theirs)


MISTAKES = {
    "unknown VFM": (
        ["--model.model.init_args.vfm.init_args.name=vit_large_patch16_siglp_512"],
        "timm knows no model 'vit_large_patch16_siglp_512'; did you mean 'vit_large_patch16_siglip_512'",
    ),
    "unsupported size": (["--data.image_size=60"], "image_size: 60 does not fit this tokenizer"),
    "missing data root": (["--data.source=folder", "--data.root=nowhere"], "root: there is no folder 'nowhere'"),
    "misspelt key": (["--model.max_imges=3"], "--model.max_imges"),
    "misspelt key in YAML": (["-c", "typo.yaml"], "latent_chanels"),
    "wrong parts": (["--model.model.init_args.adapter.init_args.unshuffle=2"], "unshuffle"),
    "missing stage": (["--model.init_from=nowhere.ckpt"], "init_from: there is no checkpoint 'nowhere.ckpt'"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_ends_with_one_line(folder: Path, mistake: str):
    options, message = MISTAKES[mistake]
    (folder / "typo.yaml").write_text("model: {model: {init_args: {adapter: {init_args: {latent_chanels: 4}}}}}")
    configs = [option for option in options if not option.startswith("--")]
    others = [option for option in options if option.startswith("--")]
    code, _, err = run(folder, *small("fit"), *configs, *others)
    assert code == 2
    assert "Traceback" not in err
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert message in line


def test_help_shows_our_options_and_no_list_of_every_layer(folder: Path):
    code, out, _ = run(folder, "fit", "--help")
    assert code == 0
    assert "--model.max_images" in out
    assert "torchvision" not in out
