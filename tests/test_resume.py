"""Killed in the middle of an epoch and resumed, by the command line: no sample twice, none lost, the same weights."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import processes
import pytest
import torch
from test_cli import DEMO, ENVIRONMENT, ROOT, SMALL

from vfm_vae.data.latents import RunningStatistics
from vfm_vae.writing import write_tensors

IMAGES = 52
NUM_STEPS, BATCH, EPOCH = 9, 8, 6  # so many images make six batches, so that the run ends within its second epoch
SMALLER = 4  # a batch by which all images are seen

# Every rank notes what it trains on, and every step is saved.
WATCH = """
import os
from lightning.pytorch import Callback


class Watch(Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        with open(f"{os.environ['SEEN']}_{trainer.global_rank}.txt", "a") as file:
            print(pl_module.images_seen, *batch.index.tolist(), file=file)
"""
OVERLAY = """
data: {num_workers: 2, val_batch_size: 26}
trainer:
  limit_val_batches: 0
  callbacks:
  - class_path: callbacks.ema.EMA
    init_args: {decay: 0.9}
  - class_path: watch.Watch
  - class_path: lightning.pytorch.callbacks.ModelCheckpoint
    init_args: {save_last: true, every_n_train_steps: 1, enable_version_counter: false}
"""
SMALL_LDM = """
model:
  model: {init_args: {in_channels: 4, depth: 2, width: 32, num_heads: 2}}
  tokenizer: null
data: {root: latents, batch_size: 8}
trainer:
  logger:
    class_path: lightning.pytorch.loggers.TensorBoardLogger
    init_args: {save_dir: runs, name: ldm, version: ""}
"""


@pytest.fixture
def folder(tmp_path: Path, photos: Path) -> Path:
    for name, text in (("watch.py", WATCH), ("small.yaml", SMALL), ("small_ldm.yaml", SMALL_LDM)):
        (tmp_path / name).write_text(text)
    (tmp_path / "overlay.yaml").write_text(OVERLAY)
    (tmp_path / "photos").symlink_to(photos)
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(52, 4, 8, 8, generator=generator)
    (tmp_path / "latents/train").mkdir(parents=True)
    for shard, rows in enumerate(latents.split(20)):
        tensors = {"latents": rows, "latents_flip": rows.flip(3), "labels": torch.arange(len(rows)) % 13}
        write_tensors(tmp_path / f"latents/train/shard{shard}.safetensors", tensors)
    statistics = RunningStatistics(4)
    statistics.add(latents)
    statistics.compute().write(tmp_path / "latents/train/latents_stats.pt")
    return tmp_path


def command(source: str, ranks: int, name: str, num_steps: int, size: int) -> list[str]:
    if source == "latents":
        start = ["ldm", "fit", "-c", str(ROOT / "configs/demo/ldm.yaml"), "-c", "small_ldm.yaml", "-c", "overlay.yaml"]
        start += [f"--trainer.max_steps={num_steps}"]
    else:
        start = ["vfm_vae", "fit", *DEMO, "-c", "small.yaml", "-c", "overlay.yaml"]
        root = {"folder": "photos", "shards": "photos/shards"}[source]
        start += [f"--data.source={source}", f"--data.root={root}", f"--model.max_images={num_steps * BATCH}"]
    start += [f"--trainer.logger.init_args.name={name}", "--ckpt_path=last", f"--data.batch_size={size}"]
    if ranks > 1:
        start += [f"--trainer.devices={ranks}", "--trainer.strategy=ddp_find_unused_parameters_true"]
    return ["-m", *start]


def start(
    folder: Path, source: str, ranks: int, name: str, num_steps: int = NUM_STEPS, size: int = BATCH
) -> processes.Process:
    environment = ENVIRONMENT | {"SEEN": name, "MASTER_ADDR": "127.0.0.1"}
    words = command(source, ranks, name, num_steps, size)
    return processes.start(words, cwd=folder, env=environment, start_new_session=True, ranks=ranks)


def wait_for(process: processes.Process, condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 200
    while not condition() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)


def seen(folder: Path, name: str, rank: int) -> dict[int, list[int]]:
    """Numbers of the samples by the count of images after them."""
    rows = [[int(number) for number in line.split()] for line in (folder / f"{name}_{rank}.txt").open()]
    assert len({row[0] for row in rows}) == len(rows)  # no batch twice
    return {row[0]: row[1:] for row in rows}


def kill(folder: Path, source: str, ranks: int) -> int:
    """Kills a run in its first epoch; forgets what it did since its checkpoint, and returns that one's images."""
    last = folder / "runs/killed/checkpoints/last.ckpt"
    killed = start(folder, source, ranks, "killed", num_steps=1000)
    wait_for(killed, last.exists)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    at = torch.load(last, weights_only=True)["images_seen"]
    assert 0 < at < EPOCH * BATCH, killed.printed()[1][-2000:]
    for rank in range(ranks):
        (folder / f"killed_{rank}.txt").write_text(
            "".join(f"{n} {' '.join(map(str, b))}\n" for n, b in seen(folder, "killed", rank).items() if n <= at)
        )
    return at


@pytest.mark.parametrize(
    ("source", "ranks"),
    [("latents", 1)]
    + [
        pytest.param(source, ranks, marks=pytest.mark.slow)
        for source, ranks in [("folder", 1), ("shards", 1), ("latents", 2), ("folder", 2), ("shards", 2)]
    ],
)
def test_killed_and_resumed_equals_uninterrupted(folder: Path, source: str, ranks: int):
    whole = start(folder, source, ranks, "whole")
    assert whole.wait(timeout=240) == 0, whole.printed()[1][-2000:]

    kill(folder, source, ranks)
    resumed = start(folder, source, ranks, "killed")
    assert resumed.wait(timeout=240) == 0, resumed.printed()[1][-2000:]
    batches = [seen(folder, "whole", rank) for rank in range(ranks)]
    assert [seen(folder, "killed", rank) for rank in range(ranks)] == batches
    assert [list(rank) for rank in batches] == [[BATCH * (step + 1) for step in range(NUM_STEPS)]] * ranks
    epoch = [numbers for rank in batches for images, numbers in rank.items() if images <= EPOCH * BATCH]
    first_epoch = [number for numbers in epoch for number in numbers]
    assert len(set(first_epoch)) == len(first_epoch) == EPOCH * BATCH

    theirs, ours = (
        torch.load(folder / f"runs/{name}/checkpoints/last.ckpt", weights_only=True) for name in ("whole", "killed")
    )
    assert theirs["images_seen"] == ours["images_seen"] == NUM_STEPS * BATCH
    for a, b in ((theirs["state_dict"], ours["state_dict"]), (theirs["ema"]["weights"], ours["ema"]["weights"])):
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "others"), [(2, 1), (1, 2)])
def test_killed_and_resumed_on_other_ranks_sees_what_is_left(folder: Path, ranks: int, others: int):
    at = kill(folder, "latents", ranks)
    num_steps = at // BATCH + (IMAGES - at) // SMALLER + 2  # two of them in the second epoch
    resumed = start(folder, "latents", others, "killed", num_steps, size=SMALLER)
    assert resumed.wait(timeout=240) == 0, resumed.printed()[1][-2000:]
    batches = [seen(folder, "killed", rank).items() for rank in range(2)]
    first_epoch = [number for rank in batches for images, numbers in rank if images <= IMAGES for number in numbers]
    assert sorted(first_epoch) == list(range(IMAGES))
    second_epoch = [number for rank in batches for images, numbers in rank if images > IMAGES for number in numbers]
    assert len(set(second_epoch)) == len(second_epoch) == 2 * SMALLER
