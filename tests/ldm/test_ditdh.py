"""What is DiTDH's own; test_denoiser.py has what it shares with others, tests/parity what it computes."""

from functools import partial

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from training import same, weights

from callbacks.ema import EMA
from ldm.condition import Labels
from ldm.models.ditdh import DiTDH
from ldm.pipeline import LatentDiffusion
from ldm.published import to_published

SMALL = {"in_channels": 3, "input_size": 4, "depth": 2, "width": 16, "num_heads": 2, "num_classes": 5}
HEAD = {"head_depth": 1, "head_width": 24, "head_num_heads": 3}


def small(**options) -> DiTDH:
    torch.manual_seed(0)
    return DiTDH(**SMALL | HEAD | options)


@pytest.mark.parametrize(("name", "sizes"), [("S/1", (12, 384, 6)), ("XL/2", (28, 1152, 16))])
def test_named_sizes_differ_in_their_body(name: str, sizes: tuple[int, int, int]):
    with torch.device("meta"):
        model = DiTDH.of_size(name)
    body, head = model.blocks[: sizes[0]], model.blocks[sizes[0] :]
    for blocks, (depth, width, heads) in ((body, sizes), (head, (2, 2048, 16))):
        assert len(blocks) == depth
        assert {(block.attention.num_heads, block.attention.out.in_features) for block in blocks} == {(heads, width)}
    assert head[0].mlp.out.in_features == 5461
    assert model.patch_size == int(name[-1])


def test_unknown_size_is_named():
    with pytest.raises(ValueError, match="name: one of S, XL, a slash"):
        DiTDH.of_size("B/1")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head_width": 20}, "head_width: 20 does not divide by 4 · head_num_heads = 12"),
        ({"head_depth": 0}, "head_depth: must be at least 1, given 0"),
        ({"align_channels": 4, "align_depth": 3}, "align_depth: a block from 1 to depth = 2, given 3"),
    ],
)
def test_options_out_of_range_are_named(options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        small(**options)


def test_frequencies_of_time_come_from_the_seed_and_are_stored():
    model, again = small(), small()
    torch.manual_seed(1)
    other = DiTDH(**SMALL | HEAD)
    frequencies = model.state_dict()["time_embed.frequencies"]
    assert torch.equal(frequencies, again.time_embed.frequencies)
    assert not torch.equal(frequencies, other.time_embed.frequencies)
    other.load_state_dict(model.state_dict())
    assert torch.equal(frequencies, other.time_embed.frequencies)
    assert "time_embed.frequencies" not in dict(model.named_parameters())


def test_towers_of_one_width_need_no_projection():
    model = small(head_width=16, head_num_heads=2)
    assert isinstance(model.to_head, torch.nn.Identity)
    assert "s_projector.weight" not in to_published(model)


@torch.no_grad()
def test_under_autocast_tokens_stay_float32_between_the_blocks_of_both_towers():
    model, types = small(head_depth=2), []
    for block in model.blocks:
        block.register_forward_hook(lambda *args: types.append(args[-1].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        model(torch.randn(2, 3, 4, 4), torch.rand(2), Labels(torch.arange(2), 5))
    assert types == [torch.float32] * 4


def test_a_resumed_run_is_the_uninterrupted_one_and_is_saved_by_name(diffusion, latents, trainer, tmp_path):
    """Its averaged weights, too; from the folder it samples what its module does."""
    wide = partial(diffusion, HEAD, DiTDH, shift="auto")
    checkpoint = ModelCheckpoint(tmp_path, every_n_train_steps=4, save_last=True)
    run = trainer(max_steps=4, limit_val_batches=0, enable_checkpointing=True, callbacks=[checkpoint, EMA(decay=0.9)])
    run.fit(wide(), datamodule=latents())
    results = []
    for path in (None, tmp_path / "last.ckpt"):
        module, average = wide(), EMA(decay=0.9)
        run = trainer(max_steps=8, limit_val_batches=0, callbacks=[average])
        run.fit(module, datamodule=latents(), ckpt_path=path, weights_only=True)
        results.append((weights(module), average.weights))
    assert all(same(*pair) for pair in zip(*results, strict=True))
    model = LatentDiffusion.from_checkpoint(tmp_path / "last.ckpt")
    model.save_pretrained(tmp_path / "folder")
    loaded = LatentDiffusion.from_pretrained(tmp_path / "folder")
    assert isinstance(loaded.model, DiTDH) and loaded.model.arguments == module.model.arguments
    assert torch.equal(loaded.sample([0, 2], seed=1).latents, model.sample([0, 2], seed=1).latents)
