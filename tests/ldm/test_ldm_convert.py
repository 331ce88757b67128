"""Published diffusion models by the command line: they sample, are measured, and go on training."""

import argparse
import json
import sys
from pathlib import Path

import pytest
import torch
import yaml

from callbacks.ema import EMA
from ldm import convert
from ldm.guidance import Guidance
from ldm.models.lightningdit import LightningDiT
from ldm.models.sit import SiT
from ldm.pipeline import LatentDiffusion
from ldm.samplers import Euler
from vfm_vae.data.latents import LatentStatistics

SIZES = {"in_channels": 4, "input_size": 4, "depth": 2, "width": 32, "num_heads": 2, "num_classes": 3}
ARGUMENTS = {
    "in_channels": 4,
    "input_size": 4,
    "depth": 2,
    "hidden_size": 32,
    "num_heads": 2,
    "num_classes": 3,
    "patch_size": 1,
    "use_qknorm": True,
    "use_swiglu": True,
    "use_rope": True,
    "use_rmsnorm": True,
}


def random_model(seed: int) -> LightningDiT:
    torch.manual_seed(seed)
    model = LightningDiT(**SIZES)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


@pytest.fixture
def models() -> dict[str, LightningDiT]:
    return {"model": random_model(0), "ema": random_model(1)}


@pytest.fixture
def published(models, tmp_path) -> Path:
    """A file as LightningDiT's training leaves it, the statistics of its latents, and what it was made of."""
    content = {name: {f"module.{n}": t for n, t in convert.to_published(m).items()} for name, m in models.items()}
    optimizer = {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 1e-4}]}
    torch.save(content | {"opt": optimizer}, tmp_path / "published.pt")
    (tmp_path / "published.yaml").write_text(yaml.safe_dump(ARGUMENTS))
    LatentStatistics(torch.randn(1, 4, 1, 1), 1 + torch.rand(1, 4, 1, 1)).write(tmp_path / "latents_stats.pt")
    return tmp_path / "published.pt"


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["convert", *map(str, arguments)])
    convert.main()


@pytest.fixture
def converted(published, monkeypatch) -> Path:
    out, statistics = published.parent / "out", published.parent / "latents_stats.pt"
    config = published.with_suffix(".yaml")
    run(monkeypatch, published, "--config", config, "--statistics", statistics, "--out", out)
    return out


def test_averages_sample_as_published(converted, models):
    loaded = LatentDiffusion.from_pretrained(converted)
    for name, tensor in models["ema"].state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], tensor), name
    statistics = LatentStatistics.read(converted.parent)
    assert torch.equal(loaded.normalization.mean, statistics.mean)
    assert torch.equal(loaded.normalization.std, statistics.std)
    assert isinstance(loaded.sampler, Euler)
    assert (loaded.sampler.steps, loaded.sampler.shift) == (250, 0.3)
    assert loaded.guidance.arguments == {"scale": 1.0, "start": 0.125, "end": 1.0, "channels": 3, "cls_scale": 0.0}
    loaded.sampler = Euler(4)
    assert loaded.sample([0, 1]).latents.isfinite().all()


def test_the_public_yaml_says_how_samples_are_drawn():
    options = {"num_sampling_steps": 100, "timestep_shift": 0.5, "cfg_scale": 6.0, "cfg_interval_start": 0.2}
    sampler, guidance = convert._sampling(random_model(0), options)
    assert (sampler.steps, sampler.shift) == (100, 0.5)
    assert guidance.arguments == Guidance(6.0, start=0.2, channels=3).arguments


def test_another_sampler_of_the_public_yaml_is_refused():
    with pytest.raises(ValueError, match=r"config: sample\.sampling_method 'dopri5' is not supported"):
        convert._sampling(random_model(0), {"sampling_method": "dopri5"})


def test_a_refused_file_leaves_what_was_there(converted, published, monkeypatch):
    before = {path.name: path.read_bytes() for path in converted.iterdir()}
    content = torch.load(published, weights_only=True)
    del content["model"]["module.pos_embed"]
    torch.save(content, published)
    arguments = ["--config", published.with_suffix(".yaml"), "--statistics", published.parent / "latents_stats.pt"]
    with pytest.raises(SystemExit):
        run(monkeypatch, published, *arguments, "--out", converted)
    assert {path.name: path.read_bytes() for path in converted.iterdir()} == before


