"""Skips training steps whose gradients are not finite."""

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from vfm_vae.optimization import takes_found_inf

MAX_SKIPPED_IN_A_ROW = 100


class SkippedSteps:
    """Leaves steps out, neither weights nor the optimiser's state changing, and counts them on the device.

    A fused optimiser is told by a tensor, so that the host waits for nothing. For others, and where parameters are
    sharded (DTensor), it asks whether the gradients are finite.

    Attributes:
        total: Steps that were left out, an int64 scalar.
        in_a_row: Steps that were left out since the last one that was taken, likewise.
    """

    def __init__(self) -> None:
        self.total, self.in_a_row = torch.tensor(0), torch.tensor(0)

    def watch(self, optimizer: torch.optim.Optimizer) -> None:
        """Clears the decision after every step; to be called once for each optimizer."""
        optimizer.register_step_post_hook(_forget)

    def judge(self, optimizer: torch.optim.Optimizer, norm: Tensor) -> None:
        """Skips the following step if the gradients' norm is not finite.

        Args:
            optimizer: About to step.
            norm: A scalar on the device of its parameters, the same on all ranks.
        """
        refused = ~norm.isfinite()
        self.total, self.in_a_row = (n.to(norm.device, non_blocking=True) for n in (self.total, self.in_a_row))
        self.total = self.total + refused
        self.in_a_row = (self.in_a_row + 1) * refused
        sharded = any(isinstance(p, DTensor) for group in optimizer.param_groups for p in group["params"])
        if takes_found_inf(optimizer) and not sharded:
            flagged: Any = optimizer  # torch reads the attribute, but does not declare it
            flagged.found_inf = refused.float()
        elif refused.item():
            optimizer.zero_grad()  # without gradients, neither weights nor moments change

    def check(self) -> None:
        """Checks that training makes progress; this waits for the device.

        Raises:
            ValueError: if too many steps in a row, up to the last one, were left out.
        """
        if self.in_a_row.item() >= MAX_SKIPPED_IN_A_ROW:
            raise ValueError(
                f"the gradients of {MAX_SKIPPED_IN_A_ROW} steps in a row were not finite: check the data, or resume "
                "from the last checkpoint with a lower learning rate"
            )


def _forget(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    vars(optimizer).pop("found_inf", None)
