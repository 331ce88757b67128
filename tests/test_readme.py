"""What the README shows is what there is."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pages import fences
from PIL import Image

from ldm.models.lightningdit import LightningDiT
from ldm.pipeline import LatentDiffusion
from ldm.samplers import Euler
from vfm_vae.data.latents import LatentStatistics

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    """Of the README and of the page that goes on from it; what both have, once."""
    found = [fence for page in ("README.md", "docs/start.md") for fence in fences(page)]
    return list(dict.fromkeys(fence.text for fence in found if fence.language == language))


CHECKS = [
    "assert Path('again.png').is_file() and z.shape == (1, 32, 8, 8) and Path('samples.png').is_file()",
    "assert image.shape == (1, 3, 64, 64) and len(multiscale) == 4",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds small models where the demo leaves its own, and a photograph."""
    root = tmp_path_factory.mktemp("readme")
    namespace: dict = {}
    exec(blocks("python")[-1], namespace)  # the model that is built by hand
    namespace["model"].save_pretrained(root / "runs/demo/pretrained/tokenizer")
    network = LightningDiT(in_channels=32, input_size=8, patch_size=2, depth=1, width=32, num_heads=2)
    diffusion = LatentDiffusion(network, Euler(4))
    diffusion.normalization.take(LatentStatistics(torch.zeros(1, 32, 1, 1), torch.ones(1, 32, 1, 1)))
    diffusion.save_pretrained(root / "runs/demo/pretrained/ldm")
    Image.new("RGB", (300, 280), "red").save(root / "photo.jpg")
    return root


@pytest.mark.parametrize("number", range(len(CHECKS)))
def test_python_runs(folder: Path, number: int, monkeypatch: pytest.MonkeyPatch):
    examples = blocks("python")
    assert len(examples) == len(CHECKS)
    monkeypatch.chdir(folder)
    exec(f"from pathlib import Path\n{examples[number]}\n{CHECKS[number]}\n", {})


def test_the_two_commands_come_first():
    first, *_ = fences("README.md")
    assert [line.split("  ")[0] for line in first.text.splitlines()] == ["make demo", "make test"]
    assert "download nothing else" in TEXT[: TEXT.index("```python")]
    assert len(TEXT.splitlines()) <= 120


def test_package_is_ours_wherever_it_is_imported_from(tmp_path: Path):
    names = "('vfm_vae', 'ldm', 'callbacks')"
    code = f"from importlib.util import find_spec; print(*(find_spec(name).origin for name in {names}), sep='\\n')"
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert [Path(line) for line in result.stdout.split()] == [
        ROOT / f"{name}/__init__.py" for name in ("vfm_vae", "ldm", "callbacks")
    ]
