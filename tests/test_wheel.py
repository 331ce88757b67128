"""What is built for others works without the clone: configs by name, commands, types."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from test_cli import ENVIRONMENT, ROOT

SOURCES = ("vfm_vae", "ldm", "callbacks", "configs", "setup.cfg", "pyproject.toml", "README.md", "LICENSE")
SMALL_LDM = """
model:
  model: {in_channels: 4, depth: 2, width: 32, num_heads: 2}
  sampler: {steps: 4}
  tokenizer: {checkpoint: runs/demo/strong/checkpoints/last.ckpt}
data: {batch_size: 8}
trainer:
  max_steps: 2
  callbacks:
  - EMA
  - class_path: ModelCheckpoint
    init_args: {save_last: true, every_n_train_steps: 1, enable_version_counter: false}
"""


def call(folder: Path, *command: str | Path) -> str:
    """Runs a command without anything of the clone on its path; returns what it printed."""
    environment = {name: value for name, value in ENVIRONMENT.items() if name != "PYTHONPATH"}
    ran = subprocess.run(
        [str(word) for word in command], cwd=folder, env=environment, stdin=subprocess.DEVNULL, capture_output=True,
        text=True, timeout=240, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `bin` of an environment that has the wheel, and of this one's packages all others."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        options = {"symlinks": True, "ignore": shutil.ignore_patterns("__pycache__")} if (ROOT / name).is_dir() else {}
        copy(ROOT / name, source / name, **options)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    call(source, *pip, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", folder, ".")
    (wheel,) = folder.glob("*.whl")
    call(folder, sys.executable, "-m", "venv", "--without-pip", folder / "environment")
    python = folder / "environment/bin/python"
    call(folder, *pip, "--python", python, "install", "--no-deps", "--no-index", wheel)
    (packages,) = (folder / "environment").glob("lib/python*/site-packages")
    (packages / "others.pth").write_text("\n".join({sysconfig.get_path(name) for name in ("purelib", "platlib")}))
    return python.parent


@pytest.mark.slow
def test_the_chain_runs_from_a_wheel(programs: Path, tmp_path: Path):
    where = call(tmp_path, programs / "python", "-c", "import vfm_vae; print(vfm_vae.__file__)").strip()
    package = Path(where).parent
    assert package.is_relative_to(programs.parent)
    assert all((package.parent / name / "py.typed").is_file() for name in ("vfm_vae", "ldm", "callbacks"))
    shipped = {str(path.relative_to(package / "configs")) for path in (package / "configs").rglob("*.yaml")}
    assert shipped == {str(path.relative_to(ROOT / "configs")) for path in (ROOT / "configs").rglob("*.yaml")}

    shutil.copy(ROOT / "tests/small.yaml", tmp_path / "small.yaml")
    (tmp_path / "ldm.yaml").write_text(SMALL_LDM)
    last = "runs/demo/{}/checkpoints/last.ckpt"
    stage = ["-c", "demo/tokenizer.yaml", "-c", "configs/demo/strong.yaml", "-c", "small.yaml"]
    call(tmp_path, programs / "vfm-vae", "fit", *stage, "--model.max_images=16")
    assert "strong" in json.loads((tmp_path / "runs/demo/metrics.json").read_text())
    trained = ["-c", "runs/demo/strong/config.yaml", "-c", "demo/latents.yaml", "--ckpt_path", last.format("strong")]
    call(tmp_path, programs / "vfm-vae", "predict", *trained)
    assert list((tmp_path / "runs/demo/latents/train").glob("*.safetensors"))
    call(
        tmp_path, programs / "vfm-vae-ldm", "fit", "-c", "demo/ldm.yaml", "-c", "demo/ldm_train.yaml", "-c", "ldm.yaml"
    )
    drawn = ["-c", "runs/demo/ldm/config.yaml", "--ckpt_path", last.format("ldm"), "--data.num_samples=4"]
    writer = ["--trainer.callbacks+=SampleWriter", "--run.output=samples"]
    call(tmp_path, programs / "python", "-m", "ldm", "predict", *drawn, *writer)
    assert len(list((tmp_path / "samples").glob("*.png"))) == 4
    call(tmp_path, programs / "vfm-vae-convert", last.format("strong"), "--out=tokenizer")
    call(tmp_path, programs / "vfm-vae-ldm-convert", last.format("ldm"), "--out=ldm")
    load = "from ldm.pipeline import LatentDiffusion; LatentDiffusion.from_pretrained('ldm', 'tokenizer')"
    call(tmp_path, programs / "python", "-c", load)
    assert "--samples" in call(tmp_path, programs / "vfm-vae-evaluate", "--help")
    assert "name=place" in call(tmp_path, programs / "vfm-vae-compare", "--help")
    assert "--length" in call(tmp_path, programs / "vfm-vae-average", "--help")


@pytest.mark.slow
def test_a_config_that_is_nowhere_is_named_with_the_place_of_all(programs: Path, tmp_path: Path):
    command = [programs / "vfm-vae", "fit", "-c", "vfm_vae/strnog.yaml"]
    ran = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT | {"PYTHONPATH": ""}, capture_output=True, text=True)
    assert ran.returncode == 2
    assert "error: config: there is no file 'vfm_vae/strnog.yaml'" in ran.stderr
    assert os.path.join("site-packages", "vfm_vae", "configs") in ran.stderr
