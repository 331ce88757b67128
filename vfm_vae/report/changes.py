"""What a run's config has other than the configs that are shipped, and what two runs' configs have other."""

import contextlib
import importlib
import io
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from lightning.pytorch.cli import ArgsType, LightningArgumentParser

from vfm_vae.cli import CLI, CONFIGS, find_config, parser_options
from vfm_vae.data.datamodule import ImageNetDataModule

# Each program's module, command line and trainer; `vfm_vae` knows no diffusion models before a report asks.
PROGRAMS = {
    "vfm_vae": ("vfm_vae.module.TokenizerModule", "vfm_vae.cli.CLI", "lightning.pytorch.Trainer"),
    "ldm": ("ldm.module.DiffusionModule", "ldm.cli.DiffusionCLI", "ldm.sweep.trainer.SweepingTrainer"),
}
ABSENT = "—"
LONGEST_VALUE = 400  # letters
Flat = dict[tuple[str, ...], Any]


class Change(NamedTuple):
    """An option whose values differ.

    Attributes:
        option: Its name.
        values: Its values, one for each side.
    """

    option: str
    values: list[str]


class Shipped(NamedTuple):
    """The shipped configs of a command, read by its program.

    Attributes:
        names: Their names.
        own: Other configs of the command.
        config: What the program takes from the shipped ones alone; None if that is not complete.
        reason: Why there is none.
    """

    names: list[str]
    own: list[str]
    config: Mapping[str, Any] | None
    reason: str = ""


def read_shipped(session: Mapping[str, Any]) -> Shipped:
    """Reads the shipped configs among those of a session's command."""
    given = [str(name) for name in session.get("configs") or []]
    shipped = [(name, file) for name in given if (file := _shipped(name)) is not None]
    own = [name for name in given if _shipped(name) is None]
    names, program = [name for name, _ in shipped], str(session.get("program"))
    if not shipped or program not in PROGRAMS:
        return Shipped(names, own, None, "the command names none of the shipped configs")
    try:
        return Shipped(names, own, parsed(program, [str(file) for _, file in shipped]))
    except Exception as error:  # the parser reports mistakes in many ways
        reason = " ".join(str(error).split())[:LONGEST_VALUE]
        return Shipped(names, own, None, f"without configs of one's own they are not complete: {reason}")


def _shipped(name: str) -> Path | None:
    """The file of a shipped config; None for a config of one's own."""
    try:
        file = Path(find_config(name)).resolve()
    except ValueError:
        file = (CONFIGS / name.rpartition("configs/")[2]).resolve()  # of another clone
        return file if "configs/" in name and file.is_file() else None
    return file if file.is_file() and file.is_relative_to(CONFIGS.resolve()) else None


def parsed(program: str, configs: Sequence[str]) -> dict[str, Any]:
    """What a program's parser makes of configs: all options of `fit`, with their defaults, as plain data.

    Raises:
        Exception: whatever the parser says of configs that are not complete.
    """
    module, command_line, trainer = (_class_at(path) for path in PROGRAMS[program])
    reading = type("Reading", (_Reading, command_line), {})
    words = ["fit", *(word for config in configs for word in ("-c", config))]
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            reading(
                module,
                ImageNetDataModule,
                trainer_class=trainer,
                auto_configure_optimizers=False,
                parser_kwargs=parser_options(command_line, words),
                args=words,
            )
    except _Read as read:
        return dict(yaml.safe_load(read.text)["fit"])
    raise AssertionError("the command line went on")


class _Reading(CLI):
    """A program's command line, which ends when it has read its options."""

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        super().parse_arguments(parser, args)
        raise _Read(parser.dump(self.config, skip_unset=False))


class _Read(Exception):
    """A command line has read its options, which are `text`."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text = text


def _class_at(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def differences(configs: Sequence[Mapping[str, Any]]) -> list[Change]:
    """The options in which configs differ, each once, at the place where they part.

    Classes stand as `trainer.callbacks[EMA].decay`; another class is shown with all of its options.
    """
    sides = [_flat(config) for config in configs]
    changed = [path for path in _paths(sides) if len({repr(side.get(path, ABSENT)) for side in sides}) > 1]
    rows: dict[tuple[str, ...], list[str]] = {}
    for path in changed:
        whole = _parting(path, sides)
        if whole not in rows:
            rows[whole] = [_shown(_under(side, whole)) for side in sides]
    return [Change(_option(path), values) for path, values in rows.items()]


def _paths(sides: Sequence[Flat]) -> list[tuple[str, ...]]:
    return list(dict.fromkeys(path for side in sides for path in side))


def _flat(value: Any, path: tuple[str, ...] = ()) -> Flat:
    """Options by path; a class's name is under its path and `class`."""
    if isinstance(value, Mapping) and "class_path" in value:
        name = str(value["class_path"]).rpartition(".")[2]
        options = value.get("init_args") or {}
        return {(*path, "class"): name} | (_flat(options, path) if options else {})
    if isinstance(value, Mapping) and value:
        return {place: leaf for key, part in value.items() for place, leaf in _flat(part, (*path, str(key))).items()}
    if isinstance(value, list) and value and all(isinstance(part, Mapping) and "class_path" in part for part in value):
        flat: Flat = {}
        for part in value:
            key = f"[{str(part['class_path']).rpartition('.')[2]}]"
            while any(place[: len(path) + 1] == (*path, key) for place in flat):
                key += "'"
            flat |= _flat(part, (*path, key))
        return flat
    if isinstance(value, Mapping) and not path:
        return {}
    return {path: value}


def _parting(path: tuple[str, ...], sides: Sequence[Flat]) -> tuple[str, ...]:
    """The highest place on the way to an option that not all sides have, or have by another class."""
    for length in range(1, len(path)):
        part = path[:length]
        has = [any(place[:length] == part for place in side) for side in sides]
        classes = {side.get((*part, "class"), ABSENT) for side in sides}
        if not all(has) or len(classes) > 1:
            return part
    return path


def _under(side: Flat, path: tuple[str, ...]) -> Any:
    """All that lies under a place."""
    if path in side:
        return side[path]
    inner = {place[len(path) :]: leaf for place, leaf in side.items() if place[: len(path)] == path}
    if not inner:
        return ABSENT
    name = inner.pop(("class",), "")
    options = ", ".join(f"{_option(place)}={_shown(leaf)}" for place, leaf in inner.items())
    return _Class(f"{name}({options})" if name else options)


class _Class(str):
    """A class with its options, as text."""


def _shown(value: Any) -> str:
    if value == ABSENT or isinstance(value, _Class):
        text = str(value)
    elif isinstance(value, str):
        text = value
    else:
        text = yaml.safe_dump(value, default_flow_style=True, width=10**6).strip().removesuffix("\n...").strip()
    return text if len(text) <= LONGEST_VALUE else f"{text[:LONGEST_VALUE]}…"


def _option(path: tuple[str, ...]) -> str:
    return ".".join(path).replace(".[", "[")
