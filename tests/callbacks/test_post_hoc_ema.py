"""Averages of any length: what a run stores, and that others are made of it afterwards."""

from functools import partial
from pathlib import Path

import pytest
import torch
from latent_cache import write_split
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from callbacks.post_hoc_ema import PostHocEMA
from ldm.models.lightningdit import LightningDiT
from ldm.module import DiffusionModule
from vfm_vae.data.datamodule import ImageNetDataModule
from vfm_vae.post_hoc import Snapshot, beta, exponent_of, reconstruct, reliable, snapshots

STORED = (0.05, 0.1)


def steps_of(folder: Path) -> list[int]:
    return [snapshot.step for snapshot in snapshots(folder / "post_hoc_ema")]


def distance(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """Of all weights, as a fraction of their norm."""
    assert ours.keys() == theirs.keys()
    flat = [torch.cat([weights[name].flatten().double() for name in sorted(ours)]) for weights in (ours, theirs)]
    return float((flat[0] - flat[1]).norm() / flat[1].norm())


class Direct(Callback):
    """Averages by definition, in double precision."""

    def __init__(self, *lengths: float):
        self.averages: dict[float, dict[str, Tensor]] = {length: {} for length in lengths}
        self.images = 0

    def on_train_batch_end(self, trainer, pl_module, *args):
        images, before = pl_module.images_seen, self.images
        now = {
            name: p.detach().double() for name, p in pl_module.model.named_parameters(prefix="model") if p.requires_grad
        }
        for length, average in self.averages.items():
            share = (1 - (images - before) / images) ** (exponent_of(length) + 1)
            average |= {name: share * average.get(name, 0 * p) + (1 - share) * p for name, p in now.items()}
        self.images = images


@pytest.mark.parametrize("length", [0.02, 0.05, 0.1, 0.28])
def test_the_length_is_the_deviation_of_the_profile(length):
    gamma = exponent_of(length)
    times = (torch.arange(1_000_000, dtype=torch.float64) + 0.5) / 1_000_000
    profile = (gamma + 1) * times**gamma / 1_000_000
    mean = (profile * times).sum()
    assert profile.sum() == pytest.approx(1, abs=1e-6)
    assert float((profile * (times - mean) ** 2).sum().sqrt()) == pytest.approx(length, rel=1e-4)


@pytest.mark.parametrize("length", [0.05, 0.1, 0.2])
@pytest.mark.parametrize(
    ("weights", "average"),
    [
        (lambda s: 3.0, lambda gamma: 3.0),
        (lambda s: s, lambda gamma: (gamma + 1) / (gamma + 2)),
        (lambda s: float(s > 0.7), lambda gamma: 1 - 0.7 ** (gamma + 1)),
    ],
    ids=["constant", "linear", "step"],
)
def test_closed_forms(tmp_path, length, weights, average):
    """The updates give the integral of weights and profile, and so do sums of snapshots."""
    images, steps = 2_000_000, 4000
    tracks = [0.0] * 3
    for step in range(1, steps + 1):
        seen = images * step // steps
        value = weights((step - 0.5) / steps)
        for number, one in enumerate((*STORED, length)):
            share = beta(one, seen, images // steps)
            tracks[number] = share * tracks[number] + (1 - share) * value
        if step % (steps // 40) == 0:
            stored = [{"w": torch.tensor(track), "large": torch.tensor([1e9 + 1, 0])} for track in tracks[:2]]
            Snapshot(step, seen, 0, STORED, "run").write(tmp_path, stored)
    exact = average(exponent_of(length))
    assert tracks[2] == pytest.approx(exact, abs=2e-4)
    found = reconstruct(tmp_path, length)
    assert float(found["w"]) == pytest.approx(exact, abs=2e-3)
    assert found["large"].tolist() == pytest.approx([1e9, 0], rel=1e-3)


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Direct]:
    """A denoiser's training with snapshots, and averages that were kept along."""
    folder = tmp_path_factory.mktemp("toy")
    write_split(folder / "cache" / "train", 50)
    torch.manual_seed(0)
    module = DiffusionModule(LightningDiT(4, 4, 1, 2, 16, 2, num_classes=3), partial(torch.optim.AdamW, lr=5e-3))
    data = ImageNetDataModule(str(folder / "cache"), source="latents", batch_size=8, num_workers=0)
    direct, kept = Direct(0.03, 0.04, 0.05, 0.07, 0.1, 0.15, 0.2, 0.25), PostHocEMA()
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "limit_val_batches": 0}
    Trainer(
        accelerator="cpu", max_steps=186, max_epochs=-1, enable_checkpointing=False, default_root_dir=folder,
        callbacks=[direct, kept], **quiet,
    ).fit(module, datamodule=data)  # fmt: skip
    return folder, direct


# Beyond both tracks, where snapshots meet profiles less well: 0.03 by the rounding of files, 0.25 by their number.
@pytest.mark.parametrize(
    ("length", "bound"),
    [(0.03, 2e-3), (0.04, 1e-3), (0.05, 1e-3), (0.07, 1e-3), (0.1, 1e-3), (0.15, 1e-3), (0.2, 1e-3), (0.25, 1e-2)],
)
def test_a_reconstructed_length_is_the_one_that_is_trained_directly(toy, length, bound):
    folder, direct = toy
    assert distance(reconstruct(folder, length), direct.averages[length]) < bound


def test_what_is_reliable_is_told(toy):
    folder, direct = toy
    low, high = reliable(folder)
    assert 0.03 < low <= 0.04 and 0.2 <= high < 0.25
    assert distance(direct.averages[0.1], direct.averages[0.2]) > 1e-2  # another length is another average
    low, high = reliable(folder, snapshots(folder / "post_hoc_ema")[2].images)
    assert (low, high) == STORED  # of three snapshots no more can be made


def test_bfloat16_would_not_do(toy):
    """Why files hold float16."""
    folder, direct = toy
    rounded = {name: tensor.bfloat16().double() for name, tensor in direct.averages[0.05].items()}
    assert distance(rounded, direct.averages[0.05]) > 1e-3
