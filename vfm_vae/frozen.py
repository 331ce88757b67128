"""Networks that never train, and the fingerprints that tell their weights from others'."""

import hashlib
from collections.abc import Callable, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn


def sha256_of(tensors: Mapping[str, Tensor], *texts: str) -> str:
    """SHA-256, in hexadecimal, over the names, shapes and bytes of tensors, and over texts."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    for text in texts:
        digest.update(text.encode())
    return digest.hexdigest()


def device_of(network: Any) -> torch.device:
    """Where an `nn.Module` has its weights."""
    module = network.network if isinstance(network, Frozen) else network
    return next(chain(module.parameters(), module.buffers())).device


class Frozen(nn.Module):
    """Holds a network outside the module registry, so that nothing can train, save, average or count it.

    The network is in no `parameters()`, `state_dict()` or `children()`, stays in eval mode whatever `train()` says, and
    still follows `to()`, `cuda()` and copies.

    Args:
        network: The network to freeze. It is switched to eval mode, and its parameters take no gradients.
    """

    network: Any

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self._fingerprint: str | None = None
        self.__dict__["network"] = network.eval().requires_grad_(False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Frozen":
        self.network._apply(fn, recurse)
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch does not annotate it

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the network; gradients may pass through it to its inputs."""
        return self.network(*args, **kwargs)

    def hold_products_in(self, dtype: torch.dtype) -> None:
        """Keeps the weights of linear layers and convolutions in the precision that autocast casts them to.

        Under autocast the outputs stay the same, bit for bit, and nothing is cast at each call. The fingerprint remains
        that of the weights as they were read.

        Args:
            dtype: The precision of autocast.
        """
        self.fingerprint()
        for layer in self.network.modules():
            if isinstance(layer, nn.Linear | nn.Conv2d):
                layer.to(dtype)

    def fingerprint(self) -> str:
        """SHA-256, in hexadecimal, over the names, shapes and bytes of the network's weights, as they were read."""
        if self._fingerprint is None:
            self._fingerprint = sha256_of(self.network.state_dict())
        return self._fingerprint
