"""Steps of as many images, whatever takes them at a time: in one batch, in several, on several GPUs."""

from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from test_datamodule import Ranks

from vfm_vae.data.datamodule import ImageNetDataModule
from vfm_vae.data.steps import Steps, batches_per_step
from vfm_vae.optimization import log_where_due
from vfm_vae.two_players import TwoPlayers

SIZE, STEP = 32, 8  # images of training, and of a step
ROUNDING = {"rtol": 1e-5, "atol": 1e-6}


@pytest.fixture(scope="module")
def root(tmp_path_factory, make_tree_in):
    return make_tree_in(tmp_path_factory.mktemp("images"), train=SIZE, val=3, size=(8, 8), classes=("apple",))


class Watched(LightningModule):
    """Remembers the images of each step, and after which steps it was validated."""

    def _begin(self):
        self.weight = torch.nn.Parameter(torch.zeros(3))
        self.steps, self.validated, self.at_a_time = {}, [], set()

    def _loss(self, batch):
        self.steps.setdefault(self.global_step, []).extend(batch.index.tolist())
        self.at_a_time.add(len(batch.index))
        return (batch.images.float().mean((2, 3)) / 255 - self.weight).square().sum(1).mean()

    def on_validation_start(self):
        self.validated.append(self.global_step)

    def validation_step(self, batch, batch_idx):
        pass


