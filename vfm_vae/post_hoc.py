"""Averages of the weights of any length, made after training (Karras et al. 2024, arXiv 2312.02696, section 3).

The average of length sigma over `t` images weights the state after `s` images by `(gamma + 1) s^gamma / t^(gamma + 1)`,
a power function whose standard deviation is the fraction sigma of `t`. A run keeps two such averages, and stores them
from time to time. The profile of any other length is nearly a sum of the stored ones' profiles, found by least squares,
and its average is the same sum of the stored averages.

A file holds the averages of one moment in float16, every tensor divided by a power of two of its own, so that none of
its values is beyond float16's range. It takes as much as bfloat16 and is eight times as precise: where the squares of
the coefficients add up to about 1, the sum has the rounding error of a file, and bfloat16's alone is above 1e-3.
"""

import json
import math
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vfm_vae.checkpoints import open_tensors
from vfm_vae.options import within
from vfm_vae.writing import write_tensors

FOLDER = "post_hoc_ema"
FILES = "step*.safetensors"
SHORTEST, LONGEST = 0.01, 0.28  # 1 / sqrt(12) = 0.289 is equal weight for all; beyond it the past would weigh more
RELIABLE = 0.01  # up to this error of its profile, as a fraction of the profile's norm, a length is relied on
ENTRY = "post_hoc_ema"  # of a file's metadata


@dataclass(frozen=True)
class Snapshot:
    """A file with the averages of one moment.

    Attributes:
        step: Steps of the optimizer until then.
        images: Images that the averages span.
        start: Images that the module had seen when they began.
        lengths: Their lengths.
        run: What tells the run from others.
    """

    step: int
    images: int
    start: int
    lengths: tuple[float, ...]
    run: str

    def path(self, folder: Path) -> Path:
        """Its place in a folder."""
        return folder / f"step{self.step:08d}.safetensors"

    def write(self, folder: Path, tracks: Sequence[Mapping[str, Tensor]]) -> None:
        """Writes the file.

        Args:
            folder: Where it goes.
            tracks: The average of each length, by the parameters' names.

        Raises:
            NotWritten: if that is not possible.
        """
        exponents = [{name: _exponent(tensor) for name, tensor in track.items()} for track in tracks]
        tensors = {
            f"{number}.{name}": torch.ldexp(tensor.cpu().float(), torch.tensor(-exponents[number][name])).half()
            for number, track in enumerate(tracks)
            for name, tensor in track.items()
        }
        facts = vars(self) | {"exponents": exponents}
        write_tensors(self.path(folder), tensors, {"format": "pt", ENTRY: json.dumps(facts)})


def snapshots(folder: Path) -> list[Snapshot]:
    """The snapshots in a folder, in the order in which they were written.

    Raises:
        ValueError: if a file is damaged or something else.
    """
    return [_facts(path)[0] for path in sorted(folder.glob(FILES))]


def num_bytes(tracks: Sequence[Mapping[str, Tensor]]) -> int:
    """What the tensors of a snapshot take."""
    return sum(2 * tensor.numel() for track in tracks for tensor in track.values())


def remove_all_but(folder: Path, steps: Container[int], run: str) -> None:
    """Removes snapshots of other steps or another run from a folder, and what can't be read.

    Args:
        folder: The folder.
        steps: Those whose snapshots stay.
        run: The run whose snapshots stay.
    """
    for path in folder.glob(FILES):
        try:
            found, _ = _facts(path)
        except ValueError:
            found = None
        if found is None or found.run != run or found.step not in steps:
            path.unlink()


def find(folder: str | Path) -> Path:
    """The folder of snapshots, of a run's folder or itself.

    Raises:
        ValueError: if there are none.
    """
    for place in (Path(folder, FOLDER), Path(folder)):
        if any(place.glob(FILES)):
            return place
    raise ValueError(
        f"run: {str(folder)!r} has no snapshots of averages; give the folder of a run that was trained with "
        "PostHocEMA among its callbacks"
    )


def reconstruct(folder: str | Path, length: float, images_seen: int | None = None) -> dict[str, Tensor]:
    """The average of a length, from a run's snapshots.

    One tensor of one snapshot is read after another, so it takes little more memory than its result.

    Args:
        folder: Folder of the run, or of its snapshots.
        length: Standard deviation of the average's profile, as a fraction of the training, 0.01 to 0.28. `reliable`
            says which are met.
        images_seen: Images that the module has seen: the average ends with the last snapshot until then; with the last
            of all by default.

    Returns:
        The averaged parameters in float32, by their names in a checkpoint.

    Raises:
        ValueError: if there are no snapshots until then, one can't be read, or the length is out of range.
    """
    within(SHORTEST, LONGEST, length=length)
    place = find(folder)
    used, end = _until(place, images_seen)
    coefficients, _ = fit(used, length, end)
    average: dict[str, Tensor] = {}
    for snapshot, own in zip(used, coefficients.reshape(len(used), -1).tolist(), strict=True):
        path = snapshot.path(place)
        _, exponents = _facts(path)
        with open_tensors(path, "run") as file:
            for number, coefficient in enumerate(own):
                for name, exponent in exponents[number].items():
                    tensor = file.get_tensor(f"{number}.{name}").float().mul_(coefficient * 2.0**exponent)
                    average[name] = average[name].add_(tensor) if name in average else tensor
    return average