def test_training_goes_on_from_it(converted, models, diffusion, latents, trainer):
    module = diffusion(init_from=str(converted / "training.ckpt"))
    datamodule = latents()
    datamodule.setup("fit")
    LatentStatistics(*datamodule.latent_statistics).write(converted / "statistics.pt")
    stored = torch.load(converted / "training.ckpt", weights_only=True)
    for name in ("mean", "std"):  # those of the data at hand: others are refused, see below
        stored["state_dict"][f"normalization.{name}"] = getattr(datamodule.latent_statistics, name)
    torch.save(stored, converted / "training.ckpt")
    trainer(max_steps=0, limit_val_batches=0).fit(module, latents())
    for name, tensor in models["ema"].state_dict().items():
        assert torch.equal(module.model.state_dict()[name], tensor), name
    trainer(max_steps=2, limit_val_batches=0).fit(module, latents())
    assert module.images_seen == 16


def test_weights_for_other_latents_are_refused(converted, diffusion, latents, trainer):
    module = diffusion(init_from=str(converted / "training.ckpt"))
    with pytest.raises(
        ValueError, match="init_from: the checkpoint was trained on latents with clearly different means"
    ):
        trainer(max_steps=1).fit(module, latents())
    module = diffusion(init_from="nowhere.ckpt")
    with pytest.raises(ValueError, match=r"init_from: there is no checkpoint 'nowhere\.ckpt'"):
        trainer(max_steps=1).fit(module, latents())


def test_it_is_sampled_by_the_command_lines_module(converted, models, diffusion, latents, trainer):
    module = diffusion()
    batches = trainer(callbacks=[EMA(decay=0.9)]).predict(
        module, latents(num_samples=3), ckpt_path=str(converted / "training.ckpt"), weights_only=True
    )
    drawn = torch.cat([batch.latents[batch.index >= 0] for batch in batches])
    labels = torch.cat([batch.condition.labels[batch.index >= 0] for batch in batches])
    loaded = LatentDiffusion.from_pretrained(converted)
    loaded.sampler, loaded.guidance = module.pipeline.sampler, module.pipeline.guidance
    assert torch.allclose(loaded.sample(labels, seed=1).latents, drawn, atol=1e-5)


def test_reg_is_read_with_the_arguments_in_its_file(published, monkeypatch):
    torch.manual_seed(0)
    network = SiT(
        in_channels=4,
        input_size=4,
        depth=2,
        width=32,
        num_heads=2,
        num_classes=3,
        cls_channels=8,
        align_channels=8,
        align_depth=1,
        projector_width=16,
    )
    arguments = argparse.Namespace(model="SiT-S/1", qk_norm=True, latent_size=4)
    torch.save({"ema": convert.to_published(network), "args": arguments}, published)
    statistics = published.parent / "latents_stats.pt"
    monkeypatch.setattr(SiT, "of_size", classmethod(lambda cls, name, **options: network))
    run(monkeypatch, published, "--statistics", statistics, "--out", published.parent / "out")
    loaded = LatentDiffusion.from_pretrained(published.parent / "out")
    assert isinstance(loaded.model, SiT)
    for name, tensor in network.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], tensor), name


def test_the_tokenizer_of_its_latents_is_noted(published, tiny_model, monkeypatch, tmp_path):
    tokenizer = tiny_model()
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    common = [published, "--config", published.with_suffix(".yaml"), "--statistics", tmp_path / "latents_stats.pt"]
    run(monkeypatch, *common, "--tokenizer", tmp_path / "tokenizer", "--out", tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["tokenizer"] == tokenizer.latent_identity()
    overlay = yaml.safe_load((tmp_path / "out/model.yaml").read_text())
    assert overlay["model"]["tokenizer"]["init_args"] == {"checkpoint": str(tmp_path / "tokenizer")}


MISTAKES = {
    "no statistics": (["published.pt", "--config=published.yaml"], "statistics: latents are normalised by those of"),
    "no config": (["published.pt", "--statistics=latents_stats.pt"], "config: published weights need the public YAML"),
    "junk statistics": (
        ["published.pt", "--config=published.yaml", "--statistics=junk.pt"],
        "statistics: 'junk.pt' can't",
    ),
    "other config": (["published.pt", "--config=deep.yaml", "--statistics=latents_stats.pt"], "missing ['blocks.2."),
    "other statistics": (["published.pt", "--config=published.yaml", "--statistics=wide.pt"], "statistics: of 8 chan"),
    "other weights": (["else.pt", "--config=published.yaml"], "holds no weights of a LightningDiT or a SiT"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_ends_with_one_line(published, monkeypatch, capsys, mistake):
    arguments, message = MISTAKES[mistake]
    monkeypatch.chdir(published.parent)
    Path("deep.yaml").write_text(yaml.safe_dump(ARGUMENTS | {"depth": 3}))
    LatentStatistics(torch.zeros(1, 8, 1, 1), torch.ones(1, 8, 1, 1)).write(Path("wide.pt"))
    Path("junk.pt").write_bytes(b"x")
    torch.save({"weight": torch.zeros(1)}, "else.pt")
    with pytest.raises(SystemExit) as stopped:
        run(monkeypatch, *arguments, "--out=out")
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert not Path("out").exists()
