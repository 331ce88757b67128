"""Runs that are told to stop: they save, end with a known code, and go on as if nothing had been."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import Dataset

from callbacks.ema import EMA
from callbacks.preemption import StopOnSignal
from vfm_vae.data.resuming import ResumableLoader
from vfm_vae.data.sampling import TrainingSampler

ROOT = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1"}

# Saves at the end of an epoch only.
SMALL = """
model: {max_images: 96}
data: {num_workers: 1}
trainer:
  limit_val_batches: 0
  logger:
    class_path: lightning.pytorch.loggers.TensorBoardLogger
    init_args: {save_dir: runs, name: small, version: ""}
  callbacks:
  - class_path: callbacks.ema.EMA
  - class_path: sender.Ready
  - class_path: lightning.pytorch.callbacks.ModelCheckpoint
    init_args: {save_last: true, enable_version_counter: false}
  - class_path: callbacks.preemption.StopOnSignal
"""

# Tells the test when a step was done, and waits there for the signal: so the test knows which step it reaches.
SENDER = """
import time
from pathlib import Path
from lightning.pytorch import Callback


class Ready(Callback):
    def on_train_batch_end(self, trainer, *args):
        name = trainer.logger.name
        if name != "whole" and trainer.global_step == 3:
            Path(f"ready_{name}").touch()
            while not Path(f"sent_{name}").exists():
                time.sleep(0.01)
"""


def fit(folder: Path, name: str, *options: str) -> subprocess.Popen:
    configs = [str(ROOT / "configs/demo/tokenizer.yaml"), str(ROOT / "tests/small.yaml"), "run.yaml"]
    command = [sys.executable, "-m", "vfm_vae", "fit", *(f"--config={config}" for config in configs)]
    command += [f"--trainer.logger.init_args.name={name}", *options]
    pipes = {"stdin": subprocess.DEVNULL, "stderr": subprocess.PIPE, "stdout": subprocess.PIPE}
    environment = ENVIRONMENT | {"PYTHONPATH": str(folder)}
    return subprocess.Popen(command, cwd=folder, env=environment, start_new_session=True, **pipes)


def end(process: subprocess.Popen, timeout: float = 100) -> int:
    """The exit code, and standard error where it is not what one hopes for."""
    _, error = process.communicate(timeout=timeout)
    print(error.decode()[-3000:])
    return process.returncode


def wait_for(path: Path, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 100
    while not path.exists():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.01)


def same(ours: object, theirs: object) -> bool:
    """Whether two parts of checkpoints are equal bit for bit."""
    if isinstance(ours, torch.Tensor):
        return torch.equal(ours, theirs)
    if isinstance(ours, dict):
        return ours.keys() == theirs.keys() and all(same(ours[key], theirs[key]) for key in ours)
    if isinstance(ours, list | tuple):
        return len(ours) == len(theirs) and all(map(same, ours, theirs))
    return ours == theirs


PARTS = ("state_dict", "ema", "optimizer_states", "images_seen", "global_step", "epoch", "guard")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGTERM", pytest.param("SIGINT", marks=pytest.mark.slow)])
def test_the_command_line_saves_ends_and_goes_on(tmp_path: Path, photos: Path, name: str):
    (tmp_path / "photos").symlink_to(photos)
    (tmp_path / "run.yaml").write_text(SMALL)
    (tmp_path / "sender.py").write_text(SENDER)
    last = "checkpoints/last.ckpt"
    process = fit(tmp_path, name)
    wait_for(tmp_path / f"ready_{name}", process)
    os.killpg(process.pid, signal.Signals[name])  # as a terminal and SLURM do; what loads data gets it, too
    (tmp_path / f"sent_{name}").touch()
    assert end(process) == 0
    assert torch.load(tmp_path / "runs" / name / last, weights_only=True)["global_step"] == 3  # of 6 in the epoch
    runs = [fit(tmp_path, name), fit(tmp_path, "whole")]
    assert [end(process) for process in runs] == [0, 0]  # the demo's config says `ckpt_path: last`
    resumed, whole = (torch.load(tmp_path / "runs" / run / last, weights_only=True) for run in (name, "whole"))
    assert whole["images_seen"] == 96
    for part in PARTS:
        assert same(resumed[part], whole[part]), part


RANKS = """
import os, signal, sys, time
from pathlib import Path
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from callbacks.preemption import StopOnSignal

