"""Collects the tokens between a transformer's blocks, whatever else its blocks take."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from typing import Any, TypeVar

from torch import Tensor, nn

Result = TypeVar("Result")


def run_and_keep(
    run: Callable[[], Result],
    blocks: Sequence[nn.Module],
    layers: Iterable[int],
    keep: Callable[[Tensor], Tensor] = lambda tokens: tokens,
) -> tuple[Result, dict[int, Tensor]]:
    """Runs a network, and keeps the tokens of some of its layers.

    Args:
        run: Runs the network.
        blocks: Its blocks, each of which takes tokens first and returns tokens.
        layers: Which to keep: 0 is what enters the first block, k the output of block k.
        keep: What to keep of tokens.

    Returns:
        The result of `run`, and what is kept of each layer.
    """
    kept: dict[int, Tensor] = {}

    def keep_input(block: nn.Module, inputs: tuple[Any, ...]) -> None:
        kept[0] = keep(inputs[0])

    def keeps_output(layer: int) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
        return lambda block, inputs, output: kept.update({layer: keep(output)})

    with ExitStack() as hooks:
        for layer in sorted(set(layers)):
            if layer == 0:
                hook = blocks[0].register_forward_pre_hook(keep_input)
            else:
                hook = blocks[layer - 1].register_forward_hook(keeps_output(layer))
            hooks.callback(hook.remove)
        return run(), kept
