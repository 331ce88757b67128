"""Commands that pages tell, taken by the programs' own parsers; nothing is built or run."""

import argparse
import importlib
import runpy
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import jsonargparse
import pytest

from ldm.cli import DiffusionCLI
from ldm.module import DiffusionModule
from ldm.sweep.trainer import SweepingTrainer
from vfm_vae.cli import CLI, NAMED, words
from vfm_vae.data.datamodule import ImageNetDataModule
from vfm_vae.module import TokenizerModule

ROOT = Path(__file__).parents[1]
PROGRAMS = {"vfm_vae": TokenizerModule, "ldm": DiffusionModule}
# What installed programs run.
SCRIPTS = {
    line.split("=")[0].strip(): line.split("=")[1].strip().partition(":")[0].removesuffix(".__main__")
    for line in (ROOT / "setup.cfg").read_text().splitlines()
    if line.strip().startswith("vfm-vae") and ":main" in line
}
# What stands for configs that a former command leaves: of the same classes, so that the same options are there.
DEMO = ["configs/demo/tokenizer.yaml", "configs/demo/weak.yaml"]
LEFT = {
    "vfm_vae": DEMO,
    "ldm": ["configs/demo/ldm.yaml", "configs/demo/ldm_guided.yaml"],
    "t2i": ["configs/demo/text.yaml", "configs/demo/text_guided.yaml"],
}
# What an ellipsis stands for, and options alone are behind.
BEHIND = {"vfm_vae": [*DEMO], "ldm": [*LEFT["ldm"]]}


SUBCOMMANDS = ("fit", "validate", "test", "predict")


class Parsed(BaseException):
    """Raised when a program has parsed its command line, so that it does nothing more."""


def take(command: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the program of a command parse it.

    Raises:
        AssertionError: if there is no such program, or it would refuse the command.
    """
    program, arguments = program_of(command)
    if program == "make":
        dry = ["make", "--dry-run", "--assume-old=install", *arguments]
        done = subprocess.run(dry, cwd=ROOT, capture_output=True, text=True, check=False)
        assert not done.returncode, done.stderr
    elif program in PROGRAMS and arguments[0] in (*SUBCOMMANDS, "sweep"):
        parser_of(program).parse_args(words(completed(program, arguments)))
    else:
        parse_alone(program, arguments, monkeypatch)


def take_options(options: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets a program parse options that go behind one of its commands: one of diffusion models, or of tokenizers."""
    refused = []
    for program in ("ldm", "vfm_vae"):
        try:
            take(["python", "-m", program, "fit", "…", *options], monkeypatch)
        except (argparse.ArgumentError, ValueError) as error:
            refused.append(error)
        else:
            return
    raise refused[0]


def program_of(command: Sequence[str]) -> tuple[str, list[str]]:
    """The module that a command runs, or `make`, and its arguments.

    Raises:
        AssertionError: if it is none of ours.
    """
    first, *rest = command
    first = first.removeprefix(".venv/bin/")
    if first in SCRIPTS:
        return SCRIPTS[first], rest
    if first == "python" and rest[:1] == ["-m"]:
        return rest[1], rest[2:]
    assert first == "make", f"no program of ours: {command}"
    return first, rest


def completed(program: str, arguments: Sequence[str]) -> list[str]:
    """Arguments with configs in the place of those that a former command leaves, and of an ellipsis."""
    result: list[str] = []
    options = iter(arguments)
    for word in options:
        if word == "…":
            result += [part for config in BEHIND[program] for part in ("-c", config)]
            continue
        if word == "-c":
            config = next(options)
            kind = "t2i" if "t2i" in config else program
            there = (ROOT / config).is_file() or (ROOT / "configs" / config).is_file()
            assert there or config.endswith(("/config.yaml", "/model.yaml", "/best.yaml")), config
            configs = [config] if there else LEFT[kind] if config.endswith("/config.yaml") else []
            result += [part for name in configs for part in ("-c", name)]
        else:
            result.append(word)
    return result


@cache
def parser_of(program: str) -> Any:
    """The parser of a program with configs."""
    for module in NAMED:
        importlib.import_module(module)
    base = {"vfm_vae": CLI, "ldm": DiffusionCLI}[program]

    class Parses(base):
        def parse_arguments(self, parser: Any, args: Any) -> None:
            raise Parsed(parser)

    plain = {name: {"exit_on_error": False} for name in base.subcommands()} | {"exit_on_error": False}
    options = {"auto_configure_optimizers": False, "parser_kwargs": plain}
    try:
        Parses(PROGRAMS[program], ImageNetDataModule, trainer_class=SweepingTrainer, **options)
    except Parsed as made:
        return made.args[0]


@cache
def options_of(program: str, subcommand: str) -> frozenset[str]:
    """The options of a command, but for those of classes that configs name."""
    (commands,) = [action for action in parser_of(program)._actions if hasattr(action, "choices") and action.choices]
    return frozenset(commands._name_parser_map[subcommand]._option_string_actions)


def parse_alone(program: str, arguments: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs a program up to where it has parsed its command line."""

    def stopping(parse: Callable) -> Callable:
        def parse_and_stop(*args, **kwargs) -> None:
            parse(*args, **kwargs)
            raise Parsed

        return parse_and_stop

    with monkeypatch.context() as patch:
        for kind in (argparse.ArgumentParser, jsonargparse.ArgumentParser):
            patch.setattr(kind, "parse_args", stopping(kind.parse_args))
        patch.setattr(sys, "argv", [program, *arguments])
        with pytest.raises(Parsed):
            module = importlib.import_module(program)
            if hasattr(module, "main"):
                module.main()
            else:
                runpy.run_module(program, run_name="__main__", alter_sys=False)
