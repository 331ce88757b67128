"""What lies in a folder of runs: each run with its config, its sessions and curves, and the files of metrics."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import yaml

from vfm_vae.history import HISTORY, read_history
from vfm_vae.metrics.summary import read_entries
from vfm_vae.report.curves import TABLE, Curves, read_curves
from vfm_vae.timeline import BY_STEPS, EVENTS

Kind = Literal["tokenizer", "diffusion", "other"]
METRICS, CONFIG = "metrics.json", "config.yaml"
MAX_DEPTH = 5
# Folders that hold many files, and no runs of their own.
PASSED_OVER = ("checkpoints", "images", "latents", "samples", "pretrained", "parts", BY_STEPS)


@dataclass(frozen=True)
class Run:
    """A folder that training wrote.

    Attributes:
        folder: Where it lies.
        name: Its place within the folder that the report is of; its own name if it is that folder.
        config: What `config.yaml` holds; empty where there is none.
        sessions: What `history.json` holds; empty for a run of a version that kept none.
        curves: What it logged.
        problems: What could not be read.
    """

    folder: Path
    name: str
    config: Mapping[str, Any]
    sessions: Sequence[Mapping[str, Any]]
    curves: Curves
    problems: Sequence[str] = ()

    @property
    def model(self) -> Mapping[str, Any]:
        """The options of what was trained."""
        return mapping(self.config.get("model"))

    @property
    def kind(self) -> Kind:
        """Which program trained it."""
        programs = {str(session.get("program")) for session in self.sessions}
        if "ldm" in programs or {"sampler", "label_drop", "times"} & self.model.keys():
            return "diffusion"
        if "vfm_vae" in programs or {"objective", "discriminator"} & self.model.keys():
            return "tokenizer"
        return "diffusion" if "train/loss" in self.curves.values else "tokenizer" if self.curves.values else "other"

    @property
    def init_from(self) -> Path | None:
        """The run whose checkpoint a stage began from."""
        given = self.model.get("init_from")
        return Path(given).parent.parent if isinstance(given, str) else None

    @property
    def images_seen(self) -> int | None:
        """How far training came, as far as is known."""
        known = [seen[1] for seen in (session.get("images_seen") for session in self.sessions) if seen]
        known = [int(seen) for seen in known if isinstance(seen, int | float)]
        if known:
            return max(known)
        return self.curves.end if self.curves.unit == "images" else None


@dataclass(frozen=True)
class Entry:
    """An entry of a file of metrics.

    Attributes:
        file: The file's place within the folder that the report is of.
        name: The entry's name.
        content: What it holds.
    """

    file: str
    name: str
    content: Mapping[str, Any]

    @property
    def metrics(self) -> Mapping[str, float | None]:
        """Numbers by name; None where one is not finite."""
        return mapping(self.content.get("metrics"))


@dataclass(frozen=True)
class Subject:
    """A folder that is reported on.

    Attributes:
        folder: The folder.
        name: What the report calls it.
        runs: The runs in it, those that others began from first.
        entries: The entries of all its files of metrics.
        study: The report of a study, if that is what it is.
        undone: Parts of a study that are not done.
    """

    folder: Path
    name: str
    runs: Sequence[Run]
    entries: Sequence[Entry]
    study: Path | None = None
    undone: Sequence[str] = field(default_factory=list)

    @cached_property
    def lines(self) -> list[list[Run]]:
        """Runs that follow one another as stages, each from its first to its last; others stand alone."""
        former = {run.name: self._former(run) for run in self.runs}
        continued = {run.name for run in former.values() if run is not None}
        lines = []
        for run in self.runs:
            if run.name in continued:
                continue
            line, at = [run], former[run.name]
            while at is not None and at not in line:
                line.insert(0, at)
                at = former[at.name]
            lines.append(line)
        return lines

    def _former(self, run: Run) -> Run | None:
        """The stage that a stage of a tokenizer began from; a diffusion model begins to count anew."""
        place = run.init_from
        if place is None or run.kind != "tokenizer":
            return None
        others = [other for other in self.runs if other is not run]
        here = [other for other in others if other.folder.absolute() == place.absolute()]
        # The folder may have been moved, or the report be made from elsewhere.
        alike = [other for other in others if place.parts[-len(Path(other.name).parts) :] == Path(other.name).parts]
        found = here or [other for other in alike if other.folder.parent == run.folder.parent]
        return found[0] if found else None


def read_subjects(folders: Sequence[str | Path]) -> list[Subject]:
    """Reads folders to report on.

    Raises:
        ValueError: if one does not exist or holds no run, or a file of metrics can't be read.
    """
    places = [Path(folder) for folder in folders]
    names = _names(places)
    return [read_subject(place, name) for place, name in zip(places, names, strict=True)]


def read_subject(folder: Path, name: str) -> Subject:
    """Reads a folder; arguments and errors as of `read_subjects`."""
    if not folder.is_dir():
        raise ValueError(f"folders: there is no folder {str(folder)!r}; give that of a run, such as runs/demo")
    found = dict(_folders(folder))
    runs = [read_run(place, folder) for place, files in found.items() if _is_run(files)]
    measured = [place / METRICS for place, files in found.items() if METRICS in files]
    entries = [entry for file in measured for entry in _entries(file, file.relative_to(folder).as_posix())]
    entries = entries or _entries_elsewhere(runs)
    if not runs and not entries:
        raise ValueError(
            f"folders: no run lies in {str(folder)!r}: no {CONFIG}, {HISTORY}, {METRICS}, event file or {TABLE}; "
            "give the folder of a run, or one that holds runs"
        )
    study = folder / "report.md"
    parts = sorted((folder / "parts").glob("*.json"))
    is_study = study.is_file() or bool(parts)
    undone = [file.stem for file in parts if not mapping(_json(file)).get("done")] if is_study else []
    return Subject(folder, name, _ordered(runs), entries, study if study.is_file() else None, undone)


def read_run(place: Path, top: Path) -> Run:
    """Reads a run; what can't be read is among its problems."""
    problems: list[str] = []
    config: Any = {}
    try:
        if (place / CONFIG).is_file():
            config = yaml.safe_load((place / CONFIG).read_text())
    except (OSError, ValueError, yaml.YAMLError) as error:
        problems.append(f"{CONFIG} can't be read: {' '.join(str(error).split())}")
    sessions: list[dict[str, Any]] = []
    try:
        sessions = read_history(place)
    except ValueError as error:
        problems.append(str(error))
    curves = read_curves(place)
    name = place.name if place == top else place.relative_to(top).as_posix()
    name = place.absolute().name if name in (".", "") else name
    return Run(place, name, mapping(config), sessions, curves, [*problems, *curves.problems])


