"""The demo's training step alone, and beside a process that keeps one core busy, by how OpenMP's threads wait.

Each figure is a process of its own, since OpenMP reads its settings when it is loaded.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from timing import table

SETTINGS = {
    "as it is": {},
    "GOMP_SPINCOUNT=1000": {"GOMP_SPINCOUNT": "1000"},
    "OMP_WAIT_POLICY=passive": {"OMP_WAIT_POLICY": "passive"},
}
WARM_UP, BATCH = 2, 32


def steps(number: int) -> None:
    """Prints the mean seconds of so many steps; what the child processes do."""
    from full_size import tokenizer  # the parent loads no torch
    from lightning.pytorch import Callback, Trainer
    from torch.utils.data import DataLoader

    class Clock(Callback):
        """Notes the seconds of each step."""

        def __init__(self) -> None:
            self.seconds: list[float] = []

        def on_train_batch_start(self, *_: Any) -> None:
            """Starts."""
            self.start = time.perf_counter()

        def on_train_batch_end(self, *_: Any) -> None:
            """Stops."""
            self.seconds.append(time.perf_counter() - self.start)

    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        module, batch = tokenizer(folder, BATCH, [], toy=True)
        Trainer(
            accelerator="cpu", devices=1, max_steps=number, logger=False, enable_checkpointing=False, callbacks=[clock],
            enable_progress_bar=False, enable_model_summary=False,
        ).fit(module, DataLoader([batch] * number, batch_size=None))  # fmt: skip
    print(f"\n{statistics.mean(clock.seconds[WARM_UP:])}")


@contextmanager
def busy_core() -> Iterator[None]:
    """A process that computes all the time."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def measure(setting: dict[str, str], number: int) -> float:
    """Mean seconds of a step in a process of its own."""
    command = [sys.executable, __file__, f"--steps={number}", "--child"]
    done = subprocess.run(command, env=os.environ | setting, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def main() -> None:
    """Prints one table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    sys.argv = sys.argv[:1]
    if options.child:
        steps(options.steps)
        return
    rows = []
    for name, setting in SETTINGS.items():
        alone = measure(setting, options.steps)
        with busy_core():
            busy = measure(setting, options.steps)
        rows.append((name, f"{1000 * alone:.0f} ms", f"{1000 * busy:.0f} ms", f"{busy / alone:.2f}x"))
    table(f"the demo's strong stage, steps of {BATCH} images", rows, "OpenMP", "alone", "beside a busy core", "ratio")


if __name__ == "__main__":
    main()
