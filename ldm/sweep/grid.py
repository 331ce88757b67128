"""What a sweep tries: a grid of guidance scales, intervals and averages."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal, final

from ldm.guidance import Guidance
from vfm_vae.options import at_least, positive, within


@final
class Sweep:
    """The grid of a sweep: every scale with every interval and every average.

    Args:
        scales: Guidance scales to try. Scale 1 is no guidance, so it is measured once for all intervals.
        starts: Times at which guidance begins, 0 being noise and 1 data; null for that of the config's guidance.
        ends: Times after which guidance ends; null for that of the config's guidance. An interval that would end before
            it starts is left out.
        lengths: Averages to try, by their length (`sigma_rel`), which are reconstructed from the snapshots that the
            callback PostHocEMA has kept in the run; null within the list is the checkpoint's own average.
        metric: The logged number that decides, such as `gfid` or `class_accuracy`; null for the first distance that
            the callbacks log.
        mode: Whether the smallest (`min`) or the largest (`max`) number is the best; null for the smallest distance,
            and the largest of anything else.
        confirm: Whether to measure the best setting once more at the end, with the next seed; and no guidance as well,
            where the grid has it.
        folder: Folder for the results; null for `sweep` in the run that the checkpoint belongs to.

    Raises:
        ValueError: if a list is empty, a number lies outside its range, or no interval ends after it starts.
    """

    def __init__(
        self,
        scales: Sequence[float] = (1.0, 1.5, 2.0, 3.0, 4.0),
        starts: Sequence[float] | None = None,
        ends: Sequence[float] | None = None,
        lengths: Sequence[float | None] = (None,),
        metric: str | None = None,
        mode: Literal["min", "max"] | None = None,
        confirm: bool = True,
        folder: str | None = None,
    ):
        at_least(0, scales=scales)
        within(0, 1, starts=starts, ends=ends)
        positive(lengths=[length for length in lengths if length is not None])
        for name, values in {"scales": scales, "starts": starts, "ends": ends, "lengths": lengths}.items():
            if values is not None and not len(values):
                raise ValueError(f"{name}: there is nothing to try in an empty list; give at least one value")
        self.scales, self.starts, self.ends, self.lengths = scales, starts, ends, lengths
        self.metric, self.mode, self.confirm, self.folder = metric, mode, confirm, folder

    def settings(self, guidance: Guidance) -> "list[Setting]":
        """All settings of the grid, each once, those of an average together.

        Args:
            guidance: The config's, whose interval counts where the grid has none.

        Raises:
            ValueError: if no interval ends after it starts.
        """
        starts, ends = self.starts or [guidance.start], self.ends or [guidance.end]
        intervals = [(start, end) for start, end in product(starts, ends) if start <= end]
        if not intervals:
            raise ValueError(
                f"sweep.starts, sweep.ends: every interval would end before it starts, given {list(starts)} and "
                f"{list(ends)}"
            )
        grid = [
            Setting(scale, *interval, length)
            for length in self.lengths
            for interval in intervals
            for scale in sorted(self.scales)
        ]
        return list(dict.fromkeys(grid))


@dataclass(frozen=True)
class Setting:
    """One point of the grid.

    Attributes:
        scale: Scale of guidance.
        start: Time at which guidance begins.
        end: Time after which it ends.
        length: Length of the average; None for the checkpoint's own.
    """

    scale: float
    start: float
    end: float
    length: float | None

    @property
    def measured(self) -> "Setting":
        """The setting that is measured in its place: without guidance, the interval makes no difference."""
        return self.unguided if self.scale == 1 else self

    @property
    def unguided(self) -> "Setting":
        """No guidance of the same average."""
        return Setting(1.0, 0.0, 1.0, self.length)

    def of(self, guidance: Guidance) -> Guidance:
        """A guidance with this scale and interval."""
        return guidance.with_interval(self.start, self.end).with_scale(self.scale)

    def __str__(self) -> str:
        """The setting in words."""
        guided = f"scale {self.scale:g} from {self.start:g} to {self.end:g}" if self.scale != 1 else "no guidance"
        return guided if self.length is None else f"{guided}, average of length {self.length:g}"
