"""Commands leave nothing behind that would mislead: not of trial runs, of untrained models, or of broken weights."""

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, RichProgressBar
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_cli import DEMO, SMALL
from test_ldm_cli import LATENTS, LDM_DEMO, SMALL_LDM

from callbacks.checkpoint import LastCheckpoint
from callbacks.preemption import StopOnSignal
from callbacks.report import Report
from ldm.module import DiffusionModule
from vfm_vae.cli import run
from vfm_vae.data.datamodule import ImageNetDataModule
from vfm_vae.module import TokenizerModule
from vfm_vae.trial import cut_short_by, without_output

# All that writes, some of it to places of its own.
OUTPUT = """
ckpt_path: last
trainer:
  callbacks+:
  - class_path: callbacks.checkpoint.LastCheckpoint
  - class_path: callbacks.preemption.StopOnSignal
  - class_path: callbacks.report.Report
    init_args: {path: metrics.json}
"""
PICTURES = "\n  - class_path: callbacks.images.ReconstructionImages\n    init_args: {num_images: 2}\n"
BLOCKS = """
  - class_path: callbacks.cknna.CKNNACallback
    init_args:
      vfms: [{class_path: vfm_vae.vfm.FrozenVFM, init_args: {name: vit_photos_patch8_64}}]
      images: photos/val
      image_size: 64
"""
SAMPLES = """
data: {num_samples: 4}
trainer:
  callbacks+:
  - class_path: callbacks.samples.SampleWriter
    init_args: {directory: samples, npz: true}
"""
TOKENIZER, DIFFUSION = "runs/small/config.yaml", "runs/ldm/config.yaml"


