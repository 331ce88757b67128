"""What the README shows is what there is."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)


CHECKS = ["assert image.shape == (1, 3, 64, 64) and len(multiscale) == 4", "assert latents.shape == (2, 32, 16, 16)"]


@pytest.mark.parametrize("number", range(len(CHECKS)))
def test_python_runs(tmp_path: Path, number: int):
    examples = blocks("python")
    assert len(examples) == len(CHECKS)
    subprocess.run(
        [sys.executable, "-c", f"{examples[number]}\n{CHECKS[number]}\n"], cwd=tmp_path, check=True, timeout=120
    )


def test_make_targets_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    inline = re.findall(r"`([^`]*)`", TEXT)
    shown = set(re.findall(r"make +([a-z-]+)", "\n".join(blocks("bash") + inline)))
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
