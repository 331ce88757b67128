"""A checkpoint says how to make its model again, however training was started, and is read by whoever needs it."""

import json
import sys

import pytest
import torch
from torch import nn

from callbacks.ema import EMA
from ldm import convert as diffusion_convert
from ldm.compatibility import DIFFUSION
from ldm.pipeline import LatentDiffusion
from ldm.samplers import GridSampler
from vfm_vae import convert, schema
from vfm_vae.description import Described
from vfm_vae.saving import WholeCheckpoints
from vfm_vae.tokenizer import VFMVAE, FrozenTokenizer


class HalfSteps(GridSampler):
    """A third party's sampler; it knows nothing of checkpoints."""

    def __init__(self, steps: int = 4, factor: float = 0.5):
        super().__init__(steps)
        self.factor = factor

    def __call__(self, field, noise, fresh_noise):
        return noise * self.factor


@pytest.fixture
def fitted(trainer, tmp_path):
    """Trains a module from Python, with averages; returns its checkpoint."""

    def fit(module, data):
        run = trainer(max_steps=2, limit_val_batches=0, callbacks=[EMA(decay=0.5), WholeCheckpoints()])
        run.fit(module, datamodule=data)
        run.save_checkpoint(tmp_path / "last.ckpt")
        return tmp_path / "last.ckpt"

    return fit


@pytest.fixture(scope="module")
def trained():
    """The tokenizer's checkpoint, written once, as bytes."""
    return []


@pytest.fixture
def tokenizer(trained, fitted, tiny_module, data, tmp_path):
    if not trained:
        trained.append(fitted(tiny_module(), data()).read_bytes())
    (tmp_path / "last.ckpt").write_bytes(trained[0])
    return tmp_path / "last.ckpt"


@pytest.fixture
def denoiser(fitted, diffusion, latents):
    return fitted(diffusion(sampler=HalfSteps(3, factor=0.25)), latents())


def weights_of(path):
    return torch.load(path, weights_only=True)


def former(path, hyper_parameters):
    """Brings a checkpoint into the form of before formats were counted."""
    stored = weights_of(path)
    for entry in ("format_version", "kind", "config"):
        del stored[entry]
    torch.save(stored | {"hyper_parameters": hyper_parameters}, path)


def test_a_tokenizer_trained_from_python_is_read_like_any_other(tokenizer, tmp_path):
    stored = weights_of(tokenizer)
    json.dumps(stored["config"])  # plain data
    model = VFMVAE.from_checkpoint(tokenizer)
    for name, tensor in model.named_parameters():
        assert torch.equal(tensor, stored["ema"]["weights"][f"model.{name}"]), name
    assert FrozenTokenizer(str(tokenizer)).identity == model.latent_identity()
    convert.convert(str(tokenizer), str(tmp_path / "folder"))
    again = VFMVAE.from_pretrained(tmp_path / "folder")
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in again.state_dict().items())


def test_a_diffusion_model_trained_from_python_is_read_like_any_other(denoiser, tmp_path):
    stored = weights_of(denoiser)
    model = LatentDiffusion.from_checkpoint(denoiser)
    assert type(model.sampler) is HalfSteps and (model.sampler.steps, model.sampler.factor) == (3, 0.25)
    for name, tensor in model.model.named_parameters():
        assert torch.equal(tensor, stored["ema"]["weights"][f"model.{name}"]), name
    assert model.normalization.is_known and model.latent_source == stored["tokenizer"]


def test_classes_of_others_are_built_from_folders_once_they_are_imported(denoiser, tmp_path, monkeypatch):
    diffusion_convert.convert(str(denoiser), str(tmp_path / "folder"))
    assert type(LatentDiffusion.from_pretrained(tmp_path / "folder").sampler) is HalfSteps
    monkeypatch.delitem(sys.modules, HalfSteps.__module__)
    with pytest.raises(ValueError, match=r"asks for \['.*HalfSteps'\], but only classes of this project"):
        LatentDiffusion.from_pretrained(tmp_path / "folder")


