"""What a run logged along training, from event files of TensorBoard's or from a table of the CSV logger's."""

import csv
import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

from vfm_vae.timeline import BY_STEPS, EPOCH, FILES, IMAGES_SEEN

TABLE = "metrics.csv"
OF_FORMER = (IMAGES_SEEN, EPOCH)  # former versions, that counted steps, logged these beside the others

Tags = dict[str, dict[int, float]]


class Curve(NamedTuple):
    """A number along training.

    Attributes:
        at: Where it was logged, ascending.
        values: What was logged; all finite.
        num_broken: How many more values were not finite.
    """

    at: NDArray[np.int64]
    values: NDArray[np.float64]
    num_broken: int


@dataclass(frozen=True)
class Curves:
    """What a run logged.

    Attributes:
        values: Curves by name.
        unit: What their positions count.
        began: When the first number was logged, in seconds since 1970; 0 where that is unknown.
        problems: What could not be read.
    """

    values: Mapping[str, Curve] = field(default_factory=dict)
    unit: Literal["images", "steps"] = "images"
    began: float = 0.0
    problems: tuple[str, ...] = ()

    @property
    def end(self) -> int | None:
        """The last position in training."""
        ends = [int(curve.at[-1]) for curve in self.values.values() if len(curve.at)]
        return max(ends) if ends else None


def read_curves(folder: Path) -> Curves:
    """Reads what a run logged; its files may have been cut by a kill.

    Where training went on from an older checkpoint, what came behind that in former files is left out.
    """
    problems: list[str] = []
    files: list[Tags] = []
    began = math.inf
    for path in [*sorted((folder / BY_STEPS).glob(FILES)), *sorted(folder.glob(FILES))]:
        tags, first = _of_events(path, problems)
        files.append(tags)
        began = min(began, first)
    if not any(files) and (folder / TABLE).is_file():
        files = [_of_table(folder / TABLE, problems)]
    counted = {step: images for tags in files for step, images in tags.get(IMAGES_SEEN, {}).items()}
    is_former = [any(name in tags for name in OF_FORMER) for tags in files]
    by_images = [_by_images(tags, counted) if former else tags for tags, former in zip(files, is_former, strict=True)]
    merged = _merged(by_images)
    unit: Literal["images", "steps"] = "steps" if any(is_former) and not counted else "images"
    values = {tag: curve_of(points) for tag, points in merged.items() if tag not in (*OF_FORMER, "hp_metric")}
    return Curves(values, unit, 0.0 if math.isinf(began) else began, tuple(problems))


def curve_of(points: Mapping[int, float]) -> Curve:
    """A curve from values by position."""
    at = np.array(sorted(points), np.int64)
    values = np.array([points[position] for position in at.tolist()], np.float64)
    finite = np.isfinite(values)
    return Curve(at[finite], values[finite], int((~finite).sum()))


def _of_events(path: Path, problems: list[str]) -> tuple[Tags, float]:
    """Numbers by name and step, as far as a file of TensorBoard's can be read; and when it begins."""
    tags: Tags = {}
    began = math.inf
    quiet = logging.getLogger("tensorboard")
    level = quiet.level
    quiet.setLevel(logging.ERROR)
    try:
        for event in LegacyEventFileLoader(str(path)).Load():
            began = min(began, event.wall_time)
            for value in event.summary.value:
                if value.HasField("simple_value"):
                    tags.setdefault(value.tag, {})[event.step] = value.simple_value
    except Exception as error:  # a damaged file, as the reader reports it in many ways
        problems.append(f"{path.name} is damaged, and read up to there ({' '.join(str(error).split()) or 'no text'})")
    finally:
        quiet.setLevel(level)
    return tags, began


def _of_table(path: Path, problems: list[str]) -> Tags:
    """The same from a table with a column for each name, in which most cells are empty."""
    tags: Tags = {}
    try:
        with open(path, newline="") as file:
            rows: Iterable[dict[Any, Any]] = csv.DictReader(file)
            for row in rows:
                step = int(float(row["step"]))
                for tag, value in row.items():
                    if tag not in (None, "step") and value:
                        tags.setdefault(tag, {})[step] = float(value)
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
        problems.append(f"{path.name} is damaged, and read up to there ({error})")
    return tags


def _by_images(tags: Tags, counted: Mapping[int, float]) -> Tags:
    """What a former version logged by steps, by the images that it had seen then."""
    known = sorted(step for step, images in counted.items() if math.isfinite(images))
    if not known:
        return tags
    steps = np.array(known, float)
    images = np.array([counted[step] for step in known], float)
    slope = (images[-1] - images[0]) / (steps[-1] - steps[0]) if len(known) > 1 else images[0] / (steps[0] + 1)

    def at(step: int) -> int:
        if step < steps[0]:
            return max(0, round(images[0] - slope * (steps[0] - step)))
        if step > steps[-1]:
            return round(images[-1] + slope * (step - steps[-1]))
        return round(float(np.interp(step, steps, images)))

    return {tag: {at(step): value for step, value in points.items()} for tag, points in tags.items()}


def _merged(files: list[Tags]) -> Tags:
    """All files as one; a later one takes the place of what was logged behind where its training begins."""
    merged: Tags = {}
    for tags in files:
        starts = [min(points) for tag, points in tags.items() if tag.startswith("train/") and points]
        if starts:
            start = min(starts)
            merged = {tag: {at: v for at, v in points.items() if at < start} for tag, points in merged.items()}
        for tag, points in tags.items():
            merged.setdefault(tag, {}).update(points)
    return {tag: points for tag, points in merged.items() if points}
