"""The curves of all runs: stages one after the other on one axis, several runs over one another."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from markupsafe import Markup

from vfm_vae.report.curves import Curve
from vfm_vae.report.drawing import Trace, chart, heat_map, shade, short, thinned
from vfm_vae.report.folders import Kind, Run, Subject
from vfm_vae.report.known import known
from vfm_vae.report.tables import columns

TITLES: dict[Kind, str] = {"tokenizer": "Tokenizer", "diffusion": "Diffusion model", "other": "Others"}
# Which curves stand together, by pattern; the first one that matches counts.
GROUPS = {
    "Losses": r"train/loss(_(?!adversarial|discriminator).*)?|val/loss|test/loss",
    "The game": r"train/(loss_adversarial|loss_discriminator|logits_).*",
    "Quality on validation": r"val/(psnr|ssim|lpips|perceptual|fd|r?s?fid|ris|gfid|incep|precis|recall|clip_s|class).*",
    "Alignment": r"val/(cknna/(?!block_)|se_cknna|robustness|probe).*|train/alignment.*",
    "Learning rate and gradients": r"train/(lr|grad_norm|clip_share|skipped_steps).*",
    "Speed and memory": r"train/(device/)?(samples_per_sec|mfu|memory_gb)",
    "Others": r"(val|train)/(?!cknna/block_|device/|batches|samples|flops|time).*",
}
MOST_LINES = 8
SHOWN_TIMES = 6
LOSS_BY_TIME, BLOCKS = "loss_by_time/", re.compile(r"val/cknna/block_(\d+)(.*)")
TRANSFORMED = re.compile(r"(?:val|test)/se_cknna/(.+)/(noise|scale|rotation)_([\d.]+)")
STRENGTHS = {"noise": "Standard deviation of the noise", "scale": "Scale", "rotation": "Rotation in degrees"}


class Label(NamedTuple):
    """What a colour stands for; a number is one of the page's colours."""

    colour: int | str
    text: str


class Panel(NamedTuple):
    """A chart with its title, and the name under which its numbers were logged."""

    title: str
    name: str
    drawing: Markup


@dataclass
class Group:
    """Charts that stand together, with what their colours stand for."""

    title: str
    panels: list[Panel] = field(default_factory=list)
    labels: list[Label] = field(default_factory=list)


@dataclass
class Axis:
    """All charts of one kind of models, which have an axis of their own.

    Attributes:
        title: Which models they are.
        unit: What the axis counts.
        stages: Where stages end, in words; empty unless one line alone has several.
        labels: What the colours of lines stand for.
        groups: Curves along training.
        by_time: Loss by time.
        blocks: CKNNA of blocks by images seen.
        left_out: Names of lines that would be too many.
    """

    title: str
    unit: str
    stages: str
    labels: list[Label]
    groups: list[Group]
    by_time: list[Group]
    blocks: list[Panel]
    left_out: list[str]


class Line(NamedTuple):
    """Runs that follow one another, as one line."""

    label: str
    runs: Sequence[Run]

    def curve(self, tag: str) -> Curve | None:
        """A number through all stages; a stage that began anew hides what the one before logged behind that."""
        at, values, broken = np.zeros(0, np.int64), np.zeros(0), 0
        for run in self.runs:
            if (part := run.curves.values.get(tag)) is None:
                continue
            broken += part.num_broken
            if len(part.at):
                kept = at < part.at[0]
                at, values = np.concatenate([at[kept], part.at]), np.concatenate([values[kept], part.values])
        return Curve(at, values, broken) if len(at) else None

    @property
    def tags(self) -> list[str]:
        """All names, in the order of their logging."""
        return list(dict.fromkeys(tag for run in self.runs for tag in run.curves.values))


def axes_of(subjects: Sequence[Subject], points: int) -> list[Axis]:
    """All curves, by kind of model; a line has so many points at most."""
    axes = []
    for kind, title in TITLES.items():
        lines = _lines(subjects, kind)
        if lines:
            axes.append(_axis(title, lines, points))
    return axes


def _lines(subjects: Sequence[Subject], kind: Kind) -> list[Line]:
    lines = []
    for subject in subjects:
        for runs in subject.lines:
            if runs[-1].kind == kind and any(run.curves.values for run in runs):
                name = " → ".join(run.name for run in runs)
                lines.append(Line(f"{subject.name}: {name}" if len(subjects) > 1 else name, runs))
    return lines