class Automatic(Watched):
    def __init__(self):
        super().__init__()
        self._begin()

    def training_step(self, batch, batch_idx):
        loss = self._loss(batch)
        self.log("train/loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Players(TwoPlayers, Watched):
    """Steps by itself, as tokenizers do."""

    def __init__(self, accumulate_grad_batches=1):
        super().__init__(None, accumulate_grad_batches, None)
        self._begin()
        self.opponent = torch.nn.Parameter(torch.zeros(()))

    def training_step(self, batch, batch_idx):
        step_ends, loss = self.completes_step(batch_idx), self._loss(batch)
        self.judge(others={"loss": loss})
        self.learn(self.GENERATOR, loss, step_ends)
        self.learn(self.DISCRIMINATOR, (self.opponent - loss.detach()).square(), step_ends)
        self.finish_batch(len(batch.index), step_ends)
        log_where_due(self, {"train/loss": loss}, shown="train/loss")

    def configure_optimizers(self):
        return [torch.optim.SGD([parameter], lr=0.1) for parameter in (self.weight, self.opponent)]


class Stop(Exception):
    pass


class StopAt(Callback):
    def __init__(self, step):
        self.step = step

    def on_train_batch_start(self, trainer, *args):
        if trainer.global_step == self.step:
            raise Stop


def datamodule(root, **kwargs):
    return ImageNetDataModule(str(root), **{"image_size": 8, "batch_size": STEP, "num_workers": 0} | kwargs)


def trainer(folder, steps=6, **kwargs):
    options = {"val_check_interval": 3, "check_val_every_n_epoch": None, "max_steps": steps, "max_epochs": -1}
    silent = {"enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0, "logger": False}
    options |= {"enable_checkpointing": False} | silent
    return Trainer(default_root_dir=folder, accelerator="cpu", **options | kwargs)


def fit(folder, root, module, steps=6, trained=None, **data):
    run = trained or trainer(folder, steps)
    run.fit(module, datamodule=datamodule(root, **data))
    return module


@pytest.mark.parametrize("kind", [Automatic, Players])
def test_a_step_is_the_same_whatever_is_taken_at_a_time(root, tmp_path, kind):
    whole = fit(tmp_path, root, kind())
    assert whole.at_a_time == {STEP} and whole.validated == [3, 6]
    for micro in (2, 4, 8, 100):
        divided = fit(tmp_path, root, kind(), micro_batch_size=micro)
        assert divided.at_a_time == {min(micro, STEP)}
        assert divided.steps == whole.steps and divided.validated == [3, 6]
        torch.testing.assert_close(divided.weight, whole.weight, **ROUNDING)
        assert divided.weight.abs().min() > 0.01


@pytest.mark.parametrize("kind", [Automatic, Players])
def test_former_options_say_the_same_bit_for_bit(root, tmp_path, kind):
    """`batch_size` of a batch, and how many make a step, as configs had it before there was `micro_batch_size`."""
    by_trainer = {"accumulate_grad_batches": 4} if kind is Automatic else {}
    former = trainer(tmp_path, val_check_interval=12, **by_trainer)
    before = fit(tmp_path, root, kind() if by_trainer else kind(4), trained=former, batch_size=2)
    now = fit(tmp_path, root, kind(), micro_batch_size=2)
    assert (now.steps, now.validated, now.at_a_time) == (before.steps, before.validated, before.at_a_time)
    assert torch.equal(now.weight, before.weight)


@pytest.mark.parametrize("kind", [Automatic, Players])
@pytest.mark.parametrize("stop", [2, 3, 4])  # within the first epoch; before a validation; at its end
def test_a_run_goes_on_with_fewer_at_a_time(root, tmp_path, kind, stop):
    whole = fit(tmp_path, root, kind(), micro_batch_size=4)
    last = ModelCheckpoint(tmp_path, save_last=True, save_top_k=0, every_n_train_steps=1)
    saving = {"callbacks": [last], "enable_checkpointing": True}
    before = fit(tmp_path, root, kind(), micro_batch_size=4, trained=trainer(tmp_path, stop, **saving))
    after = kind()
    trainer(tmp_path).fit(after, datamodule(root, micro_batch_size=2), ckpt_path=tmp_path / "last.ckpt")
    assert before.steps | after.steps == whole.steps
    assert not before.steps.keys() & after.steps.keys()
    assert before.validated + after.validated == [3, 6]
    torch.testing.assert_close(after.weight, whole.weight, **ROUNDING)


def test_a_run_of_former_options_goes_on_with_these(root, tmp_path):
    whole = fit(tmp_path, root, Players(), micro_batch_size=2)
    last = ModelCheckpoint(tmp_path, save_last=True, save_top_k=0, every_n_train_steps=1)
    former = trainer(tmp_path, 2, val_check_interval=12, callbacks=[last], enable_checkpointing=True)
    fit(tmp_path, root, Players(4), trained=former, batch_size=2)
    after = Players()
    trainer(tmp_path).fit(after, datamodule(root, micro_batch_size=2), ckpt_path=tmp_path / "last.ckpt")
    assert after.steps == {step: whole.steps[step] for step in range(2, 6)} and after.validated == [3, 6]
    assert torch.equal(after.weight, whole.weight)


@pytest.mark.parametrize("ends", ["well", "by an exception"])
def test_a_trainer_is_given_back_as_it_was(root, tmp_path, ends):
    run = trainer(tmp_path, callbacks=[StopAt(2)] if ends != "well" else [])
    module = Players()
    for steps in (6, 9):
        run.fit_loop.epoch_loop.max_steps = steps
        if ends == "well":
            fit(tmp_path, root, module, trained=run, micro_batch_size=2)
        else:
            with pytest.raises(Stop):
                fit(tmp_path, root, module, trained=run, micro_batch_size=2)
        assert (run.accumulate_grad_batches, run.val_check_interval, module.accumulate_grad_batches) == (1, 3, 1)
    assert module.validated == ([3, 6, 9] if ends == "well" else [])


@pytest.mark.parametrize("kind", [Automatic, Players])
def test_numbers_are_logged_once_a_step(root, tmp_path, kind):
    logger = CSVLogger(tmp_path, name="", version="")
    logging = {"logger": logger, "log_every_n_steps": 2, "limit_val_batches": 0}
    module = fit(tmp_path, root, kind(), trained=trainer(tmp_path, **logging), micro_batch_size=2)
    assert module.global_step == 6
    title, *rows = (Path(tmp_path) / "metrics.csv").read_text().splitlines()
    column = title.split(",").index("step")
    assert [int(row.split(",")[column]) for row in rows] == [1, 3, 5]


def test_validations_may_go_by_the_clock_or_the_epoch(root, tmp_path):
    by_clock = trainer(tmp_path, 2, val_check_interval="00:10:00:00", check_val_every_n_epoch=1)
    assert fit(tmp_path, root, Automatic(), trained=by_clock, micro_batch_size=2).validated == []
    by_epoch = trainer(tmp_path, 8, val_check_interval=1.0, check_val_every_n_epoch=1)
    assert fit(tmp_path, root, Automatic(), trained=by_epoch, micro_batch_size=2).validated == [4, 8]
    by_share = trainer(tmp_path, 8, val_check_interval=0.5, check_val_every_n_epoch=1)
    assert fit(tmp_path, root, Automatic(), trained=by_share, micro_batch_size=8).validated == [2, 4, 6, 8]
    with pytest.raises(ValueError, match=r"^trainer.val_check_interval: 0.5 of an epoch .* takes 4 batches"):
        fit(tmp_path, root, Automatic(), trained=by_share, micro_batch_size=2)


def test_ranks_take_equal_parts_of_a_step(root):
    """Two GPUs, and four that need not accumulate, see what one sees in a step."""
    orders = {}
    for ranks, micro in ((1, 8), (1, 2), (2, 2), (4, 2), (8, 2)):
        batches = []
        for rank in range(ranks):
            data = datamodule(root, micro_batch_size=micro)
            data.trainer = Ranks(rank, ranks)
            data.setup("fit")
            batches.append([batch.index.tolist() for batch in data.train_dataloader()])
        number = batches_per_step(data.trainer)
        assert number * len(batches[0][0]) * ranks == STEP
        indices = [index for together in zip(*batches, strict=True) for part in together for index in part]
        orders[ranks, micro] = [sorted(indices[start : start + STEP]) for start in range(0, SIZE, STEP)]
    assert len({str(order) for order in orders.values()}) == 1


@pytest.mark.parametrize(
    ("batch_size", "micro_batch_size", "ranks", "at_a_time"),
    [(512, 64, 1, 64), (512, 64, 8, 64), (512, 64, 32, 16), (512, 4, 1, 4), (1024, None, 2, 512), (6, 64, 1, 6)],
)
def test_a_gpu_takes_its_part_or_as_many_as_it_may(batch_size, micro_batch_size, ranks, at_a_time):
    assert Steps(batch_size, micro_batch_size).of_rank(ranks) == at_a_time


def test_steps_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match=r"^batch_size: 512 images in total don't divide over 3 ranks; give a"):
        Steps(512, 64).of_rank(3)
    with pytest.raises(ValueError, match=r"^micro_batch_size: the 256 .* don't divide into batches of 48; give 32"):
        Steps(512, 48).of_rank(2)
    with pytest.raises(ValueError, match=r"^micro_batch_size: must be at least 1, given 0"):
        datamodule("nowhere", micro_batch_size=0)


@pytest.mark.parametrize("kind", [Automatic, Players])
def test_what_makes_a_step_is_said_once(root, tmp_path, kind):
    by_trainer = {"accumulate_grad_batches": 2} if kind is Automatic else {}
    run = trainer(tmp_path, **by_trainer)
    option = f"{'trainer' if by_trainer else 'model'}.accumulate_grad_batches"
    with pytest.raises(ValueError, match=rf"^micro_batch_size: .* follows from it, but {option} says 2, too; leave"):
        fit(tmp_path, root, kind() if by_trainer else kind(2), trained=run, micro_batch_size=2)


@pytest.mark.parametrize(
    ("options", "ranks", "at_a_time"),
    [
        ({}, 2, 4),
        ({"micro_batch_size": 3}, 2, 3),
        ({"micro_batch_size": 64}, 2, 4),
        ({"micro_batch_size": 2}, 3, 2),
        ({"val_batch_size": 2}, 2, 1),
        ({"micro_batch_size": 2, "val_batch_size": 3}, 1, 3),
    ],
)
def test_evaluation_takes_as_many_as_training_unless_told(root, options, ranks, at_a_time):
    data = datamodule(root, **options)
    data.trainer = Ranks(0, ranks)
    data.setup("validate")
    assert data.val_dataloader().batch_size == at_a_time
