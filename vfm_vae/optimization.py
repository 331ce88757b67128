"""Checks of training options, optimizer steps, and their logging, without waiting for the device."""

from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

from vfm_vae.lightning_private import logs_now
from vfm_vae.options import at_least, finite, positive

PRECISIONS = ("bf16-mixed", "32-true")


def check_trainer(trainer: Trainer) -> None:
    """Checks options that Lightning takes without checking, and that its precision is supported.

    Weights are always in float32; training takes no float16, whose gradients would need scaling.

    Raises:
        ValueError: if one does not.
    """
    for minimum, options in {
        0: ("gradient_clip_val", "log_every_n_steps", "min_epochs", "min_steps"),
        1: ("accumulate_grad_batches", "check_val_every_n_epoch"),
    }.items():
        at_least(minimum, **{f"trainer.{option}": getattr(trainer, option) for option in options})
    precisions = PRECISIONS if trainer.state.fn == TrainerFn.FITTING else (*PRECISIONS, "16-mixed")
    if trainer.precision not in precisions:
        raise ValueError(f"trainer.precision: {trainer.precision} is not supported, use {' or '.join(precisions)}")
    at_least(-1, **{"trainer.num_sanity_val_steps": min(trainer.num_sanity_val_steps, 0)})  # -1 is infinity by now
    positive(**{"trainer.val_check_interval": getattr(trainer, "val_check_interval", None)})  # unless by the clock


def try_optimizers(*shape: int, **options: OptimizerCallable | None) -> None:
    """Checks that optimizers can be made from their options, before there is anything to optimize.

    Args:
        *shape: Shape of a parameter that they are tried with; one number by default.
        **options: What makes them, by name; None where there is none.

    Raises:
        ValueError: if one can't be made, or has a number that is not finite.
    """
    for name, make in options.items():
        if make is None:
            continue
        try:
            (group,) = make([nn.Parameter(torch.zeros(shape or (1,)))]).param_groups
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        finite(**{f"{name}.{option}": float(value) for option, value in group.items() if isinstance(value, Real)})


def takes_found_inf(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the optimiser's kernels look at `found_inf`, as fused ones do for a gradient scaler."""
    return bool(optimizer.param_groups) and all(group.get("fused") for group in optimizer.param_groups)


def step_unless(refused: Tensor, optimizer: torch.optim.Optimizer, step: Callable[[], object]) -> None:
    """Takes a step, unless it is refused; then neither weights nor the optimiser's state change.

    A fused optimiser decides on the device. Any other waits for the answer, which on a CPU is there.

    Args:
        refused: 1 to leave the step out, 0 to take it; a float32 scalar.
        optimizer: The optimizer that steps.
        step: Takes it.
    """
    if takes_found_inf(optimizer):
        flagged: Any = optimizer  # torch reads the attribute, but does not declare it
        flagged.found_inf = refused
        try:
            step()
        finally:
            del flagged.found_inf
    elif not refused.item():
        step()


class ClipShare:
    """The share of steps since the last logging whose gradients were clipped, counted on the device.

    Steps that were left out don't count.

    Args:
        name: What it is logged as.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._counts: Tensor | None = None  # of clipped steps, and of all; None where there were none

    def note(self, norm: Tensor, limit: float | None, refused: Tensor) -> None:
        """Counts a step.

        Args:
            norm: Norm of its gradients, a scalar.
            limit: Norm above which gradients are clipped; None or 0 where they are not, and nothing is counted.
            refused: Whether the step is left out, a scalar.
        """
        if limit:
            taken = refused == 0
            counts = torch.stack([taken & (norm > limit), taken]).float()
            self._counts = counts if self._counts is None else self._counts.to(norm.device, non_blocking=True) + counts

    def taken(self) -> dict[str, Tensor]:
        """The share by its name, which begins anew; nothing where nothing was counted."""
        counts, self._counts = self._counts, None
        return {} if counts is None else {self.name: counts[0] / counts[1].clamp(min=1)}

    def state(self) -> list[float] | None:
        """What a checkpoint stores, so that a resumed run goes on counting; this waits for the device."""
        return None if self._counts is None else self._counts.tolist()

    def go_on(self, state: list[float] | None) -> None:
        """Continues from `state`."""
        self._counts = None if state is None else torch.tensor(state)


def log_where_due(module: Any, values: Mapping[str, Tensor | float], shown: str) -> None:
    """Logs numbers of a training step where the trainer logs; elsewhere the device is not asked for them.

    The images that the module has seen are kept beside them, for files of metrics; loggers have them as the position.
    They are fetched at once, and logged as tensors of the CPU: what is shown is read at every batch.

    Args:
        module: The LightningModule in training, which counts `images_seen`.
        values: Scalars by name.
        shown: The name of the one that the progress bar shows.
    """
    if not logs_now(module.trainer):
        return
    tensors = {name: value.detach().float() for name, value in values.items() if isinstance(value, Tensor)}
    fetched = torch.stack(list(tensors.values())).tolist() if tensors else []
    scalars = dict(values) | dict(zip(tensors, fetched, strict=True))
    module.log(shown, torch.tensor(scalars.pop(shown)), prog_bar=True)
    module.log_dict({name: torch.tensor(float(value)) for name, value in scalars.items()})
    module.log("images_seen", torch.tensor(float(module.images_seen)), logger=False)
