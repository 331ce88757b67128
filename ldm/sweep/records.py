"""What a sweep has measured, in a file: each setting is written at once, so that nothing is measured twice."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from ldm.sweep.grid import Setting
from vfm_vae.checkpoints import read_json
from vfm_vae.writing import check_place, write_json

FILE = "sweep.json"


class Task(NamedTuple):
    """A setting to measure, by a seed.

    Attributes:
        setting: The setting.
        seed: Seed of the samples.
    """

    setting: Setting
    seed: int


class Record(NamedTuple):
    """What was measured of a setting.

    Attributes:
        metrics: All that was logged, by name; None of what is not finite.
        depends: All that the numbers depend on.
        seconds: How long it took.
        broken: Why there are no numbers; None where there are.
    """

    metrics: Mapping[str, float | None]
    depends: Mapping[str, Any]
    seconds: float
    broken: str | None = None


class Records:
    """All records of a folder, by setting and seed; also those of other sweeps than the present one.

    Args:
        folder: Folder of the sweep; None keeps the records in memory alone.

    Raises:
        ValueError: if its file of records holds something else, or nothing can be written there.
    """

    def __init__(self, folder: Path | None) -> None:
        self.file = None if folder is None else folder / FILE
        self._records: dict[Task, Record] = {}
        self.summary: dict[str, Any] = {}
        if self.file is not None and self.file.is_file():
            self._read(self.file)

    def _read(self, file: Path) -> None:
        content = read_json(file, "sweep.folder")
        try:
            for entry in content["measured"]:
                setting = Setting(**{name: entry[name] for name in Setting.__dataclass_fields__})
                record = Record(**{name: entry[name] for name in Record._fields})
                self._records[Task(setting, entry["seed"])] = record
        except (KeyError, TypeError) as error:
            raise ValueError(f"sweep.folder: {str(file)!r} holds no sweep; give another folder") from error

    def check_place(self) -> None:
        """Checks early that records can be written.

        Raises:
            NotWritten: if they can't.
        """
        if self.file is not None:
            check_place(self.file, option="sweep.folder")

    def find(self, task: Task, depends: Mapping[str, Any]) -> Record | None:
        """The record of a task; None where it was not measured, or depends on something that has changed."""
        record = self._records.get(task)
        return record if record is not None and not changes(record.depends, depends) else None

    def changed(self, task: Task, depends: Mapping[str, Any]) -> list[str]:
        """What has changed since a task was measured, by name; nothing where it was not."""
        record = self._records.get(task)
        return [] if record is None else changes(record.depends, depends)

    def add(self, task: Task, record: Record) -> None:
        """Adds a record, or puts it in the place of a former one."""
        self._records[task] = record

    def write(self) -> None:
        """Writes all records, after the summary of the present sweep."""
        if self.file is not None:
            measured = [
                asdict(task.setting) | {"seed": task.seed} | record._asdict() for task, record in self._records.items()
            ]
            write_json(self.file, self.summary | {"measured": measured})


def changes(former: Mapping[str, Any], present: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Names of what differs between two nested dictionaries."""
    found = []
    for name in dict.fromkeys((*former, *present)):
        one, other = former.get(name), present.get(name)
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            found += changes(one, other, f"{prefix}{name}.")
        elif one != other:
            found.append(f"{prefix}{name}")
    return found
