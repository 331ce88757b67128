"""The command line: `python -m ldm.study PLAN`."""

import os
import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from jsonargparse import ArgumentParser
from rich.console import Console

from ldm.study.plan import parts_of, read_plan
from ldm.study.runner import Runner
from vfm_vae.cli import short_errors
from vfm_vae.options import at_least


def study(
    plan: str = "study/photos.yaml",
    folder: str | None = None,
    seeds: list[int] | None = None,
    jobs: int | None = None,
    tokenizers: str = "",
    denoisers: str = "",
    report: bool = False,
) -> int:
    """Trains the tokenizers and the diffusion models of a plan, measures them, and writes the report.

    Started again, it goes on where it was stopped. Everything is in the study's folder: a folder for each run, logs of
    all commands in `parts`, and at the end `report.md` with its figures.

    Args:
        plan: The plan: a YAML file, or the name of one that comes with the package.
        folder: Folder of the study, if it is to be another than the plan's.
        seeds: Seeds, if they are to be others than the plan's.
        jobs: How many commands run at a time, each on one CPU thread if there are several; the default is the number of
            CPU cores.
        tokenizers: Further words of the command lines that train and measure tokenizers, such as
            `-c configs/trainer/gpu.yaml --data.root /data/imagenet`.
        denoisers: Further words of the command lines that train diffusion models.
        report: Write the report of what is done already, and run nothing.

    Returns:
        The exit code: 0 if everything is done, 1 if a part failed, and as shells have it after a signal.
    """
    at_least(1, jobs=jobs)
    chosen = read_plan(plan, folder=folder, seeds=seeds)
    console = Console()
    if not report:
        words = [[os.path.expanduser(word) for word in shlex.split(text)] for text in (tokenizers, denoisers)]
        parts = parts_of(chosen, *words)
        cores = os.cpu_count() or 1
        runner = Runner(parts, Path(chosen.folder), min(jobs or cores, len(parts)), console)
        if not runner.run():
            what = signal.Signals(runner.stopped_by).name if runner.stopped_by else "stopped"
            console.print(f"{what}: the same command goes on from here")
            return 128 + runner.stopped_by if runner.stopped_by else 1
    from ldm.study.report import write_report  # it takes seconds to import what draws

    console.print(f"The report: {write_report(chosen)}", soft_wrap=True)
    return 0


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = ArgumentParser(
        exit_on_error=False, prog="python -m ldm.study", description=str(study.__doc__).split("\n")[0]
    )
    parser.add_argument(
        "plan", nargs="?", default="study/photos.yaml", help="The plan: a YAML file, or the name of one."
    )
    parser.add_function_arguments(study, skip={"plan"})
    with short_errors():
        code = study(**parser.parse_args(arguments).as_dict())
    sys.exit(code)


if __name__ == "__main__":
    main()
