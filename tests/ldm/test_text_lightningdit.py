"""LightningDiT for texts: what it makes of the words, of their order, and of what is behind them.

test_denoiser.py and test_compilation.py have what it shares with the other denoisers.
"""

from dataclasses import replace

import pytest
import torch
from test_denoiser import condition, inputs, randomised, small

from ldm.condition import Labels
from ldm.models.text_lightningdit import TextLightningDiT
from ldm.text import Text


@pytest.fixture
def model() -> TextLightningDiT:
    return randomised(small("text", "none")).eval()


@torch.no_grad()
def test_what_is_behind_a_text_does_not_matter(model):
    state, t, told = inputs(model, 3)
    expected = model(state, t, told).velocity
    for content in (0.0, 1e4, float("inf"), float("nan")):
        behind = torch.where(told.mask[..., None], told.embeddings, content)
        assert torch.equal(model(state, t, replace(told, embeddings=behind)).velocity, expected)
    longer = [
        torch.nn.functional.pad(x, padding) for x, padding in ((told.embeddings, (0, 0, 0, 4)), (told.mask, (0, 4)))
    ]
    assert torch.allclose(model(state, t, Text(*longer, told.empty)).velocity, expected, atol=1e-5)


@torch.no_grad()
def test_texts_have_no_order_but_that_which_embeddings_tell(model):
    state, t, told = inputs(model, 3)
    order = torch.tensor([2, 0, 1])
    moved = replace(told, embeddings=told.embeddings[:, order], mask=told.mask[:, order])
    expected = model(state, t, told).velocity
    assert torch.allclose(model(state, t, moved).velocity, expected, atol=1e-5)
    other = replace(told, embeddings=told.embeddings[:, order])  # while other words count
    assert (model(state, t, other).velocity - expected).abs().max() > 1e-2


@torch.no_grad()
@pytest.mark.parametrize("path", ["cross_attention", "pooled"])
def test_words_reach_the_image_on_two_ways(model, path):
    """By the attention of its tokens, place by place, and by the modulation."""
    without = "pooled" if path == "cross_attention" else "cross_attention.out"
    for name, parameter in model.named_parameters():
        if without in name:
            parameter.zero_()
    state, t, told = inputs(model)
    changed = replace(told, embeddings=told.embeddings + 1)
    assert (model(state, t, told).velocity - model(state, t, changed).velocity).abs().max() > 1e-3


@torch.no_grad()
def test_training_begins_without_cross_attention():
    model = small("text", "none")
    for name, parameter in model.named_parameters():
        if "cross_attention.out" not in name:
            torch.nn.init.normal_(parameter, std=0.3)
    state, t, told = inputs(model)
    expected = model(state, t, told).velocity
    for block in model.blocks:
        block.cross_attention.forward = lambda *_: 0
    assert expected.any() and torch.equal(model(state, t, told).velocity, expected)


def test_every_weight_learns_within_steps():
    model = small("text", "none")
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    state, t, told = inputs(model, 4)
    for _ in range(5):
        optimizer.zero_grad()
        (model(state, t, told).velocity - state).square().mean().backward()
        optimizer.step()
    assert [name for name, p in model.named_parameters() if not p.grad.any() or torch.equal(p, before[name])] == []


def test_captions_are_learned():
    """One noise and one time for all: what differs between the targets, captions alone tell."""
    model = small("text", "none")
    told, target = condition(model, 6), torch.randn(6, *model.latent_shape)
    state, t = torch.randn(1, *model.latent_shape).expand(6, -1, -1, -1), torch.full((6,), 0.3)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(100):
        loss = (model(state, t, told).velocity - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    between = (target - target.mean(0)).square().mean()
    assert loss < 0.05 * between


def num_parameters(text: int, channels: int, depth: int, width: int, heads: int) -> int:
    """By the parts of the network, with patches of one place."""
    hidden, head = 8 * width // 3, width // heads
    attention = 4 * (width * width + width) + 2 * head  # queries, keys, values and outputs; two norms
    mlp = width * 2 * hidden + 2 * hidden + hidden * width + width
    modulation = 6 * width * (width + 1)
    block = 2 * attention + mlp + modulation + 3 * width  # three norms
    embeddings = channels * width + width + 256 * width + width + width * (width + 1)  # patches and time
    texts = text + text * width + width + width * (width + 1)
    final = width + 2 * width * (width + 1) + width * channels + channels
    return depth * block + embeddings + texts + final


@pytest.mark.parametrize(("name", "total"), [("B/1", 160_117_792), ("XL/1", 826_304_416)])
def test_sizes(name, total):
    with torch.device("meta"):
        model = TextLightningDiT.of_size(name, text_channels=2048)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert (
        count
        == total
        == num_parameters(2048, 32, model.depth, len(model.position[0]), model.blocks[0].cross_attention.num_heads)
    )


def test_labels_are_refused(model):
    state, t, _ = inputs(model)
    with pytest.raises(ValueError, match="gives Labels, but the denoiser takes texts"):
        model(state, t, Labels(torch.tensor([0, 1]), 5))


def test_a_text_has_a_width():
    with pytest.raises(ValueError, match="text_channels: must be at least 1, given 0"):
        TextLightningDiT(0)
    with pytest.raises(TypeError, match="text_channels"):
        TextLightningDiT()
