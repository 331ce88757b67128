"""Saves and ends a run that is told to stop."""

import os
import signal
import subprocess
import threading
from collections.abc import Sequence
from typing import Any

import torch
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only, rank_zero_warn
from torch import Tensor, distributed

from vfm_vae.lightning_private import (
    BatchProgress,
    cluster_environment,
    give_sigterm_back,
    keep_sigterm,
    save_last,
    validation_is_due,
)
from vfm_vae.options import at_least, within
from vfm_vae.saving import write_whole


class StopOnSignal(Checkpoint):
    """On a signal, writes the `last` checkpoint of the run's ModelCheckpoint after the current step, and ends the run.

    With `ckpt_path: last` the same command resumes exactly where the run stopped, even in the middle of an epoch. A
    signal may reach only one rank: after each step all ranks ask each other. A stop waits for the end of an optimizer
    step, because a checkpoint holds no half-accumulated gradients. No validation is run; one that was due or had begun
    is run as a whole after resuming. Only the last validation, behind which no step is left to resume, goes on once the
    checkpoint is written. (What a validation computes after its last batch is not interrupted.) Before training begins,
    signals have their usual effect. A second Ctrl-C (SIGINT) ends the process at once, without saving.
    If a shell makes its background jobs ignore Ctrl-C, it stays ignored.

    With several GPUs, ranks read an answer when they next ask, so all of them stop one question later (by default, one
    step): waiting for the answer would leave GPUs idle at the end of each step. For the same reason, if SIGTERM is
    among the signals, Lightning's ranks no longer ask each other for it before each batch.

    The process ends by `SystemExit` out of `Trainer.fit` with code 0, as it did what it was told. Give `exit_code` if a
    scheduler restarts jobs by their code alone. Between SIGTERM and SIGKILL, SLURM leaves `KillWait` and torchrun 30
    seconds; torchrun itself ends with code 1, and passes SIGUSR1 on only with `--signals-to-handle`.

    Under SLURM it replaces Lightning's auto-requeue, which saves within the signal's handler and therefore in the
    middle of a step, to an `hpc_ckpt_*` file that then takes precedence over `ckpt_path`. Instead, the requeue signal
    (SIGUSR1, as `sbatch --signal=SIGUSR1@120` sends it two minutes before the time limit) ends the run as described,
    and rank zero calls `scontrol requeue`; if that fails, it warns, and the code is 1. SIGTERM, by which jobs are
    cancelled or preempted, requeues nothing: SLURM does that itself if it is set up to.

    List it after the ModelCheckpoint. All ranks must have equally many batches, which our DataModule ensures. If
    training runs in another thread than the main one, Python gives it no signals, and this callback does nothing.

    Args:
        signals: Names of the signals that stop the run.
        every_n_steps: Ranks ask each other for signals every so many steps.
        exit_code: Exit code of a process that was stopped.
        requeue: Whether the requeue signal requeues a SLURM job.

    Raises:
        ValueError: if an option is not possible; when training is set up, if no ModelCheckpoint keeps `last`.
        SystemExit: when the run was stopped, and its checkpoint was written and read back.
        NotWritten: when it was stopped, but could not write it.
    """

    def __init__(
        self,
        signals: Sequence[str] = ("SIGTERM", "SIGUSR1", "SIGINT"),
        every_n_steps: int = 1,
        exit_code: int = 0,
        requeue: bool = True,
    ) -> None:
        known = signal.Signals.__members__
        for name in signals:
            if name not in known or known[name] in (signal.SIGKILL, signal.SIGSTOP):
                raise ValueError(f"signals: {name!r} can't be caught as a signal; use SIGTERM or SIGUSR1, for instance")
        at_least(1, every_n_steps=every_n_steps)
        within(0, 255, exit_code=exit_code)
        self.signals = [known[name] for name in signals]
        self.every_n_steps, self.exit_code, self.requeue = every_n_steps, exit_code, requeue
        self._received = 0  # number of the signal
        self._asked = 0  # step
        self._late = False  # whether an answer is read when the next question is asked
        self._answer: _Answer | None = None
        self._saved_at_end = False  # in the last validation
        self._previous: dict[signal.Signals, Any] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Looks for the checkpoint, which is to be whole; takes SLURM's requeue signal from Lightning."""
        if stage != "fit":
            return
        if not any(checkpoint.save_last is True for checkpoint in _model_checkpoints(trainer)):
            raise ValueError("trainer.callbacks: StopOnSignal needs a ModelCheckpoint with save_last: true")
        write_whole(trainer)
        environment = _slurm(trainer)
        if environment is not None:
            environment.auto_requeue = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """From here on, signals are noted. Lightning's handler of SIGTERM, which breaks off, stands aside."""
        self._received, self._asked, self._saved_at_end = 0, trainer.global_step, False
        self._late, self._answer = trainer.strategy.root_device.type == "cuda", None
        if threading.current_thread() is threading.main_thread():
            heard = [number for number in self.signals if not _ignored_by_shell(number)]
            self._previous |= {number: signal.signal(number, self._note) for number in heard}
        if trainer.world_size > 1 and signal.SIGTERM in self.signals:
            keep_sigterm(trainer)  # Lightning hears of a signal that came before, and of no later one

    def _note(self, number: int, frame: Any) -> None:
        self._received = number
        if number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)  # so the second ends the process, whatever it is waiting for
            if getattr(rank_zero_only, "rank", 0) == 0:
                os.write(2, b"\nSIGINT: saves after this step and ends; a second one ends at once, without saving\n")

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """At the end of a step, stops if any rank was told to."""
        if trainer.global_step - self._asked < self.every_n_steps:
            return
        self._asked = trainer.global_step  # so that nothing is asked within a step
        if validation_is_due(trainer):
            return  # the validation's first batch stops, and the checkpoint knows that it is due
        number = self._agreed(trainer)
        if number:
            self._stop(trainer, number)

    def on_validation_batch_start(self, trainer: Trainer, *args: Any) -> None:
        """Stops in a validation, which is then done anew when the run goes on; saves in the last one, which goes on."""
        if trainer.state.fn != "fit" or trainer.sanity_checking or self._saved_at_end:
            return
        number = self._agreed(trainer)
        if number and _has_taken_all_steps(trainer):
            self._saved_at_end = True
            self._save(trainer, number)
        elif number:
            _rewind(trainer.fit_loop.epoch_loop.val_loop.batch_progress)
            self._stop(trainer, number)

    def _agreed(self, trainer: Trainer) -> int:
        """The signal that any rank received, or 0; the same on all ranks."""
        if trainer.world_size == 1:
            return self._received
        number = torch.full((), self._received, device=trainer.strategy.root_device)  # `tensor` would wait to copy
        distributed.all_reduce(number, distributed.ReduceOp.MAX)
        if not self._late:
            return int(number)
        former, self._answer = self._answer, _Answer(number)
        return former.read() if former is not None else 0

    def _save(self, trainer: Trainer, number: int) -> None:
        checkpoint = next(callback for callback in _model_checkpoints(trainer) if callback.save_last is True)
        save_last(checkpoint, trainer)
        end = "; its last validation is finished now" if self._saved_at_end else ""
        name = signal.Signals(number).name
        rank_zero_info(f"{name}: saved {checkpoint.last_model_path} after step {trainer.global_step}{end}")

    def _stop(self, trainer: Trainer, number: int) -> None:
        self._save(trainer, number)
        code, environment = self.exit_code, _slurm(trainer)
        if self.requeue and environment is not None and number == environment.requeue_signal:
            code = code if not trainer.is_global_zero or _requeue() else 1
        raise SystemExit(code)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restores signal handlers, before Lightning restores its own."""
        while self._previous:
            signal.signal(*self._previous.popitem())
        give_sigterm_back(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Restores signal handlers."""
        self.on_train_end(trainer, pl_module)


