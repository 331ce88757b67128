"""A sweep measures what tests measure, goes on where it was stopped, and gives its best setting to other commands."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from building import Build
from command_line import run
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torchmetrics import MeanMetric

from callbacks.ema import EMA
from callbacks.evaluation import EvaluationCallback
from ldm.guidance import Autoguidance, Guidance, InternalGuidance
from ldm.models.lightningdit import LightningDiT
from ldm.module import DiffusionModule
from ldm.samplers import Euler
from ldm.sweep.averages import Averages
from ldm.sweep.goal import Goal
from ldm.sweep.grid import Setting, Sweep
from ldm.sweep.records import Record
from ldm.sweep.results import Results
from ldm.sweep.sweeper import Sweeper
from ldm.sweep.trainer import SweepingTrainer
from vfm_vae.checkpoints import read_checkpoint
from vfm_vae.data.datamodule import ImageNetDataModule
from vfm_vae.post_hoc import FOLDER, Snapshot, reconstruct

NAME = "test/fd_size"
CONFIG = """
seed_everything: 0
model:
  model:
    class_path: LightningDiT
    init_args: {in_channels: 4, input_size: 4, depth: 2, width: 32, num_heads: 2, num_classes: 3}
  optimizer: {class_path: AdamW, init_args: {lr: 2.0e-3}}
  sampler: {class_path: Euler, init_args: {steps: 4}}
  predict: latents
  seed: 1
data: {root: cache, source: latents, val_batch_size: 4, num_workers: 0, num_samples: 10}
trainer:
  accelerator: cpu
  enable_progress_bar: false
  callbacks: [EMA, test_sweep.Size, Report, ModelCheckpoint, EndTogether]
