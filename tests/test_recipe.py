"""The published recipe, stage after stage, by the commands that the README shows: its own configs, two steps each.

Only sizes, data and networks that would be downloaded are replaced.
"""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from ldm.module import DiffusionModule
from vfm_vae.cli import run as run_cli
from vfm_vae.data.datamodule import ImageNetDataModule
from vfm_vae.module import TokenizerModule

ROOT = Path(__file__).parents[1]
BATCH = 8
STAGES = ("strong", "weak", "ssim", "patchgan")

TOY = """
model:
  model:
    init_args:
      vfm: {init_args: {name: vit_photos_patch8_64, layers: [0, 2, -1], input_scale: 1.0}}
      adapter:
        init_args:
          {feature_channels: [128, 128, 128], layer_channels: [8, 8, 8], latent_channels: 4, decoded_channels: 16,
           alignment_channels: 128}
      decoder:
        init_args:
          {in_channels: 16, channels: [16, 16, 16, 16, 16, 8], route_channels: [16, 16, 16, 8],
           attention_depths: [1], num_res_blocks: 0, w_channels: 16}
  discriminator: {init_args: {backbone: vit_photos_patch8_64, size: 64, layers: [0, 4]}}
  objective:
    init_args:
      perceptual_loss: &vfm
        class_path: vfm_vae.losses.reconstruction.VFMPerceptualLoss
        init_args: {vfm: {class_path: vfm_vae.vfm.FrozenVFM, init_args: {name: vit_photos_patch8_64}}}
data: {image_size: 64, min_size: 64, batch_size: 8, val_batch_size: 26, num_workers: 0}
trainer:
  log_every_n_steps: 1
  val_check_interval: 2
  callbacks:
  - class_path: callbacks.ema.EMA
  - class_path: callbacks.throughput.Throughput
    init_args: {window_size: 2}
  - class_path: lightning.pytorch.callbacks.ModelCheckpoint
    init_args: {monitor: val/psnr, mode: max, filename: best, enable_version_counter: false}
  - class_path: callbacks.checkpoint.LastCheckpoint
  - class_path: callbacks.preemption.StopOnSignal
  - class_path: callbacks.rank_failure.EndTogether
"""
TOY_TEST = """
trainer:
  callbacks:
  - class_path: callbacks.ema.EMA
  - class_path: callbacks.distribution.DistributionCallback
    init_args: {network: {class_path: vfm_vae.vfm.FrozenVFM, init_args: {name: vit_photos_patch8_64}}}
  - class_path: callbacks.report.Report
    init_args: {name: test}
"""
TOY_LDM = """
model:
  model: {init_args: {in_channels: 4, input_size: 4, depth: 2, width: 32, num_heads: 2, num_classes: 13}}
  sampler: {init_args: {steps: 4}}
data: {batch_size: 8, val_batch_size: 26, num_workers: 0}
trainer:
  max_steps: 2
  callbacks:
  - class_path: callbacks.ema.EMA
    init_args: {decay: 0.9}
  - class_path: callbacks.checkpoint.LastCheckpoint
"""
TOY_REG = """
model:
  model: {init_args: {cls_channels: 128, align_channels: 128, align_depth: 1, projector_width: 16}}
"""
TOY_FEATURES = """
model: {features: {init_args: {name: vit_photos_patch8_64, input_scale: 0.5, antialias: null}}}
"""
TOY_LDM_TEST = """
data: {num_samples: 10}
trainer:
  callbacks:
  - class_path: callbacks.ema.EMA
    init_args: {decay: 0.9}
  - class_path: callbacks.distribution.DistributionCallback
    init_args:
      network: {class_path: vfm_vae.vfm.FrozenVFM, init_args: {name: vit_photos_patch8_64}}
      reference: photos/train
      image_size: 64
      num_images: 10
  - class_path: callbacks.report.Report
    init_args: {name: test}
"""


