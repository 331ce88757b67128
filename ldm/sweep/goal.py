"""What a sweep looks for: the smallest distance, or whatever else the callbacks log."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from ldm.sweep.grid import Sweep
from vfm_vae.contracts import Measures

DISTANCE = re.compile(r"([gr]fid|fd_)")
LOWER_IS_BETTER = re.compile(r"(r?sfid|[gr]fid|fd_|perceptual|lpips|loss)")


@dataclass(frozen=True)
class Goal:
    """The number that decides.

    Attributes:
        name: Name of the number, without `test/`.
        lower: Whether the smallest is the best.
    """

    name: str
    lower: bool

    @property
    def logged(self) -> str:
        """The name that it is logged under."""
        return f"test/{self.name}"

    @property
    def direction(self) -> str:
        """The direction in words."""
        return "lower is better" if self.lower else "higher is better"

    def is_better(self, value: float, other: float | None) -> bool:
        """Whether a number is better than another, or the first one."""
        return other is None or (value < other if self.lower else value > other)


def goal_of(options: Sweep, measuring: Iterable[Measures]) -> Goal:
    """The number that decides, which some callback has to log.

    Raises:
        ValueError: if none will.
    """
    names = [name for callback in measuring for name in sorted(callback.names())]
    if not names:
        raise ValueError(
            "trainer.callbacks: nothing measures samples here; add DistributionCallback, or a config that has it, such "
            "as -c configs/ldm/sweep.yaml"
        )
    name = options.metric and re.sub("^(test|val)/", "", options.metric)
    if name is None:
        name = next((name for name in names if DISTANCE.match(name)), None)
        if name is None:
            raise ValueError(f"sweep.metric: the callbacks log no distance; name one of {', '.join(names)}")
    elif not any(re.fullmatch(re.sub("<.*?>", ".+", known), name) for known in map(_escaped, names)):
        raise ValueError(f"sweep.metric: no callback logs {options.metric!r}; they log {', '.join(names)}")
    lower = options.mode == "min" if options.mode else LOWER_IS_BETTER.match(name) is not None
    return Goal(name, lower)


def _escaped(name: str) -> str:
    """A name as a pattern, but for its placeholders such as `<feature>`."""
    return "".join(part if part.startswith("<") else re.escape(part) for part in re.split("(<.*?>)", name))
