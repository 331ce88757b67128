"""What was trained, in words: the head of the page, each run's commands and sessions, and its config."""

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NamedTuple

import yaml

from vfm_vae.history import commit
from vfm_vae.report.changes import Change, Shipped, differences, read_shipped
from vfm_vae.report.folders import Run, Subject
from vfm_vae.report.problems import headline

LONGEST_CONFIG = 60_000  # letters


class SessionRow(NamedTuple):
    """A session, as text."""

    started: str
    ended: str
    outcome: str
    images: str
    steps: str
    seconds: str
    device: str
    memory: str
    commit: str
    versions: str


@dataclass(frozen=True)
class RunStory:
    """A run in words.

    Attributes:
        name: Its name.
        what: What was trained.
        ending: How it ended.
        commands: Its commands, each once.
        sessions: Its sessions.
        shipped: The shipped configs of its last command; None where no command is known.
        changes: Options whose values are other than in these: the shipped value, then the run's.
        config: Its whole config.
    """

    name: str
    what: str
    ending: str
    commands: list[str]
    sessions: list[SessionRow]
    shipped: Shipped | None
    changes: list[Change]
    config: str


def stories_of(subjects: Sequence[Subject], with_configs: bool) -> list[RunStory]:
    """All runs in words, with their whole configs or without."""
    known: dict[str, Shipped] = {}  # a study's runs have the same ones many times
    stories = []
    for subject in subjects:
        for run in subject.runs:
            name = f"{subject.name}: {run.name}" if len(subjects) > 1 else run.name
            stories.append(_story(run, name, _ending(subject, run), with_configs, known))
    return stories


def _story(run: Run, name: str, ending: str, with_configs: bool, known: dict[str, Shipped]) -> RunStory:
    shipped, changes = None, []
    if run.sessions:
        last = run.sessions[-1]
        key = f"{last.get('program')} {last.get('configs')}"
        shipped = known[key] if key in known else known.setdefault(key, read_shipped(last))
        if shipped.config is not None and run.config:
            changes = differences([shipped.config, run.config])
    commands = list(dict.fromkeys(str(session.get("command")) for session in run.sessions))
    config = yaml.safe_dump(dict(run.config), sort_keys=False, width=100) if run.config and with_configs else ""
    if len(config) > LONGEST_CONFIG:
        config = f"{config[:LONGEST_CONFIG]}\n…"
    return RunStory(name, what(run), ending, commands, [_session(s) for s in run.sessions], shipped, changes, config)


def _ending(subject: Subject, run: Run) -> str:
    own = [entry.content.get("step") for entry in subject.entries if entry.name in (run.name, run.folder.name, "run")]
    return headline(run, [step for step in own if isinstance(step, int)])


def what(run: Run) -> str:
    """What a run trained, and on what, such as `VFMVAE on vit_photos_patch8_64, images of data/photos`."""
    model, data = run.model, run.config.get("data")
    network = _options(model.get("model"))
    vfm = _options(network.get("vfm")).get("name")
    alignment = _name(model.get("alignment"))
    parts = [
        _name(model.get("model")) or {"tokenizer": "a tokenizer", "diffusion": "a diffusion model"}.get(run.kind, "")
    ]
    parts[0] = parts[0] or "a model"
    if vfm:
        parts[0] += f" on {vfm}"
    if alignment:
        parts[0] += f" with {alignment}"
    if isinstance(data, Mapping) and data.get("root"):
        kind = "latents" if data.get("source") == "latents" else "images"
        size = f" at {data['image_size']} px" if kind == "images" and data.get("image_size") else ""
        parts.append(f"{kind} in {data['root']}{size}")
    return ", ".join(parts)


def sentences(subjects: Sequence[Subject]) -> list[str]:
    """What was trained, how far, and how it ended: a sentence for each line of stages."""
    told = []
    for subject in subjects:
        for line in subject.lines:
            last = line[-1]
            seen = f" {last.images_seen:,} images," if last.images_seen is not None else ""
            names = " → ".join(run.name for run in line)
            stages = f"in {len(line)} stages, {names}" if len(line) > 1 else names
            prefix = f"{subject.name}: " if len(subjects) > 1 else ""
            told.append(f"{prefix}{what(last)}; {stages}:{seen} {_ending(subject, last)}.")
    return told


def _session(session: Mapping[str, Any]) -> SessionRow:
    versions = session.get("versions")
    listed = ", ".join(f"{name} {each}" for name, each in versions.items()) if isinstance(versions, Mapping) else ""
    memory = session.get("peak_memory_gb")
    hash_, plus, _ = str(session.get("commit") or "").partition("+")
    several = f", {session.get('nodes')} nodes" if session.get("nodes") not in (1, None) else ""
    return SessionRow(
        started=_time(session.get("started")),
        ended=_time(session.get("ended")),
        outcome=str(session.get("outcome") or "no end"),
        images=_range(session.get("images_seen")),
        steps=_range(session.get("steps")),
        seconds=duration(session.get("seconds")),
        device=", ".join(
            filter(None, (f"{session.get('device') or ''}{several}", str(session.get("precision") or "")))
        ),
        memory="" if not isinstance(memory, int | float) else f"{memory:g} GB",
        commit=f"{hash_[:10]}{' with changes' if plus else ''}",
        versions=listed,
    )


def _time(moment: Any) -> str:
    try:
        return f"{datetime.fromisoformat(str(moment)):%Y-%m-%d %H:%M %z}"
    except ValueError:
        return ""


def _range(ends: Any) -> str:
    if not isinstance(ends, list) or len(ends) != 2 or not all(isinstance(end, int) for end in ends):
        return ""
    return f"{ends[0]:,} to {ends[1]:,}" if ends[0] else f"{ends[1]:,}"


def duration(seconds: Any) -> str:
    """Seconds as people say them."""
    if not isinstance(seconds, int | float):
        return ""
    whole = round(seconds)
    days, hours, minutes = whole // 86400, whole // 3600 % 24, whole // 60 % 60
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {whole % 60} s" if minutes else f"{seconds:g} s"


def between(subjects: Sequence[Subject]) -> list[tuple[list[str], list[Change]]]:
    """The options in which the last runs of several folders differ, for each kind of model.

    Returns:
        For each kind the heads of the columns, and the options; none where nothing differs.
    """
    found = []
    for kind in ("tokenizer", "diffusion", "other"):
        lasts = [(subject.name, [line[-1] for line in subject.lines if line[-1].kind == kind]) for subject in subjects]
        named = [(f"{name} · {run.name}", run) for name, runs in lasts for run in runs[-1:] if run.config]
        changes = differences([run.config for _, run in named]) if len(named) > 1 else []
        if changes := [change for change in changes if not change.option.startswith("run.")]:
            found.append(([name for name, _ in named], changes))
    return found


def made_by() -> str:
    """What made the page."""
    found = commit()
    return f"vfm_vae at commit {found[:10]}" if found else f"vfm_vae on Python {platform.python_version()}"


def _name(part: Any) -> str:
    if isinstance(part, str):
        return part.rpartition(".")[2]
    return str(part.get("class_path", "")).rpartition(".")[2] if isinstance(part, Mapping) else ""


def _options(part: Any) -> Mapping[str, Any]:
    if not isinstance(part, Mapping):
        return {}
    options = part.get("init_args", part)
    return options if isinstance(options, Mapping) else {}
