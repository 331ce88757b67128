"""A rank that fails takes the whole job down within a bounded time, and one sees why."""

import os
import signal
import time
from pathlib import Path

import processes
import pytest

from callbacks.rank_failure import EndTogether

ROOT = Path(__file__).parents[1]
GRACE = 3

# Rank `rank` fails in step 3 as `how` says; the other waits for it in a collective of its backend, or, as where a
# backend notices no peer's death, in a way that nothing interrupts.
SCRIPT = """
import os, signal, sys, time
from datetime import timedelta
from pathlib import Path
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from callbacks.rank_failure import EndTogether

rank, how, waits, out, grace = int(sys.argv[1]), sys.argv[2], sys.argv[3], Path(sys.argv[4]), float(sys.argv[5])

class Module(LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 2)
    def setup(self, stage):
        (out / f"pid{self.global_rank}").write_text(str(os.getpid()))
    def training_step(self, batch, batch_idx):
        if batch_idx == 3 and self.global_rank == rank:
            (out / "failed").write_text(str(time.time()))
            if how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise RuntimeError("the data set is broken")
        if batch_idx == 3 and waits == "deaf":
            time.sleep(1000)
        return self.layer(batch).sum()
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)

class Strategy(DDPStrategy):
    def teardown(self):
        if how == "stuck" and self.global_rank == rank:
            time.sleep(1000)
        super().teardown()

trainer = Trainer(
    accelerator="cpu", devices=2, strategy=Strategy(timeout=timedelta(seconds=30)), logger=False, max_epochs=1,
    enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    callbacks=[EndTogether(grace_seconds=grace)],
)
trainer.fit(Module(), torch.utils.data.DataLoader(torch.randn(100, 2)))
"""


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def fail(folder: Path, rank: int, how: str, waits: str) -> tuple[float, int, str]:
    """Seconds from the failure to the end of the last process, the command's code, standard error."""
    (folder / "script.py").write_text(SCRIPT)
    command = [folder / "script.py", str(rank), how, waits, folder, str(GRACE)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "PYTHONPATH": str(ROOT)}
    process = processes.start(command, cwd=folder, env=environment, ranks=2)
    try:
        code = process.wait(timeout=60)
        pids = [int((folder / f"pid{number}").read_text()) for number in (0, 1)]
        deadline = time.time() + 20
        while any(map(alive, pids)) and time.time() < deadline:
            time.sleep(0.05)
        ended = time.time()
    finally:
        left = [int(path.read_text()) for path in folder.glob("pid*")]
        for pid in filter(alive, left):
            os.kill(pid, signal.SIGKILL)
    return ended - float((folder / "failed").read_text()), code, process.printed()[1]


# What watches: the backend sees the connection close, Lightning looks every 5 s for ranks that it started, these look
# every second for rank zero; starting and ending of Python processes comes on top.
BOUND = 10.0


@pytest.mark.parametrize(
    ("rank", "how", "waits"),
    [(0, "kill", "deaf")]
    + [
        pytest.param(*case, marks=pytest.mark.slow)
        for case in [
            (1, "raise", "collective"),
            (1, "kill", "collective"),
            (0, "raise", "collective"),
            (1, "kill", "deaf"),
            (0, "raise", "deaf"),
            (0, "stuck", "deaf"),
            (1, "stuck", "deaf"),
        ]
    ],
)
def test_the_job_ends(tmp_path: Path, rank: int, how: str, waits: str):
    seconds, code, error = fail(tmp_path, rank, how, waits)
    print(f"rank {rank}, {how}, {waits}: {seconds:.1f} s, exit code {code}")
    assert seconds < BOUND + (GRACE if how == "stuck" else 0)
    assert code != 0
    assert how == "kill" or "RuntimeError: the data set is broken" in error
    assert (rank, waits) != (0, "deaf") or "rank 1 ends: the process that started it is gone" in error


def test_grace_must_be_positive():
    with pytest.raises(ValueError, match="grace_seconds: must be above 0"):
        EndTogether(0)