def test_a_former_tokenizer_is_read(tokenizer):
    expected, config = VFMVAE.from_checkpoint(tokenizer), weights_of(tokenizer)["config"]
    vfm = {"class_path": "vfm_vae.vfm.FrozenVFM", "init_args": {"name": config["vfm"]["name"], "layers": [0, -1]}}
    model = config["model"] | {"init_args": config["model"]["init_args"] | {"vfm": vfm}}
    former(tokenizer, {"_instantiator": "lightning.pytorch.cli.instantiate_module", "model": model, "seed": 0})
    loaded = VFMVAE.from_checkpoint(tokenizer)
    assert loaded.latent_identity() == expected.latent_identity()
    assert all(torch.equal(tensor, expected.state_dict()[name]) for name, tensor in loaded.state_dict().items())


def test_a_former_diffusion_model_is_read(fitted, diffusion, latents):
    path = fitted(diffusion(), latents())
    expected, parts = LatentDiffusion.from_checkpoint(path), weights_of(path)["config"]["model"]["init_args"]
    former(path, {name: parts[name] for name in ("model", "sampler", "guidance")} | {"optimizer": {"class_path": "x"}})
    loaded = LatentDiffusion.from_checkpoint(path)
    assert loaded.sampler.arguments == expected.sampler.arguments
    assert torch.equal(loaded.sample([0, 2]).latents, expected.sample([0, 2]).latents)


def test_a_former_one_that_describes_no_model_is_named(tokenizer):
    former(tokenizer, {})
    stored = weights_of(tokenizer)
    for parts in ({}, {"model": None}, {"model": {"init_args": None}}, {"model": 3}):
        torch.save(stored | {"hyper_parameters": parts}, tokenizer)
        with pytest.raises(
            ValueError, match=r"^checkpoint: '.*' does not describe a tokenizer: give a checkpoint that"
        ):
            VFMVAE.from_checkpoint(tokenizer)


def test_other_kinds_and_later_versions_are_refused(tokenizer):
    with pytest.raises(ValueError, match=r"^checkpoint: '.*last.ckpt' is not a diffusion model's: give a checkpoint"):
        LatentDiffusion.from_checkpoint(tokenizer)
    torch.save(weights_of(tokenizer) | {"format_version": 3}, tokenizer)
    with pytest.raises(ValueError, match=r"^checkpoint: '.*' is in format version 3, .* up to 2: install a newer"):
        VFMVAE.from_checkpoint(tokenizer)


def test_averages_take_the_place_of_trained_weights_and_nothing_else():
    one, two = torch.ones(1), 2 * torch.ones(1)
    checkpoint = schema.of_weights({"model.a": one, "model.b": one, "normalization.mean": one, "other.c": one})
    assert schema.averaged(checkpoint) == checkpoint["state_dict"]
    schema.write_average(checkpoint, {"model.b": two}, images_seen=5)
    schema.write(checkpoint, DIFFUSION, {"model": {}}, images_seen=7, tokenizer=None)
    assert schema.averaged(checkpoint) == checkpoint["state_dict"] | {"model.b": two}
    stored = schema.take(checkpoint, DIFFUSION, "ckpt_path")
    assert stored.model() == {"model.a": one, "model.b": two, "normalization.mean": one}
    assert (stored.images_seen, stored.average["images_seen"]) == (7, 5)
    assert schema.take(checkpoint | {"kind": "tokenizer"}, schema.TOKENIZER, "").model() == {"a": one, "b": two}


@pytest.mark.parametrize("program", ["tokenizer", "diffusion"])
def test_what_can_not_be_described_is_said_before_training(program, tiny_module, data, diffusion, latents, trainer):
    class Unknown(nn.Identity):
        """Stands for a part that knows nothing of its arguments."""

    module, datamodule = (tiny_module(), data()) if program == "tokenizer" else (diffusion(), latents())
    part: Described = module.model.adapter if program == "tokenizer" else module.model
    part.arguments["extra"] = Unknown()
    with pytest.raises(ValueError, match=r"\.extra: a Unknown can't be described, .* derive its class from"):
        trainer(max_steps=1).fit(module, datamodule=datamodule)