def _folders(top: Path) -> Iterator[tuple[Path, list[str]]]:
    """The folders in which runs may lie, with what lies in each."""
    for place, folders, files in os.walk(top):
        depth = len(Path(place).relative_to(top).parts)
        folders[:] = sorted(name for name in folders if depth < MAX_DEPTH and not name.startswith((".", *PASSED_OVER)))
        if "sweep.md" in files:
            folders.clear()
        else:
            yield Path(place), files


def _is_run(files: Sequence[str]) -> bool:
    return any(name in (CONFIG, HISTORY, TABLE) or name.startswith(EVENTS) for name in files)


def _ordered(runs: list[Run]) -> list[Run]:
    """By when they were trained, as far as is known; tokenizers before what is trained on their latents."""

    def when(run: Run) -> tuple[bool, str, float]:
        began = str(run.sessions[0].get("started")) if run.sessions else ""
        return run.kind == "diffusion", began, run.curves.began

    return sorted(runs, key=when)


def _entries(file: Path, name: str) -> list[Entry]:
    entries = read_entries(file)
    for key, content in entries.items():
        metrics = content.get("metrics", {})
        is_plain = isinstance(metrics, dict) and all(
            value is None or (isinstance(value, int | float) and not isinstance(value, bool))
            for value in metrics.values()
        )
        if not is_plain:
            raise ValueError(f"{str(file)!r} is no file of metrics: those of {key!r} are no numbers; give another path")
    return [Entry(name, key, content) for key, content in entries.items()]


def _entries_elsewhere(runs: Sequence[Run]) -> list[Entry]:
    """The runs' own entries in a file that they share with others, beside or above them."""
    found = []
    for run in runs:
        options = mapping(run.config.get("run"))
        names = {options.get("entry"), options.get("name"), run.folder.absolute().name}
        for file in dict.fromkeys([*_report_paths(run), run.folder.absolute().parent / METRICS]):
            if not file.is_file():
                continue
            for entry in _entries(file, os.path.relpath(file, run.folder)):
                measured = str(mapping(entry.content.get("settings")).get("checkpoint"))
                if entry.name in names or Path(measured).parent.parent.name == run.folder.absolute().name:
                    found.append(entry)
            break
    return found


def _report_paths(run: Run) -> list[Path]:
    callbacks = mapping(run.config.get("trainer")).get("callbacks")
    options = [mapping(mapping(each).get("init_args")) for each in callbacks or [] if isinstance(each, dict)]
    return [Path(each["path"]) for each in options if str(each.get("path")).endswith(".json")]


def _names(places: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell folders apart."""
    parts = [place.absolute().parts for place in places]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(each[-length:]) for each in parts]
        if len(set(names)) == len(names):
            return names
    raise ValueError("folders: give each folder once")


def _json(file: Path) -> Any:
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError):
        return {}


def mapping(value: Any) -> Mapping[str, Any]:
    """A value of a file that others wrote, if it is a mapping; else an empty one."""
    return value if isinstance(value, Mapping) else {}
