"""Compiles a model region by region rather than as a whole: equal layers are compiled once, and the rest stays eager.

A region is a module whose `forward` has no break: a transformer's block, a decoder's layer. What is compiled is
`forward` alone, once for each class, so that hooks, state dicts, sharding and activation checkpointing around it know
nothing of it.
"""

from collections.abc import Callable, Iterable
from functools import cache
from types import MethodType
from typing import Any, Literal

import torch
import torch._functorch.config
import torch.fx.experimental._config
from torch import nn

Compile = bool | Literal["auto"]

MIN_PARAMETERS = 20_000_000
"""Below so many parameters, `auto` leaves a model alone: it would compile longer than it trains."""

# Each distinct shape is compiled once for each class. Past PyTorch's limit of 8 it would go on eagerly and say nothing;
# past this one, `fullgraph` makes it an error.
MAX_SHAPES = 256


def should_compile(option: Compile, device: torch.device, model: nn.Module) -> bool:
    """Whether to compile: as the option says, or with `auto` on CUDA unless the model is small.

    Args:
        option: The option as given: true, false or `auto`.
        device: Where the model runs.
        model: All of it.
    """
    if option != "auto":
        return option
    return device.type == "cuda" and sum(p.numel() for p in model.parameters()) >= MIN_PARAMETERS


def compile_regions(regions: Iterable[nn.Module], method: str = "forward", dynamic: bool | None = None) -> None:
    """Compiles the `forward` of each region where it is first called; a region that is compiled already stays so.

    Args:
        regions: The modules.
        method: Another method instead.
        dynamic: Whether one compilation serves tensors of any size; None lets the first have its own.
    """
    for region in regions:
        if method not in vars(region):
            # A method, so that a copy of the module gets a method of the copy.
            setattr(region, method, MethodType(compiled(getattr(type(region), method), dynamic), region))


def is_compiled(region: nn.Module, method: str = "forward") -> bool:
    """Whether `compile_regions` has compiled this module."""
    return method in vars(region)


@cache
def compiled(function: Callable[..., Any], dynamic: bool | None) -> Callable[..., Any]:
    """A function that is compiled where it is first called, once for all who ask for it.

    Args:
        function: Without a break.
        dynamic: As for `compile_regions`.
    """
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, MAX_SHAPES)
    config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, 4 * MAX_SHAPES)
    config.optimize_ddp = False  # or DDP's buckets would cut regions up; they are small enough to send gradients early
    config.specialize_int = config.specialize_float = True  # numbers that are no sizes are constants of the kernels
    torch._functorch.config.donated_buffer = False  # the adaptive weight passes back through regions twice
    torch.fx.experimental._config.use_duck_shape = False  # sizes that are equal by accident may differ the next time
    # The norms' means over a few channels would be written out in all that use them.
    return torch.compile(function, fullgraph=True, dynamic=dynamic, options={"unroll_reductions_threshold": 1})
