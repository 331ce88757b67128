"""What averages of weights share: which parameters, in which precision, and where."""

from collections.abc import Mapping, Sequence

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor


def check_modules(pl_module: LightningModule, modules: Sequence[str]) -> None:
    """Checks that a module has the parts whose parameters are to be averaged.

    Raises:
        ValueError: if not.
    """
    missing = [name for name in modules if not hasattr(pl_module, name)]
    if missing:
        children = [name for name, _ in pl_module.named_children()]
        raise ValueError(f"modules: {type(pl_module).__name__} has no {missing}; its parts are {children}.")


def parameters_of(pl_module: LightningModule, modules: Sequence[str]) -> dict[str, nn.Parameter]:
    """The parameters of some parts of a module, by their names in it."""
    prefixes = tuple(f"{name}." for name in modules)
    return {name: p for name, p in pl_module.named_parameters() if name.startswith(prefixes)}


def precise(tensor: Tensor) -> Tensor:
    """The tensor in float32 or better, as small steps would be lost in bfloat16."""
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))


def placed_like(parameter: Tensor, tensor: Tensor) -> Tensor:
    """The tensor on the parameter's device, and sharded over the ranks as the parameter is."""
    tensor = tensor.to(parameter.device)
    if isinstance(parameter, DTensor) and not isinstance(tensor, DTensor):
        tensor = distribute_tensor(tensor, parameter.device_mesh, parameter.placements)
    return tensor


def whole(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Sharded tensors put together, on the CPU: all ranks must ask."""
    return {name: t.full_tensor().cpu() if isinstance(t, DTensor) else t for name, t in tensors.items()}
