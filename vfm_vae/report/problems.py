"""Everything that went wrong on the way, or that keeps numbers from being compared."""

import re
from collections.abc import Iterator, Sequence

from vfm_vae.metrics.summary import flattened
from vfm_vae.report.folders import Run, Subject, mapping
from vfm_vae.report.known import GROUPS, bare

REFUSED = "steps refused, as losses or gradients were not finite or too large"
MEASURED = re.compile("|".join(GROUPS[name] for name in GROUPS if name not in ("Speed", "Training", "Loss by time")))
PARTS_OF_ALL = ("model", "checkpoint", "metrics")


def problems_of(subject: Subject) -> list[str]:
    """What was skipped, damaged or interrupted in a folder, a line each."""
    found = [line for run in subject.runs for line in _of_run(run)]
    for entry in subject.entries:
        if broken := [name for name, value in entry.metrics.items() if value is None]:
            found.append(f"{entry.name}: not finite: {', '.join(broken)}")
    found += _settings_that_differ(subject)
    if subject.undone:
        found.append(f"parts of the study that are not done: {', '.join(subject.undone)}")
    if subject.runs and not subject.entries:
        found.append("there are no metrics: nothing was validated, or nothing wrote metrics.json")
    return found


def unknown_of(subject: Subject) -> list[str]:
    """What nothing is known of."""
    silent = [run.name for run in subject.runs if not run.sessions]
    if not silent:
        return []
    return [f"{', '.join(silent)}: no history.json, so sessions, commands and damaged images are not known"]


def _of_run(run: Run) -> Iterator[str]:
    yield from (f"{run.name}: {problem}" for problem in run.problems)
    for number, session in enumerate(run.sessions, start=1):
        where = f"{run.name}, session {number}"
        outcome, seen = session.get("outcome"), session.get("images_seen")
        at = f" at {seen[-1]:,} images" if isinstance(seen, list) and isinstance(seen[-1], int) else ""
        if outcome == "stopped":
            yield f"{where}: stopped by a signal{at}"
        elif outcome == "failed":
            yield f"{where}: failed{at}: {session.get('error')}"
        elif outcome is None:
            yield f"{where}: has no end: it was killed, or still runs; last heard of{at}"
        if session.get("skipped_steps"):
            yield f"{where}: {session['skipped_steps']:,} {REFUSED}"
        if session.get("damaged_images"):
            yield f"{where}: {session['damaged_images']:,} damaged images left out"
    curve = run.curves.values.get("train/skipped_steps")
    if not run.sessions and curve is not None and curve.values[-1:].any():
        yield f"{run.name}: {int(curve.values[-1]):,} {REFUSED}"
    for tag, each in run.curves.values.items():
        if each.num_broken:
            yield f"{run.name}: {tag} was not finite at {each.num_broken} of {each.num_broken + len(each.at)} points"


def _settings_that_differ(subject: Subject) -> Iterator[str]:
    """Settings of what measures, where entries that share a number have other ones."""
    groups: list[set[int]] = []
    names = [{bare(name) for name in entry.metrics if MEASURED.match(bare(name))} for entry in subject.entries]
    for number, own in enumerate(names):
        joined = [group for group in groups if any(own & names[other] for other in group)]
        groups = [group for group in groups if group not in joined] + [{number}.union(*joined)]
    for group in groups:
        entries = [subject.entries[number] for number in sorted(group)]
        flat = {entry.name: flattened(mapping(entry.content.get("settings"))) for entry in entries}
        for name in dict.fromkeys(name for each in flat.values() for name in each):
            if name.partition(".")[0] in PARTS_OF_ALL and not name.endswith(("precision", "rounding", "latent")):
                continue
            values: dict[str, list[str]] = {}
            for entry, each in flat.items():
                if name in each:
                    values.setdefault(str(each[name]), []).append(entry)
            if len(values) > 1:
                told = "; ".join(f"{value[:60]} in {', '.join(where)}" for value, where in values.items())
                yield f"measured differently: {name}: {told}"


def headline(run: Run, steps: Sequence[int]) -> str:
    """How a run ended, in a few words.

    Args:
        run: The run.
        steps: Steps of its entries in files of metrics.
    """
    if run.sessions:
        outcome = run.sessions[-1].get("outcome")
        return {"finished": "finished", "stopped": "stopped by a signal", "failed": "failed"}.get(
            str(outcome), "has no end: killed, or still running"
        )
    goal, limit = run.model.get("max_images"), mapping(run.config.get("trainer")).get("max_steps")
    if isinstance(goal, int) and goal > 0 and run.images_seen is not None:
        return "reached its end" if run.images_seen >= goal else f"ended before its goal of {goal:,} images"
    if isinstance(limit, int) and limit > 0 and steps:
        return "reached its end" if max(steps) >= limit else f"ended before its goal of {limit:,} steps"
    return "its end is not known"
