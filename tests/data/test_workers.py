"""Processes that load data outlive the signals that tell a run to stop."""

import os
import signal
import subprocess

import pytest
from torch.utils.data import DataLoader

from vfm_vae.data.workers import STOPPING, outlive_signals


@pytest.mark.parametrize("number", STOPPING)
def test_loading_goes_on_until_the_process_that_trains_ends_it(number: signal.Signals):
    batches = iter(DataLoader(range(40), batch_size=1, num_workers=1, worker_init_fn=outlive_signals))
    next(batches)
    (worker,) = batches._workers
    subprocess.run(["kill", f"-{number.value}", str(worker.pid)], check=True)  # as a terminal does: not by this process
    assert [int(batch) for batch in batches] == list(range(1, 40))
    batches = iter(DataLoader(range(40), batch_size=1, num_workers=1, worker_init_fn=outlive_signals))
    next(batches)
    (worker,) = batches._workers
    os.kill(worker.pid, signal.SIGTERM)
    worker.join(30)
    assert worker.exitcode == 0
