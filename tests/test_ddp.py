"""Two processes against one: the same validation metrics, the same weights on both ranks."""

import os
from pathlib import Path

import numpy as np
import processes
import pytest
import torch
from rank_programs import ALL, SCRIPTS
from safetensors.torch import load_file

from vfm_vae.data.latents import LatentDataset

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, photos: Path) -> Path:
    """What the scripts leave behind, each in a folder of its name: run by one process, then by two."""
    folder = tmp_path_factory.mktemp("ranks")
    run_scripts(folder, photos, [name for name in SCRIPTS if name != "aligned"])
    return folder


def run_scripts(folder: Path, photos: Path, names: list[str]) -> None:
    (folder / "all.py").write_text(ALL)
    for name in names:
        (folder / f"{name}.py").write_text(SCRIPTS[name])
        (folder / name).mkdir()
    path = ":".join(map(str, (ROOT, ROOT / "tests", ROOT / "tests/ldm")))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "PYTHONPATH": path}
    for devices, some in ((1, [name for name in names if name != "poison"]), (2, names)):
        command = ["all.py", str(devices), photos, "", *some]
        process = processes.run(command, cwd=folder, env=environment, timeout=180, ranks=devices)
        (folder / "stderr").write_text(process.stderr)


def results(folder: Path, name: str, devices: int) -> list[dict]:
    """What each rank found."""
    found = sorted((folder / name).glob(f"{devices}_*.pt"))
    # The files count: a crash at teardown would not matter.
    assert len(found) == devices, (folder / "stderr").read_text()[-3000:]
    return [torch.load(path, weights_only=True) for path in found]


def test_two_processes_validate_as_one_and_train_alike(folder: Path):
    (one,) = results(folder, "tokenizer", 1)
    first, second = results(folder, "tokenizer", 2)
    assert first["metrics"] == pytest.approx(one["metrics"], rel=1e-5, abs=1e-6)
    assert second["metrics"] == first["metrics"]
    assert first["images_seen"] == one["images_seen"] == 24
    assert first["weights"].keys() == second["weights"].keys()
    local = ("average", "weight_u", "weight_v")  # statistics of each rank's own batches
    for name, tensor in first["weights"].items():
        if not name.endswith(local):
            assert torch.equal(tensor, second["weights"][name]), name
    for order, phases in (("simultaneous", 1), ("published", 2)):  # each rank draws for itself, in each phase
        assert len(first["draws"][order]) == len(second["draws"][order]) == 6 * phases
        assert first["draws"][order] != second["draws"][order]
    assert first["draws"]["simultaneous"] == one["draws"]["simultaneous"]


def test_two_processes_cache_measure_and_sample_as_one(folder: Path):
    (one,) = results(folder, "diffusion", 1)
    first, second = results(folder, "diffusion", 2)
    for split, size in (("train", 52), ("val", 26)):
        ours, theirs = (LatentDataset(folder / "diffusion" / f"cache{n}" / split, train=False) for n in (1, 2))
        assert len(ours) == len(theirs) == size and (ours.labels == theirs.labels).all()
        rows = [torch.stack([dataset[index][0] for index in range(size)]) for dataset in (ours, theirs)]
        assert torch.allclose(*rows, atol=1e-4)
    assert first["metrics"] == pytest.approx(one["metrics"], rel=1e-4, abs=1e-5)
    assert first["metrics"]["val/loss"] == pytest.approx(one["metrics"]["val/loss"], rel=1e-5)
    assert second["metrics"] == first["metrics"]
    with (
        np.load(folder / "diffusion" / "samples1.npz") as ours,
        np.load(folder / "diffusion" / "samples2.npz") as theirs,
    ):
        assert np.abs(ours["arr_0"].astype(int) - theirs["arr_0"]).max() <= 1 and len(ours["arr_0"]) == 11
        assert (ours["arr_1"] == theirs["arr_1"]).all()
    assert first["images_seen"] == one["images_seen"] == 24
    assert all(torch.equal(tensor, second["weights"][name]) for name, tensor in first["weights"].items())
    assert first["stored"] == second["stored"] == one["stored"] == [8, 16, 24]  # images of both ranks
    assert first["average"].keys() == one["average"].keys() and first["average"]


@pytest.mark.slow
def test_two_processes_align_as_one(tmp_path: Path, photos: Path):
    folder = tmp_path
    run_scripts(folder, photos, ["aligned"])
    (one,) = results(folder, "aligned", 1)
    first, second = results(folder, "aligned", 2)
    for split, size in (("train", 52), ("val", 26)):
        ours, theirs = (LatentDataset(folder / "aligned" / f"cache{n}" / split, train=False) for n in (1, 2))
        for position in range(size):
            (latent, _, _, features), (other, _, _, others) = ours[position], theirs[position]
            assert torch.allclose(latent, other, atol=1e-4)
            assert torch.allclose(features.float(), others.float(), atol=0.05)  # half a step of bfloat16
    assert first["metrics"]["val/loss"] == pytest.approx(one["metrics"]["val/loss"], rel=1e-4)
    assert second["metrics"] == first["metrics"]
    assert first["images_seen"] == one["images_seen"] == 24
    assert all(torch.equal(tensor, second["weights"][name]) for name, tensor in first["weights"].items())


def test_two_processes_draw_prompts_as_one(folder: Path):
    (one,) = results(folder, "texts", 1)
    first, second = results(folder, "texts", 2)
    assert first["metrics"] == pytest.approx(one["metrics"], rel=1e-5) and second["metrics"] == first["metrics"]
    assert all(torch.equal(tensor, second["weights"][name]) for name, tensor in first["weights"].items())
    drawn = []
    for devices in (1, 2):
        parts = [load_file(path) for path in (folder / "texts" / f"samples{devices}").glob("*.safetensors")]
        latents, index = (torch.cat([part[name] for part in parts]) for name in ("latents", "index"))
        assert sorted(index.tolist()) == list(range(10))  # two of each prompt
        drawn.append(latents[index.argsort()])
    assert torch.allclose(*drawn, atol=1e-5) and drawn[0].std(dim=0).min() > 0.1


def test_a_nan_on_one_rank_skips_the_step_on_both(folder: Path):
    first, second = results(folder, "poison", 2)
    for name in ("tokenizer", "diffusion"):
        kept, skipped = zip(*first["history"][name], strict=True)
        assert kept == (False, True, False)  # the second step alone changes nothing
        assert skipped == (0, 1, 1)
    assert first["history"] == second["history"]
    for name, tensor in first["weights"].items():
        assert tensor.isfinite().all() and torch.equal(tensor, second["weights"][name]), name