def commands(*targets: str, **variables: str) -> list[list[str]]:
    """What `make` would run for targets, without the program and what sets the allocator."""
    settings = [f"{name}={value}" for name, value in variables.items()]
    dry = subprocess.run(
        ["make", "--dry-run", "--assume-old=install", *targets, *settings],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    lines = [shlex.split(line) for line in dry.stdout.replace("\\\n", " ").splitlines()]
    return [line[line.index("-m") + 1 :] for line in lines if "-m" in line and line[line.index("-m") + 1] != "venv"]


def run(monkeypatch: pytest.MonkeyPatch, command: list[str], *options: str) -> None:
    package, *arguments = command
    monkeypatch.setattr(sys, "argv", [package, *arguments, *options])
    run_cli({"vfm_vae": TokenizerModule, "ldm": DiffusionModule}[package], ImageNetDataModule)


@pytest.fixture
def folder(tmp_path: Path, photos: Path) -> Path:
    """Where the commands run: with the configs, the toy sizes, and photographs for ImageNet."""
    folder = tmp_path
    for name in ("toy", "toy_test", "toy_ldm", "toy_ldm_test", "toy_reg", "toy_features"):
        (folder / f"{name}.yaml").write_text(globals()[name.upper()])
    (folder / "configs").symlink_to(ROOT / "configs")
    (folder / "photos").symlink_to(photos)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("source", ["photos", pytest.param("photos/shards", marks=pytest.mark.slow)])
def test_the_whole_recipe(folder: Path, monkeypatch: pytest.MonkeyPatch, source: str):
    monkeypatch.chdir(folder)
    data = {"DATA": str(folder / source), "GPUS": "0"}
    images = 0
    for stage, command in zip(STAGES, commands(*STAGES, **data), strict=True):
        assert f"configs/vfm_vae/{stage}.yaml" in command
        images += 2 * BATCH
        run(monkeypatch, command, "-c", "toy.yaml", f"--model.max_images={images}")
        stored = torch.load(f"runs/{stage}/checkpoints/last.ckpt", weights_only=True)
        assert stored["images_seen"] == images and stored["global_step"] == 2
        assert {path.name for path in Path(f"runs/{stage}/checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}
        assert all(tensor.isfinite().all() for tensor in stored["state_dict"].values())
    assert any(name.startswith("patchgan.") for name in stored["state_dict"])
    assert ("source: shards" in Path("runs/patchgan/config.yaml").read_text()) == source.endswith("shards")

    predict, fit, *tests = commands("latents", "ldm", "evaluate", **data)
    run(monkeypatch, predict, "--trainer.accelerator=cpu")
    assert json.loads(Path("runs/latents/train/latents.json").read_text())["tokenizer"]["channels"] == 4
    run(monkeypatch, fit, "-c", "toy_ldm.yaml")
    for test, overlay in zip(tests, ("toy_test.yaml", "toy_ldm_test.yaml"), strict=True):
        run(monkeypatch, test, "-c", overlay)
    tokenizer, diffusion = (json.loads(Path(name).read_text()) for name in REPORTS)
    assert tokenizer["test"]["metrics"]["test/psnr"] > 0
    assert diffusion["test"]["metrics"]["test/fd_vit_photos_patch8_64/train"] > 0
    if source == "photos":
        align(folder, monkeypatch, data)


@pytest.mark.slow
def test_the_recipe_as_published(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(folder)
    images = 0
    options = {"RECIPE": "as_published", "DATA": str(folder / "photos"), "GPUS": "0"}
    for stage, command in zip(STAGES, commands(*STAGES, **options), strict=True):
        images += 2 * BATCH
        run(monkeypatch, command, "-c", "toy.yaml", f"--model.max_images={images}")
        stored = torch.load(f"runs/as_published/{stage}/checkpoints/last.ckpt", weights_only=True)
        assert stored["images_seen"] == images and stored["global_step"] == 2
        assert any(".noise." in name for name in stored["state_dict"])
        assert all(tensor.isfinite().all() for tensor in stored["state_dict"].values())
        settings = yaml.safe_load(Path(f"runs/as_published/{stage}/config.yaml").read_text())["model"]
        assert (settings["order"], settings["evaluate"], settings["rounding"]) == ("published", "sample", "truncate")
        assert stored["vfm"]["antialias_positions"] is False
        assert "evaluation_crop: resize" in Path(f"runs/as_published/{stage}/config.yaml").read_text()
    (test,) = commands("evaluate-tokenizer", **options)
    run(monkeypatch, test, "-c", "toy_test.yaml")
    report = json.loads(Path("runs/as_published/patchgan/metrics.json").read_text())
    assert report["test"]["settings"]["model"]["rounding"] == "truncate"


def test_a_recipe_of_its_own_has_runs_of_its_own():
    targets = (*STAGES, "latents", "ldm", "samples", "evaluate")
    for run in ("epochs64", "reg80", "rae_ditdh_xl"):
        for command in commands(*targets, RECIPE="as_published", RUN=run, GPUS="8"):
            places = [word for word in command if "runs/" in word]
            assert all("runs/as_published/" in word for word in places)
            assert places or "configs/vfm_vae/strong.yaml" in command
    plain = [word for command in commands(*targets, GPUS="8") for word in command]
    assert not any("as_published" in word or "_published" in word for word in plain)


BASELINES = ("sdvae", "vavae", "rae")


@pytest.mark.parametrize("baseline", BASELINES)
def test_a_baseline_has_runs_of_its_own_from_training_to_evaluation(baseline: str):
    targets = ("baseline", "latents", "ldm", "samples", "evaluate")
    fit, *others = commands(*targets, BASELINE=baseline, DATA="/data", GPUS="8", ARGS="--seed_everything 1")
    assert all(command[-2:] == ["--seed_everything", "1"] for command in (fit, *others))
    assert f"configs/vfm_vae/baselines/{baseline}.yaml" in fit and fit[fit.index("--data.root") + 1] == "/data"
    for command in others:
        places = [word for word in command if "runs/" in word]
        assert places and all(f"runs/{baseline}/" in word for word in places)


MISTAKES = [
    ("baseline", "BASELINE=", "BASELINE: one of sdvae vavae rae; given ''"),
    ("latents", "BASELINE=vae", "BASELINE: one of sdvae vavae rae, or none; given vae"),
    ("weak", "RECIPE=typo", "RECIPE: one of as_published discrete, or none; given typo"),
    ("weak", "GPUS=eight", "GPUS, MICRO: whole numbers; given 'eight', ''"),
    ("ldm", "MICRO=few", "GPUS, MICRO: whole numbers; given '1', 'few'"),
    ("latents", "STAGE=patchgam", "STAGE: one of strong weak ssim patchgan; given 'patchgam'"),
    ("evaluate-tokenizer", "STAGE=", "STAGE: one of strong weak ssim patchgan; given ''"),
    ("ldm", "RUN=epochs65", "reg480 reg640 reg80 t2i_lightningdit t2i_lumina; given 'epochs65'"),
    ("samples", "RUN=epochs64 reg80", "given 'epochs64 reg80'"),
    ("demo", "DENOISER=regg", "DENOISER: one of lightningdit reg; given 'regg'"),
]


@pytest.mark.parametrize(("target", "setting", "message"), MISTAKES)
def test_make_names_a_variable_that_is_none_of_its_words(target: str, setting: str, message: str):
    dry = subprocess.run(["make", "-n", target, setting], cwd=ROOT, capture_output=True, text=True, check=False)
    assert dry.returncode and message in dry.stderr


@pytest.mark.parametrize("name", ["plain", "two words", "it's (1) & more", "three  spaced words"])
@pytest.mark.parametrize("layout", ["folders", "shards", "train"])
def test_data_may_lie_where_names_have_spaces(tmp_path: Path, name: str, layout: str):
    root = tmp_path / name
    place = root / ("train" if layout == "train" else "")
    place.mkdir(parents=True)
    if layout != "folders":
        (place / "imagenet-train-0000.tar").touch()
    for command in commands(*STAGES, DATA=str(root)):
        assert command[command.index("--data.root") + 1] == str(root)
        kind = "imagenet" if layout == "folders" else "imagenet_wds"
        assert f"configs/data/{kind}.yaml" in command


def test_the_environment_may_lie_there_too_and_a_tilde_is_home(tmp_path: Path):
    def printed(*arguments: str) -> str:
        make = ["make", "-n", "--no-print-directory", *arguments, f"HOME={tmp_path}"]
        return subprocess.run(make, cwd=ROOT, capture_output=True, text=True, check=True).stdout

    venv = tmp_path / "a venv"
    venv.mkdir()
    assert shlex.split(printed("test", f"VENV={venv}").splitlines()[0])[-1] == str(venv)
    (venv / ".ready").touch()
    (line,) = printed("test", f"VENV={venv}").splitlines()
    assert f"{venv}/bin/pytest" in shlex.split(line)
    assert f"-not -path ./'{venv}/*'" in printed("clean", f"VENV={venv}")
    line = printed("strong", "DATA=~/my images", f"VENV={venv}").splitlines()[-1]
    assert "--data.root ~/'my images' " in line


def test_a_run_goes_after_what_runs_of_its_denoiser_share():
    for run, expected in (
        ("epochs64", ["ldm/lightningdit", "data/latents", "ldm/epochs64"]),
        ("reg80", ["ldm/reg", "ldm/reg80"]),
        ("best", ["ldm/reg", "ldm/best"]),
        ("rae_ditdh_xl", ["ldm/ditdh", "ldm/rae_ditdh_xl"]),
        ("t2i_lumina", ["ldm/t2i_lumina"]),
    ):
        (fit,) = commands("ldm", RUN=run, GPUS="8")
        assert [word for word in fit if word.endswith(".yaml")][:-1] == [f"configs/{name}.yaml" for name in expected]


def test_text_to_image_has_captions_prompts_and_numbers_of_its_own():
    targets = {"latents": "vfm_vae/latents_text", "samples": "trainer/ddp8_ldm", "evaluate-ldm": "ldm/t2i_test"}
    for target, expected in targets.items():
        (command,) = commands(target, RUN="t2i_lumina", GPUS="8", DATA="captioned", ARGS="--prompt 'a red fox'")
        configs = [word for word in command if word.startswith("configs/")]
        assert f"configs/{expected}.yaml" in configs and command[-2:] == ["--prompt", "a red fox"]
        assert ("configs/data/captions.yaml" in configs) == (target == "latents")


def align(folder: Path, monkeypatch: pytest.MonkeyPatch, data: dict[str, str]) -> None:
    """The recipe's other end: REG on the same tokenizer."""
    predict, fit, test = commands("latents", "ldm", "evaluate-ldm", RUN="reg80", **data)
    run(monkeypatch, predict, "-c", "toy_features.yaml", "--trainer.accelerator=cpu")
    assert json.loads(Path("runs/latents_reg/train/latents.json").read_text())["features"]["input_scale"] == 0.5
    run(monkeypatch, fit, "-c", "toy_ldm.yaml", "-c", "toy_reg.yaml")
    run(monkeypatch, test, "-c", "toy_ldm_test.yaml")
    stored = torch.load("runs/ldm/reg80/checkpoints/last.ckpt", weights_only=True)
    assert {"model.projector.0.weight", "model.cls_embed.weight"} <= stored["state_dict"].keys()
    report = json.loads(Path("runs/ldm/reg80/metrics.json").read_text())
    assert report["test"]["metrics"]["test/fd_vit_photos_patch8_64/train"] > 0


@pytest.mark.parametrize("gpus", [0, 1, 3, 8, 32])
def test_the_number_of_gpus_is_said_once(gpus: int):
    """What follows from it, the programs know: steps of as many images are configs' (`tests/data/test_steps.py`)."""
    stage, diffusion = commands("weak", "ldm", GPUS=str(gpus))
    for command, many in ((stage, "ddp8"), (diffusion, "ddp8_ldm")):
        assert f"configs/trainer/{ ({0: 'cpu', 1: 'gpu'}.get(gpus, many)) }.yaml" in command
        told = [word for word in command if word.startswith(("--data", "--trainer", "--model"))]
        few = ["--data.micro_batch_size=8"] if gpus == 0 else []
        assert [word for word in told if word != "--data.root"] == [f"--trainer.devices={gpus}"] * (gpus > 1) + few


def test_small_gpus_take_fewer_at_a_time():
    targets = ("strong", "ldm")
    assert all("--data.micro_batch_size=4" in command for command in commands(*targets, MICRO="4"))
    evaluations = commands("latents", "samples", "sweep", "evaluate", MICRO="4", GPUS="2")
    assert all("--data.val_batch_size=8" in command for command in evaluations)


def test_arguments_have_the_last_word():
    targets = (
        *STAGES,
        "latents",
        "ldm",
        "samples",
        "sweep",
        "evaluate",
        "demo",
        "tokenizer-study",
        "bench-gpu",
        "test",
    )
    targets += ("ablation", "embedded-vfm", "embedded-judge")
    without = ("convert", "report")  # take no options of a run
    said = [command for command in commands(*targets, ARGS="--seed_everything 1") if not command[0].endswith(without)]
    assert len(said) > 18 and all(command[-2:] == ["--seed_everything", "1"] for command in said)


REPORTS = ("runs/patchgan/metrics.json", "runs/ldm/epochs64/metrics.json")


def test_the_toy_keeps_the_stages_weights_and_rates():
    """What the test replaces are sizes: nothing that a stage is about."""
    toy = yaml.safe_load(TOY)["model"]
    assert toy.keys() == {"model", "discriminator", "objective"}
    assert toy["objective"]["init_args"].keys() == {"perceptual_loss"}


# What each baseline's networks, sizes and VFMs become.
TOY_VFM = {"init_args": {"name": "vit_photos_patch8_64", "input_scale": 1.0}}
TOY_CONV = {"channels": [8, 8, 8, 8], "num_res_blocks": 1, "norm_groups": 4, "attention": []}
TOY_DECODER = {"image_size": 64, "decoder_width": 32, "decoder_depth": 1, "decoder_heads": 2, "decoder_mlp_width": 32}
TOY_BASELINES = {
    "sdvae": TOY_CONV,
    "vavae": TOY_CONV | {"vfm": TOY_VFM},
    "rae": TOY_DECODER | {"vfm": TOY_VFM, "statistics_images": 16},
}


@pytest.mark.slow
@pytest.mark.parametrize("baseline", BASELINES)
def test_a_baseline_is_trained_cached_and_generated_with(folder: Path, monkeypatch, baseline: str):
    monkeypatch.chdir(folder)
    toy = yaml.safe_load(TOY)
    toy["model"]["model"] = {"init_args": TOY_BASELINES[baseline]}
    toy["model"]["objective"]["init_args"]["adversarial_from"] = 8
    if baseline == "rae":
        toy["model"]["discriminate_from"] = 0
    else:
        del toy["model"]["discriminator"]
    Path("toy_baseline.yaml").write_text(yaml.safe_dump(toy))

    variables = {"BASELINE": baseline, "DATA": str(folder / "photos"), "GPUS": "0"}
    fit, predict, train, *tests = commands("baseline", "latents", "ldm", "evaluate", **variables)
    run(monkeypatch, fit, "-c", "toy_baseline.yaml", "--model.max_images=16")
    stored = torch.load(f"runs/{baseline}/tokenizer/checkpoints/last.ckpt", weights_only=True)
    assert stored["images_seen"] == 16 and all(tensor.isfinite().all() for tensor in stored["state_dict"].values())
    run(monkeypatch, predict, "--trainer.accelerator=cpu")
    noted = json.loads(Path(f"runs/{baseline}/latents/train/latents.json").read_text())["tokenizer"]
    channels = {"sdvae": 4, "vavae": 32, "rae": 128}[baseline]
    assert noted["channels"] == channels
    sizes = [f"--model.model.init_args.in_channels={channels}", "--model.model.init_args.input_size=8"]
    run(monkeypatch, train, "-c", "toy_ldm.yaml", *sizes)
    for test, overlay in zip(tests, ("toy_test.yaml", "toy_ldm_test.yaml"), strict=True):
        run(monkeypatch, test, "-c", overlay)
    report = json.loads(Path(f"runs/{baseline}/ldm/epochs64/metrics.json").read_text())
    assert report["test"]["metrics"]["test/fd_vit_photos_patch8_64/train"] > 0
