"""What `make demo` promises, by the run in `runs/demo`, which is begun here where it is missing."""

import json
import subprocess
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "runs/demo"
pytestmark = [pytest.mark.slow, pytest.mark.timeout(3700)]  # the first test trains; `make clean` makes it do so anew


@pytest.fixture(scope="module")
def metrics() -> dict[str, dict[str, float]]:
    subprocess.run(["make", "demo"], cwd=ROOT, check=True, stdin=subprocess.DEVNULL, timeout=3600)
    return {name: entry["metrics"] for name, entry in json.loads((DEMO / "metrics.json").read_text()).items()}


def test_reconstructions_beat_a_thumbnail(metrics):
    assert metrics["weak"]["val/psnr"] > metrics["weak"]["val/psnr_thumbnail"] + 1


def test_guided_samples_show_their_classes(metrics):
    assert metrics["ldm_guided"]["val/class_accuracy"] >= 0.7
    assert metrics["ldm_guided"]["val/class_accuracy"] > metrics["ldm"]["val/class_accuracy"]


def test_distance_of_samples_falls_along_training(metrics):
    events = EventAccumulator(str(DEMO / "ldm"))
    events.Reload()
    distances = [event.value for event in events.Scalars("val/fd_vit_photos_patch8_64/train")]
    assert len(distances) >= 4 and all(b < a for a, b in pairwise(distances))


def test_samples_are_there(metrics):
    for scale in (1, 2):
        grid = Image.open(DEMO / f"ldm/images/samples_guidance_{scale}.png")
        assert grid.size == (8 * 66 + 2, 13 * 66 + 2)
    with np.load(DEMO / "samples.npz") as samples:
        assert samples["arr_0"].shape == (130, 64, 64, 3)
        assert (np.bincount(samples["arr_1"]) == 10).all()
    assert len(list((DEMO / "samples").glob("*.png"))) == 130