class Command:
    """Runs commands in a folder, in this process."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __call__(self, package: str, *arguments: str) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(self.folder)
            patch.setattr(sys, "argv", [package, *arguments])
            run({"vfm_vae": TokenizerModule, "ldm": DiffusionModule}[package], ImageNetDataModule)

    def files(self) -> dict[str, tuple[int, int]]:
        """Size and time of every file, by its path."""
        files = (file for file in self.folder.rglob("*") if file.is_file())
        return {str(file.relative_to(self.folder)): (file.stat().st_size, file.stat().st_mtime_ns) for file in files}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, photos: Path) -> Command:
    """A folder with a finished run of either program, their numbers, pictures and a cache of latents."""
    folder = tmp_path_factory.mktemp("finished")
    shutil.copytree(photos, folder / "photos")
    texts = {"small": SMALL, "ldm": SMALL_LDM, "latents": LATENTS, "samples": SAMPLES}
    texts |= {"output": OUTPUT + PICTURES, "output_ldm": OUTPUT + BLOCKS}
    for name, text in texts.items():
        (folder / f"{name}.yaml").write_text(text)
    command = Command(folder)
    options = ["--model.max_images=16", "--trainer.val_check_interval=2"]
    command("vfm_vae", "fit", *DEMO, "-c", "small.yaml", "-c", "output.yaml", *options)
    last = "runs/small/checkpoints/last.ckpt"
    command("vfm_vae", "predict", "-c", TOKENIZER, "-c", "latents.yaml", "--ckpt_path", last)
    options = ["--trainer.max_steps=2", "--trainer.val_check_interval=2"]
    command("ldm", "fit", *LDM_DEMO, "-c", "ldm.yaml", "-c", "output_ldm.yaml", *options)
    return command


SLOW = pytest.mark.slow  # other commands with an option that is here already
CUTS = {
    "vfm_vae": [
        ("fit", "fast_dev_run=1"),
        ("fit", "limit_train_batches=1"),
        ("validate", "fast_dev_run=true", SLOW),
        ("test", "limit_test_batches=1", SLOW),
        ("predict", "limit_predict_batches=1"),
    ],
    "ldm": [
        ("fit", "limit_val_batches=1"),
        ("fit", "overfit_batches=2", SLOW),
        ("fit", "barebones=true"),
        ("validate", "limit_val_batches=1", SLOW),
        ("test", "barebones=true"),
        ("predict", "fast_dev_run=2"),
    ],
}


@pytest.mark.parametrize(
    ("package", "command", "cut"),
    [pytest.param(package, *cut[:2], marks=cut[2:]) for package, cuts in CUTS.items() for cut in cuts],
)
def test_a_trial_run_leaves_everything_as_it_was(
    finished: Command, recwarn, monkeypatch, package: str, command: str, cut: str
):
    before, steps = finished.files(), []
    pictures = {"runs/small/images/val.png", "runs/ldm/images/cknna_blocks.png"}
    assert {"metrics.json", "runs/small/history.json", "runs/ldm/history.json"} | pictures <= before.keys()
    monkeypatch.setattr(Callback, "on_train_batch_end", lambda self, trainer, *_: steps.append(trainer.global_step))
    options = {
        "vfm_vae": ["-c", TOKENIZER, "--model.max_images=1000", "--trainer.max_epochs=1"],
        "ldm": ["-c", DIFFUSION, "--trainer.max_steps=4"],
    }[package]
    if command != "fit":
        options += ["--ckpt_path", f"runs/{'small' if package == 'vfm_vae' else 'ldm'}/checkpoints/last.ckpt"]
    if command == "predict":
        options += ["-c", "latents.yaml" if package == "vfm_vae" else "samples.yaml"]
        options += ["--trainer.callbacks.directory=elsewhere"]
    finished(package, command, *options, f"--trainer.{cut}")
    assert finished.files() == before
    assert command != "fit" or steps[0] == 1  # the last checkpoint, of two steps, is not read
    said = [str(warned.message) for warned in recwarn if "a trial run, which reads" in str(warned.message)]
    assert len(said) == 1 and said[0].startswith(f"--trainer.{cut.split('=')[0]}=")


def test_which_options_make_a_trial():
    whole = vars(Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, barebones=False))
    for command in ("fit", "validate", "test", "predict"):
        assert cut_short_by(whole, command) is None
        assert (
            cut_short_by({f"limit_{part}_batches": 1.0 for part in ("train", "val", "test", "predict")}, command)
            is None
        )
    assert cut_short_by({"limit_val_batches": 0}, "fit") is None  # no validation is wanted
    assert cut_short_by({"limit_val_batches": 0}, "validate") == "--trainer.limit_val_batches=0"
    assert cut_short_by({"limit_test_batches": 3}, "fit") is None
    assert cut_short_by({"limit_train_batches": 1}, "fit") == "--trainer.limit_train_batches=1"  # one batch, not all
    assert cut_short_by({"fast_dev_run": True, "limit_train_batches": 1}, "test") == "--trainer.fast_dev_run=True"


def test_what_does_not_write_stays():
    bar, own = RichProgressBar(), Callback()
    callbacks = [Report(), own, ModelCheckpoint(), LastCheckpoint(), StopOnSignal(), bar]
    assert without_output({"callbacks": callbacks})["callbacks"] == [own, bar]
    assert without_output({"callbacks": callbacks, "barebones": True})["callbacks"] == [own]


@pytest.fixture
def refused(finished: Command, capsys) -> Callable[..., str]:
    """The one line that a command ends with, which has written nothing."""

    def refuse(*arguments: str) -> str:
        before = finished.files()
        with pytest.raises(SystemExit) as end:
            finished(*arguments)
        assert end.value.code == 2 and finished.files() == before
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        return line

    return refuse


@pytest.mark.parametrize(
    ("package", "command", "options", "reason"),
    [
        ("vfm_vae", "validate", ["--ckpt_path=null"], "none is given"),
        ("vfm_vae", "predict", ["--trainer.logger.init_args.name=never"], "there is no last one"),
        ("vfm_vae", "test", ["--trainer.fast_dev_run=1"], "a trial run reads no last one"),
        ("ldm", "test", ["--ckpt_path=null"], "none is given"),
        ("ldm", "validate", ["--trainer.logger.init_args.name=never"], "there is no last one"),
        ("ldm", "predict", ["--ckpt_path=null", "--data.num_samples=4"], "none is given"),
    ],
)
def test_an_untrained_model_is_not_measured(refused, package: str, command: str, options: list[str], reason: str):
    line = refused(package, command, "-c", TOKENIZER if package == "vfm_vae" else DIFFUSION, *options)
    assert line.startswith(f"error: ckpt_path: {reason}, so {command} would take an untrained model; give --ckpt_path")


def test_who_asks_for_an_untrained_model_gets_it(finished: Command, refused):
    options = ["-c", TOKENIZER, "--untrained=true", "--trainer.logger=false"]
    report = ["--trainer.callbacks.path=untrained.json", "--trainer.callbacks.name=untrained"]
    finished("vfm_vae", "validate", *options, "--trainer.callbacks+=callbacks.report.Report", *report)
    assert '"checkpoint": null' in (finished.folder / "untrained.json").read_text()
    line = refused("vfm_vae", "validate", *options, "--ckpt_path=runs/small/checkpoints/last.ckpt")
    assert line.startswith("error: untrained: a model without a checkpoint was asked for; leave --ckpt_path out")


def test_the_last_checkpoint_is_found_where_training_left_it(finished: Command, caplog):
    finished("vfm_vae", "validate", "-c", TOKENIZER)  # whose ckpt_path is `last`
    assert any("Loaded model weights" in message and "/last.ckpt" in message for message in caplog.messages)
    events = EventAccumulator(str(finished.folder / "runs/small")).Reload()
    assert {event.step for event in events.Scalars("val/psnr")} == {16}  # as the checkpoint is, not 0


@pytest.fixture(scope="module")
def broken(finished: Command) -> dict[str, str]:
    """Checkpoints of both programs with a weight that is nan, and which one, by the package."""
    paths = {}
    for package, name, weight in (("vfm_vae", "small", "model.decoder."), ("ldm", "ldm", "model.final.")):
        path = f"runs/{name}/checkpoints/last.ckpt"
        stored = torch.load(finished.folder / path, weights_only=True)
        for weights in (stored["state_dict"], stored["ema"]["weights"]):
            for key in weights:
                if key.startswith(weight) and weights[key].is_floating_point():
                    weights[key].view(-1)[0] = torch.nan
        paths[package] = f"broken_{name}.ckpt"
        torch.save(stored, finished.folder / paths[package])
    return paths


BROKEN = [
    ("vfm_vae", "validate", [], "images"),
    ("vfm_vae", "predict", ["--trainer.callbacks+=callbacks.writers.ReconstructionWriter"], "images"),
    ("ldm", "validate", [], ""),
    ("ldm", "predict", ["-c", "samples.yaml"], "samples"),
    ("ldm", "predict", ["-c", "samples.yaml", "--model.predict=latents", "--trainer.callbacks.npz=false"], "samples"),
]


@pytest.mark.parametrize(("package", "command", "options", "what"), BROKEN)
def test_broken_weights_give_one_line_and_no_numbers_or_files(
    finished: Command, broken: dict[str, str], capsys, package: str, command: str, options: list[str], what: str
):
    folder = finished.folder / f"broken_{package}_{len(options)}"
    place = [f"--trainer.callbacks.directory={folder}"] if command == "predict" else []
    config = ["-c", TOKENIZER if package == "vfm_vae" else DIFFUSION, "--trainer.logger=false"]
    before = (finished.folder / "metrics.json").read_bytes()
    with pytest.raises(SystemExit) as end:
        finished(package, command, *config, *options, *place, "--ckpt_path", broken[package])
    assert end.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert line.startswith(f"error: {what}") and "either the weights are broken (give another --ckpt_path)" in line
    assert (finished.folder / "metrics.json").read_bytes() == before
    assert not [file for file in folder.glob("*") if file.name != "samples.json"]


def test_latents_that_are_not_finite_fill_no_cache(finished: Command, capsys):
    path = finished.folder / "runs/small/checkpoints/last.ckpt"
    stored = torch.load(path, weights_only=True)
    for weights in (stored["state_dict"], stored["ema"]["weights"]):
        for key in weights:
            if key.startswith("model.adapter."):
                weights[key].mul_(1e3 if weights[key].is_floating_point() else 1)  # finite, but not in float16
    torch.save(stored, finished.folder / "large.ckpt")
    options = ["--trainer.callbacks.directory=large", "--trainer.callbacks.dtype=float16", "--ckpt_path=large.ckpt"]
    with pytest.raises(SystemExit):
        finished("vfm_vae", "predict", "-c", TOKENIZER, "-c", "latents.yaml", *options)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: latents in torch.float16: ") and "hold nan or inf" in line
    assert not list((finished.folder / "large").rglob("*.safetensors"))
