"""Ends all ranks soon after one has failed."""

import os
import sys
import threading
import time
import traceback

from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch import Callback, LightningModule, Trainer

from vfm_vae.lightning_private import cluster_environment
from vfm_vae.options import positive


class EndTogether(Callback):
    """Ends the processes that Lightning started when one of them fails.

    Lightning's rank zero starts the other ranks of its machine and kills all of them within five seconds if one fails.
    In two more cases, ranks would wait for the process group's timeout, or forever:

    - If rank zero fails, the others notice that it is gone, and end.
    - If a rank fails with an error but can't end, because its backend waits for the others while it is torn down, it
      shows its error and ends after `grace_seconds`. (A script for several ranks must therefore not catch exceptions
      of `Trainer.fit` and go on.)

    Torchrun, and `srun --kill-on-bad-exit=1`, watch the ranks that they start. A rank that hangs without failing ends
    by the timeout of the process group, which the strategies in configs/trainer set to ten minutes.

    Args:
        grace_seconds: How long a rank with an error has to end by itself.

    Raises:
        ValueError: if the time is not positive.
    """

    def __init__(self, grace_seconds: float = 30.0) -> None:
        positive(grace_seconds=grace_seconds)
        self.grace_seconds = grace_seconds
        self._over = threading.Event()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Begins to watch."""
        self._over.clear()
        environment = cluster_environment(trainer)
        if isinstance(environment, LightningEnvironment) and trainer.local_rank > 0:
            watch = (os.getppid(), f"rank {trainer.global_rank} ends: the process that started it is gone", self._over)
            threading.Thread(target=_end_with, args=watch, daemon=True).start()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Watches no longer: after a good end each rank does what its script says."""
        self._over.set()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leaves the rank some time to end; whoever exits on purpose takes the time it needs."""
        if trainer.world_size > 1 and isinstance(exception, Exception):
            threading.Thread(target=_end_after, args=(self.grace_seconds, exception), daemon=True).start()


def _end_with(parent: int, message: str, over: threading.Event) -> None:
    while not over.wait(1.0):
        if os.getppid() != parent:
            print(message, file=sys.stderr, flush=True)
            os._exit(1)


def _end_after(seconds: float, exception: Exception) -> None:
    time.sleep(seconds)
    traceback.print_exception(exception)
    sys.stderr.flush()
    os._exit(1)
