"""What a run's trainings were: a session for each start of `fit`, in `history.json` in the run's folder."""

import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.exceptions import SIGTERMException

from vfm_vae.lightning_private import undeclared
from vfm_vae.metrics.summary import json_content, versions
from vfm_vae.saving import alike, local_path
from vfm_vae.trial import Output, is_trial
from vfm_vae.writing import write_json

HISTORY = "history.json"
STOPS = (SystemExit, KeyboardInterrupt, SIGTERMException)
CONFIG = ("-c", "--config")
LONGEST_ERROR = 500  # letters
ENDS = ("images_seen", "steps")  # two numbers each
NUMBERS = ("seconds", "skipped_steps", "damaged_images", "peak_memory_gb")


class History(Output):
    """Writes how a run was trained to `<log_dir>/history.json`. The command lines add it to every run.

    The file holds `{"sessions": [...]}`, one for each start of `fit`, and is written when training starts, after each
    validation and at the end. A session has

    - `command`, as it can be typed again, and its parts: `program`, `configs`, `options`;
    - `started` and `ended`, by ISO 8601 with the offset of the time zone, and `seconds` between them. While a session
      runs, and after a kill, `ended` and `outcome` are null, and the other numbers those of the last validation;
    - `outcome`: `finished`, `stopped` (by a signal) or `failed`, with `error` beside it, which is null otherwise;
    - `images_seen` and `steps`, each at the start and at the end, counted as the module and the trainer do;
    - `commit` of the code, with `+changes` where files differ from it; null outside a clone. `versions` of Python and
      packages;
    - `device`, the number of `devices` over all `nodes`, `precision`, and `peak_memory_gb`, the most that tensors took
      on rank zero's GPU, in 10⁹ bytes; null on CPUs;
    - `skipped_steps` within the session, and `damaged_images`, those that rank zero has met; null where nothing counts.

    Rank zero writes, and all ranks end where it can't. Trial runs have no history.

    Args:
        program: The package whose command line it is, `vfm_vae` or `ldm`.
    """

    def __init__(self, program: str) -> None:
        self.program = program
        self._file: Path | None = None
        self._former: list[dict[str, Any]] = []
        self._session: dict[str, Any] | None = None
        self._began = 0.0
        self._skipped = 0  # steps that were skipped before this session

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Asks for the folder to write to, on all ranks; looks at the clock."""
        self._session = None
        if stage != "fit" or is_trial(trainer):
            return
        folder = local_path(trainer.log_dir)
        self._file, self._began = None if folder is None else folder / HISTORY, time.monotonic()
        self._started = _now()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begins a session."""
        if self._file is None or is_trial(trainer):
            return
        try:
            self._former = read_history(self._file.parent)
        except ValueError as error:
            rank_zero_warn(f"{error}; it is replaced")
            self._former = []
        self._session = {
            **command_line(self.program, sys.argv[1:]),
            "started": self._started,
            "ended": None,
            "outcome": None,
            "error": None,
            "images_seen": [_images_seen(pl_module)] * 2,
            "steps": [trainer.global_step] * 2,
            "seconds": 0.0,
            "commit": commit() if trainer.is_global_zero else None,  # which asks git
            "versions": {"python": platform.python_version(), **versions()},
            "device": device_name(trainer),
            "devices": trainer.world_size,
            "nodes": trainer.num_nodes,
            "precision": str(trainer.precision),
        }
        self._skipped = _skipped(pl_module) or 0
        self._write(trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Notes where a run goes on, which some strategies know only now."""
        if self._session is not None:
            self._session["images_seen"][0] = _images_seen(pl_module)
            self._session["steps"][0] = trainer.global_step
            self._skipped = _skipped(pl_module) or 0

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Notes how far training is."""
        if self._session is not None and trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._write(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Notes that training has come to its end."""
        if self._session is not None:
            self._session |= {"ended": _now(), "outcome": "finished"}
            self._write(trainer, pl_module)
            self._session = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Notes that training was stopped, or has failed; other ranks may be at work, or gone."""
        if self._session is None:
            return
        is_stop = isinstance(exception, STOPS)
        self._session |= {"ended": _now(), "outcome": "stopped" if is_stop else "failed"}
        if not is_stop:
            self._session["error"] = f"{type(exception).__name__}: {' '.join(str(exception).split())}"[:LONGEST_ERROR]
        try:
            self._note(trainer, pl_module)
        except Exception as error:  # the first one is what matters, and the device may have died of it
            rank_zero_warn(f"history: {error}")
        self._session = None

    def _write(self, trainer: Trainer, module: LightningModule) -> None:
        alike(trainer.strategy, lambda: self._note(trainer, module))

    def _note(self, trainer: Trainer, module: LightningModule) -> None:
        """Brings the session up to date, and writes; this waits for the device."""
        assert self._session is not None and self._file is not None  # begun
        if not trainer.is_global_zero:
            return
        session = self._session
        session["images_seen"][1], session["steps"][1] = _images_seen(module), trainer.global_step
        session["seconds"] = round(time.monotonic() - self._began, 1)
        try:
            skipped, device = _skipped(module), trainer.strategy.root_device
            session["skipped_steps"] = None if skipped is None else skipped - self._skipped
            session["peak_memory_gb"] = (
                round(torch.cuda.max_memory_allocated(device) / 1e9, 3) if device.type == "cuda" else None
            )
            session["damaged_images"] = _damaged(trainer)
        finally:
            write_json(self._file, {"sessions": [*self._former, session]})


def read_history(folder: str | Path) -> list[dict[str, Any]]:
    """The sessions of a run, the first one first; none where none was noted.

    Raises:
        ValueError: if something else is there.
    """
    file = Path(folder, HISTORY)
    if not file.exists():
        return []
    try:
        sessions = json_content(file.read_text())["sessions"]
        if not isinstance(sessions, list) or not all(map(_is_session, sessions)):
            raise ValueError("sessions: not a list of them")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{str(file)!r} is no history of a run ({error})") from error
    return sessions


def _is_session(session: Any) -> bool:
    """Whether a session has numbers, and lists of them, where readers expect them."""
    if not isinstance(session, dict) or not isinstance(session.get("configs") or [], list):
        return False
    ends = [session[name] for name in ENDS if session.get(name) is not None]
    if not all(isinstance(both, list) and len(both) == 2 for both in ends):
        return False
    numbers = [number for both in ends for number in both] + [session.get(name) for name in NUMBERS]
    return all(number is None or type(number) in (int, float) for number in numbers)


def command_line(program: str, words: Sequence[str]) -> dict[str, Any]:
    """A command and its parts: `command`, `program`, `configs` and `options`.

    Args:
        program: The package whose command line it is.
        words: What came behind its name, such as `fit -c demo/tokenizer.yaml --model.seed=1`.
    """
    configs: list[str] = []
    options: list[str] = []
    left = iter(words[1:] if words and not words[0].startswith("-") else words)
    for word in left:
        option, equals, value = word.partition("=")
        if word in CONFIG:
            configs += [file for file in [next(left, None)] if file is not None]
        elif option in CONFIG and equals:
            configs.append(value)
        elif word.startswith("-c") and len(word) > 2:
            configs.append(word.removeprefix("-c"))
        else:
            options.append(word)
    command = shlex.join(["python", "-m", program, *words])
    return {"command": command, "program": program, "configs": configs, "options": options}


@cache
def commit(folder: Path = Path(__file__).parents[1]) -> str | None:
    """The commit of the code, with `+changes` behind it where files differ; None outside a clone or without git.

    Args:
        folder: The top of the clone.
    """
    if not (folder / ".git").exists():  # git would find one further up, of the project that this is installed in
        return None
    answers = []
    for words in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"]):
        environment = os.environ | {"GIT_OPTIONAL_LOCKS": "0"}  # nothing is written
        try:
            done = subprocess.run(
                ["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=20, env=environment
            )
        except (OSError, subprocess.SubprocessError):
            return None
        if done.returncode:
            return None
        answers.append(done.stdout.strip())
    return answers[0] + ("+changes" if answers[1] else "")


def device_name(trainer: Trainer) -> str:
    """What a trainer computes on, such as `8 x NVIDIA H100 80GB HBM3` or `CPU, 2 threads`."""
    device = trainer.strategy.root_device
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    elif device.type == "cpu":
        threads = torch.get_num_threads()
        name = f"CPU, {threads} thread{'s' * (threads > 1)}"
    else:
        name = device.type.upper()
    return name if trainer.world_size == 1 and device.type != "cuda" else f"{trainer.world_size} x {name}"


def _now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")


def _images_seen(module: LightningModule) -> int | None:
    seen = getattr(module, "images_seen", None)
    return None if seen is None else int(seen)


def _skipped(module: LightningModule) -> int | None:
    """Steps that were left out so far, over all sessions; None where the module does not count them."""
    counted = getattr(module, "skipped_steps", None)
    counted = getattr(getattr(module, "guard", None), "num_skipped", None) if counted is None else counted
    return None if counted is None else int(counted)


def _damaged(trainer: Trainer) -> int | None:
    """Images that could not be decoded; None where the data does not count them."""
    data = undeclared(trainer).datamodule
    sets = [getattr(data, name, None) for name in ("train_set", "val_set")]
    counts = [count for count in (getattr(found, "num_damaged", None) for found in sets) if count is not None]
    return sum(counts) if counts else None
