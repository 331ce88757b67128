"""The notebook: it runs as a user would run it, and leaves what it promises."""

import base64
import importlib
import io
import re
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

FILE = Path(__file__).parents[1] / "notebooks/your_own_images.ipynb"
TOY = {"IMAGES": 16, "STEPS": 2, "SAMPLES": 3, "TOKENIZER": "nowhere"}


def cells(kind: str) -> list[str]:
    return [cell.source for cell in nbformat.read(FILE, 4).cells if cell.cell_type == kind]


def picture(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def test_it_compiles_what_it_imports_is_there_and_what_may_be_changed_stands_in_one_cell():
    notebook = nbformat.read(FILE, 4)
    nbformat.validate(notebook)
    (parameters,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    namespace: dict = {}
    exec(parameters.source, namespace)
    assert namespace.keys() >= {"PHOTOS", "OUT", "SIZE", *TOY}
    for source in cells("code"):
        compile(source, "cell", "exec")
    for module, names in re.findall(r"^from ([\w.]+) import (.+)$", "\n".join(cells("code")), re.M):
        assert all(hasattr(importlib.import_module(module), name) for name in names.split(", "))


def test_it_is_kept_without_outputs_and_links_to_what_there_is():
    assert not [cell for cell in nbformat.read(FILE, 4).cells if cell.get("outputs")]
    links = re.findall(r"\]\((?!http)([^)#]+)", "\n".join(cells("markdown")))
    assert links and not [link for link in links if not (FILE.parent / link).is_file()]


@pytest.mark.slow
def test_a_folder_of_photographs_becomes_models_and_samples(camera: Path, tmp_path: Path):
    from nbclient import NotebookClient

    notebook = nbformat.read(FILE, 4)
    place = next(i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", []))
    given = TOY | {"PHOTOS": str(camera), "OUT": str(tmp_path / "out")}
    values = "\n".join(f"{name} = {value!r}" for name, value in given.items())
    notebook.cells.insert(place + 1, nbformat.v4.new_code_cell(values))  # as papermill does
    NotebookClient(notebook, timeout=240, resources={"metadata": {"path": str(tmp_path)}}).execute()

    shown = [
        output for cell in notebook.cells for output in cell.get("outputs", []) if "image/png" in output.get("data", {})
    ]
    assert len(shown) == 4  # photographs, reconstructions, samples, and what is nearest to them
    for output in shown:
        pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(output["data"]["image/png"]))).convert("RGB"))
        assert (pixels < 250).any(2).mean() > 0.05  # images, and not only a title
    out = tmp_path / "out"
    assert picture(out / "samples.png").shape == (64, 3 * 64, 3)
    assert picture(out / "reconstructions.png").shape[0] == 2 * 64
    count = 0
    for split in ("train", "val"):
        for file in (out / "latents" / split).glob("*.safetensors"):
            latents = load_file(file)["latents"]
            assert latents.shape[1:] == (32, 8, 8) and torch.isfinite(latents).all()
            count += len(latents)
    assert count == 24
    for name in ("tokenizer", "diffusion"):
        weights = load_file(out / name / "model.safetensors")
        assert weights and all(torch.isfinite(value).all() for value in weights.values())
