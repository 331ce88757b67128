"""Several optimisers, each with its own weights, as one."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate
from torch.optim import Muon, Optimizer

OPTIONS = "optimizer", "matrix_optimizer"  # of the parts, in their order
SCHEDULED = {"initial_lr"}  # what a schedule adds to groups of parameters
FOUND_INF = "found_inf"  # by which fused optimisers are told to leave a step out


class Joined(Optimizer):
    """Several optimisers that step together, and are scheduled, saved and restored as one.

    The groups of parameters are those of the parts, one after another, and the state is shared: a learning rate that a
    scheduler sets in a group here is the part's.

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
            if isinstance(part, Muon) and _is_sharded(part):
                step_with_whole_matrices(part)
            else:
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


@torch.no_grad()
def step_with_whole_matrices(optimizer: Optimizer) -> None:
    """Takes a step of matrices that are sharded over ranks, putting them together one after another.

    From shards, Muon would orthogonalise whole matrices as well, but its products in bfloat16 would be rounded
    otherwise: where gradients have few directions, it magnifies that until nothing of the others is alike. It would
    also exchange much more.

    Args:
        optimizer: Its parameters are DTensors, its state has tensors of their shape.
    """
    groups, state = optimizer.param_groups, optimizer.state
    try:
        for group in groups:
            for shard in group["params"]:
                if shard.grad is None:
                    continue
                whole = nn.Parameter(shard.full_tensor())
                whole.grad = shard.grad.full_tensor()
                optimizer.param_groups = [group | {"params": [whole]}]
                optimizer.state = defaultdict(dict)
                optimizer.state[whole] = {name: value.full_tensor() for name, value in state[shard].items()}
                optimizer.step()
                shard.copy_(_sharded_like(shard, whole))
                state[shard] = {name: _sharded_like(shard, value) for name, value in optimizer.state[whole].items()}
    finally:
        optimizer.param_groups, optimizer.state = groups, state


def join(
    parameters: Iterable[nn.Parameter],
    optimizer: Callable[..., Optimizer],
    matrices: Iterable[nn.Parameter],
    matrix_optimizer: Callable[..., Optimizer] | None,
) -> Optimizer:
    """The optimizer of a model, some of whose matrices may have one of their own.

    A checkpoint's state is refused with a ValueError where they had one and have none now, or the other way round, and
    where it is that of another class of optimizer.

    Args:
        parameters: All that the model trains.
        optimizer: Makes the optimizer of all, or of what `matrix_optimizer` leaves.
        matrices: Those among them that `matrix_optimizer` is for.
        matrix_optimizer: Makes their optimizer; None to leave them to the other.
    """
    own = {} if matrix_optimizer is None else dict.fromkeys(matrices)
    whole = optimizer([parameter for parameter in parameters if parameter not in own])
    if matrix_optimizer is not None:
        whole = Joined(whole, matrix_optimizer(list(own)))
    whole.register_load_state_dict_pre_hook(_check_state)
    return whole


def matrices_of(blocks: nn.Module) -> list[nn.Parameter]:
    """The matrices of blocks that train."""
    return [parameter for parameter in blocks.parameters() if parameter.ndim == 2 and parameter.requires_grad]


def rates(optimizer: Optimizer) -> dict[str, float]:
    """Learning rates to log, by name; the matrices' own where it differs."""
    parts = optimizer.parts if isinstance(optimizer, Joined) else (optimizer,)
    first, *others = (float(part.param_groups[0]["lr"]) for part in parts)
    own = [rate for rate in others if rate != first]
    return {"train/lr": first} | ({"train/lr_matrices": own[0]} if own else {})


def number_as_in(model: nn.Module, optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Numbers a state's parameters as they come in the model, in place; torch numbers them group by group.

    Lightning numbers those of a sharded model so, for which nothing is to be done here: either reads the other's.

    Args:
        model: Has the optimizer's parameters, and perhaps others.
        optimizer: The optimizer that the state is of.
        state: As `optimizer.state_dict()` gives it.
    """
    if not isinstance(optimizer, Joined) or _is_sharded(optimizer):
        return
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    places = {parameter: place for place, parameter in enumerate(model.parameters())}
    numbers = [places[parameter] for parameter in parameters]
    state["state"] = {numbers[former]: values for former, values in state["state"].items()}
    state["param_groups"] = [
        {**group, "params": [numbers[former] for former in group["params"]]} for group in state["param_groups"]
    ]


def _check_state(optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    """Refuses the state of other optimizers: of another class, or where matrices had one of their own, or had none."""
    have, groups = isinstance(optimizer, Joined), state["param_groups"]
    parameters = chain.from_iterable(group["params"] for group in optimizer.param_groups)
    names = chain.from_iterable(group["params"] for group in groups)
    # That of a sharded model comes in groups as there are now, and mixed with what `optimizer` has begun with.
    mixed = {
        bool(state["state"].get(name, {}).keys() - optimizer.state[parameter].keys())
        for parameter, name in zip(parameters, names, strict=False)
        if parameter in optimizer.state
    }
    if len(groups) != len(optimizer.param_groups) or len(mixed) > 1:
        had, change = ("none", "leave it out") if have else ("one", "give it again")
        raise ValueError(
            f"matrix_optimizer: the run that wrote the checkpoint had {had}, so its optimizer's state does not fit; "
            f"{change}, or begin from the checkpoint's weights alone by init_from"
        )
    parts = optimizer.parts if isinstance(optimizer, Joined) else (optimizer,)
    of_groups = [(name, part) for name, part in zip(OPTIONS, parts, strict=False) for _ in part.param_groups]
    for (name, part), ours, theirs in zip(of_groups, optimizer.param_groups, groups, strict=True):
        lacking, left = ours.keys() - theirs.keys() - SCHEDULED, theirs.keys() - ours.keys() - SCHEDULED
        if lacking and left:  # from one version of torch to the next, options are added to a class or left out
            raise ValueError(
                f"{name}: the checkpoint's state is of another class of optimizer than {type(part).__name__}; give "
                "the one that the run had, or begin from the checkpoint's weights alone by init_from"
            )


def _is_sharded(optimizer: Optimizer) -> bool:
    return any(isinstance(parameter, DTensor) for group in optimizer.param_groups for parameter in group["params"])


def _sharded_like(shard: DTensor, whole: Tensor) -> DTensor:
    """This rank's part of what all ranks have; nothing is exchanged."""
    everywhere = DTensor.from_local(whole.detach(), shard.device_mesh, [Replicate()] * shard.device_mesh.ndim)
    return everywhere.redistribute(placements=shard.placements)
