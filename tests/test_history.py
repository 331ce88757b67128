"""What a run's folder tells of its trainings, however they ended."""

import json
import subprocess
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from vfm_vae.history import HISTORY, History, command_line, commit, device_name, read_history
from vfm_vae.lightning_private import undeclared
from vfm_vae.writing import NotWritten

COMMAND = ["vfm_vae", "fit", "-c", "a file.yaml", "--config=b.yaml", "--model.seed=3", "--trainer.max_steps", "4"]


class Counting(LightningModule):
    """Counts images and refused steps as our modules do."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)
        self.images_seen, self.skipped_steps = 0, 0

    def training_step(self, batch, _):
        self.images_seen += len(batch)
        self.skipped_steps += 1
        return self.layer(batch).mean()

    def validation_step(self, batch, _):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)

    def on_save_checkpoint(self, checkpoint):
        checkpoint["counted"] = self.images_seen, self.skipped_steps

    def on_load_checkpoint(self, checkpoint):
        self.images_seen, self.skipped_steps = checkpoint["counted"]


class Data(torch.utils.data.Dataset):
    def __len__(self):
        return 24

    def __getitem__(self, index):
        return torch.ones(2)


class Ends(Callback):
    """Ends training by an error after some steps."""

    def __init__(self, error, after):
        self.error, self.after = error, after

    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == self.after:
            raise self.error


def fit(folder: Path, *callbacks: Callback, ckpt_path: str | None = None, **options) -> None:
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        default_root_dir=folder,
        callbacks=[History("vfm_vae"), *callbacks],
        **{"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
        | {"max_steps": 6, "val_check_interval": 2, "num_sanity_val_steps": 1}
        | options,
    )
    undeclared(trainer).datamodule = None
    loader = DataLoader(Data(), batch_size=4)
    trainer.fit(Counting(), loader, DataLoader(Data(), batch_size=24), ckpt_path=ckpt_path)


@pytest.fixture(autouse=True)
def typed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sys.argv", COMMAND)


def test_a_run_that_goes_on_has_a_session_for_each_start(tmp_path: Path):
    last = ModelCheckpoint(tmp_path, save_last=True)
    fit(tmp_path, last, max_steps=2, enable_checkpointing=True)
    fit(tmp_path, ckpt_path=str(tmp_path / "last.ckpt"))
    first, second = read_history(tmp_path)
    assert first["command"] == "python -m vfm_vae fit -c 'a file.yaml' --config=b.yaml --model.seed=3 " + (
        "--trainer.max_steps 4"
    )
    assert first["program"] == "vfm_vae" and first["configs"] == ["a file.yaml", "b.yaml"]
    assert first["options"] == ["--model.seed=3", "--trainer.max_steps", "4"]
    assert [each["outcome"] for each in (first, second)] == ["finished"] * 2 and first["error"] is None
    assert (first["images_seen"], second["images_seen"]) == ([0, 8], [8, 24])
    assert (first["steps"], second["steps"]) == ([0, 2], [2, 6])
    assert (first["skipped_steps"], second["skipped_steps"]) == (2, 4)  # each within its own session
    assert first["device"].startswith("CPU, ") and first["devices"] == first["nodes"] == 1
    assert first["precision"] == "32-true" and first["peak_memory_gb"] is None and first["damaged_images"] is None
    assert {"python", "torch", "vfm_vae"} <= first["versions"].keys()
    began, ended = (datetime.fromisoformat(first[name]) for name in ("started", "ended"))
    assert began.utcoffset() is not None and began <= ended and 0 <= first["seconds"] < 60


@pytest.mark.parametrize(
    ("error", "outcome", "said"),
    [
        (SystemExit(0), "stopped", None),
        (KeyboardInterrupt(), "stopped", None),
        (ValueError("no\n  such <image>"), "failed", "ValueError: no such <image>"),
    ],
)
def test_how_a_session_ended(tmp_path: Path, error: BaseException, outcome: str, said: str | None):
    with pytest.raises((type(error), SystemExit)):
        fit(tmp_path, Ends(error, after=3))
    (session,) = read_history(tmp_path)
    assert (session["outcome"], session["error"]) == (outcome, said)
    assert session["ended"] is not None and session["images_seen"] == [0, 12] and session["steps"] == [0, 3]


def test_while_a_session_runs_its_numbers_are_those_of_the_last_validation(tmp_path: Path):
    """That is what a kill leaves."""
    seen = []

    class Look(Callback):
        def on_train_batch_start(self, *args):
            seen.append(read_history(tmp_path)[0])

    fit(tmp_path, Look())
    assert [session["images_seen"][1] for session in seen] == [0, 0, 8, 8, 16, 16]
    assert {session["outcome"] for session in seen} == {session["ended"] for session in seen} == {None}


def test_trial_runs_have_none(tmp_path: Path):
    fit(tmp_path, fast_dev_run=True)
    fit(tmp_path, limit_train_batches=1, val_check_interval=1)
    assert not (tmp_path / HISTORY).exists()


def test_only_rank_zero_writes_and_all_ranks_end_where_it_cannot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "is_global_zero", False)
        fit(tmp_path)
    assert not (tmp_path / HISTORY).exists()
    (tmp_path / HISTORY).mkdir()
    with (
        pytest.warns(UserWarning, match="is no history of a run"),
        pytest.raises(NotWritten, match=r"history.json' .a folder lies there"),
    ):
        fit(tmp_path)


def test_what_is_no_history(tmp_path: Path):
    assert read_history(tmp_path) == []
    odd = ('"images_seen": 3', '"images_seen": [3]', '"steps": [0, "7"]', '"seconds": "long"', '"configs": "demo"')
    sessions = ("3", "[3]", *(f"[{{{each}}}]" for each in odd))
    for content in ("{", "[]", *(f'{{"sessions": {each}}}' for each in sessions)):
        (tmp_path / HISTORY).write_text(content)
        with pytest.raises(ValueError, match=r"history.json' is no history of a run \("):
            read_history(tmp_path)
    (tmp_path / HISTORY).write_text('{"sessions": [{"seconds": NaN, "images_seen": [null, 1e999]}]}')
    assert read_history(tmp_path) == [{"seconds": None, "images_seen": [None, None]}]
    (tmp_path / HISTORY).write_text("{")
    with pytest.warns(UserWarning, match="it is replaced"):
        fit(tmp_path)
    assert len(json.loads((tmp_path / HISTORY).read_text())["sessions"]) == 1


def test_commands_in_other_spellings():
    assert command_line("ldm", ["fit", "-ca.yaml", "-c=b.yaml", "--x"])["configs"] == ["a.yaml", "b.yaml"]
    assert command_line("ldm", [])["command"] == "python -m ldm"
    assert command_line("ldm", ["fit", "-c"])["configs"] == []  # which the parser refuses


def test_the_commit_of_a_clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").write_text("a")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a"]
    for words in (["init", "-q"], ["add", "file"], ["commit", "-q", "-m", "first"]):
        subprocess.run([*git, *words], check=True)
    commit.cache_clear()
    found = commit(tmp_path)
    assert found is not None and len(found) == 40 and commit(tmp_path / "within") is None
    commit.cache_clear()
    (tmp_path / "file").write_text("b")
    assert commit(tmp_path) == f"{found}+changes"
    commit.cache_clear()
    monkeypatch.setenv("PATH", "")
    assert commit(tmp_path) is None
    commit.cache_clear()


def test_names_of_devices(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)

    def on(kind: str, ranks: int) -> str:
        return device_name(SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device(kind)), world_size=ranks))

    assert on("cuda", 8) == "8 x NVIDIA H100 80GB HBM3" and on("cpu", 1) == "CPU, 2 threads"
    assert on("cuda", 1) == "1 x NVIDIA H100 80GB HBM3" and on("cpu", 2) == "2 x CPU, 2 threads"
