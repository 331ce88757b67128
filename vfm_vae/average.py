"""`python -m vfm_vae.average`: writes a run's last checkpoint with an average of another length.

The run was trained with `callbacks.post_hoc_ema.PostHocEMA`, whose snapshots the average is made of. The commands
`validate`, `test` and `predict`, and `convert`, take the checkpoint like any other.
"""

from pathlib import Path

from jsonargparse import ArgumentParser

from vfm_vae import schema
from vfm_vae.checkpoints import read_checkpoint
from vfm_vae.cli import short_errors
from vfm_vae.options import within
from vfm_vae.post_hoc import FOLDER, LONGEST, SHORTEST, check_run, find, last_until, reconstruct, reliable
from vfm_vae.writing import write_torch


def average(run: str, out: str, length: float = 0.08, images: int | None = None) -> None:
    """Writes the last checkpoint of a run with another average as its `ema`, and says which lengths are reliable.

    Args:
        run: Folder of the run, with its checkpoints and snapshots.
        out: The checkpoint to write.
        length: Length of the average: the standard deviation of its profile, as a fraction of the training.
        images: Images that the model had seen: the average ends with the last snapshot until then; by default, with
            the last one until the checkpoint.

    Raises:
        ValueError: if there are no snapshots or no checkpoint, one can't be read, or they don't belong together.
        NotWritten: if the checkpoint can't be written.
    """
    within(SHORTEST, LONGEST, length=length)
    folder = find(run)
    checkpoint = read_checkpoint(_last_checkpoint(folder.parent), "run", mmap=True)
    seen = int(checkpoint.get("images_seen", 0))
    if images is not None and images > seen:
        raise ValueError(f"images: the run's last checkpoint has seen {seen} images, given {images}")
    until = seen if images is None else images
    check_run(folder, checkpoint, until)
    last = last_until(folder, until)
    low, high = reliable(folder, until)
    end = last.start + last.images
    had_one = schema.AVERAGE in checkpoint
    schema.write_average(checkpoint, reconstruct(folder, length, until), end)
    write_torch(out, checkpoint)
    print(f"{out}: the average of length {length:g} at {end} images; lengths from {low:g} to {high:g} are reliable")
    if not had_one:
        print("the run was without EMA: commands use the average only with that among trainer.callbacks")


def _last_checkpoint(run: Path) -> Path:
    """The checkpoint that training goes on from."""
    found = [place for place in (run / "checkpoints" / "last.ckpt", run / "last.ckpt") if place.exists()]
    if not found:
        raise ValueError(f"run: {str(run)!r} has no checkpoints/last.ckpt; give the folder that holds it and {FOLDER}")
    return found[0]


def main() -> None:
    """The command line."""
    parser = ArgumentParser(exit_on_error=False, prog="python -m vfm_vae.average", description=__doc__)
    parser.add_argument("run", help="Folder of the run, with its checkpoints and snapshots.")
    parser.add_function_arguments(average, skip={"run"})
    with short_errors():
        average(**parser.parse_args().as_dict())


if __name__ == "__main__":
    main()
