"""Checkpoints of training: a save that fails is none, is said, and never costs the former one."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import tracemalloc
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import fsspec
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from callbacks.checkpoint import LastCheckpoint
from callbacks.preemption import StopOnSignal
from vfm_vae.saving import WholeCheckpoints

ROOT = Path(__file__).parents[1]


class Module(LightningModule):
    """Counts its steps."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)
        self.steps = 0

    def training_step(self, batch, batch_idx):
        self.steps += 1
        return self.layer(batch).square().mean()

    def validation_step(self, batch, batch_idx):
        self.log("val/lpips", 1.0 / (1 + self.steps))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 0.1)


class After(Callback):
    """Does something after a step."""

    def __init__(self, step: int, action: Callable[[], None]):
        self.step, self.action = step, action

    def on_train_batch_end(self, trainer, module, *args):
        if trainer.global_step == self.step:
            self.action()


def last(folder: Path) -> LastCheckpoint:
    checkpoint = LastCheckpoint(every_n_steps=4)
    checkpoint.dirpath = str(folder)
    return checkpoint


def best(folder: Path) -> ModelCheckpoint:
    return ModelCheckpoint(folder, "best", monitor="val/lpips", mode="min", enable_version_counter=False)


def named(folder: Path) -> ModelCheckpoint:
    return ModelCheckpoint(folder, every_n_train_steps=4, save_top_k=-1, enable_version_counter=False)


def fit(*callbacks: Callback, module: Module | None = None, ckpt_path: str | None = None, **kwargs) -> Module:
    """Trains and validates after four steps."""
    module = module or Module()
    options = {"max_steps": 4, "val_check_interval": 4, "num_sanity_val_steps": 0, "logger": False}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(accelerator="cpu", devices=1, callbacks=[*callbacks], **quiet | options | kwargs)
    data = DataLoader(torch.ones(60, 2)), DataLoader(torch.ones(2, 2))
    trainer.fit(module, *data, ckpt_path=ckpt_path, weights_only=True)
    return module


def fail(*args):
    raise OSError(errno.ENOSPC, "No space left on device")


# What goes wrong: what is replaced by what, and the reason that is given.
FAULTS = {
    "the disk is full": (os, "replace", fail, r"\(No space left on device\); the former file is kept"),
    "the disk fails": (os, "fsync", fail, r"\(No space left on device\); the former file is kept"),
    "another step is read back": (
        torch,
        "save",
        lambda content, file, save=torch.save: save(content | {"global_step": 2}, file),
        r"\(step 2 was read back, not 4\); the former file is kept",
    ),
    "it is cut": (
        torch,
        "save",
        lambda content, file, save=torch.save: (save(content, file), file.truncate(file.tell() - 99)),
        r"\(what was written can't be read back: .*cut short.*\); the former file is kept",
    ),
}


@pytest.mark.parametrize("keeps", [last, best, named])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_save_that_fails_ends_the_run_and_keeps_the_former_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str, keeps: Callable[[Path], ModelCheckpoint]
):
    fit(WholeCheckpoints(), keeps(tmp_path))
    (file,) = tmp_path.iterdir()
    former = file.read_bytes()
    module, (where, name, broken, reason) = Module(), FAULTS[fault]
    with pytest.raises(OSError, match=f"^can't write '{file}' {reason}$"):
        fit(
            WholeCheckpoints(),
            After(3, lambda: monkeypatch.setattr(where, name, broken)),
            keeps(tmp_path),
            module=module,
            max_steps=60,
        )
    assert module.steps == 4
    assert list(tmp_path.iterdir()) == [file] and file.read_bytes() == former


def test_whole_checkpoints_are_what_lightning_writes(tmp_path: Path):
    fit(last(tmp_path))
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 4 and checkpoint["optimizer_states"][0]["state"]
    assert fit(last(tmp_path), ckpt_path="last", max_steps=6).steps == 2


@pytest.mark.parametrize("keeps", [last, best])
def test_training_that_can_write_nowhere_says_so_before_its_first_step(tmp_path: Path, keeps):
    (tmp_path / "checkpoints").write_text("where the folder was to be")
    module = Module()
    with pytest.raises(OSError, match=r"can't write '.*last.ckpt' .*checkpoints"):
        fit(WholeCheckpoints(), keeps(tmp_path / "checkpoints"), module=module)
    assert module.steps == 0


def test_sharded_checkpoints_and_links_to_nothing_are_in_nobodys_way(tmp_path: Path):
    (tmp_path / "last.ckpt").mkdir()
    (tmp_path / "best.ckpt").symlink_to(tmp_path / "gone.ckpt")
    assert fit(WholeCheckpoints(), named(tmp_path)).steps == 4


@pytest.mark.parametrize("former", [0, 5000])
def test_a_disk_without_space_for_one_checkpoint_is_seen_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, former: int
):
    """A former checkpoint tells how large they are; else it is the module with both averages of Adam, here 36 bytes."""
    (tmp_path / "best.ckpt").write_bytes(bytes(former))
    usage, needed = namedtuple("usage", "total used free"), max(former, 36)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(1 << 40, 0, needed - 1))
    module = Module()
    with pytest.raises(OSError, match=r"can't write '.*last.ckpt' .*MB are needed"):
        fit(last(tmp_path), module=module)
    assert module.steps == 0
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(1 << 40, 0, max(needed, 1 << 20)))
    assert fit(last(tmp_path), module=module).steps == 4