def _axis(title: str, lines: list[Line], points: int) -> Axis:
    shown, left_out = lines[:MOST_LINES], [line.label for line in lines[MOST_LINES:]]
    marks, stages = _stages(shown[0]) if len(shown) == 1 else ([], "")
    unit = "steps" if all(run.curves.unit == "steps" for line in shown for run in line.runs) else "images seen"
    labels = [Label(number, line.label) for number, line in enumerate(shown)] if len(shown) > 1 else []
    groups = {name: Group(name) for name in GROUPS}
    ends = [run.curves.end for line in shown for run in line.runs if run.curves.end is not None]
    for tag in dict.fromkeys(tag for line in shown for tag in line.tags):
        place = next((name for name, pattern in GROUPS.items() if re.fullmatch(pattern, tag)), None)
        traces = [] if place is None else _traces(shown, tag, points)
        if place is not None and traces:
            about = known(tag)
            groups[place].panels.append(Panel(about.title if about else tag, tag, chart(traces, marks, max(ends))))
    by_time = [group for line in shown if (group := _by_time(line)) is not None]
    blocks = [panel for line in shown for panel in _blocks(line)]
    return Axis(title, unit, stages, labels, [g for g in groups.values() if g.panels], by_time, blocks, left_out)


def _traces(lines: Sequence[Line], tag: str, points: int) -> list[Trace]:
    traces = []
    for number, line in enumerate(lines):
        if (curve := line.curve(tag)) is not None:
            trace = Trace(curve.at.astype(float), curve.values, number, has_dots=len(curve.at) <= 30)
            traces.append(thinned(trace, points))
    return traces


def _stages(line: Line) -> tuple[list[float], str]:
    """Where the stages of a line end, and the same in words."""
    if len(line.runs) < 2:
        return [], ""
    ends = [(run.name, run.curves.end or 0) for run in line.runs]
    text = ", then ".join(f"{name} to {end:,}" for name, end in ends)
    return [float(end) for _, end in ends[:-1]], text


def _by_time(line: Line) -> Group | None:
    """The loss over time, a curve for each of some measurements along training."""
    for part in ("val", "train"):
        found: dict[float, Curve] = {}
        for tag in line.tags:
            if tag.startswith(f"{LOSS_BY_TIME}{part}_") and (curve := line.curve(tag)) is not None:
                found[float(tag.rpartition("_")[2])] = curve
        if found:
            break
    else:
        return None
    positions = sorted({int(at) for curve in found.values() for at in curve.at})
    chosen = np.unique(np.linspace(0, len(positions) - 1, min(SHOWN_TIMES, len(positions))).round().astype(int))
    traces, labels = [], []
    for number, position in enumerate(positions[place] for place in chosen):
        known_there = [(time, curve) for time, curve in sorted(found.items()) if position in curve.at]
        times = np.array([time for time, _ in known_there])
        values = np.array([curve.values[curve.at == position][0] for _, curve in known_there])
        colour = shade(number / max(1, len(chosen) - 1))
        traces.append(Trace(times, values, colour, has_dots=True))
        labels.append(Label(colour, short(position)))
    source = "validation" if part == "val" else "training"
    return Group(line.label, [Panel(f"{line.label}, {source}", f"{LOSS_BY_TIME}{part}_…", chart(traces))], labels)


def _blocks(line: Line) -> list[Panel]:
    """A heat map for each VFM and time at which blocks were compared."""
    maps: dict[str, dict[int, Curve]] = {}
    for tag in line.tags:
        if (match := BLOCKS.fullmatch(tag)) and (curve := line.curve(tag)) is not None:
            maps.setdefault(match[2], {})[int(match[1])] = curve
    panels = []
    for suffix, blocks in maps.items():
        at = sorted({int(position) for curve in blocks.values() for position in curve.at})
        values = np.full((len(blocks), len(at)), np.nan)
        for row, number in enumerate(sorted(blocks)):
            values[row, np.searchsorted(at, blocks[number].at)] = blocks[number].values
        drawing = heat_map(values, at, [str(number) for number in sorted(blocks)])
        panels.append(Panel(line.label, f"val/cknna/block_…{suffix}", drawing))
    return panels


def strengths_of(subjects: Sequence[Subject]) -> list[Group]:
    """SE-CKNNA by the strength of each transformation, a chart for each feature and kind."""
    groups: dict[str, dict[str, list[tuple[int, dict[float, float]]]]] = {}
    labels: list[Label] = []
    for _, entry, head in columns(subjects):
        found: dict[tuple[str, str], dict[float, float]] = {}
        for name, value in entry.metrics.items():
            if (match := TRANSFORMED.fullmatch(name)) and value is not None:
                found.setdefault((match[1], match[2]), {})[float(match[3])] = value
        if not found:
            continue
        labels.append(Label(len(labels), head))
        for (feature, kind), values in found.items():
            groups.setdefault(feature, {}).setdefault(kind, []).append((len(labels) - 1, values))
    shown = []
    for feature, kinds in groups.items():
        group = Group(feature.replace("_", " "), labels=labels)
        for kind, title in STRENGTHS.items():
            traces = [
                Trace(np.array(sorted(values)), np.array([values[at] for at in sorted(values)]), colour, has_dots=True)
                for colour, values in kinds.get(kind, [])
            ]
            if traces:
                group.panels.append(Panel(title, f"se_cknna/{feature}/{kind}_…", chart(traces, linear=True)))
        shown.append(group)
    return shown