out, name, late = Path(sys.argv[1]), sys.argv[2], sys.argv[3] == "late"
asked = []  # by Lightning, in training

class Module(LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 2)
    def training_step(self, batch, batch_idx):
        return self.layer(batch).sum()
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)

class Event:  # of a device that there is not
    def record(self):
        self.recorded = True
    def synchronize(self):
        assert self.recorded

class Late(StopOnSignal):  # as on GPUs
    def on_train_start(self, trainer, module):
        super().on_train_start(trainer, module)
        self._late = True

class Signal(Callback):
    def on_train_start(self, trainer, module):
        broadcast = torch.distributed.broadcast
        torch.distributed.broadcast = lambda *args, **kwargs: (asked.append(args), broadcast(*args, **kwargs))
    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if batch_idx == 4 and trainer.global_rank == 1:
            (out / "sent").write_text(str(time.time()))
            if name == "SIGINT":
                os.killpg(0, signal.SIGINT)  # as a terminal does
            else:
                os.kill(os.getpid(), signal.Signals[name])
    def on_exception(self, trainer, module, exception):
        steps, code = trainer.global_step, exception.code
        (out / f"rank{trainer.global_rank}").write_text(f"{time.time()} {steps} {code} {len(asked)}")

torch.cuda.Event = Event

trainer = Trainer(
    accelerator="cpu", devices=2, strategy="ddp", logger=False, default_root_dir=out, enable_progress_bar=False,
    enable_model_summary=False, max_epochs=1,
    callbacks=[
        Signal(), ModelCheckpoint(out, save_last=True, save_top_k=0),
        (Late if late else StopOnSignal)(every_n_steps=3, exit_code=7),
    ],
)
trainer.fit(Module(), torch.utils.data.DataLoader(torch.randn(1000, 2)))
"""


# Told in step 5, they ask each other after steps 3, 6 and 9, and on GPUs read the answer when they next ask.
@pytest.mark.slow
@pytest.mark.parametrize(("name", "when_read", "last_step"), [("SIGINT", "soon", "6"), ("SIGTERM", "late", "9")])
def test_a_signal_to_one_rank_or_to_all_stops_both(tmp_path: Path, name: str, when_read: str, last_step: str):
    (tmp_path / "ranks.py").write_text(RANKS)
    command = [sys.executable, str(tmp_path / "ranks.py"), str(tmp_path), name, when_read]
    environment = ENVIRONMENT | {"PYTHONPATH": str(ROOT)}
    pipes = {"stdin": subprocess.DEVNULL, "stderr": subprocess.PIPE, "start_new_session": True}
    process = subprocess.Popen(command, env=environment, **pipes)
    code = end(process, timeout=60)
    sent = float((tmp_path / "sent").read_text())
    for rank in (0, 1):
        when, step, exit_code, asked = (tmp_path / f"rank{rank}").read_text().split()
        assert float(when) - sent < 5
        assert (step, exit_code) == (last_step, "7")
        assert asked == "1"  # as training began; in no step since
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == int(last_step)
    assert code == 7


@pytest.mark.gpu
def test_asking_leaves_the_queue_filled(tmp_path: Path):
    strategy = SimpleNamespace(root_device=torch.device("cuda", torch.cuda.current_device()))
    trainer = SimpleNamespace(world_size=2, strategy=strategy)
    stop = StopOnSignal()
    stop._late = True
    torch.distributed.init_process_group("nccl", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        assert [stop._agreed(trainer) for _ in range(3)] == [0, 0, 0]  # whatever it allocates it has by now
        stop._received = signal.SIGTERM
        torch.cuda._sleep(2 * 10**9)  # cycles, about a second
        assert stop._agreed(trainer) == 0 and not torch.cuda.current_stream().query()
        assert stop._agreed(trainer) == signal.SIGTERM
    finally:
        torch.distributed.destroy_process_group()


class Raise(Callback):
    """Sends the process a signal in a step of training, or in a batch of a validation."""

    def __init__(self, step: int | None = None, validation: tuple[int, int] | None = None, name: str = "SIGTERM"):
        self.step, self.validation, self.signal = step, validation, signal.Signals[name]
        self.batches, self.validations = [], 0

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.batches += [batch.index.tolist()]
        if trainer.global_step + 1 == self.step:
            os.kill(os.getpid(), self.signal)

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if self.validation == (trainer.global_step, batch_idx):
            os.kill(os.getpid(), self.signal)

    def on_validation_epoch_end(self, trainer, pl_module):
        self.validations += 1
        self.loss = float(trainer.callback_metrics["val/loss"]) if "val/loss" in trainer.callback_metrics else None
        self.was_saved = Path(trainer.checkpoint_callback.dirpath, "last.ckpt").is_file()


class Drawn(Dataset):
    """As the loader that keeps its place asks for samples."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __getitem__(self, draw):
        return self.dataset[draw.index]


