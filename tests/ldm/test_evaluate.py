"""Anybody's samples from files: as an .npz, as a folder, against a folder or statistics."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.evaluate import SampleFiles, asks_for_files, evaluate_samples, main
from vfm_vae.data.archive import ImageArchive, write_archive
from vfm_vae.data.folder import ImageFolderDataset
from vfm_vae.data.transforms import CentreCrop
from vfm_vae.metrics.distribution import frechet_distance
from vfm_vae.metrics.reconstruction import from_uint8
from vfm_vae.vfm import FrozenVFM

VFM = "vit_photos_patch8_64"


@pytest.fixture
def pixels(photos):
    """Samples: training photographs, uint8 `[N, H, W, 3]`."""
    dataset = ImageFolderDataset(photos, "train", CentreCrop(64))
    return torch.stack([dataset[i][0] for i in range(0, 52, 2)]).permute(0, 2, 3, 1).numpy()


@pytest.fixture
def samples(pixels, tmp_path):
    """As a file and as a folder."""
    write_archive(tmp_path / "samples.npz", pixels, len(pixels))
    (tmp_path / "samples").mkdir()
    for number, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / f"samples/{number:08d}.png")
    return tmp_path


@pytest.mark.parametrize("name", ["samples.npz", "samples"])
def test_equals_the_distance_by_hand(samples, pixels, photos, name, capsys):
    file = samples / "numbers.json"
    options = {"vfm": VFM, "image_size": 64, "batch_size": 7, "statistics": str(samples / "real.npz")}
    evaluate_samples(str(samples / name), str(photos / "val"), metrics_file=str(file), **options)
    entry = json.loads(file.read_text())["samples"]
    vfm = FrozenVFM(VFM)
    real = ImageFolderDataset(photos, "val", CentreCrop(64))
    sets = (torch.stack([real[i][0] for i in range(len(real))]), torch.from_numpy(pixels).permute(0, 3, 1, 2))
    a, b = (vfm(from_uint8(images)).pooled.double() for images in sets)
    expected = frechet_distance(a.mean(0), a.T.cov(), b.mean(0), b.T.cov()).item()
    assert entry["metrics"][f"test/fd_{VFM}"] == pytest.approx(expected, rel=1e-4)
    assert 0 <= entry["metrics"][f"test/recall_{VFM}"] <= 1
    assert entry["settings"]["num_images"] == 26 and entry["settings"]["network"] == VFM
    assert torch.__version__.startswith(entry["versions"]["torch"])
    assert f"test/fd_{VFM}" in capsys.readouterr().out


def test_the_command_line_knows_files_of_samples(samples, photos):
    command = ["test", f"--samples={samples / 'samples.npz'}", "--reference", str(photos / "train"), "--vfm", VFM]
    command += ["--image_size=64", f"--statistics={samples / 'train.npz'}"]
    run = subprocess.run(
        [sys.executable, "-m", "ldm", *command], cwd=samples, capture_output=True, text=True, timeout=120, check=False
    )
    assert run.returncode == 0, run.stderr
    assert "precision_vit_photos_patch8_64" in run.stdout
    assert (samples / "metrics.json").is_file() and ImageArchive(samples / "train.npz").num_images() == 52
    for wrong, message in {
        "--reference=nowhere": "reference: nothing at 'nowhere'",
        "--bach_size=3": "bach_size",
    }.items():
        run = subprocess.run(
            [sys.executable, "-m", "ldm", *command, wrong], cwd=samples, capture_output=True, text=True, timeout=120,
            check=False,
        )  # fmt: skip
        assert run.returncode == 2 and "Traceback" not in run.stderr
        assert message in next(line for line in run.stderr.splitlines() if line.startswith("error: "))


def test_only_test_with_samples_is_about_files():
    assert asks_for_files(["test", "--samples", "a.npz"]) and asks_for_files(["test", "--samples=a.npz"])
    assert not asks_for_files(["test", "-c", "a.yaml"]) and not asks_for_files(["fit", "--samples=a"])


def test_what_is_missing_is_named_before_anything_is_measured(samples, photos, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="samples: there is no file at 'nowhere'"):
        SampleFiles("nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="samples: no images in"):
        SampleFiles(str(tmp_path / "empty"))
    np.savez(tmp_path / "latents.npz", latents=np.zeros(3))
    with pytest.raises(ValueError, match=r"samples: .*holds no images.*give an \.npz with 'arr_0'"):
        SampleFiles(str(tmp_path / "latents.npz"))
    arguments = ["--samples", str(samples / "samples"), "--reference", str(photos / "val")]
    with pytest.raises(
        ValueError, match="weights: those of Inception, for FID and its kin, could not be had from 'no'"
    ):
        main([*arguments, "--inception=no"])