"""


class Size(EvaluationCallback):
    """Logs the mean square of samples; `at` is told of each beginning, and rank 1 finds inf at scale `breaks`."""

    def __init__(self, num_images: int | None = None, breaks: float | None = None) -> None:
        super().__init__(num_images)
        self.at: Callable[[Any], None] = lambda module: None
        self.breaks = breaks

    def names(self) -> set[str]:
        return {"fd_size", "accuracy"}

    def start(self, trainer, pl_module) -> None:
        self.at(pl_module)
        self.size = MeanMetric().to(pl_module.device)

    def update(self, pl_module, batch) -> None:
        batch = self.select(batch)
        std, breaks = pl_module.normalization.std, pl_module.pipeline.guidance.scale == self.breaks
        kept = std.clone()
        if breaks and pl_module.global_rank == 1:
            std.fill_(3e38)
        drawn = pl_module.draw(batch.index, decode=False)
        std.copy_(kept)
        for latents in drawn.latents[batch.index >= 0]:
            self.size.update(latents.square().mean())

    def results(self) -> dict[str, torch.Tensor]:
        size = self.size.compute()
        return {"fd_size": size, "accuracy": size / (1 + size)}


class Fixture(SimpleNamespace):
    """A run with a checkpoint, and how to sweep over it."""

    def trainer(self, size: Size | None = None, ema: bool = True) -> SweepingTrainer:
        callbacks = [*([EMA(decay=0.5)] if ema else []), size or Size()]
        options = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
        return SweepingTrainer(accelerator="cpu", logger=False, callbacks=callbacks, **options)

    def data(self, **options) -> ImageNetDataModule:
        given = {"source": "latents", "batch_size": 8, "val_batch_size": 4, "num_workers": 0, "num_samples": 10}
        return ImageNetDataModule(self.cache, **given | options)

    def module(self, guidance: Guidance | None = None) -> DiffusionModule:
        torch.manual_seed(0)
        denoiser = LightningDiT(4, 4, depth=2, width=32, num_heads=2, num_classes=3)
        optimizer = partial(torch.optim.AdamW, lr=2e-3)
        return DiffusionModule(denoiser, optimizer, Euler(4), guidance, predict="latents", seed=1)

    def sweep(
        self, size: Size | None = None, guidance: Guidance | None = None, data: dict | None = None, **options
    ) -> dict[str, Any]:
        """Sweeps, and returns what the file says."""
        sweep = Sweep(**{"scales": [1, 2.5], "folder": str(self.folder / "sweep")} | options)
        self.trainer(size).sweep(self.module(guidance), self.data(**data or {}), sweep, self.checkpoint)
        return json.loads((self.folder / "sweep/sweep.json").read_text())


@pytest.fixture(scope="module")
def trained(tmp_path_factory, cache) -> Path:
    made = Fixture(cache=cache)
    file = tmp_path_factory.mktemp("run") / "checkpoints/last.ckpt"
    trainer, module = made.trainer(), made.module()
    trainer.fit_loop.epoch_loop.max_steps = 3
    trainer.limit_val_batches = 0
    trainer.fit(module, datamodule=made.data())
    for parameter in module.model.final.parameters():  # which begin with zeros
        torch.nn.init.normal_(parameter, std=0.1)
    trainer.save_checkpoint(file)
    return file


@pytest.fixture
def made(trained, cache, tmp_path) -> Fixture:
    return Fixture(cache=cache, folder=tmp_path, checkpoint=str(trained))


@pytest.fixture
def counted() -> Iterator[tuple[Size, list[tuple[float, float, int]]]]:
    """A callback, and the scale, start and seed of each measurement that it began."""
    size, begun = Size(), []
    size.at = lambda module: begun.append((module.pipeline.guidance.scale, module.pipeline.guidance.start, module.seed))
    return size, begun


def measured(content: dict[str, Any], seed: int = 1) -> dict[tuple, float]:
    return {
        (each["scale"], each["start"], each["length"]): each["metrics"].get(NAME)
        for each in content["measured"]
        if each["seed"] == seed
    }


# Measuring


def test_each_setting_is_measured_as_a_test_of_its_own_would(made):
    content = made.sweep(starts=[0, 0.5])
    trainer = made.trainer()
    found = {}
    for guidance in (Guidance(1.0), Guidance(2.5), Guidance(2.5, start=0.5)):
        trainer.test(made.module(guidance), datamodule=made.data(), ckpt_path=made.checkpoint, verbose=False)
        found[guidance.scale, guidance.start, None] = trainer.callback_metrics[NAME].item()
    assert measured(content) == found and len(set(found.values())) == 3
    best = min(found, key=found.get)
    assert content["best"] == {
        "scale": best[0], "start": best[1], "end": 1.0, "length": None, "value": found[best], "seed": 1,
    }  # fmt: skip
    confirmed = {(each["scale"], each["start"], each["length"]): each["value"] for each in content["confirmed"]}
    assert confirmed.keys() == {best, (1.0, 0.0, None)} and {each["seed"] for each in content["confirmed"]} == {2}
    for (scale, start, _), value in confirmed.items():
        module = made.module(Guidance(scale, start=start))
        module.seed = 2
        trainer.test(module, datamodule=made.data(), ckpt_path=made.checkpoint, verbose=False)
        assert trainer.callback_metrics[NAME].item() == value


def test_what_is_measured_is_not_measured_again_unless_something_changed(made, counted, capsys):
    size, begun = counted
    made.sweep(size, starts=[0, 0.5])
    assert begun[:3] == [(1, 0, 1), (2.5, 0, 1), (2.5, 0.5, 1)] and {seed for *_, seed in begun[3:]} == {2}
    begun.clear()
    again = made.sweep(size, starts=[0, 0.5], scales=[1, 2.5, 4], confirm=False)
    assert begun == [(4, 0, 1), (4, 0.5, 1)]
    assert "5 settings" in (out := capsys.readouterr().out) and "; 3 of them are measured already" in out
    begun.clear()
    fewer = made.sweep(size, data={"num_samples": 9}, confirm=False)
    assert begun == [(1, 0, 1), (2.5, 0, 1)]
    changed = "measured anew: 2, because of what changed: num_samples, Size.num_images"
    assert changed in capsys.readouterr().out
    assert measured(fewer)[1, 0, None] != measured(again)[1, 0, None]
    assert measured(fewer)[4, 0, None] == measured(again)[4, 0, None]  # which is no part of that sweep


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_sweep_that_is_stopped_goes_on_from_there(made, counted, number):
    size, begun = counted
    note, handlers = size.at, {each: signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)}

    def stop_in_the_third(module) -> None:
        note(module)
        if len(begun) == 3:
            os.kill(os.getpid(), number)

    size.at = stop_in_the_third
    try:
        with pytest.raises(SystemExit):
            made.sweep(size, scales=[1, 2, 3, 4])
    finally:
        for each, handler in handlers.items():
            signal.signal(each, handler)
    begun.clear()
    size.at = note
    content = made.sweep(size, scales=[1, 2, 3, 4], confirm=False)
    assert [scale for scale, *_ in begun] == [3, 4]
    assert measured(content) == measured(
        Fixture(cache=made.cache, folder=made.folder / "whole", checkpoint=made.checkpoint).sweep(scales=[1, 2, 3, 4])
    )


def test_a_setting_whose_samples_are_not_finite_is_told_and_the_sweep_goes_on(made, capsys):
    content = made.sweep(scales=[1e300, 1, 2.5])
    (broken,) = [each for each in content["measured"] if each["broken"]]
    assert broken["scale"] == 1e300 and broken["metrics"] == {} and "hold nan or inf" in broken["broken"]
    whole = Fixture(cache=made.cache, folder=made.folder / "whole", checkpoint=made.checkpoint)
    assert measured(content) == measured(whole.sweep()) | {(1e300, 0, None): None}
    text = (made.folder / "sweep/sweep.md").read_text()
    assert [line.rstrip(" |").endswith("not finite") for line in text.splitlines() if "1e+300 |" in line] == [True]
    with pytest.raises(ValueError, match="no setting gave a finite test/fd_size: samples: 4 of 4 hold nan or inf"):
        made.sweep(scales=[1e300])


def test_averages_of_any_length_are_reconstructed_and_the_best_is_kept(made, counted):
    size, begun = counted
    run, stored = made.folder / "run", read_checkpoint(made.checkpoint, "")
    (run / "checkpoints").mkdir(parents=True)
    made.checkpoint = str(shutil.copy(made.checkpoint, run / "checkpoints"))
    average = stored["ema"]["weights"]
    for step, images in enumerate((8, 16, 24), 1):
        tracks = [{name: (factor + step) / 3 * tensor for name, tensor in average.items()} for factor in (0.0, 1.0)]
        Snapshot(step, images, 0, (0.05, 0.2), "run").write(run / FOLDER, tracks)
    sweep = Sweep(scales=[1, 2], lengths=[None, 0.05, 0.1, 0.2], mode="max")
    made.trainer(size).sweep(made.module(), made.data(), sweep, made.checkpoint)
    content = json.loads((run / "sweep/sweep.json").read_text())
    found = {(scale, length): value for (scale, _, length), value in measured(content).items()}
    assert len(found) == len(set(found.values())) == 8
    trainer = made.trainer()
    for length in (0.05, 0.1, 0.2):
        path = made.folder / "averaged.ckpt"
        torch.save(stored | {"ema": {"weights": reconstruct(run, length, 24), "images_seen": 24}}, path)
        trainer.test(made.module(Guidance(2)), datamodule=made.data(), ckpt_path=path, verbose=False)
        assert found[2, length] == trainer.callback_metrics[NAME].item()
    best = content["best"]["length"]
    assert best == max(found, key=found.get)[1] == 0.05 and content["best"]["value"] == max(found.values())
    (kept,) = (run / "sweep").glob("length_*.ckpt")
    overlay = yaml.safe_load((run / "sweep/best.yaml").read_text())
    assert overlay["ckpt_path"] == str(kept) and kept.name == "length_0.05.ckpt"
    assert kept.stat().st_size < Path(made.checkpoint).stat().st_size  # nothing of the optimizer's
    trainer.test(made.module(Guidance(content["best"]["scale"])), datamodule=made.data(), ckpt_path=kept, verbose=False)
    assert trainer.callback_metrics[NAME].item() == content["best"]["value"]
    begun.clear()
    Snapshot(2, 16, 0, (0.05, 0.2), "another").write(run / FOLDER, tracks)
    made.trainer(size).sweep(made.module(), made.data(), sweep, made.checkpoint)
    assert len({seed for *_, seed in begun}) == 2 and sum(seed == 1 for *_, seed in begun) == 2 * 3  # all but the own


def averaged(made: Fixture, name: str) -> str:
    """A checkpoint of the run with a name, in a folder that has a snapshot of the run `a`."""
    run, content = made.folder / "run", read_checkpoint(made.checkpoint, "ckpt_path")
    content["callbacks"]["PostHocEMA"] = {"tracks": [], "run": name}
    run.mkdir(exist_ok=True)
    torch.save(content, run / "last.ckpt")
    Snapshot(1, 8, 0, (0.1,), "a").write(run / FOLDER, [{}])
    return str(run / "last.ckpt")


def test_a_trial_writes_nothing(made):
    trainer = made.trainer()
    trainer.limit_test_batches = 1
    sweep = Sweep(scales=[1, 2.5], folder=str(made.folder / "sweep"))
    trainer.sweep(made.module(), made.data(), sweep, made.checkpoint)
    with pytest.raises(ValueError, match=r"^sweep.lengths: a trial run writes no checkpoints with other averages"):
        Sweeper(trainer, made.module(), made.data(), Sweep(lengths=[None, 0.1]), averaged(made, "a"))
    assert [file.name for file in made.folder.iterdir()] == ["run"]


def test_snapshots_of_another_run_are_refused(made):
    checkpoint = averaged(made, "a")
    Averages(Path(checkpoint), has_average=True).check([0.1])
    with pytest.raises(ValueError, match=r"^sweep.lengths: the snapshots in .* are of another run .*; remove them"):
        Averages(Path(averaged(made, "b")), has_average=True).check([0.1])


def test_mistakes_are_seen_before_anything_is_measured(made, counted):
    size, begun = counted
    for options, message in (
        ({"data": {"num_samples": None}}, "data.num_samples: give the number of samples"),
        ({"lengths": [0.1]}, "sweep.lengths: '.*' has no snapshots of averages"),
        ({"lengths": [0.5]}, r"sweep.lengths: must be in \[0.01, 0.28\], given \[0.5\]"),
        ({"metric": "gfid"}, "sweep.metric: no callback logs 'gfid'; they log accuracy, fd_size"),
    ):
        with pytest.raises(ValueError, match=message):
            made.sweep(size, **options)
    with pytest.raises(ValueError, match=r"sweep.lengths: no callback uses averages here; add EMA"):
        made.trainer(size, ema=False).sweep(made.module(), made.data(), Sweep(lengths=[0.1]), made.checkpoint)
    with pytest.raises(ValueError, match=r"ckpt_path: there is no checkpoint 'nowhere.ckpt'"):
        made.trainer(size).sweep(made.module(), made.data(), Sweep(), "nowhere.ckpt")
    with pytest.raises(ValueError, match="ckpt_path: a sweep looks at one checkpoint; give --ckpt_path FILE"):
        made.trainer(size).sweep(made.module(), made.data(), Sweep(), "last")
    assert not list(made.folder.iterdir())
    (made.folder / "sweep").mkdir()
    (made.folder / "sweep/sweep.json").write_text("[1]")
    with pytest.raises(ValueError, match="holds no sweep; give another folder"):
        made.sweep(size)
    assert not begun


# What it leaves


def overlaid(folder: Path, overlay: Path, command: str = "predict") -> Build:
    arguments = [command, "-c", str(folder / "config.yaml"), "-c", str(overlay)]
    return Build(DiffusionModule, ImageNetDataModule, args=arguments, auto_configure_optimizers=False)


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param("classifier-free", marks=pytest.mark.slow),
        pytest.param("autoguidance", marks=pytest.mark.slow),
        "classifier-free on top of internal",
    ],
)
def test_the_best_setting_is_an_overlay_that_predict_takes(made, kind):
    guidance = {
        "classifier-free": Guidance(channels=2, cls_scale=3.0),
        "autoguidance": Autoguidance(made.checkpoint, channels=3),
        "classifier-free on top of internal": Guidance(inner=InternalGuidance(1.5)),
    }[kind]
    setting = Setting(2.5, 0.25, 0.75, None)
    shared = {"model": {"sampler": {"class": "Euler", "steps": 4}}, "num_samples": 10}
    rows = [(setting, Record({NAME: 3.0}, {}, 1.0))]
    found = Results(rows, Goal("fd_size", lower=True), 1, shared, Path(made.checkpoint), guidance)
    found.write(made.folder / "sweep", Path(made.checkpoint), 7)
    (made.folder / "config.yaml").write_text(CONFIG.replace("depth: 2", "depth: 2, base_depth: 1"))
    cli = overlaid(made.folder, made.folder / "sweep/best.yaml")
    taken = cli.model.pipeline.guidance
    assert type(taken) is type(guidance) and taken.arguments.keys() == guidance.arguments.keys()
    assert (taken.scale, taken.start, taken.end) == (2.5, 0.25, 0.75)
    assert (taken.channels, taken.cls_scale) == (guidance.channels, guidance.cls_scale)
    if kind.endswith("internal"):
        assert isinstance(taken.inner, InternalGuidance) and taken.inner.scale == 1.5
    assert cli.config.predict.ckpt_path == made.checkpoint


def test_the_picture_is_a_file_and_in_tensorboard(made):
    made.sweep(starts=[0, 0.5])
    made.sweep(starts=[0, 0.5], scales=[1, 2.5, 3])
    picture = np.asarray(Image.open(made.folder / "sweep/sweep.png").convert("RGB"))
    events = EventAccumulator(str(made.folder / "sweep"), size_guidance={"images": 0}).Reload()
    (shown,) = events.Images("sweep/fd_size")
    assert shown.step == 24 and (shown.height, shown.width) == picture.shape[:2]


# The command line


def test_by_the_command_line(made):
    (made.folder / "cache").symlink_to(made.cache)
    (made.folder / "config.yaml").write_text(CONFIG)
    words = ["-c", "config.yaml", f"--ckpt_path={made.checkpoint}", "--sweep.folder=found", "--sweep.scales=[1,2.5]"]
    code, out, err = run(made.folder, "ldm", "sweep", *words)
    assert code == 0, err
    assert "sweep: 2 settings by test/fd_size, lower is better" in out and "2 of 2: scale 2.5 from 0 to 1" in out
    names = {"sweep.json", "sweep.md", "sweep.png", "best.yaml"}
    assert names == {file.name for file in (made.folder / "found").iterdir() if "tfevents" not in file.name}
    assert {file.name for file in made.folder.iterdir()} == {"cache", "config.yaml", "found"}  # no report, no logs
    overlay = yaml.safe_load((made.folder / "found/best.yaml").read_text())
    assert overlay["ckpt_path"] == made.checkpoint
    best = ["-c", "config.yaml", "-c", "found/best.yaml", "--trainer.logger=false"]
    code, _, err = run(made.folder, "ldm", "test", *best)
    assert code == 0, err
    again = json.loads((made.folder / "metrics.json").read_text())["run"]["metrics"][NAME]
    assert again == json.loads((made.folder / "found/sweep.json").read_text())["best"]["value"]
    code, _, err = run(made.folder, "ldm", "sweep", *words, "--sweep.scales=[]")
    assert code == 2 and err.count("\n") <= 3 and "scales: there is nothing to try in an empty list" in err


@pytest.mark.slow
def test_two_processes_sweep_as_one_does(made):
    (made.folder / "cache").symlink_to(made.cache)
    (made.folder / "config.yaml").write_text(
        CONFIG.replace("test_sweep.Size", "{class_path: test_sweep.Size, init_args: {breaks: 3}}")
    )
    paths = [str(Path(__file__).parents[level]) for level in range(3)]
    environment = dict(os.environ) | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    found = []
    for number, devices in enumerate((1, 2, 2)):
        words = ["-c", "config.yaml", f"--ckpt_path={made.checkpoint}", f"--trainer.devices={devices}"]
        words += ["--sweep.scales=[1,2,3,4]", f"--sweep.folder={min(number, 1)}", "--trainer.strategy=ddp"]
        command = [sys.executable, "-m", "ldm", "sweep", *words]
        ended = subprocess.run(command, cwd=made.folder, env=environment, capture_output=True, text=True, timeout=200)
        assert ended.returncode == 0, ended.stderr
        found.append(measured(json.loads((made.folder / f"{min(number, 1)}/sweep.json").read_text())))
    one, two, again = found
    assert "4 of them are measured already" in ended.stdout and again == two
    assert two.pop((3, 0, None)) is None and one.pop((3, 0, None)) is not None
    assert two == pytest.approx(one, rel=1e-5) and len(two) == 3
