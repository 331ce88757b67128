"""Keeps loading processes alive while training is told to stop."""

import os
import signal
import threading

# By which runs are told to stop, see `callbacks.preemption`.
STOPPING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


def outlive_signals(_: int) -> None:
    """A DataLoader's `worker_init_fn`: leaves signals to stop to the process that trains.

    A terminal's Ctrl-C, and most schedulers, send them to every process of a job. Without loading processes training
    could not end its step and save. What that process itself sends ends them. (Systems that can't tell who sent a
    signal, such as macOS, keep what Python does.)
    """
    if not hasattr(signal, "sigwaitinfo"):
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    while signal.sigwaitinfo(STOPPING).si_pid != os.getppid():
        pass
    os._exit(0)
