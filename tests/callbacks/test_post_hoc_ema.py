"""Averages of any length: what a run stores, and that others are made of it afterwards."""

import logging
import shutil
from collections import namedtuple
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from latent_cache import write_split
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import Subset

from callbacks.post_hoc_ema import PostHocEMA
from ldm.models.lightningdit import LightningDiT
from ldm.module import DiffusionModule
from ldm.pipeline import LatentDiffusion
from vfm_vae.average import average, main
from vfm_vae.data.datamodule import ImageNetDataModule
from vfm_vae.post_hoc import Snapshot, beta, exponent_of, find, reconstruct, reliable, snapshots
from vfm_vae.writing import NotWritten

STORED = (0.05, 0.1)


def steps_of(folder: Path) -> list[int]:
    return [snapshot.step for snapshot in snapshots(folder / "post_hoc_ema")]


def flat(weights: dict[str, Tensor]) -> Tensor:
    return torch.cat([weights[name].detach().flatten().double() for name in sorted(weights)])


def distance(ours: Tensor, theirs: Tensor) -> float:
    """As a fraction of the norm."""
    return float((ours - theirs).norm() / theirs.norm())


class Direct(Callback):
    """Averages by definition, in double precision."""

    def __init__(self, *lengths: float):
        self.averages = dict.fromkeys(lengths, torch.zeros(()))
        self.images = 0

    def on_train_batch_end(self, trainer, pl_module, *args):
        now = flat({name: p for name, p in pl_module.model.named_parameters() if p.requires_grad})
        kept = 1 - (pl_module.images_seen - self.images) / pl_module.images_seen
        self.images = pl_module.images_seen
        for length, former in self.averages.items():
            share = kept ** (exponent_of(length) + 1)
            self.averages[length] = share * former + (1 - share) * now


@pytest.mark.parametrize("length", [0.02, 0.05, 0.1, 0.28])
def test_the_length_is_the_deviation_of_the_profile(length):
    gamma = exponent_of(length)
    times = (torch.arange(1_000_000, dtype=torch.float64) + 0.5) / 1_000_000
    profile = (gamma + 1) * times**gamma / 1_000_000
    mean = (profile * times).sum()
    assert profile.sum() == pytest.approx(1, abs=1e-6)
    assert float((profile * (times - mean) ** 2).sum().sqrt()) == pytest.approx(length, rel=1e-4)


