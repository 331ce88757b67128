"""The judge: what it is as a VFM, and that it puts images in the order in which people would."""

import importlib
import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from jsonargparse import ArgumentParser
from lightning.pytorch import Callback
from safetensors.torch import load_file
from torch import nn

from vfm_vae.cli import NAMED
from vfm_vae.embedded import photos as photographs
from vfm_vae.embedded.judge import WEIGHTS, Judge, judge_network
from vfm_vae.embedded.pretrain import CropSampler, jitter
from vfm_vae.embedded.train_judge import LOSSES, Judging, train
from vfm_vae.losses.reconstruction import VFMPerceptualLoss
from vfm_vae.vfm import check_frozen, check_source, vfm_from, vfm_identity
from vfm_vae.writing import write_tensors

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module", autouse=True)
def read_once() -> Iterator[None]:
    """Photographs take longer to read than anything here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(photographs, "load_photo", cache(photographs.load_photo))
        yield


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge()


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "tests/bench")
        return importlib.import_module("judge")


def test_tokens_and_pooled_feature(judge):
    images = torch.rand(2, 3, 64, 64) * 2 - 1
    features = judge(images)
    assert features.tokens.shape == (2, 64, judge.width) and features.grid == judge.grid(64, 64) == (8, 8)
    assert torch.equal(features.pooled, features.tokens.mean(1)) and torch.equal(features.layers[0], features.tokens)
    assert judge(images[..., :40, :]).tokens.shape == (2, 40, judge.width)
    shape = Judge.shape_of()
    assert (shape.width, shape.widths, shape.stride) == (judge.width, judge.widths, judge.stride)
    # In raster order: what happens in the lower right corner is seen by the last token alone.
    changed = images.clone()
    changed[:, :, 62:, 62:] = 0
    differs = (judge(changed).tokens - features.tokens).abs().amax(2).bool()
    assert differs[:, -1].all() and not differs[:, :32].any()


@pytest.mark.parametrize("size", [(60, 64), (64, 60), (0, 64)])
def test_sizes_that_do_not_fit_are_refused(judge, size):
    with pytest.raises(
        ValueError, match=rf"^images: judge_photos takes sides .* of 8 pixels, given {size[0]}x{size[1]}"
    ):
        judge(torch.zeros(1, 3, *size))


def test_it_is_small_frozen_and_draws_nothing(judge):
    assert WEIGHTS.stat().st_size < 2**20
    tensors = load_file(WEIGHTS)
    assert tensors.keys() == judge_network().state_dict().keys()
    torch.manual_seed(0)
    before = torch.get_rng_state()
    made = Judge()
    assert torch.equal(torch.get_rng_state(), before)
    check_frozen(made)
    assert not list(made.parameters()) and not made.train().network.training
    weights = made.network.state_dict()
    assert all(torch.equal(tensors[name].to(value.dtype), value) for name, value in weights.items())
    made.hold_products_in(torch.bfloat16)
    images = torch.rand(1, 3, 64, 64)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(made(images).tokens, judge(images).tokens)


def test_no_loss_has_its_gradients(judge):
    images = torch.rand(1, 3, 64, 64, requires_grad=True)
    assert not judge(images).tokens.requires_grad
    with pytest.raises(ValueError, match=r"^judge_photos only measures, .*; give the loss another VFM"):
        VFMPerceptualLoss(judge)(images, images.detach())


def test_it_can_be_made_again(judge, tmp_path):
    check_source(judge)
    source = json.loads(json.dumps(judge.source()))
    again = vfm_from(source)
    assert type(again) is Judge and vfm_identity(again) == vfm_identity(judge)
    network = judge_network()
    write_tensors(tmp_path / "other.safetensors", network.state_dict())
    other = vfm_from(source, weights=str(tmp_path / "other.safetensors"))
    assert other.fingerprint() != judge.fingerprint() and other.source()["weights"].endswith("other.safetensors")
    write_tensors(tmp_path / "none.safetensors", nn.Linear(2, 2).state_dict())
    with pytest.raises(ValueError, match=r"^weights: '.*none.safetensors' is no judge's: of .* missing"):
        Judge(str(tmp_path / "none.safetensors"))


def test_callbacks_take_it_by_name_alone(photos):
    """As the command lines build them."""
    for module in NAMED:
        importlib.import_module(module)
    given = {
        "DistributionCallback": {"network": "Judge"},
        "ClassAccuracyCallback": {"vfm": {"class_path": "Judge"}, "images": str(photos / "train"), "image_size": 64},
        "LinearProbeCallback": {"vfms": ["Judge"]},
        "CKNNACallback": {"vfms": [{"class_path": "Judge"}]},
    }
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--callbacks", type=list[Callback])
    parsed = parser.parse_object({"callbacks": [{"class_path": name, "init_args": of} for name, of in given.items()]})
    distribution, accuracy, probe, cknna = parser.instantiate_classes(parsed).callbacks
    assert distribution.names() == {"fd_judge_photos"} and type(accuracy.vfm) is Judge
    assert type(probe.vfms["judge_photos"]) is type(cknna.vfms["judge_photos"]) is Judge


def named(part: Any) -> Iterator[str]:
    """All words of a config."""
    if isinstance(part, dict | list):
        for inner in part.values() if isinstance(part, dict) else part:
            yield from named(inner)
    else:
        yield str(part)


def test_no_config_trains_with_it():
    """Callbacks have it, and neither a model nor a loss nor a discriminator."""
    assert list(named({"objective": [{"vfm": "Judge"}]})) == ["Judge"]
    configs = [yaml.safe_load(file.read_text()) or {} for file in (ROOT / "configs").rglob("*.yaml")]
    words = {word.rpartition(".")[2] for config in configs for word in named(config.get("model"))}
    assert "FrozenVFM" in words and words.isdisjoint({"Judge", "judge_photos"})


def test_training_learns_and_repeats_itself():
    torch.manual_seed(0)
    images, labels, boxes = CropSampler(seed=0)(16)
    images, model = jitter(images / 127.5 - 1), Judging(len(photographs.PHOTOS))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    totals = []
    for _ in range(20):
        losses = model(images, labels, boxes)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
        totals.append(float(losses["class"]))
    assert losses.keys() == LOSSES.keys() and totals[-1] < 0.5 * totals[0]
    first, second, other = (train(2, 4, 1e-3, seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


@pytest.fixture(scope="module")
def crops(bench: ModuleType) -> torch.Tensor:
    return bench.held_out_crops(1)


def test_degradations_are_in_order(judge, bench, crops):
    """Of held-out crops: the stronger, the farther, by sets and by single images."""
    for name, row in bench.degraded(judge, crops[::2]).items():
        for measure in ("frechet", "mean"):
            values = [getattr(distances, measure) for distances in row]
            assert values[0] > 0 and values == sorted(values), (name, measure, values)


def test_other_crops_are_near_and_missing_photographs_far(judge, bench, crops):
    real, others = bench.features_of(judge, crops), bench.held_out_crops(1, seed=1)
    missing = [bench.drop_photographs(others, number) for number in (0, *bench.MISSING)]
    noise = torch.randint(256, crops.shape, generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    values = [bench.distances(real, bench.features_of(judge, images)).frechet for images in (*missing, noise)]
    assert values == sorted(values) and values[0] < 0.5 * values[1], values


def test_held_out_crops_are_near_the_means_of_their_photographs(judge, bench, crops):
    """An untrained network puts degradations in order, too; but it does not know the photographs."""
    images, labels, _ = CropSampler(seed=0)(260)
    features = bench.features_of(judge, images)
    means = torch.stack([features[labels == label].mean(0) for label in range(len(photographs.PHOTOS))])
    nearest = torch.cdist(bench.features_of(judge, crops), means).argmin(1)
    assert (nearest == torch.arange(13).repeat_interleave(5)).float().mean() > 0.8
