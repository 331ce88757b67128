"""Tokens of layers, collected while a network runs."""

import pytest
import torch
from torch import nn

from vfm_vae.hooks import run_and_keep


def test_layers_are_counted_by_the_blocks_passed():
    blocks = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))
    x = torch.rand(1, 4, 2)
    states = [x]
    for block in blocks:
        states.append(block(states[-1]))
    run = nn.Sequential(*blocks)
    result, kept = run_and_keep(lambda: run(x), blocks, (3, 0, 2))
    assert torch.equal(result, states[3]) and set(kept) == {0, 2, 3}
    assert all(torch.equal(tokens, states[layer]) for layer, tokens in kept.items())
    _, means = run_and_keep(lambda: run(x), blocks, (1,), keep=lambda tokens: tokens.mean(1))
    assert torch.equal(means[1], states[1].mean(1))


def test_hooks_are_gone_afterwards_whatever_happens():
    blocks = nn.ModuleList([nn.Linear(2, 2), nn.Linear(3, 3)])  # which do not fit each other
    with pytest.raises(RuntimeError):
        run_and_keep(lambda: nn.Sequential(*blocks)(torch.rand(1, 2)), blocks, (0, 1, 2))
    assert not any(block._forward_hooks or block._forward_pre_hooks for block in blocks)