def test_a_development_run_leaves_nothing(tmp_path: Path):
    fit(last(tmp_path / "run"), fast_dev_run=True)
    assert not list(tmp_path.iterdir())


def test_what_killed_runs_left_is_taken_away(tmp_path: Path):
    (tmp_path / ".best-v1.ckpt.partial").write_bytes(bytes(99))
    fit(last(tmp_path))
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]


def test_a_stop_that_could_not_save_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    fit(last(tmp_path))

    def stop():
        monkeypatch.setattr(os, "replace", fail)
        os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(OSError, match=r"can't write '.*last.ckpt' \(No space left on device\)"):
        fit(After(2, stop), last(tmp_path), StopOnSignal(), max_steps=60)
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 4
    assert "saved" not in capsys.readouterr().err


def test_there_is_never_a_copy_of_a_checkpoint_in_memory(tmp_path: Path):
    module = Module()
    module.register_buffer("large", torch.zeros(5_000_000))  # 20 MB, which tracemalloc, watching Python, doesn't see
    trainer = Trainer(accelerator="cpu", logger=False, callbacks=[last(tmp_path)], barebones=False)
    trainer.strategy.connect(module)
    WholeCheckpoints().setup(trainer, module, "fit")
    tracemalloc.start()
    trainer.save_checkpoint(tmp_path / "last.ckpt", weights_only=True)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2_000_000 < 20_000_000 < (tmp_path / "last.ckpt").stat().st_size


def test_temporary_folders_are_not_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "full"))  # and missing
    assert fit(last(tmp_path / "run")).steps == 4
    assert (tmp_path / "run/last.ckpt").is_file() and not (tmp_path / "full").exists()


def test_addresses_of_other_file_systems_are_left_to_lightning():
    fit(WholeCheckpoints(), ModelCheckpoint("memory://run/checkpoints", save_last=True))
    with fsspec.open("memory://run/checkpoints/last.ckpt", "rb") as file:
        assert torch.load(file, weights_only=True)["global_step"] == 4


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 30700000\n"
DAMAGES = {"empty": lambda _: b"", "cut": lambda content: content[: len(content) // 2], "a Git LFS": lambda _: LFS}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_last_names_itself_and_the_newest_whole_one(tmp_path: Path, damage: str):
    for name, seconds in (("older.ckpt", 100), ("newer.ckpt", 200), ("newest.ckpt", 300), ("last.ckpt", 400)):
        fit(last(tmp_path / "other"), module=Module())
        (tmp_path / "other/last.ckpt").rename(tmp_path / name)
        os.utime(tmp_path / name, (seconds, seconds))
    for name in ("newest.ckpt", "last.ckpt"):
        (tmp_path / name).write_bytes(DAMAGES[damage]((tmp_path / name).read_bytes()))
        os.utime(tmp_path / name, (300, 300))
    module = Module()
    message = (
        rf"^ckpt_path: '{tmp_path}/last.ckpt' .*{damage}.*the newest whole one beside it is '{tmp_path}/newer.ckpt'$"
    )
    with pytest.raises(ValueError, match=message):
        fit(last(tmp_path), module=module, ckpt_path="last")
    for name in ("older.ckpt", "newer.ckpt"):
        (tmp_path / name).unlink()
    with pytest.raises(ValueError, match="no whole one lies beside it"):
        fit(last(tmp_path), module=module, ckpt_path="last")
    assert module.steps == 0


RANKS = """
import errno, os, sys, torch
from pathlib import Path
from lightning.pytorch import Callback, LightningModule, Trainer
from callbacks.checkpoint import LastCheckpoint
from test_saving import Module, fail

class Told(Callback):
    def on_train_start(self, trainer, module):
        if trainer.is_global_zero:
            os.replace = fail
    def on_exception(self, trainer, module, exception):
        out = Path(sys.argv[1]) / f"rank{trainer.global_rank}"
        out.write_text(f"{trainer.global_step} {type(exception).__name__}: {exception}")

last = LastCheckpoint(every_n_steps=2)
last.dirpath = sys.argv[1]
trainer = Trainer(
    accelerator="cpu", devices=2, strategy="ddp", logger=False, enable_progress_bar=False, enable_model_summary=False,
    max_steps=9, limit_val_batches=0, callbacks=[Told(), last],
)
trainer.fit(Module(), torch.utils.data.DataLoader(torch.ones(60, 2)))
"""


@pytest.mark.slow
def test_all_ranks_hear_of_a_save_that_fails(tmp_path: Path):
    (tmp_path / "ranks.py").write_text(RANKS)
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
    }
    command = [sys.executable, tmp_path / "ranks.py", tmp_path]
    done = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, timeout=100)
    assert done.returncode not in (0, None)
    message = f"2 NotWritten: can't write '{tmp_path}/last.ckpt' (No space left on device)"
    assert [(tmp_path / f"rank{rank}").read_text() for rank in (0, 1)] == [message, message]
    assert not list(tmp_path.glob("*.ckpt*"))