class _Answer:
    """A GPU's number on its way to the host, to be read a step later."""

    def __init__(self, number: Tensor) -> None:
        self._number = number.to("cpu", non_blocking=True)  # pinned
        self._arrived = torch.cuda.Event()
        self._arrived.record()

    def read(self) -> int:
        """Waits for what was launched before the number was sent; what was launched since remains in the queue."""
        self._arrived.synchronize()
        return int(self._number)


def _model_checkpoints(trainer: Trainer) -> list[ModelCheckpoint]:
    return [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]


def _has_taken_all_steps(trainer: Trainer) -> bool:
    """Whether no step of training follows, so that a run that goes on would validate no more."""
    return trainer.should_stop or 0 <= trainer.max_steps <= trainer.global_step


def _ignored_by_shell(number: signal.Signals) -> bool:
    """Whether a shell started the process in the background, where it ignores the terminal's Ctrl-C."""
    return number == signal.SIGINT and signal.getsignal(number) is signal.SIG_IGN


def _slurm(trainer: Trainer) -> SLURMEnvironment | None:
    """SLURM's job, also where one device needs no strategy that would know it."""
    environment = cluster_environment(trainer)
    return environment if isinstance(environment, SLURMEnvironment) else None


def _requeue() -> bool:
    """Puts this job, or this task of an array, back into SLURM's queue; whether that went well."""
    job = os.environ["SLURM_JOB_ID"]
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    try:
        subprocess.run(["scontrol", "requeue", job], check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        rank_zero_warn(f"the checkpoint is saved, but the job was not requeued: {error}")
        return False
    return True


def _rewind(progress: BatchProgress) -> None:
    """Makes a loop look interrupted in its first batch, so that Lightning runs the whole of it again."""
    total: Any = progress.total  # declared without what it counts
    total.started = total.ready
    total.processed = total.completed = total.ready - 1
    progress.current.reset()
