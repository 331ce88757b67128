"""The command line as a user meets it: commands, mistakes, and a run that is killed."""

import json
import os
from pathlib import Path

import processes
import pytest
import torch
import webdataset
from command_line import Ended
from command_line import run as run_here

from vfm_vae.cli import short_errors
from vfm_vae.run import Run

ROOT = Path(__file__).parents[1]
DEMO = ["-c", str(ROOT / "configs/demo/tokenizer.yaml"), "-c", str(ROOT / "tests/small.yaml")]
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "VFM_VAE_DEBUG"} | {"OMP_NUM_THREADS": "1"}

# Files go to the working directory.
SMALL = """
ckpt_path: null
model: {max_images: 48}
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
def folder(tmp_path: Path, photos: Path) -> Path:
    (tmp_path / "small.yaml").write_text(SMALL)
    (tmp_path / "photos").symlink_to(photos)
    return tmp_path


def run(folder: Path, *arguments: str) -> Ended:
    return run_here(folder, "vfm_vae", *arguments)


def run_alone(folder: Path, *arguments: str) -> Ended:
    """Runs a command in a process of its own."""
    done = processes.run(["-m", "vfm_vae", *arguments], cwd=folder, env=ENVIRONMENT)
    return Ended(done.returncode, done.stdout, done.stderr)


def small(command: str, *options: str) -> list[str]:
    return [command, *DEMO, "-c", "small.yaml", *options]


def test_fit_validate_predict(folder: Path):
    code, _, err = run_alone(folder, *small("fit", "--model.max_images=24"))
    assert code == 0, err
    last = "runs/small/checkpoints/last.ckpt"
    assert torch.load(folder / last, weights_only=True)["images_seen"] == 24
    assert list((folder / "runs/small").glob("events*"))
    assert "\nmatmul_precision: high\n" in (folder / "runs/small/config.yaml").read_text()

    trained = ["-c", "runs/small/config.yaml", "--ckpt_path", last]
    report = folder / "runs/small/metrics.json"
    assert json.loads(report.read_text())["run"]["settings"]["model"]["matmul_precision"] == "high"
    code, out, err = run(folder, "validate", *trained, "--matmul_precision=highest")
    assert code == 0, err
    entry = json.loads(report.read_text())["run"]
    assert entry["metrics"]["val/psnr"] > 5 and entry["settings"]["model"]["matmul_precision"] == "highest"
    assert "val/psnr" in out

    writer = "--trainer.callbacks+=callbacks.writers.ReconstructionWriter"
    code, _, err = run(folder, "predict", *trained, writer, "--trainer.callbacks.directory=reconstructions")
    assert code == 0, err
    assert len(list((folder / "reconstructions").glob("*.png"))) == 26


@pytest.mark.parametrize(("percent", "expected"), [pytest.param(1, 0, marks=pytest.mark.slow), (10, 2)])
def test_a_little_damage_is_borne_and_much_stops_with_its_place(
    folder: Path, photos: Path, percent: int, expected: int
):
    content = next((photos / "train").glob("*/*.JPEG")).read_bytes()
    (folder / "shards").mkdir()
    for split, damaged in (("train", percent), ("val", 0)):
        with webdataset.TarWriter(str(folder / f"shards/set-{split}-0000.tar")) as tar:
            for number in range(100):
                jpeg = content[: 300 if number < damaged else None]
                tar.write({"__key__": f"{number:03d}", "jpg": jpeg, "cls": number % 13})
    options = ["--data.source=shards", "--data.root=shards", "--data.num_workers=2", "--model.max_images=96"]
    options += ["--trainer.limit_val_batches=0"]
    code, _, err = (run if expected else run_alone)(folder, *small("fit", *options))  # workers print for themselves
    assert code == expected, err
    assert "damaged image left out: shards/set-train-0000.tar/000.jpg" in err or percent == 10
    if expected:
        (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
        assert line.startswith("error: max_bad_fraction: 2 of the 100 images in 'shards' are damaged, more than 1.00%")
        assert "set-train-0000.tar/" in line and "Traceback" not in line


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
    "no such precision": (
        ["--matmul_precision=low"],
        "\"matmul_precision\": Expected a typing.Literal['highest', 'high', 'medium']. Got value: low",
    ),
    "no folder for the run": (
        ["--trainer.logger.init_args.save_dir=typo.yaml"],
        "typo.yaml/small/config.yaml' ([Errno 20] Not a directory: '",
    ),
    "no folder for checkpoints": (
        ["--trainer.logger.init_args.save_dir=taken"],
        "taken/small/checkpoints/last.ckpt' ([Errno 17] File exists: '",
    ),
    "missing stage": (["--model.init_from=nowhere.ckpt"], "init_from: there is no checkpoint 'nowhere.ckpt'"),
}


@pytest.mark.parametrize(
    "mistake",
    [
        # `test_named_options` and `test_read_checkpoints` find them, too.
        pytest.param(name, marks=pytest.mark.slow if name in ("unsupported size", "missing stage") else [])
        for name in MISTAKES
    ],
)
def test_a_mistake_ends_with_one_line(folder: Path, mistake: str):
    options, message = MISTAKES[mistake]
    (folder / "typo.yaml").write_text("model: {model: {init_args: {adapter: {init_args: {latent_chanels: 4}}}}}")
    (folder / "taken/small").mkdir(parents=True)
    (folder / "taken/small/checkpoints").touch()
    configs = [option for option in options if not option.startswith("--")]
    others = [option for option in options if option.startswith("--")]
    code, _, err = run(folder, *small("fit"), *configs, *others)
    assert code == 2
    assert "Traceback" not in err
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert message in line


def test_a_former_runs_logger_does_not_lead_a_new_run_into_its_folder(folder: Path):
    (folder / "runs/small").mkdir(parents=True)
    former = folder / "runs/small/config.yaml"
    former.write_text("seed_everything: 0")
    code, _, err = run(folder, *small("fit"), "--run.name=mine")
    assert code == 2 and "run.name, run.folder: runs/mine was asked for, but trainer.logger decides" in err
    assert former.read_text() == "seed_everything: 0"
    options = ["--trainer.logger=null", "--model.max_images=8", "--trainer.limit_val_batches=0"]
    code, _, err = run(folder, *small("fit"), "--run.name=mine", *options)
    assert code == 0 and (folder / "runs/mine/config.yaml").is_file(), err
    # A logger of one's own goes on in its folder.
    Run(name="mine").check_folder(folder / "runs/mine")
    former.write_text("run: {name: mine, folder: runs}")
    Run(name="mine").check_folder(folder / "runs/small")
    with pytest.raises(ValueError, match="elsewhere/small was asked for"):
        Run(folder="elsewhere").check_folder(folder / "runs/small")


def test_ctrl_c_before_training_is_no_traceback(capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit) as ended, short_errors():
        raise KeyboardInterrupt
    assert ended.value.code == 130 and capsys.readouterr().err == "interrupted\n"


def test_help_shows_our_options_and_no_list_of_every_layer(folder: Path):
    code, out, _ = run(folder, "fit", "--help")
    assert code == 0
    assert "--model.max_images" in out
    assert "torchvision" not in out


def test_who_asks_for_no_command_is_told_of_all(folder: Path):
    for words in ([], ["fti"], ["--help"]):
        code, out, err = run(folder, *words)
        assert code == (0 if words == ["--help"] else 2) and "Traceback" not in err
        assert words == [] or all(command in out + err for command in ("fit", "validate", "test", "predict"))
