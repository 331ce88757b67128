"""Configs and options of former versions, in today's form."""

import pytest
import yaml

from vfm_vae.former import upgrade, upgrade_word, upgrade_words

FORMER = """
model:
  model:
    class_path: vfm_vae.tokenizer.VFMVAE
    init_args:
      adapter: {class_path: vfm_vae.modules.adapter.Adapter, init_args: {latent_channels: 32}}
      decoder: {class_path: vfm_vae.modules.decoder.Decoder, init_args: {latent_channels: 512, w_channels: 8}}
  objective: {init_args: {l1: 2.0}}
  equivariance: {class_path: vfm_vae.modules.equivariance.EquivarianceRegularizer}
  guard: null
trainer:
  callbacks:
  - class_path: callbacks.fid.DistributionCallback
    init_args: {network: null}
"""
TODAY = """
model:
  model:
    class_path: vfm_vae.tokenizer.VFMVAE
    init_args:
      adapter: {latent_channels: 32}
      decoder: {in_channels: 512, w_channels: 8}
  objective: {l1: 2.0}
  equivariance: {}
  guard: null
trainer:
  callbacks:
  - class_path: callbacks.distribution.DistributionCallback
    init_args: {network: null}
"""


@pytest.mark.parametrize("text", [FORMER, TODAY])
def test_configs_come_into_todays_form_and_stay_in_it(text: str):
    assert upgrade(yaml.safe_load(text)) == yaml.safe_load(TODAY)


@pytest.mark.parametrize(
    "part",
    [
        {"class_path": "others.Decoder", "init_args": {"latent_channels": 3}},
        {"init_args": {"latents": 3}},  # an addition to it, known by an option that ours has not
    ],
)
def test_options_of_the_same_name_with_others_classes_stay(part: dict[str, object]):
    assert upgrade({"decoder": part}) == {"decoder": part}


@pytest.mark.parametrize("decoder", [{"latent_channels": 4}, {"init_args": {"latent_channels": 4}}])
def test_options_of_others_classes_stay(decoder: dict[str, object]):
    description = {"model": {"model": {"class_path": "mine.VAE", "init_args": {"decoder": decoder}}}}
    assert upgrade(description) == description
    inside = {"class_path": "vfm_vae.tokenizer.VFMVAE", "init_args": {"part": description["model"]["model"]}}
    assert upgrade(inside) == inside


def test_a_class_of_this_project_in_others_stays_named():
    decoder = {"class_path": "vfm_vae.modules.decoder.Decoder", "init_args": {"latent_channels": 4}}
    upgraded = upgrade({"class_path": "mine.VAE", "init_args": {"decoder": decoder}})
    assert upgraded["init_args"]["decoder"] == {**decoder, "init_args": {"in_channels": 4}}


@pytest.mark.parametrize("named", [["--model.model=mine.VAE"], ["--model.model.class_path", "mine.VAE"]])
def test_words_that_set_options_of_others_classes_stay(named: list[str]):
    options = ["--model.model.init_args.decoder.latent_channels=4", "--model.model.init_args.tokenizer.init_args.a=1"]
    assert upgrade_words([*named, *options]) == [*named, *options]
    ours = upgrade_words([*named, "--model.equivariance.init_args.probability=1"])
    assert ours == [*named, "--model.equivariance.probability=1"]


@pytest.mark.parametrize(
    ("word", "today"),
    [
        ("--model.equivariance.init_args.probability=1", "--model.equivariance.probability=1"),
        ("--model.tokenizer.init_args.checkpoint", "--model.tokenizer.checkpoint"),
        (
            "--model.model.init_args.decoder.init_args.latent_channels=8",
            "--model.model.init_args.decoder.in_channels=8",
        ),
        ("--model.model=ldm.models.reg.SiT", "--model.model=ldm.models.sit.SiT"),
        ("callbacks.fid.DistributionCallback", "callbacks.distribution.DistributionCallback"),
        ("callbacks.writers.SampleWriter", "callbacks.samples.SampleWriter"),
        ("--model.model.init_args.adapter.latent_channels=8", "--model.model.init_args.adapter.latent_channels=8"),
    ],
)
def test_words_of_the_command_line(word: str, today: str):
    assert upgrade_word(word) == today


def test_an_option_that_another_command_has_names_it():
    with pytest.raises(ValueError, match=r"--samples: samples in files are measured by `python -m vfm_vae\.evaluate"):
        upgrade_word("--samples=a.npz")
