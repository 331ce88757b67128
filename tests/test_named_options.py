"""A mistake in an option ends a command with one line that names the option, whoever finds it."""

import sys
from pathlib import Path

import pytest
from test_cli import DEMO, SMALL

from vfm_vae.cli import run
from vfm_vae.data.datamodule import ImageNetDataModule
from vfm_vae.module import TokenizerModule

ADAPTER, DISCRIMINATOR = "--model.model.init_args.adapter.init_args", "--model.discriminator.init_args"
SLOW = pytest.mark.slow  # found where another's mistake is
MISTAKES = [
    ("--seed_everything=-1", "seed_everything: must be in [0, 4294967295], given -1"),
    pytest.param(
        "--seed_everything=4294967296", "seed_everything: must be in [0, 4294967295], given 4294967296", marks=SLOW
    ),
    ("--data.seed=-1", "seed: must be at least 0, given -1"),
    pytest.param("--model.seed=-1", "seed: must be at least 0, given -1", marks=SLOW),
    ("--data.image_size=0", "image_size: must be at least 1, given 0"),
    ("--data.image_size=63", "image_size: 63 does not fit this tokenizer"),
    pytest.param("--data.val_batch_size=0", "val_batch_size: must be at least 1, given 0", marks=SLOW),
    ("--data.num_workers=-1", "num_workers: must be at least 0, given -1"),
    ('--data.photos={"sise": 3}', "photos: one of 'size', 'train_per_class', 'val_per_class', 'seed', given 'sise'"),
    ('--data.photos={"size": 0}', "photos.size: must be at least 1, given 0"),
    ("--trainer.devices=-1", "trainer.devices: "),
    pytest.param("--trainer.devices=x", "trainer.devices: ", marks=SLOW),
    ("--trainer.max_time=abc", "trainer.max_time: "),
    ("--trainer.strategy=foo", "trainer.strategy: "),
    ("--trainer.num_nodes=0", "trainer.num_nodes: "),
    ("--model.optimizer.init_args.lr=-1", "optimizer: Invalid learning rate: -1.0"),
    (f"{ADAPTER}.latent_channels=x", 'Parser key "latent_channels": Expected a'),
    (f"{ADAPTER}.layer_channels=[8,8]", "layer_channels: one number for each of the 3 layers that are read, given [8,"),
    (f"{ADAPTER}.layer_channels=[7,7,7]", "layer_channels, latent_channels, decoded_channels: an attention projection"),
    (f"{DISCRIMINATOR}.kernel_size=4", "kernel_size: must be odd, so that tokens stay as many, given 4"),
    (f"{DISCRIMINATOR}.backbone=nothing", "backbone: timm knows no model 'nothing'"),
    ("--model.model=VFMVEA", "model.model: there is no class 'VFMVEA' for it; did you mean VFMVAE? Other people's"),
    ("--trainer.callbacks+=Reprot", "trainer.callbacks: there is no class 'Reprot' for it; did you mean Report"),
    pytest.param(
        "--model.optimizer=Adamm", "model.optimizer: there is no class 'Adamm' for it; did you mean Adam", marks=SLOW
    ),
    pytest.param(
        "--model.objective.perceptual_loss=LPIPS",
        "model.objective.perceptual_loss: there is no class 'LPIPS' for it; did you mean LPIPSLoss",
        marks=SLOW,
    ),
    (
        "--model.discriminator=Qqqq",
        "model.discriminator: there is no class 'Qqqq' for it; give the full path, package.module.Class",
    ),
    ("--model.discriminator=null", "objective.adversarial: 0.02 needs a discriminator; give model.discriminator, or"),
]


@pytest.mark.parametrize(("option", "message"), MISTAKES)
def test_a_failing_option_is_named(option: str, message: str, tmp_path: Path, photos: Path, monkeypatch, capsys):
    (tmp_path / "small.yaml").write_text(SMALL)
    (tmp_path / "photos").symlink_to(photos)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("VFM_VAE_DEBUG", raising=False)
    monkeypatch.setattr(sys, "argv", ["vfm_vae", "fit", *DEMO, "-c", "small.yaml", "--trainer.accelerator=cpu", option])
    with pytest.raises(SystemExit) as end:
        run(TokenizerModule, ImageNetDataModule)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert end.value.code == 2
    assert line.startswith(f"error: {message}") or ("Parser" in message and message in line)
