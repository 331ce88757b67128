"""Learning rates that change from step to step."""

import math
import warnings
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau

from vfm_vae.description import class_path
from vfm_vae.options import at_least, one_of, within

SCHEDULES = "schedules"  # where a checkpoint has the options that were given, with the schedules' classes


class Schedule(NamedTuple):
    """How to make a schedule.

    Attributes:
        make: Makes it for an optimizer.
        kind: Full name of its class.
    """

    make: LRSchedulerCallable
    kind: str


class WarmupDecay(LambdaLR):
    """A linear warm-up, a constant rate, and a linear or cosine decay to a part of it, where the rate then stays.

    Steps k = 0, 1, … of the warm-up are taken at `(k + 1) / warmup_steps` of the optimizer's rate, and steps k of the
    decay at `final + (1 − final) · f(k / decay_steps)`, where f(p) is `1 − p`, or `(1 + cos πp) / 2` (Loshchilov &
    Hutter 2017, arXiv 1608.03983, eq. 5).

    A checkpoint holds how many steps were counted, and the rate of the next. A resumed run goes on from there by the
    options that it is given.

    Args:
        optimizer: The optimizer whose rate changes, in all of its groups alike.
        warmup_steps: Steps in which the rate rises linearly; 0 begins at the full rate.
        constant_steps: Steps at the full rate between warm-up and decay.
        decay: How the rate falls after that: `linear`, or `cosine`; `none` leaves it at the full rate.
        decay_steps: Steps in which it falls.
        final: Fraction of the rate that it falls to.

    Raises:
        ValueError: if an option lies outside its range, or does not fit another.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        warmup_steps: int = 0,
        constant_steps: int = 0,
        decay: Literal["none", "linear", "cosine"] = "none",
        decay_steps: int = 0,
        final: float = 0.0,
    ):
        at_least(0, warmup_steps=warmup_steps, constant_steps=constant_steps, decay_steps=decay_steps)
        one_of("decay", decay, "none", "linear", "cosine")
        within(0, 1, final=final)
        if (decay == "none") != (decay_steps == 0):
            raise ValueError(f"decay, decay_steps: give both or none, given {decay!r} and {decay_steps}")

        def factor(step: int) -> float:
            if step < warmup_steps:
                return (step + 1) / warmup_steps
            decayed = step - warmup_steps - constant_steps
            if decay == "none" or decayed <= 0:
                return 1.0
            progress = min(decayed / decay_steps, 1.0)
            left = 1 - progress if decay == "linear" else (1 + math.cos(math.pi * progress)) / 2
            return final + (1 - final) * left

        super().__init__(optimizer, factor)


def try_schedules(
    **options: tuple[LRSchedulerCallable | None, OptimizerCallable | None],
) -> dict[str, Schedule]:
    """Checks that schedules can be made from their options, before there is anything to optimize.

    Args:
        **options: What makes them by name, None for a constant rate, and what makes the optimizer of each.

    Returns:
        Those that are wanted.

    Raises:
        ValueError: if one can't be made, has no optimizer, or needs a metric.
    """
    wanted = {}
    for name, (make, make_optimizer) in options.items():
        if make is None:
            continue
        if make_optimizer is None:
            raise ValueError(f"{name}: there is no optimizer whose rate it could change; leave it out")
        try:
            schedule = make(make_optimizer([nn.Parameter(torch.zeros(1))]))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        if isinstance(schedule, ReduceLROnPlateau):
            raise ValueError(
                f"{name}: ReduceLROnPlateau follows a metric, but rates change after every step; take a schedule that "
                "only counts steps, such as vfm_vae.schedules.WarmupDecay"
            )
        wanted[name] = Schedule(make, class_path(type(schedule)))
    return wanted


def with_schedules(schedules: Mapping[str, Schedule], **optimizers: Optimizer) -> Any:
    """Optimizers as `configure_optimizers` returns them, with their schedules.

    Args:
        schedules: How to make them, by their options' names.
        **optimizers: All optimizers, by the options that a schedule of each has.
    """
    # Torch warns of a schedule that goes on before the optimizer does; but the first step may have been refused.
    warnings.filterwarnings("ignore", r"Detected call of `lr_scheduler\.step\(\)` before `optimizer\.step\(\)`")
    made = [schedules[name].make(optimizer) for name, optimizer in optimizers.items() if name in schedules]
    return list(optimizers.values()), [{"scheduler": schedule, "interval": "step"} for schedule in made]


def schedule_of(trainer: Trainer, optimizer: Optimizer) -> LRScheduler | None:
    """The schedule that changes an optimizer's rate after every step of training; None where there is none."""
    schedules = [config.scheduler for config in trainer.lr_scheduler_configs if config.interval == "step"]
    return next((schedule for schedule in schedules if schedule.optimizer is optimizer), None)


def kinds_of(schedules: Mapping[str, Schedule]) -> dict[str, str]:
    """What a checkpoint notes of schedules: their classes, by their options' names."""
    return {name: schedule.kind for name, schedule in schedules.items()}


def check_schedules(schedules: Mapping[str, Schedule], checkpoint: Mapping[str, Any]) -> None:
    """Checks that the run which wrote a checkpoint had the same schedules, so that this one can go on where it was.

    Args:
        schedules: Those that were given, by their options' names.
        checkpoint: A training checkpoint, which notes those of its run, unless it is of before there were any.

    Raises:
        ValueError: if there is one more or one less, or one of another class.
    """
    had, have = dict(checkpoint.get(SCHEDULES, {})), kinds_of(schedules)
    for name in sorted({*had, *have}):
        if had.get(name) == have.get(name):
            continue
        found, change = (had[name], "give it again") if name in had else ("none", "leave it out")
        raise ValueError(
            f"{name}: the run that wrote the checkpoint had {found}, so the learning rate can't go on where it was; "
            f"{change}, or begin from the checkpoint's weights alone by init_from"
        )
