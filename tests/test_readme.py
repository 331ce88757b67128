"""What the README shows is what there is."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from ldm.models.lightningdit import LightningDiT
from ldm.pipeline import LatentDiffusion
from ldm.samplers import Euler
from vfm_vae.data.latents import LatentStatistics

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)


CHECKS = [
    "assert Path('again.png').is_file() and z.shape == (1, 32, 32, 32)",  # 256 px, eight times smaller
    "assert Path('samples.png').is_file() and samples.images.shape == (2, 3, 64, 64)",
    "assert image.shape == (1, 3, 64, 64) and len(multiscale) == 4",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds small models under the names that the README gives to large ones, and a photograph."""
    root = tmp_path_factory.mktemp("readme")
    namespace: dict = {}
    exec(blocks("python")[-1], namespace)  # the model that is built by hand
    namespace["model"].save_pretrained(root / "vfm_vae-f16d32")
    network = LightningDiT(in_channels=32, input_size=8, patch_size=2, depth=1, width=32, num_heads=2)
    diffusion = LatentDiffusion(network, Euler(4))
    diffusion.normalization.take(LatentStatistics(torch.zeros(1, 32, 1, 1), torch.ones(1, 32, 1, 1)))
    diffusion.save_pretrained(root / "lightningdit-xl")
    Image.new("RGB", (300, 280), "red").save(root / "photo.jpg")
    return root


@pytest.mark.parametrize("number", range(len(CHECKS)))
def test_python_runs(folder: Path, number: int, monkeypatch: pytest.MonkeyPatch):
    examples = blocks("python")
    assert len(examples) == len(CHECKS)
    monkeypatch.chdir(folder)
    exec(f"from pathlib import Path\n{examples[number]}\n{CHECKS[number]}\n", {})


def test_make_targets_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    inline = re.findall(r"`([^`]*)`", TEXT)
    shown = set(re.findall(r"make +([a-z][a-z-]*)", "\n".join(blocks("bash") + inline)))
    assert {"demo", "test"} <= shown <= targets


def test_files_exist():
    links = re.findall(r"\]\((?!http)([^)#]+)\)", TEXT)
    configs = re.findall(r"configs/[\w/.]+\.yaml", TEXT)
    assert links and configs
    assert not [path for path in links + configs if not (ROOT / path).exists()]


def test_package_is_ours_wherever_it_is_imported_from(tmp_path: Path):
    code = "import vfm_vae, ldm, callbacks; print(vfm_vae.__file__, ldm.__file__, callbacks.__file__, sep='\\n')"
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert [Path(line) for line in result.stdout.split()] == [
        ROOT / f"{name}/__init__.py" for name in ("vfm_vae", "ldm", "callbacks")
    ]
