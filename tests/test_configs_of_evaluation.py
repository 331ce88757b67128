"""The configs that cache latents and evaluate build what they measure with, by the protocol that they name."""

import json

import numpy as np
import pytest
import torch
from building import CONFIGS, OFFLINE, Build, build, build_ldm, callback
from lightning.pytorch.callbacks import Checkpoint

from ldm.cli import DiffusionCLI
from ldm.module import DiffusionModule
from ldm.sweep.goal import goal_of
from ldm.sweep.trainer import SweepingTrainer
from vfm_vae.contracts import Measures
from vfm_vae.data.datamodule import ImageNetDataModule
from vfm_vae.data.transforms import CentreCrop, ResizeAndCrop
from vfm_vae.metrics.inception import Inception, InceptionNetwork
from vfm_vae.trial import Output
from vfm_vae.vit import create_vit


class BuildSweep(Build, DiffusionCLI):
    """Builds what a sweep takes."""


@pytest.fixture
def offline_networks(monkeypatch):
    """Measuring networks with random weights; what they are asked for is noted."""
    asked = []

    def random_vit(name, *, weights=None, pretrained=True, **kwargs):
        asked.append(name)
        return create_vit(name, pretrained=False, **kwargs)

    monkeypatch.setattr("vfm_vae.vfm.create_vit", random_vit)
    monkeypatch.setattr("vfm_vae.metrics.inception._load", lambda weights: (InceptionNetwork(), "random"))
    return asked


@pytest.mark.parametrize(
    "name", [pytest.param("demo/latents_reg.yaml", marks=pytest.mark.slow), "vfm_vae/latents_reg.yaml"]
)
def test_caches_with_features_build(name, offline_networks):
    cli = build("demo/tokenizer.yaml", "demo/weak.yaml", name, "trainer/cpu.yaml", command="predict")
    assert cli.model.predict == "moments" and cli.datamodule.predict == ("train", "val")
    size = 64 if name.startswith("demo") else 256
    with torch.no_grad():
        features = cli.model.features(torch.zeros(1, 3, size, size))
    assert features.grid == ((4, 4) if size == 64 else (16, 16))


@pytest.mark.parametrize("name", ["demo/latents.yaml", "vfm_vae/latents.yaml"])
def test_caches_build(name):
    cli = build("demo/tokenizer.yaml", "demo/weak.yaml", name, "trainer/cpu.yaml", command="predict")
    assert cli.model.predict == "latents" and cli.datamodule.predict == ("train", "val")
    assert callback(cli, "LatentWriter").dtype == "float32"


def test_caches_with_captions_build(tmp_path):
    sizes = {"hidden_size": 2048, "num_hidden_layers": 36, "num_attention_heads": 16, "vocab_size": 151936}
    config = {"model_type": "qwen2_5_vl", "text_config": sizes}
    (tmp_path / "config.json").write_text(json.dumps(config))
    text = (CONFIGS / "vfm_vae/latents_text.yaml").read_text().replace("Qwen/Qwen2.5-VL-3B-Instruct", str(tmp_path))
    (tmp_path / "latents_text.yaml").write_text(text)
    cli = build(
        "demo/tokenizer.yaml", "demo/weak.yaml", tmp_path / "latents_text.yaml", "trainer/cpu.yaml", command="predict"
    )
    encoder = callback(cli, "LatentWriter").text
    assert (encoder.width, encoder.max_tokens, encoder.layer, encoder.precision) == (2048, 256, -1, "bfloat16")
    assert cli.model.predict == "moments" and not encoder.is_loaded


def test_cache_of_the_demo_with_captions_builds():
    configs = ("demo/tokenizer.yaml", "demo/weak.yaml", "demo/latents_text.yaml")
    cli = build(*configs, "trainer/cpu.yaml", command="predict")
    assert cli.model.predict == "moments"  # mirrored views would belie "left" and "right"
    assert callback(cli, "LatentWriter").text.width == 64 and cli.config.predict.data.captions == "text"


@pytest.mark.parametrize("name", ["test", pytest.param("test_published", marks=pytest.mark.slow)])
def test_evaluation_of_tokenizers_builds(name, vgg, offline_networks):
    configs = ("vfm_vae/base.yaml", "vfm_vae/weak.yaml", f"vfm_vae/{name}.yaml", "data/imagenet.yaml")
    with torch.device("meta"):
        cli = build(*configs, "trainer/cpu.yaml", options=[*OFFLINE, *vgg], command="test")
    distribution, cknna = callback(cli, "DistributionCallback"), callback(cli, "CKNNACallback")
    assert isinstance(distribution.network, Inception) and distribution.reference is None
    assert any("dinov2" in name for name in offline_networks) and cknna.num_images == 10_000
    published = name == "test_published"
    assert {vfm.precision for vfm in cknna.vfms.values()} == {"float32" if published else "bfloat16"}
    assert cknna.se_cknna == ("published" if published else "each")
    assert (cli.model.evaluate, cli.model.rounding) == (("sample", "truncate") if published else ("mode", "round"))
    assert isinstance(cli.datamodule.evaluation_transform, ResizeAndCrop if published else CentreCrop)
    assert callback(cli, "EMA") and callback(cli, "Report").name == name


