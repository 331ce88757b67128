"""Where TensorBoard shows what was logged, and what progress bars say, of runs that were stopped and go on."""

from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from callbacks.checkpoint import LastCheckpoint
from callbacks.images import ReconstructionImages
from callbacks.throughput import Throughput
from vfm_vae.timeline import Timeline


def shown(folder: Path) -> dict[str, list[int]]:
    """The positions that TensorBoard shows of each curve and row of pictures, as often as it shows them."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0})
    events.Reload()
    tags = events.Tags()
    steps = {tag: [event.step for event in events.Scalars(tag)] for tag in tags["scalars"]}
    return steps | {f"picture {tag}": [event.step for event in events.Images(tag)] for tag in tags["images"]}


@pytest.fixture
def fit(trainer, new_module, data, tmp_path):
    """Trains in `runs/<name>`, where every start writes; saves every two steps, or where validations end."""

    def run(
        name: str, max_steps: int, ckpt_path: str | None = "last", accumulate: int = 1, at: str = "steps", **kwargs
    ):
        module = new_module(accumulate)
        logger = TensorBoardLogger(tmp_path, name, version="")
        options = {"log_every_n_steps": 1, "check_val_every_n_epoch": None, "max_epochs": -1, "val_check_interval": 3}
        when = {"every_n_train_steps": 2} if at == "steps" else {}
        folder = tmp_path / name / "checkpoints"
        saves = [ModelCheckpoint(folder, "{step}", save_top_k=-1, **when)]
        if at == "end":
            saves = [LastCheckpoint(every_n_steps=1000)]
            saves[0].dirpath = str(folder)
        callbacks = [Timeline(), Throughput(window_size=2), ReconstructionImages(2, every_n_images=8), *saves]
        run = trainer(
            *callbacks, logger=logger, max_steps=max_steps, enable_checkpointing=True, **options | kwargs
        )  # fmt: skip
        path = folder / f"step={ckpt_path}.ckpt" if isinstance(ckpt_path, int) else ckpt_path
        run.fit(module, data, ckpt_path=path, weights_only=True)
        # TensorBoard reads files by their names, which begin with the second: starts lie within one only here.
        files = sorted((tmp_path / name).glob("events*"), key=lambda file: file.stat().st_ctime_ns)
        files[-1].rename(files[-1].with_name(f"events.out.tfevents.{len(files):010d}"))
        return run

    return run


@pytest.mark.parametrize(
    ("accumulate", "at", "step"),
    [(1, "steps", 4), (1, "steps", 6), (1, "validations", 3), (1, "end", "last"), (2, "steps", 4)],
)
def test_every_position_is_shown_once_though_training_went_on_from_an_older_one(
    fit, tmp_path: Path, accumulate: int, at: str, step: int | str
):
    options = {"accumulate": accumulate, "at": at}
    fit("whole", 11, None, **options)
    fit("resumed", 10 if at != "end" else 7, None, **options)
    if at == "end":  # a longer one, killed before it saved
        (tmp_path / "resumed/checkpoints/last.ckpt").rename(tmp_path / "last.ckpt")
        fit("resumed", 10, str(tmp_path / "last.ckpt"), **options)
        (tmp_path / "last.ckpt").rename(tmp_path / "resumed/checkpoints/last.ckpt")
    fit("resumed", 11, step, **options)
    whole, resumed = shown(tmp_path / "whole"), shown(tmp_path / "resumed")
    assert whole.keys() == resumed.keys() and {"val/loss", "picture val/reconstructions"} <= whole.keys()
    assert all(len(set(steps)) == len(steps) for steps in resumed.values()), resumed
    assert whole["val/loss"][:3] == [12, 24, 36]  # images of three batches each
    assert not {"epoch", "images_seen", "hp_metric"} & whole.keys()
    # Rates begin anew, and so does the first picture; everything else is as if training had never been stopped.
    anew = ("train/device", "train/time", "train/batches", "train/samples", "picture train")
    assert all(steps == whole[tag] for tag, steps in resumed.items() if not tag.startswith(anew)), (resumed, whole)


def test_a_run_that_begins_again_hides_the_former_one(fit, tmp_path: Path):
    fit("run", 9, None)
    fit("run", 5, None)
    assert shown(tmp_path / "run")["train/loss"] == [4, 8, 12, 16, 20]
    assert len(list((tmp_path / "run").glob("events*"))) == 2  # whose files keep it


def test_an_evaluation_is_shown_where_its_checkpoint_is(fit, trainer, new_module, data, tmp_path: Path):
    fit("run", 6, None)
    before = shown(tmp_path / "run")["val/loss"]
    evaluation = trainer(Timeline(), logger=TensorBoardLogger(tmp_path, "run", version=""))
    path = tmp_path / "run/checkpoints/step=6.ckpt"
    evaluation.test(new_module(), data, ckpt_path=path, weights_only=True, verbose=False)
    steps = shown(tmp_path / "run")
    assert steps["test/loss"] == [24] and steps["val/loss"] == before == [12, 24]
    assert not {"epoch", "hp_metric"} & steps.keys()


@pytest.mark.parametrize(("max_epochs", "said"), [(-1, "Epoch 3"), (None, "Epoch 3"), (7, "Epoch 3/6")])
def test_a_progress_bar_counts_no_epochs_that_there_are_not(trainer, new_module, data, max_epochs, said):
    bar = RichProgressBar()
    run = trainer(Timeline(), bar, max_epochs=max_epochs, max_steps=1, enable_progress_bar=True)
    run.fit(new_module(), data)
    assert bar._get_train_description(3).strip() == said
    assert len(bar._get_train_description(3)) >= len(bar.validation_description)


def test_one_logger_serves_several_trainings(trainer, new_module, data, tmp_path: Path):
    logger = TensorBoardLogger(tmp_path, "run", version="")
    for number in range(3):
        run = trainer(Timeline(), logger=logger, max_steps=2, log_every_n_steps=1)
        run.fit(new_module(), data)
        files = sorted((tmp_path / "run").glob("events*"), key=lambda file: file.stat().st_ctime_ns)
        files[-1].rename(files[-1].with_name(f"events.out.tfevents.{number:010d}"))
    assert shown(tmp_path / "run")["train/loss"] == [4, 8]


def test_a_stage_begins_where_the_former_one_ended(trainer, new_module, data, tmp_path: Path):
    for name, begins in (("strong", 0), ("weak", 40)):
        module = new_module()
        module.images_seen = begins
        logger = TensorBoardLogger(tmp_path, name, version="")
        trainer(Timeline(), logger=logger, max_steps=2, log_every_n_steps=1).fit(module, data)
        assert shown(tmp_path / name)["train/loss"] == [begins + 4, begins + 8]


@pytest.fixture
def former(trainer, new_module, data, tmp_path: Path):
    """A run of a former version, which logged by steps, with the epoch, and its checkpoint at step 3."""
    saves = ModelCheckpoint(tmp_path / "checkpoints", "{step}", every_n_train_steps=3)
    logger = TensorBoardLogger(tmp_path, "run", version="")
    run = trainer(saves, logger=logger, max_steps=5, log_every_n_steps=1, enable_checkpointing=True)
    run.fit(new_module(), data)
    (file,) = (tmp_path / "run").glob("events*")
    file.rename(file.with_name("events.out.tfevents.0000000000"))
    return tmp_path / "checkpoints/step=3.ckpt"


def test_what_a_former_version_logged_by_steps_is_a_run_of_its_own_where_training_goes_on(
    former, trainer, new_module, data, tmp_path: Path
):
    assert shown(tmp_path / "run")["train/loss"] == shown(tmp_path / "run")["epoch"][:5] == [0, 1, 2, 3, 4]
    for _ in range(2):  # the second time, there is nothing of a former version any more
        logger = TensorBoardLogger(tmp_path, "run", version="")
        run = trainer(Timeline(), logger=logger, max_steps=5, log_every_n_steps=1)
        run.fit(new_module(), data, ckpt_path=former, weights_only=True)
        assert shown(tmp_path / "run")["train/loss"] == [16, 20]
        assert shown(tmp_path / "run/by_steps")["train/loss"] == [0, 1, 2, 3, 4]
        *_, last = sorted((tmp_path / "run").glob("events*"))
        last.rename(last.with_name(f"events.out.tfevents.{len(list(last.parent.glob('events*'))):010d}"))


def test_modules_that_count_no_images_are_shown_by_steps(trainer, data, tmp_path: Path):
    class Plain(LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(8, 1)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

        def training_step(self, batch, batch_idx):
            loss = self.layer(batch.images[:, 0, 0].float()).mean()
            self.log("train/loss", loss)
            return loss

    logger = TensorBoardLogger(tmp_path, "run", version="")
    trainer(Timeline(), logger=logger, max_steps=2, log_every_n_steps=1).fit(Plain(), data)
    assert shown(tmp_path / "run")["train/loss"] == [0, 1]