@pytest.mark.parametrize(
    ("weights", "average"),
    [
        (lambda s: 3.0, lambda gamma: 3.0),
        (lambda s: s, lambda gamma: (gamma + 1) / (gamma + 2)),
        (lambda s: float(s > 0.7), lambda gamma: 1 - 0.7 ** (gamma + 1)),
    ],
    ids=["constant", "linear", "step"],
)
def test_closed_forms(tmp_path, weights, average):
    """The updates give the integral of weights and profile, and so do sums of snapshots."""
    lengths, images, steps = (*STORED, 0.07, 0.2), 2_000_000, 1000
    tracks = dict.fromkeys(lengths, 0.0)
    for step in range(1, steps + 1):
        seen = images * step // steps
        for length, track in tracks.items():
            share = beta(length, seen, images // steps)
            tracks[length] = share * track + (1 - share) * weights((step - 0.5) / steps)
        if step % (steps // 40) == 0:
            stored = [{"w": torch.tensor(tracks[length]), "large": torch.tensor([1e9, 0])} for length in STORED]
            Snapshot(step, seen, 0, STORED, "run").write(tmp_path, stored)
    for length, track in tracks.items():
        exact, found = average(exponent_of(length)), reconstruct(tmp_path, length)
        assert track == pytest.approx(exact, abs=2e-4)
        assert float(found["w"]) == pytest.approx(exact, abs=2e-3)
        assert found["large"].tolist() == pytest.approx([1e9, 0], rel=1e-3)  # far beyond float16's range


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
        accelerator="cpu", max_steps=124, max_epochs=-1, default_root_dir=folder,
        callbacks=[direct, kept, ModelCheckpoint(folder / "checkpoints", save_last=True)], **quiet,
    ).fit(module, datamodule=data)  # fmt: skip
    return folder, direct


# Beyond both tracks, where snapshots meet profiles less well: 0.03 by the rounding of files, 0.25 by their number.
@pytest.mark.parametrize(
    ("length", "bound"),
    [(0.03, 2e-3), (0.04, 1e-3), (0.05, 1e-3), (0.07, 1e-3), (0.1, 1e-3), (0.15, 1e-3), (0.2, 1e-3), (0.25, 1e-2)],
)
def test_a_reconstructed_length_is_the_one_that_is_trained_directly(toy, length, bound):
    folder, direct = toy
    assert distance(flat(reconstruct(folder, length)), direct.averages[length]) < bound


def test_what_is_reliable_is_told(toy):
    folder, direct = toy
    low, high = reliable(folder)
    assert 0.03 < low <= 0.04 and 0.2 <= high < 0.25
    assert distance(direct.averages[0.1], direct.averages[0.2]) > 1e-2  # another length is another average
    low, high = reliable(folder, snapshots(folder / "post_hoc_ema")[2].images)
    assert (low, high) == STORED  # of three snapshots no more can be made


def command(*words: object) -> None:
    with patch("sys.argv", ["average", *map(str, words)]):
        main()


def test_a_checkpoint_with_another_average(toy, tmp_path, capsys, monkeypatch):
    folder, direct = toy
    out = tmp_path / "average.ckpt"
    command(folder, "--length=0.07", f"--out={out}")
    told = capsys.readouterr().out
    assert told.startswith(f"{out}: the average of length 0.07 at 992 images; lengths from 0.0")
    assert "the run was without EMA: commands use the average only with that among trainer.callbacks" in told
    shutil.copytree(folder / "post_hoc_ema", tmp_path / "run/post_hoc_ema")
    command(tmp_path / "run", f"--out={shutil.copy(out, tmp_path / 'run/last.ckpt')}")  # as of a run that has one
    assert "EMA" not in capsys.readouterr().out
    last, written = (torch.load(path, weights_only=True) for path in (folder / "checkpoints/last.ckpt", out))
    assert written["ema"]["images_seen"] == last["images_seen"] == 992
    assert written.keys() - last.keys() == {"ema"} and written["global_step"] == last["global_step"]
    assert distance(flat(written["ema"]["weights"]), direct.averages[0.07]) < 1e-3
    pipeline = LatentDiffusion.from_checkpoint(out)  # as `convert` and samples take it
    for name, tensor in written["ema"]["weights"].items():
        assert torch.equal(pipeline.model.get_parameter(name.removeprefix("model.")).detach(), tensor), name


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--length=0.5"], "length: must be in [0.01, 0.28], given 0.5"),
        (["--images=2000"], "images: the run's last checkpoint has seen 992 images, given 2000"),
        (["--images=3"], "images: the first snapshot is of 32 images, given 3"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line(toy, tmp_path, capsys, monkeypatch, words, message):
    monkeypatch.delenv("VFM_VAE_DEBUG", raising=False)
    with pytest.raises(SystemExit):
        command(toy[0], f"--out={tmp_path / 'out.ckpt'}", *words)
    assert capsys.readouterr().err.startswith(f"error: {message}\n")
    assert not list(tmp_path.iterdir())


def test_snapshots_of_another_run_are_refused(toy, tmp_path):
    shutil.copytree(toy[0], tmp_path / "run")
    last = snapshots(find(tmp_path / "run"))[-1]
    for one in snapshots(find(tmp_path / "run")):
        replace(one, run="other").write(find(tmp_path / "run"), [{"model.w": torch.ones(1)}] * 2)
    with pytest.raises(ValueError, match=r"^run: the snapshots in .* are of another run than the checkpoint; remove"):
        average(str(tmp_path / "run"), str(tmp_path / "out.ckpt"))
    assert not (tmp_path / "out.ckpt").exists() and last.run != "other"
    shutil.rmtree(tmp_path / "run/checkpoints")
    with pytest.raises(ValueError, match=r"^run: .* has no checkpoints/last.ckpt; give the folder that holds it"):
        average(str(tmp_path / "run"), str(tmp_path / "out.ckpt"))


def test_bfloat16_would_not_do(toy):
    """Why files hold float16."""
    _, direct = toy
    exact = direct.averages[0.05]
    assert distance(exact.bfloat16().double(), exact) > 1e-3


def test_snapshots_thin_out_and_stay_bounded(new_module, data, trainer, tmp_path):
    seen = []

    class Watch(Callback):
        def on_train_batch_end(self, *_):
            seen.append(steps_of(tmp_path))

    kept = PostHocEMA(every_n_steps=1, max_snapshots=5)
    trainer(kept, Watch(), max_steps=15).fit(new_module(), data)
    assert seen[3] == [1, 2, 3, 4] and seen[5] == [2, 4, 6] and seen[11] == [4, 8, 12]
    assert steps_of(tmp_path) == [4, 8, 12, 15]
    assert all(len(steps) <= 5 for steps in seen)


@pytest.mark.parametrize(("max_steps", "written"), [(12, [3, 6, 9, 12]), (10, [3, 6, 9, 10]), (3, [1, 2, 3])])
def test_snapshots_are_spread_over_the_training(module, data, trainer, tmp_path, max_steps, written):
    trainer(PostHocEMA(max_snapshots=5), max_steps=max_steps).fit(module, data)
    assert steps_of(tmp_path) == written


def test_a_resumed_run_stores_what_an_uninterrupted_one_does(new_module, data, trainer, tmp_path):
    data.train_set = Subset(data.train_set, range(20))  # five steps an epoch

    def run(name, path=None, **end):
        folder, kept = tmp_path / name, PostHocEMA(every_n_steps=2, max_snapshots=20)
        training = trainer(kept, **{"max_steps": -1} | end, default_root_dir=folder)
        training.fit(new_module(), data, ckpt_path=path, weights_only=True)
        training.save_checkpoint(folder / f"{training.global_step}.ckpt")
        stored = {one.step: load_file(one.path(folder / "post_hoc_ema")) for one in snapshots(find(folder))}
        return kept.tracks, stored

    whole, stored = run("whole", max_epochs=2)
    assert list(stored) == [2, 4, 6, 8, 10]
    assert list(run("parts", max_epochs=1)[1]) == [2, 4, 5]  # the last one for the end
    half = tmp_path / "parts/5.ckpt"
    resumed, stored_in_parts = run("parts", half, max_epochs=2)
    assert list(stored_in_parts) == list(stored)
    for ours, theirs in zip([*resumed, *stored_in_parts.values()], [*whole, *stored.values()], strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in ours | theirs)
    # Once more from the older checkpoint: what was stored later is of another course, as soon as there is a new one.
    assert list(run("parts", half, max_epochs=1)[1]) == [2, 4, 6, 8, 10]
    assert list(run("parts", half, max_steps=7)[1]) == [2, 4, 6, 7]


def test_another_run_in_the_folder_and_a_new_stage_begin_anew(new_module, data, trainer, tmp_path):
    trainer(PostHocEMA(every_n_steps=2), max_steps=8).fit(new_module(), data)
    module, kept = new_module(), PostHocEMA(every_n_steps=3)
    module.images_seen = 1000  # as a stage that goes on from another one's weights
    trainer(kept, max_steps=6).fit(module, data)
    assert steps_of(tmp_path) == [3, 6]
    assert [(one.start, one.images) for one in snapshots(find(tmp_path))] == [(1000, 12), (1000, 24)]
    end = reconstruct(tmp_path, 0.1)
    assert all(torch.equal(reconstruct(tmp_path, 0.1, 2000)[name], end[name]) for name in end)
    assert not torch.equal(reconstruct(tmp_path, 0.1, 1023)["model.encode.weight"], end["model.encode.weight"])
    with pytest.raises(ValueError, match=r"^images: the first snapshot is of 1012 images, given 1011"):
        reconstruct(tmp_path, 0.1, 1011)


def test_space_is_stated_and_asked_for_before_the_first_step(module, data, trainer, tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    monkeypatch.setattr(logging.getLogger("lightning.pytorch"), "propagate", True)
    trainer(PostHocEMA(max_snapshots=5), max_steps=8).fit(module, data)
    (line,) = {line for line in caplog.messages if "snapshots" in line}
    assert "4 snapshots of averages at most, one every 2 steps to begin with, of 0.0 MB each, 0.00 GB in all" in line

    disk = namedtuple("disk", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: disk(10**9, 10**9, 100))
    step = module.images_seen
    with pytest.raises(NotWritten, match=r"^max_snapshots: can't write .* MB are needed, 0.0 MB free"):
        trainer(PostHocEMA(), max_steps=8, default_root_dir=tmp_path / "full").fit(module, data)
    assert module.images_seen == step and not any((tmp_path / "full").rglob("*.*"))


def test_trial_runs_leave_nothing(module, data, trainer, tmp_path):
    trainer(PostHocEMA(every_n_steps=1), fast_dev_run=True).fit(module, data)
    assert not list(tmp_path.iterdir())


def test_frozen_weights_and_other_parts_are_left_out(module, data, trainer, tmp_path):
    trainer(PostHocEMA(every_n_steps=2), max_steps=2).fit(module, data)
    names = {"model.encode.weight", "model.encode.bias", "model.decode.weight", "model.decode.bias"}
    assert reconstruct(tmp_path, 0.1).keys() == names


def test_mistakes_are_told(module, data, trainer, tmp_path):
    with pytest.raises(ValueError, match=r"^lengths: must be in \[0.01, 0.28\], given \[0.05, 0.5\]"):
        PostHocEMA(lengths=(0.05, 0.5))
    with pytest.raises(ValueError, match=r"^lengths: at least one, and each once"):
        PostHocEMA(lengths=(0.05, 0.05))
    with pytest.raises(ValueError, match=r"^run: .* has no snapshots of averages; give the folder of a run"):
        reconstruct(tmp_path, 0.1)
    run = trainer(PostHocEMA(every_n_steps=1), max_steps=2)
    run.fit(module, data)
    run.save_checkpoint(tmp_path / "two.ckpt")
    with pytest.raises(ValueError, match=r"^length: must be in \[0.01, 0.28\], given 0.3"):
        reconstruct(tmp_path, 0.3)
    with pytest.raises(ValueError, match=r"^lengths: the checkpoint's averages have"):
        trainer(PostHocEMA((0.1,))).fit(module, data, ckpt_path=tmp_path / "two.ckpt", weights_only=True)
    path = tmp_path / "post_hoc_ema/step00000001.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"^run: .*step00000001.safetensors.* a safetensors file cut short"):
        reconstruct(tmp_path, 0.1)
    save_file({"a": torch.ones(1)}, path)
    with pytest.raises(ValueError, match=r"^run: .*step00000001.safetensors' is no snapshot of averages"):
        reconstruct(tmp_path, 0.1)
