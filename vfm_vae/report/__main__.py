"""`python -m vfm_vae.report FOLDER… [--out report.html]`: one HTML file that tells the story of a run."""

import os
from collections.abc import Sequence
from pathlib import Path

from jsonargparse import ArgumentParser

from vfm_vae.cli import short_errors
from vfm_vae.report.folders import read_subjects
from vfm_vae.report.page import page_of
from vfm_vae.writing import check_place, write_text

NAME = "report.html"


def write_report(folders: Sequence[str], out: str | None = None) -> Path:
    """Writes one HTML file that tells the whole story of a run, or compares several.

    Args:
        folders: Folders of runs, or folders that hold runs, such as runs/demo; several are compared.
        out: The file to write; null for `report.html` in the folder, or in the one that all folders share.

    Returns:
        The file.

    Raises:
        ValueError: if a folder holds no run, a file of metrics can't be read, or the page can't be written.
    """
    if not folders:
        raise ValueError("folders: give the folder of a run, such as runs/demo")
    subjects = read_subjects(folders)
    place = Path(out) if out is not None else Path(os.path.commonpath([os.path.abspath(f) for f in folders]), NAME)
    if out is None:
        place = Path(os.path.relpath(place)) if place.is_relative_to(Path.cwd()) else place
    check_place(place, option="out")
    write_text(place, page_of(subjects), option="out")
    return place


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs `write_report` by the options of a command line; by default of this process's."""
    parser = ArgumentParser(
        prog="python -m vfm_vae.report",
        exit_on_error=False,
        description=str(write_report.__doc__).splitlines()[0],
    )
    parser.add_argument("folders", nargs="*", help="Folders of runs, or that hold runs; several are compared.")
    parser.add_argument("--out", help="The file to write; by default report.html in the folder, or in the shared one.")
    with short_errors():
        options = parser.parse_args(arguments)
        place = write_report(options.folders, options.out)
        print(f"Report: {place} ({place.stat().st_size / 1e6:.1f} MB), one file to open or to mail")


if __name__ == "__main__":
    main()
