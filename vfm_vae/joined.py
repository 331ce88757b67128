"""Several optimisers, each with its own weights, as one."""

from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

FOUND_INF = "found_inf"  # by which fused optimisers are told to leave a step out


class Joined(Optimizer):
    """Several optimisers that step together, and are scheduled, saved and restored as one.

    The groups of parameters are those of the parts, one after another, and the state is shared: a learning rate that a
    scheduler sets in a group here is the part's. A checkpoint has one state, in which groups and parameters are
    numbered in this order.

    Args:
        *parts: Optimisers of different parameters.

    Attributes:
        parts: The same.
    """

    def __init__(self, *parts: Optimizer) -> None:
        self.parts = parts
        super().__init__([group for part in parts for group in part.param_groups], {})
        self._share()

    def step(self, closure: Any = None) -> Any:
        """Every part takes its step, or, told so by `found_inf`, leaves it out.

        Args:
            closure: Computes the loss and its gradients, once, before the first part steps.

        Returns:
            The loss; None without a closure.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        told = {FOUND_INF: vars(self)[FOUND_INF]} if FOUND_INF in vars(self) else {}
        for part in self.parts:
            vars(part).update(told)
            part.step()
            vars(part).pop(FOUND_INF, None)
        return loss

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Takes what was loaded; the parts share it again."""
        super().__setstate__(state)
        self._share()

    def _share(self) -> None:
        groups = iter(self.param_groups)
        for part in self.parts:
            own = list(islice(groups, len(part.param_groups)))
            part.__setstate__({"state": self.state, "param_groups": own})


def join(
    parameters: Iterable[nn.Parameter],
    optimizer: Callable[..., Optimizer],
    matrices: Iterable[nn.Parameter],
    matrix_optimizer: Callable[..., Optimizer] | None,
) -> Optimizer:
    """The optimiser of a model, some of whose matrices may have one of their own.

    A checkpoint with the states of other optimisers is refused with a ValueError that says so.

    Args:
        parameters: All that the model trains.
        optimizer: Makes the optimiser of all, or of what `matrix_optimizer` leaves.
        matrices: Those among them that `matrix_optimizer` is for.
        matrix_optimizer: Makes their optimiser; None to leave them to the other.
    """
    if matrix_optimizer is None:
        joined = optimizer(parameters)
    else:
        own = dict.fromkeys(matrices)
        rest = optimizer([parameter for parameter in parameters if parameter not in own])
        joined = Joined(rest, matrix_optimizer(list(own)))
    joined.register_load_state_dict_pre_hook(_check_groups)
    return joined


def matrices_of(blocks: nn.Module) -> list[nn.Parameter]:
    """The matrices of blocks that train."""
    return [parameter for parameter in blocks.parameters() if parameter.ndim == 2 and parameter.requires_grad]


def _check_groups(optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    """Refuses a state in which matrices have an optimizer of their own, where they have none here; and the reverse."""
    found, wanted = len(state["param_groups"]), len(optimizer.param_groups)
    if found != wanted:
        had, change = ("one", "give it again") if found > wanted else ("none", "leave it out")
        raise ValueError(
            f"matrix_optimizer: the run that wrote the checkpoint had {had}, so its optimizer's state does not fit; "
            f"{change}, or begin from the checkpoint's weights alone by init_from"
        )
