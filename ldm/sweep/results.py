"""What a sweep has found: a table, a picture, and the best setting as a config."""

import io
import shlex
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import yaml
from lightning.pytorch.loggers import TensorBoardLogger
from rich import box
from rich.console import Console
from rich.table import Table

from ldm.guidance import Guidance
from ldm.sweep.figure import heat_map
from ldm.sweep.goal import Goal
from ldm.sweep.grid import Setting
from ldm.sweep.records import Record
from vfm_vae.description import describe
from vfm_vae.figures import pixels_of
from vfm_vae.metrics.summary import versions
from vfm_vae.pictures import log_picture
from vfm_vae.timeline import hide_from
from vfm_vae.writing import write_picture, write_text

COLOURS = 64  # of the picture, which is smaller so
OPTIMISTIC = (
    "The best setting was chosen by its number, on these very samples, so this number is optimistic: measure the "
    "chosen setting again with another seed, and as many samples as you will report."
)


class Results(NamedTuple):
    """The records of a grid.

    Attributes:
        rows: Settings with their records, in the grid's order.
        goal: The number that decides.
        seed: Seed of the samples.
        shared: What all numbers depend on.
        checkpoint: The checkpoint that was looked at.
        guidance: The config's guidance, of which settings change scale and interval.
        confirmed: Records of the best setting, and of no guidance, with the next seed; none where that was not wanted.
    """

    rows: list[tuple[Setting, Record]]
    goal: Goal
    seed: int
    shared: dict[str, Any]
    checkpoint: Path
    guidance: Guidance
    confirmed: Mapping[Setting, Record] = MappingProxyType({})

    def value(self, record: Record) -> float | None:
        """The number that decides; None where there is no finite one."""
        return record.metrics.get(self.goal.logged)

    @property
    def best(self) -> Setting:
        """The best setting, the first of several that are alike.

        Raises:
            ValueError: if no setting has a finite number.
        """
        best: tuple[Setting, float] | None = None
        for setting, record in self.rows:
            value = self.value(record)
            if value is not None and self.goal.is_better(value, None if best is None else best[1]):
                best = setting, value
        if best is None:
            raise ValueError(
                f"no setting gave a finite {self.goal.logged}: {self.rows[0][1].broken or 'all numbers are nan or inf'}"
            )
        return best[0]

    def table(self, markdown: bool = False) -> Table:
        """All settings with what the callbacks logged, a row for each; without guidance there is but one."""
        names = list(dict.fromkeys(name for _, record in self.rows for name in record.metrics))
        names.sort(key=lambda name: name != self.goal.logged)
        table = Table(box=box.MARKDOWN) if markdown else Table(title=f"sweep by {self.goal.logged}")
        for name in ("scale", "start", "end", "average"):
            table.add_column(name, justify="right")
        for name in names:
            table.add_column(name.removeprefix("test/"), justify="right", overflow="fold")
        table.add_column("")
        best = self.best
        for setting, record in {setting.measured: (setting, record) for setting, record in self.rows}.values():
            interval = [f"{setting.start:g}", f"{setting.end:g}"] if setting.scale != 1 else ["", ""]
            length = "own" if setting.length is None else f"{setting.length:g}"
            numbers = [_cell(record.metrics.get(name)) for name in names]
            mark = "best" if setting.measured == best.measured else "not finite" if self.value(record) is None else ""
            style = "bold" if mark == "best" else None
            table.add_row(f"{setting.scale:g}", *interval, length, *numbers, mark, style=style)
        return table

    def answer(self) -> str:
        """The best setting in a sentence, beside no guidance where that was measured, too."""
        measured = {setting.measured: record for setting, record in self.rows}
        text = f"The best by {self.goal.logged} ({self.goal.direction}) is {self.best}: "
        text += f"{self._numbers(measured)}, with seed {self.seed}"
        if self.confirmed:
            text += f"; {self._numbers(self.confirmed)}, with seed {self.seed + 1}, which chose nothing"
        return f"{text}."

    def _numbers(self, measured: Mapping[Setting, Record]) -> str:
        """The number of the best setting, and that of no guidance."""
        best, plain = self.best.measured, self.best.unguided
        text = _cell(self.value(measured[best])) or "not finite"
        if plain == best or plain not in measured:
            return text
        return f"{text} (no guidance: {_cell(self.value(measured[plain])) or 'not finite'})"

    def measured(self) -> str:
        """What was measured, in a sentence."""
        sampler = dict(self.shared["model"]["sampler"])
        options = ", ".join(f"{name} {value}" for name, value in sampler.items() if name != "class")
        return (
            f"{len({setting.measured for setting, _ in self.rows})} settings of {self.checkpoint}, "
            f"{self.shared['num_samples']} samples each, drawn by {sampler['class']} ({options}) with seed {self.seed}."
        )

    def summary(self) -> dict[str, Any]:
        """The answer, as plain data."""
        best, record = self.best, dict(self.rows)[self.best]
        return {
            "metric": self.goal.logged,
            "direction": self.goal.direction,
            "checkpoint": str(self.checkpoint),
            "command": _command(),
            "versions": versions(),
            "best": asdict(best) | {"value": self.value(record), "seed": self.seed},
            "confirmed": [
                asdict(setting) | {"value": self.value(record), "seed": self.seed + 1}
                for setting, record in self.confirmed.items()
            ],
        }

    def write(self, folder: Path, checkpoint: Path, images_seen: int) -> None:
        """Writes `sweep.md`, `sweep.png`, the same picture for TensorBoard, and `best.yaml`.

        Args:
            folder: Folder of the sweep.
            checkpoint: The checkpoint with the best setting's average.
            images_seen: Images that the checkpoint was trained on, where TensorBoard shows the picture.
        """
        picture = pixels_of(heat_map(self.rows, self.best, self.goal))
        write_picture(folder / "sweep.png", picture, COLOURS)
        write_text(folder / "sweep.md", self._markdown())
        write_text(folder / "best.yaml", self._overlay(checkpoint))
        logger = TensorBoardLogger(folder.parent, folder.name, version="")
        board = logger.experiment  # which begins a file
        hide_from(logger, images_seen)
        log_picture(logger, f"sweep/{self.goal.name}", picture, images_seen)
        board.close()

    def _markdown(self) -> str:
        written = io.StringIO()
        Console(file=written, width=1000).print(self.table(markdown=True))
        lines = [line.rstrip() for line in written.getvalue().splitlines() if line.strip()]
        parts = ["# Sweep", self.answer(), self.measured(), "\n".join(lines), "![All settings](sweep.png)", OPTIMISTIC]
        return "\n\n".join([*parts, f"Made by `{_command()}`"]) + "\n"

    def _overlay(self, checkpoint: Path) -> str:
        lines = [self.answer(), self.measured(), "Goes after the run's own config, for predict, test and validate."]
        lines.append(f"Made by {_command()}")
        config = {"model": {"guidance": describe(self.best.of(self.guidance))}, "ckpt_path": str(checkpoint)}
        return "".join(f"# {line}\n" for line in lines) + yaml.safe_dump(config, sort_keys=False)


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _command() -> str:
    return f"python -m ldm {shlex.join(sys.argv[1:])}"