def last_until(folder: str | Path, images_seen: int | None = None) -> Snapshot:
    """The snapshot that an average ends with; arguments and errors are those of `reconstruct`."""
    used, _ = _until(find(folder), images_seen)
    return used[-1]


def check_run(folder: str | Path, checkpoint: Mapping[str, Any], images_seen: int | None = None) -> None:
    """Checks that snapshots are of the run that wrote a checkpoint, where that tells which one it was.

    Args:
        folder: Folder of the run, or of its snapshots.
        checkpoint: The checkpoint.
        images_seen: As for `reconstruct`.

    Raises:
        ValueError: if they are of another run, or there are none until then.
    """
    last = last_until(folder, images_seen)
    states = [state for state in checkpoint.get("callbacks", {}).values() if isinstance(state, Mapping)]
    if any(state["run"] != last.run for state in states if "tracks" in state):
        place = str(find(folder))
        raise ValueError(f"run: the snapshots in {place!r} are of another run than the checkpoint; remove them")


def reliable(folder: str | Path, images_seen: int | None = None) -> tuple[float, float]:
    """The shortest and the longest length, in hundredths, whose profiles a run's snapshots meet to within 1 %.

    Weights that move by a tenth of their norm while an average forgets are then met to 1e-3 of it. Arguments and errors
    are those of `reconstruct`.
    """
    used, end = _until(find(folder), images_seen)
    stored = used[-1].lengths
    grid = [number / 100 for number in range(round(100 * SHORTEST), round(100 * LONGEST) + 1)]
    met = [length for length in sorted({*grid, *stored}) if fit(used, length, end)[1] <= RELIABLE]
    return min(met, default=min(stored)), max(met, default=max(stored))


@cache
def exponent_of(length: float) -> float:
    """The exponent gamma of the power function whose standard deviation is `length`.

    It solves `length^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3))`.
    """
    inverse = length**-2
    return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())


def beta(length: float, images: int, step_images: int) -> float:
    """The share of the old average in the new one, after a step.

    Args:
        length: Length of the average.
        images: Images that it spans, with those of the step.
        step_images: Images of the step.
    """
    return float((1 - step_images / images) ** (exponent_of(length) + 1))


def fit(used: Sequence[Snapshot], length: float, end: float) -> tuple[np.ndarray, float]:
    """How to make an average of a length from those of snapshots, by least squares over their profiles.

    Args:
        used: The snapshots.
        length: Length of the average.
        end: Images that it spans.

    Returns:
        The coefficients of all stored averages, snapshot by snapshot, and the error of the profile that they make, as a
        fraction of its norm.
    """
    ends = np.array([snapshot.images / end for snapshot in used for _ in snapshot.lengths])
    gammas = np.array([exponent_of(stored) for snapshot in used for stored in snapshot.lengths])
    one, gamma = np.ones(1), np.array([exponent_of(length)])
    among = _products(ends[:, None], gammas[:, None], ends, gammas)
    with_wanted = _products(ends, gammas, one, gamma)
    wanted = _products(one, gamma, one, gamma)[0]
    coefficients = np.linalg.lstsq(among, with_wanted, rcond=None)[0]
    square = wanted - 2 * coefficients @ with_wanted + coefficients @ among @ coefficients
    return coefficients, math.sqrt(max(square, 0) / wanted)


def _products(end_a: np.ndarray, gamma_a: np.ndarray, end_b: np.ndarray, gamma_b: np.ndarray) -> np.ndarray:
    """Inner products of profiles that end at different moments: integrals of the product of two power functions."""
    first, last = np.minimum(end_a, end_b), np.maximum(end_a, end_b)
    gamma_of_last = np.where(end_a <= end_b, gamma_b, gamma_a)
    return (gamma_a + 1) * (gamma_b + 1) / (gamma_a + gamma_b + 1) * (first / last) ** gamma_of_last / last


def _until(folder: Path, images_seen: int | None) -> tuple[list[Snapshot], int]:
    """The snapshots that an average which ends at a moment is made of, and the images that it spans."""
    found = snapshots(folder)
    alike = [each for each in found if (each.run, each.lengths) == (found[-1].run, found[-1].lengths)]
    used = [each for each in alike if images_seen is None or each.start + each.images <= images_seen]
    if not used:
        first = alike[0].start + alike[0].images
        raise ValueError(f"images: the first snapshot is of {first} images, given {images_seen}")
    return used, used[-1].images


def _facts(path: Path) -> tuple[Snapshot, list[dict[str, int]]]:
    """What a file is, and the power of two by which every tensor of every average was divided."""
    with open_tensors(path, "run") as file:
        metadata: Mapping[str, str] = file.metadata() or {}
    if ENTRY not in metadata:
        raise ValueError(f"run: {str(path)!r} is no snapshot of averages that PostHocEMA wrote; remove it")
    facts: dict[str, Any] = json.loads(metadata[ENTRY])
    exponents = facts.pop("exponents")
    return Snapshot(**facts | {"lengths": tuple(facts["lengths"])}), exponents


def _exponent(tensor: Tensor) -> int:
    """The power of two that brings a tensor's largest magnitude to between 2^14 and 2^15; float16 ends at 2^16."""
    largest = float(tensor.abs().max()) if tensor.numel() else 0.0
    return max(-100, min(100, math.frexp(largest)[1] - 15)) if largest else 0
