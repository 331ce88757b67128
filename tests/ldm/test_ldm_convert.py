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
from ldm.models.ditdh import DiTDH
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
    assert loaded.guidance.arguments == Guidance(start=0.125, channels=3).arguments
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
    "other weights": (["else.pt", "--config=published.yaml"], "holds no weights of a LightningDiT, a SiT or a DiTDH"),
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


DITDH_YAML = {
    "stage_1": {"target": "stage1.RAE", "params": {"noise_tau": 0.0}},
    "stage_2": {
        "target": "stage2.models.DDT.DiTwDDTHead",
        "params": {
            "input_size": 4,
            "patch_size": 1,
            "in_channels": 4,
            "hidden_size": [32, 48],
            "depth": [2, 1],
            "num_heads": [2, 3],
            "mlp_ratio": 4.0,
            "class_dropout_prob": 0.1,
            "num_classes": 3,
            "use_qknorm": False,
            "use_swiglu": True,
            "use_rope": True,
            "use_rmsnorm": True,
            "wo_shift": False,
            "use_pos_embed": True,
        },
    },
    "transport": {"params": {"path_type": "Linear", "prediction": "velocity", "time_dist_type": "logit-normal_0_1"}},
    "sampler": {"mode": "ODE", "params": {"sampling_method": "euler", "num_steps": 5}},
    "guidance": {"method": "cfg", "scale": 1.5, "t_min": 0.25, "t_max": 0.75},
    "misc": {"latent_size": [4, 4, 4], "time_dist_shift_dim": 64, "time_dist_shift_base": 4096},
}


def random_ditdh() -> DiTDH:
    torch.manual_seed(0)
    model = DiTDH(**SIZES, head_depth=1, head_width=48, head_num_heads=3)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


@pytest.fixture
def rae(tmp_path, monkeypatch):
    """Converts a DiTDH, published with this YAML."""
    model = random_ditdh()
    torch.save({"ema": convert.to_published(model)}, tmp_path / "rae.pt")

    def convert_with(config: dict) -> tuple[DiTDH, LatentDiffusion]:
        (tmp_path / "rae.yaml").write_text(yaml.safe_dump(config))
        run(monkeypatch, tmp_path / "rae.pt", "--config", tmp_path / "rae.yaml", "--out", tmp_path / "out")
        return model, LatentDiffusion.from_pretrained(tmp_path / "out")

    return convert_with


def test_a_published_ditdh_samples_latents_that_its_tokenizer_has_normalised(rae, tmp_path):
    model, loaded = rae(DITDH_YAML)
    assert loaded.model.arguments == model.arguments
    for name, tensor in model.state_dict().items():
        assert torch.allclose(loaded.model.state_dict()[name], tensor, rtol=0, atol=1e-6), name
    assert (loaded.normalization.mean == 0).all() and (loaded.normalization.std == 1).all()
    assert (loaded.sampler.steps, loaded.sampler.shift, loaded.sampler.end) == (5, "auto", 0.999)
    assert (loaded.guidance.scale, loaded.guidance.start, loaded.guidance.end) == (1.5, 0.25, 0.75)
    assert loaded.sample([0, 1]).latents.isfinite().all()
    assert yaml.safe_load((tmp_path / "out/model.yaml").read_text())["model"]["model"]["class_path"].endswith("DiTDH")


def test_a_published_shift_is_of_noise_and_autoguidance_waits_for_its_partner(rae, capsys):
    config = {"misc": {"time_dist_shift_dim": 16384}, "guidance": {"method": "autoguidance", "scale": 1.42}}
    _, loaded = rae(DITDH_YAML | config)
    assert loaded.sampler.shift == 0.5 and loaded.guidance.scale == 1.0
    assert "guidance is off: the config's autoguidance needs a partner" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("section", "options", "message"),
    [
        ("stage_2", {"target": "stage2.models.lightningDiT.LightningDiT", "params": {}}, "stage_2.target must be"),
        ("stage_2", {"target": "DiTwDDTHead"}, r"stage_2\.params, which has the arguments of the network, is missing"),
        ("transport", {"params": {"prediction": "x"}}, "transport.prediction must be velocity, given 'x'"),
        ("transport", {"prediction": "x"}, "transport.prediction must be velocity, given 'x'"),
    ],
)
def test_what_rae_trains_otherwise_is_named(section, options, message):
    with pytest.raises(ValueError, match=message):
        convert.denoiser_from_published(convert.to_published(random_ditdh()), DITDH_YAML | {section: options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden_size": 32}, "hidden_size is a list of two numbers, of body and head, given 32"),
        ({"use_swiglu": False}, r"\['use_swiglu'\] is not supported"),
        ({"depth": [3, 1]}, r"missing \['blocks.3"),
    ],
)
def test_what_is_no_ditdh_is_named(options, message):
    config = DITDH_YAML["stage_2"]["params"] | options
    with pytest.raises(ValueError, match=message):
        convert.ditdh_from_published(convert.to_published(random_ditdh()), config)


def test_what_a_public_ditdh_lacks_is_left_out_or_refused():
    plain = random_ditdh()
    more = DiTDH(**plain.arguments | {"align_channels": 4, "align_depth": 1, "base_depth": 1})
    assert convert.to_published(more).keys() == convert.to_published(plain).keys()
    for options, message in (
        ({"predicts": "data"}, "model.predicts: the public DiTDH"),
        ({"cls_channels": 4}, "the public DiTDH has no class token"),
    ):
        with pytest.raises(ValueError, match=message):
            convert.to_published(DiTDH(**plain.arguments | options))