@pytest.mark.parametrize(("name", "rounding"), [("test", "round"), ("test_published", "truncate")])
def test_evaluation_of_diffusion_models_builds(offline_networks, tmp_path, name, rounding):
    reference = tmp_path / "reference.npz"
    np.savez(reference, mu=np.zeros(2048), sigma=np.eye(2048))
    config = (CONFIGS / f"ldm/{name}.yaml").read_text().replace("data/VIRTUAL_imagenet256_labeled.npz", str(reference))
    (tmp_path / "test.yaml").write_text(config)
    configs = ("ldm/lightningdit.yaml", "ldm/epochs64.yaml", tmp_path / "test.yaml", "data/latents.yaml")
    with torch.device("meta"):
        cli = build_ldm(*configs, "trainer/cpu.yaml", command="test")
    assert cli.datamodule.num_samples == 50_000
    assert callback(cli, "DistributionCallback").precision_recall
    assert cli.model.rounding == rounding and callback(cli, "Report").name == name
    with torch.device("meta"), pytest.raises(ValueError, match="reference: nothing at 'data/VIRTUAL_imagenet256"):
        configs = ("ldm/lightningdit.yaml", "ldm/epochs64.yaml", f"ldm/{name}.yaml", "data/latents.yaml")
        build_ldm(*configs, command="test")


def test_evaluation_of_text_to_image_builds(offline_networks, photos, tmp_path):
    (tmp_path / "prompts.jsonl").write_text('{"category": "animals", "prompt": "a cat"}\n')
    config = (CONFIGS / "ldm/t2i_test.yaml").read_text()
    for place, stand_in in (("prompts.jsonl", tmp_path / "prompts.jsonl"), ("images", photos / "val")):
        config = config.replace(f"data/mjhq30k/{place}", str(stand_in))
    (tmp_path / "test.yaml").write_text(config)
    configs = ("ldm/lightningdit.yaml", "ldm/size/b.yaml", tmp_path / "test.yaml", "trainer/cpu.yaml")
    small = ["--model.model.depth=1", "--model.model.width=48"]
    options = ["--data.num_samples=null", "--data.root=nowhere", *small]
    cli = build_ldm(*configs, options=options, command="test")  # a folder of images can't be on the meta device
    assert [prompt.text for prompt in cli.datamodule.samples.prompts] == ["a cat"]
    assert callback(cli, "DistributionCallback").reference == str(photos / "val")
    assert callback(cli, "CLIPScoreCallback").name == "openai/clip-vit-base-patch16" and callback(cli, "EMA")


def test_sweeps_build(offline_networks, tmp_path, photos):
    reference = tmp_path / "reference.npz"
    np.savez(reference, mu=np.zeros(2048), sigma=np.eye(2048))
    config = (CONFIGS / "ldm/sweep.yaml").read_text().replace("data/VIRTUAL_imagenet256_labeled.npz", str(reference))
    (tmp_path / "sweep.yaml").write_text(config)
    (tmp_path / "demo.yaml").write_text(
        (CONFIGS / "demo/ldm_sweep.yaml").read_text().replace("data/photos", str(photos))
    )
    imagenet = ("ldm/lightningdit.yaml", "ldm/size/b.yaml", tmp_path / "sweep.yaml", "trainer/cpu.yaml")
    demo = ("demo/ldm.yaml", "demo/ldm_train.yaml", tmp_path / "demo.yaml")
    for configs, samples, metric in ((imagenet, 10_000, "gfid"), (demo, 260, "fd_vit_photos_patch8_64/train")):
        words = [word for config in configs for word in ("-c", str(CONFIGS / config))]
        made = {"trainer_class": SweepingTrainer, "auto_configure_optimizers": False, "save_config_callback": None}
        arguments = ["sweep", *words, "--model.tokenizer=null", "--data.root=nowhere", f"--run.folder={tmp_path}"]
        with torch.device("meta" if configs is imagenet else "cpu"):
            cli = BuildSweep(DiffusionModule, ImageNetDataModule, args=arguments, **made)
        measuring = [each for each in cli.trainer.callbacks if isinstance(each, Measures)]
        assert goal_of(cli.config_init.sweep.sweep, measuring).name == metric
        assert cli.datamodule.num_samples == samples and not cli.trainer.loggers
        assert not [each for each in cli.trainer.callbacks if isinstance(each, Output | Checkpoint)]
    assert not (tmp_path / "ldm").exists()


def test_alignment_of_blocks_builds(offline_networks, photos, tmp_path):
    config = (CONFIGS / "ldm/cknna.yaml").read_text().replace("data/imagenet/val", str(photos / "val"))
    (tmp_path / "cknna.yaml").write_text(config)
    configs = ("ldm/lightningdit.yaml", "ldm/epochs64.yaml", "ldm/size/b.yaml", "data/latents.yaml")
    small = ["--model.model.depth=1", "--model.model.width=48"]  # a folder of images can't be on the meta device
    cli = build_ldm(*configs, tmp_path / "cknna.yaml", options=small)
    assert callback(cli, "CKNNACallback").times == [0.5] and callback(cli, "SampleImages")


def test_evaluation_of_the_demo_builds():
    cli = build("demo/tokenizer.yaml", "demo/weak.yaml", "demo/weak_test.yaml", "trainer/cpu.yaml", command="test")
    assert callback(cli, "CKNNACallback").se_cknna == "each"
    assert callback(cli, "LinearProbeCallback") and callback(cli, "RobustnessCallback")


@pytest.mark.parametrize(("folder", "number"), [("vfm_vae", "rFID 0.52"), ("ldm", "3.80")])
def test_published_results_are_promised_by_the_published_protocol_alone(folder, number):
    assert number in (CONFIGS / folder / "test_published.yaml").read_text()
    assert number not in (CONFIGS / folder / "test.yaml").read_text()