@pytest.fixture
def run(trainer, new_module, data, tmp_path):
    """Trains in the folder `name` until the end or a signal; returns the code, the last checkpoint, who watched."""

    def loader():
        sampler, collate = TrainingSampler(data.train_set, 4), data.val_dataloader().collate_fn
        return ResumableLoader(Drawn(data.train_set), batch_size=4, sampler=sampler, collate_fn=collate)

    data.train_dataloader = loader

    def start(name: str, sender: Callback | None = None, accumulate: int = 1, **kwargs):
        sender = sender or Raise()
        saves = ModelCheckpoint(tmp_path / name, save_last=True, save_top_k=0, enable_version_counter=False)
        options = {"enable_checkpointing": True, "max_steps": 12, "check_val_every_n_epoch": None}
        fitting = trainer(EMA(), sender, saves, StopOnSignal(), **options | {"val_check_interval": 5} | kwargs)
        code = None
        try:
            fitting.fit(new_module(accumulate), data, ckpt_path="last", weights_only=True)
        except SystemExit as stop:
            code = stop.code
        return code, torch.load(tmp_path / name / "last.ckpt", weights_only=True), sender

    return start


@pytest.mark.parametrize(
    "told",
    [
        {"step": 2},
        {"step": 5, "name": "SIGINT"},
        {"validation": (5, 0)},
        {"validation": (5, 1), "name": "SIGINT"},
        {"step": 9},
    ],
)
def test_stopped_anywhere_equals_uninterrupted(run, told):
    """In the middle of an epoch, where a validation is due, in it, and after it."""
    _, whole, whole_sender = run("whole")
    code, stopped, first = run("stopped", Raise(**told))
    assert code == 0 and stopped["global_step"] == (told.get("step") or 5)
    code, resumed, second = run("stopped")
    assert code is None
    assert first.batches + second.batches == whole_sender.batches
    assert first.validations + second.validations == whole_sender.validations == 2  # each one whole, none twice
    assert second.loss == whole_sender.loss
    for part in ("state_dict", "ema", "optimizer_states", "images_seen", "global_step", "epoch"):
        assert same(resumed[part], whole[part]), part
    counted = [
        state["loops"]["fit_loop"]["epoch_loop.state_dict"]["_batches_that_stepped"] for state in (whole, resumed)
    ]
    assert counted[0] == counted[1]


def test_the_last_validation_is_not_lost(run):
    """There is no step left to resume at, so it would never be run again: it is saved first, and goes on."""
    code, stopped, sender = run("stopped", Raise(validation=(5, 0)), max_steps=5)
    assert code is None and sender.was_saved and stopped["global_step"] == 5
    _, _, whole = run("whole", max_steps=5)
    assert not whole.was_saved and sender.validations == whole.validations == 1 and sender.loss == whole.loss


