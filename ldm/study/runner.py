"""Runs the parts of a study side by side, goes on where it was stopped, and shows how far it is."""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ldm.study.plan import Part, keys_of
from vfm_vae.writing import write_json

# Which of the parts that could begin does: what others wait for and what takes longest first, short ones as fillers.
ORDER = ("latents", "tokenizer", "denoiser", "guided", "test")
# How long parts take, one beside the other, where none of the same kind has ended yet.
WEIGHTS = {"tokenizer": 1.0, "denoiser": 0.8, "guided": 0.1, "test": 0.2, "latents": 0.1}
# glibc returns large blocks to the kernel, which zeroes their pages again in every step.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "4294967296", "MALLOC_TRIM_THRESHOLD_": "8589934592"}
INTERVAL = 0.2  # seconds between looks at the processes
SHOWN_LINES = 15  # of a part that failed


@dataclass
class Running:
    """A part at work.

    Attributes:
        part: The part.
        process: Its process, which leads a session of its own: a terminal's Ctrl-C reaches it through the runner alone.
        log: What it prints goes there.
        began: When it began, by `time.monotonic`.
    """

    part: Part
    process: "subprocess.Popen[bytes]"
    log: IO[bytes]
    began: float


class Marks:
    """What is known of parts from earlier: a JSON file for each, beside its log, in `<folder>/parts`.

    A mark is written when a part begins, with the hash of all that it depends on, and again when it is done.

    Args:
        folder: The study's folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "parts"

    def file(self, part: Part, suffix: str = ".json") -> Path:
        """A part's file."""
        return self.folder / (part.name.replace("/", ".") + suffix)

    def read(self, part: Part) -> dict[str, Any]:
        """A part's mark; empty where it has none, or none that was written whole."""
        try:
            return dict(json.loads(self.file(part).read_text()))
        except (OSError, ValueError):
            return {}

    def write(self, part: Part, key: str, seconds: float, done: bool) -> None:
        """Writes a part's mark.

        Args:
            part: The part.
            key: The hash of what it depends on.
            seconds: How long it has taken so far, over all times that it was begun.
            done: Whether it is done.
        """
        words = ["python", "-m", *part.words]
        write_json(self.file(part), {"key": key, "done": done, "seconds": round(seconds, 1), "command": words})