@pytest.mark.parametrize(("told", "step"), [({"step": 2}, 2), ({"validation": (2, 2)}, 3)])
def test_accumulated_gradients_are_not_lost(run, told, step):
    """Nor where the signal comes in the last batch of a validation, so that it is heard in the next step."""
    options = {"accumulate": 2, "val_check_interval": 4, "max_steps": 5}
    code, stopped, _ = run("stopped", Raise(**told), **options)
    assert code == 0 and stopped["global_step"] == step and stopped["images_seen"] == 8 * step  # both batches of each
    _, resumed, _ = run("stopped", **options)
    _, whole, _ = run("whole", **options)
    assert same(resumed["state_dict"], whole["state_dict"])


def test_handlers_return(run):
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    before = [signal.getsignal(number) for number in numbers]
    for name, sender in (("whole", None), *((name, Raise(step=2, name=name)) for name in ("SIGUSR1", "SIGINT"))):
        run(name, sender)
        assert [signal.getsignal(number) for number in numbers] == before


class Stuck(Callback):
    """Is told to stop in a step that never ends."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 2:
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGINT)
            time.sleep(100)


def test_a_second_interrupt_ends_at_once(run, tmp_path):
    def train():
        torch.set_num_threads(1)  # those that OpenMP has in this process are not there in a fork of it
        run("stuck", Stuck())

    process = multiprocessing.get_context("fork").Process(target=train)
    process.start()
    process.join(30)
    process.kill()  # or the tests would wait for it at their end
    assert process.exitcode == -signal.SIGINT
    assert not list((tmp_path / "stuck").glob("*"))


def test_a_job_in_the_background_stays_deaf_to_the_terminal(run):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        code, last, _ = run("whole", Raise(step=2, name="SIGINT"))
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
    assert code is None and last["global_step"] == 12


@pytest.mark.parametrize("works", [True, False])
def test_a_slurm_job_is_requeued_by_its_signal_alone(run, tmp_path, monkeypatch, works):
    scontrol = tmp_path / "bin/scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\n{"true" if works else "exit 1"}\n')
    scontrol.chmod(0o755)
    job = {
        "SLURM_NTASKS": "1",
        "SLURM_JOB_NAME": "train",
        "SLURM_JOB_ID": "12",
        "SLURM_NODEID": "0",
        "SLURM_PROCID": "0",
    }
    job |= {"SLURM_LOCALID": "0", "PATH": f"{scontrol.parent}:{os.environ['PATH']}"}
    for name, value in job.items():
        monkeypatch.setenv(name, value)
    cluster = {"plugins": [SLURMEnvironment()]}
    assert run("preempted", Raise(step=2), **cluster)[0] == 0
    assert not (tmp_path / "calls").exists()
    assert run("requeued", Raise(step=2, name="SIGUSR1"), **cluster)[0] == (0 if works else 1)
    assert (tmp_path / "calls").read_text() == "requeue 12\n"
    assert not list(tmp_path.rglob("hpc_ckpt*"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"signals": ["SIGKILL"]}, "signals: 'SIGKILL'"),
        ({"signals": ["TERM"]}, "signals: 'TERM'"),
        ({"every_n_steps": 0}, "every_n_steps: must be at least 1"),
        ({"exit_code": 256}, r"exit_code: must be in \[0, 255\]"),
    ],
)
def test_impossible_options(options, message):
    with pytest.raises(ValueError, match=message):
        StopOnSignal(**options)


@pytest.mark.parametrize("save_last", [None, "link"])
def test_there_must_be_a_last_checkpoint(trainer, module, data, save_last):
    fitting = trainer(ModelCheckpoint(save_last=save_last), StopOnSignal(), enable_checkpointing=True)
    with pytest.raises(ValueError, match="StopOnSignal needs a ModelCheckpoint with save_last: true"):
        fitting.fit(module, data)