class Runner:
    """Runs parts, each once those that it needs are done, `jobs` of them at a time.

    A part that is done is not done again, and one that was stopped goes on, unless its command, its configs or a part
    that it needs changed: then its folder is emptied and it is done anew. If a part fails, no other begins, and those
    at work are waited for. SIGINT and SIGTERM are passed on as SIGTERM, on which trainings save and end; a second one
    ends all processes at once.

    Args:
        parts: The parts, each behind those that it needs.
        folder: The study's folder.
        jobs: How many run at a time; if several, each computes with a single thread.
        console: Where progress is shown.

    Attributes:
        failed: Parts that failed.
        stopped_by: The signal that stopped the study; None if none did.
    """

    def __init__(self, parts: Sequence[Part], folder: Path, jobs: int, console: Console) -> None:
        self.parts, self.folder, self.jobs, self.console = parts, folder, jobs, console
        self.marks, self.keys = Marks(folder), keys_of(parts)
        self.failed: list[Part] = []
        self.stopped_by: int | None = None
        self._running: list[Running] = []
        self._seconds: dict[str, float] = {}  # of the parts that are done

    def run(self) -> bool:
        """Runs all that is not done; returns whether everything is done then."""
        self.marks.folder.mkdir(parents=True, exist_ok=True)
        with self._locked(), self._signals(), self._progress() as progress:
            self._look_around()
            task = progress.add_task("", total=len(self.parts))
            while True:
                self._begin_what_can()
                progress.update(task, completed=len(self._seconds), description=self._state())
                if not self._running:
                    break
                time.sleep(INTERVAL)
                self._collect()
        return len(self._seconds) == len(self.parts)

    def _look_around(self) -> None:
        """Finds out which parts are done; says which have to be done anew."""
        for part in self.parts:
            mark = self.marks.read(part)
            if mark and mark.get("key") != self.keys[part.name]:
                self._say(f"{part.name}: its command, its configs or what it needs changed: it is done anew")
                self._clear(part)
            elif mark.get("done"):
                self._seconds[part.name] = mark["seconds"]
        if self._seconds:
            self._say(f"{len(self._seconds)} of {len(self.parts)} parts are done already")

    def _clear(self, part: Part) -> None:
        """Removes what a part of another command or config left."""
        if part.output is not None and part.output.is_dir():
            shutil.rmtree(part.output)
        self.marks.file(part).unlink()

    def _begin_what_can(self) -> None:
        if self.failed or self.stopped_by:
            return
        busy = {running.part.name for running in self._running}
        waiting = [part for part in self.parts if part.name not in busy and part.name not in self._seconds]
        ready = [part for part in waiting if all(name in self._seconds for name in part.needs)]
        ready.sort(key=lambda part: ORDER.index(part.kind))
        for part in ready[: self.jobs - len(self._running)]:
            self._begin(part)

    def _begin(self, part: Part) -> None:
        self.marks.write(part, self.keys[part.name], self._spent(part), done=False)
        log = self.marks.file(part, ".log").open("ab")
        process = subprocess.Popen(
            [sys.executable, "-m", *part.words],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=MALLOC | dict(os.environ) | ({"OMP_NUM_THREADS": "1"} if self.jobs > 1 else {}),
            start_new_session=True,
        )
        self._running.append(Running(part, process, log, time.monotonic()))

    def _spent(self, part: Part) -> float:
        return float(self.marks.read(part).get("seconds", 0.0))

    def _collect(self) -> None:
        """Takes note of parts that have ended; one that was stopped is not done, though it ends with code 0."""
        for running in [running for running in self._running if running.process.poll() is not None]:
            self._running.remove(running)
            running.log.close()
            part, seconds = running.part, self._spent(running.part) + time.monotonic() - running.began
            is_done = running.process.returncode == 0 and not self.stopped_by
            self.marks.write(part, self.keys[part.name], seconds, is_done)
            if is_done:
                self._seconds[part.name] = seconds
                self._say(f"{part.name}: done in {_clock(seconds)}")
            elif not self.stopped_by:
                self.failed.append(part)
                self._tell_failure(part, running.process.returncode)

    def _tell_failure(self, part: Part, code: int) -> None:
        log = self.marks.file(part, ".log")
        lines = log.read_text(errors="replace").replace("\r", "\n").splitlines()[-SHOWN_LINES:]
        self._say(f"{part.name}: failed with exit code {code}. The last lines of {log}:", style="bold red")
        self._say("\n".join(lines), markup=False, highlight=False)
        if self._running:
            self._say(f"waits for {', '.join(running.part.name for running in self._running)}")

    def _say(self, text: str, **style: Any) -> None:
        self.console.print(text, soft_wrap=True, **style)

    # Signals

    @contextmanager
    def _signals(self) -> Iterator[None]:
        former = {number: signal.signal(number, self._stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for running in self._running:  # after an error of this process
                os.killpg(running.process.pid, signal.SIGKILL)
            for number, handler in former.items():
                signal.signal(number, handler)

    def _stop(self, number: int, frame: object) -> None:
        once_more, self.stopped_by = self.stopped_by is not None, number
        for running in self._running:
            if running.process.poll() is None:
                if once_more:
                    os.killpg(running.process.pid, signal.SIGKILL)
                else:
                    running.process.terminate()

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Keeps other runners out of the folder.

        Raises:
            ValueError: if there is one.
        """
        with (self.marks.folder / "lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise ValueError(f"folder: a study is running in {str(self.folder)!r} already") from error
            yield

    # Progress

    def _progress(self) -> Progress:
        columns = (TextColumn("{task.description}"), BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn())
        return Progress(*columns, console=self.console, transient=True)

    def _state(self) -> str:
        names = ", ".join(running.part.name for running in self._running) or "study"
        if self.stopped_by:
            return f"{signal.Signals(self.stopped_by).name}: waits for {names} to save"
        left = self.seconds_left()
        end = "" if left is None else time.strftime("; ends about %H:%M", time.localtime(time.time() + left))
        return names + end

    def seconds_left(self) -> float | None:
        """How long what is left will take, judged by what is done; None while nothing is."""
        now = time.monotonic()
        at_work = {running.part.name: now - running.began for running in self._running}
        left = 0.0
        for part in self.parts:
            if part.name not in self._seconds:
                expected = _expected(part, self.parts, self._seconds)
                if expected is None:
                    return None
                left += max(expected - at_work.get(part.name, 0.0), 0.0)
        return left / self.jobs


def _expected(part: Part, parts: Sequence[Part], seconds: Mapping[str, float]) -> float | None:
    """Seconds that a part takes: as the same part of other seeds, or as others in proportion to their weights."""
    done = [other for other in parts if other.name in seconds]
    if not done:
        return None
    alike = [other for other in done if other.name.partition("/")[2] == part.name.partition("/")[2]]
    chosen = alike or [other for other in done if other.kind == part.kind] or done
    weight = sum(WEIGHTS[other.kind] for other in chosen)
    return WEIGHTS[part.kind] * sum(seconds[other.name] for other in chosen) / weight


def _clock(seconds: float) -> str:
    return time.strftime("%H:%M:%S", time.gmtime(seconds))
