"""Every config parses and builds what it describes; the full-size one has the published sizes."""

from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
from jsonargparse import Namespace
from lightning.pytorch import Callback

from ldm.alignment import REG
from ldm.models.lightningdit import SIZES, LightningDiT
from ldm.module import DiffusionModule
from vfm_vae.cli import CLI
from vfm_vae.data.datamodule import ImageNetDataModule
from vfm_vae.data.transforms import CentreCrop, ResizeAndCrop
from vfm_vae.metrics.inception import Inception, InceptionNetwork
from vfm_vae.module import TokenizerModule
from vfm_vae.types import Batch
from vfm_vae.vit import create_vit

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs"

OFFLINE = [
    "--model.model.init_args.vfm.init_args.pretrained=false",
    "--model.discriminator.init_args.pretrained=false",
]


class Build(CLI):
    """Parses and instantiates, and stops there."""

    def _run_subcommand(self, subcommand: str) -> None:
        pass


def build(*configs: str | Path, options: list[str] = (), module: type = TokenizerModule, command: str = "fit") -> Build:
    arguments = [command]
    for config in configs:
        arguments += ["--config", str(config if isinstance(config, Path) else CONFIGS / config)]
    plain = {"auto_configure_optimizers": False, "save_config_callback": None}
    return Build(module, ImageNetDataModule, args=[*arguments, *options], **plain)


@pytest.fixture
def vgg(vgg_file: str) -> list[str]:
    """Options that take LPIPS' network from a file with random weights."""
    return [f"--model.objective.init_args.perceptual_loss.init_args.weights={vgg_file}"]


@pytest.fixture
def full_size(vgg: list[str], tmp_path: Path):
    """Builds a full-size stage, its callbacks' VFMs left out: those would be downloaded."""

    def make(*configs: str, options: list[str] = ()) -> Build:
        (tmp_path / "no_callbacks.yaml").write_text("trainer: {callbacks: [], logger: false}")
        return build("vfm_vae/base.yaml", *configs, tmp_path / "no_callbacks.yaml", options=[*OFFLINE, *vgg, *options])

    return make


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


STAGES = ["strong", "weak", "ssim", "patchgan"]
VFMS = {"vfm_vae/vfm/dinov2_large.yaml": 1, "vfm_vae/vfm/dinov2_large_reg.yaml": 5}  # class token and registers


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("vfm", [[], ["vfm_vae/vfm/dinov2_large.yaml"]])
def test_full_size_stages_have_the_published_parameters(full_size, stage, vfm):
    with torch.device("meta"):
        module = full_size(f"vfm_vae/{stage}.yaml", "data/imagenet.yaml", *vfm).model
    decoder = module.model.decoder
    assert count(module.model.adapter) == 13_533_056
    assert count(decoder.mapping) == 525_312
    assert count(decoder) - count(decoder.mapping) == 125_712_274
    assert count(module.model) == 139_770_642
    assert count(module.discriminator) == 5 * 1_477_249
    assert (module.patchgan is not None) == (stage == "patchgan")
    assert module.patchgan is None or count(module.patchgan) == 8_299_587


@pytest.mark.parametrize("vfm", VFMS)
def test_other_vfms_are_prepared_for_as_published(full_size, vfm):
    with torch.device("meta"):
        module = full_size("vfm_vae/strong.yaml", "data/imagenet.yaml", vfm).model
        encoder = module.model.vfm
        assert encoder.prepare(torch.zeros(1, 3, 256, 256)).shape[2:] == (32 * encoder.patch_size,) * 2
    assert encoder.network.num_prefix_tokens == VFMS[vfm]
    assert encoder.interpolation == module.interpolation == module.discriminator.interpolation == "bicubic"
    assert encoder.antialias_positions == (VFMS[vfm] == 5)
    assert count(module.model) == 139_770_642


# What each stage weighs and trains, as the paper has it: millions of images, learning rate, weights.
PAPER = {
    "strong": (20, 1e-4, {"l1": 1, "perceptual": 10, "multi_resolution": 0.1, "alignment": 5, "kl": 1e-6}),
    "weak": (40, 1e-4, {"l1": 1, "perceptual": 10, "alignment": 1, "kl": 1e-6}),
    "ssim": (41, 5e-5, {"l1": 1, "perceptual": 2, "ssim": 1}),
    "patchgan": (44, 5e-5, {"adversarial_patch": 1, "feature_matching": 10}),
}


MECHANICS = ("simultaneous", "mode", "round", CentreCrop)  # where they are not as published


@pytest.mark.parametrize("recipe", ["recommended", "as_published"])
@pytest.mark.parametrize("stage", STAGES)
def test_stages_are_the_papers(full_size, stage, recipe):
    as_published = ["vfm_vae/as_published.yaml"] if recipe == "as_published" else []
    with torch.device("meta"):
        cli = full_size(f"vfm_vae/{stage}.yaml", "data/imagenet.yaml", *as_published)
    module = cli.model
    mechanics = (module.order, module.evaluate, module.rounding, type(cli.datamodule.evaluation_transform))
    assert mechanics == (("published", "sample", "truncate", ResizeAndCrop) if as_published else MECHANICS)
    assert count(module.model) == 139_770_642 + (38 if as_published else 0)  # strengths of noise maps
    millions, rate, expected = PAPER[stage]
    assert module.max_images == millions * 1_000_000
    assert cli.datamodule.batch_size * module.accumulate_grad_batches == 512
    assert {name: weight for name, weight in module.objective.weights.items() if weight} == expected | {
        "adversarial": 1
    }
    assert (module.equivariance.probability > 0) == (stage != "patchgan")
    former = {"strong": None} | dict(zip(STAGES[1:], STAGES, strict=False))
    assert module.init_from == (former[stage] and f"runs/{former[stage]}/checkpoints/last.ckpt")
    for optimizer in module.configure_optimizers():
        (group,) = optimizer.param_groups
        assert (group["lr"], tuple(group["betas"]), group["eps"]) == (rate, (0, 0.99), 1e-8)
    trained = {name.split(".")[0] for name, p in module.model.named_parameters() if p.requires_grad}
    assert trained == ({"decoder"} if stage == "patchgan" else {"decoder", "adapter"})
    blocks = {".".join(name.split(".")[:3]) for name, p in module.model.named_parameters() if p.requires_grad}
    assert stage != "patchgan" or blocks == {"decoder.routes.3"} | {f"decoder.blocks.{i}" for i in (3, 4, 5)}
    adapter = {".".join(name.split(".")[:2]) for name in blocks if name.startswith("adapter")}
    assert stage != "ssim" or adapter == {"adapter.widen"}


@pytest.mark.parametrize("data", ["imagenet", "imagenet_wds"])
def test_512_px_takes_the_same_model(full_size, data):
    configs = ("vfm_vae/ssim.yaml", "vfm_vae/512px.yaml", f"data/{data}.yaml", "data/512px.yaml")
    with torch.device("meta"):
        cli = full_size(*configs)
        module, datamodule = cli.model, cli.datamodule
        assert count(module.model) == 139_770_642
        for height, width in ((256, 256), (512, 512), (256, 384)):
            decoded = module.model.decode(torch.zeros(1, 32, height // 16, width // 16))
            assert decoded.image.shape == (1, 3, height, width)
    assert (datamodule.image_size, datamodule.min_size) == (512, 512)
    assert datamodule.batch_size * module.accumulate_grad_batches == 512
    module.model.check_image_size(512)


@pytest.mark.parametrize("stage", ["strong", "weak"])
@pytest.mark.parametrize("vfm", [[], ["vfm_vae/vfm/dinov2_large.yaml"]])
def test_discrete_stages_build(full_size, stage, vfm):
    with torch.device("meta"):
        module = full_size(f"vfm_vae/{stage}.yaml", "vfm_vae/discrete.yaml", "data/imagenet.yaml", *vfm).model
    assert tuple(module.model.quantizer.codebooks.shape) == (8, 4096, 8)
    assert module.model.adapter.fuse[-1].mlp.out.out_features == module.model.latent_channels == 64
    assert [module.objective.weights[name] for name in ("kl", "quantization", "entropy")] == [0, 1, 0]


@pytest.mark.parametrize("trainer", ["trainer/cpu.yaml"])
@pytest.mark.parametrize("stage", ["strong", "weak"])
def test_demo_stages_build(stage, trainer):
    cli = build("demo/tokenizer.yaml", f"demo/{stage}.yaml", "data/photos.yaml", trainer)
    assert cli.model.objective.weights["alignment"] == {"strong": 5.0, "weak": 1.0}[stage]
    assert any(type(callback).__name__ == "Report" for callback in cli.trainer.callbacks)


def callback(cli: Build, name: str) -> Callback:
    (found,) = [callback for callback in cli.trainer.callbacks if type(callback).__name__ == name]
    return found


def build_ldm(*configs: str, options: list[str] = (), command: str = "fit") -> Build:
    """A diffusion model without the tokenizer's checkpoint, which is a former command's."""
    return build(*configs, options=["--model.tokenizer=null", *options], module=DiffusionModule, command=command)


RUNS = {"epochs64": (80_000, "lognormal"), "epochs80": (100_000, "lognormal")}
RUNS |= {"epochs560": (600_000, "lognormal"), "epochs560_uniform": (700_000, "uniform")}


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("data", ["latents", "imagenet_centre"])
def test_full_size_diffusion_runs_are_the_published_ones(run, data):
    plain = ["--model.optimizer.init_args.fused=false"]  # the meta device has no fused kernels
    with torch.device("meta"):
        configs = ("ldm/lightningdit.yaml", f"ldm/{run}.yaml", f"data/{data}.yaml", "trainer/cpu.yaml")
        cli = build_ldm(*configs, options=plain)
    module = cli.model
    assert count(module.model) + module.model.position.numel() == 675_260_768
    assert (cli.trainer.max_steps, module.times) == RUNS[run]
    optimizer = module.configure_optimizers()
    (group,) = optimizer.param_groups
    assert isinstance(optimizer, torch.optim.AdamW)
    assert (group["lr"], tuple(group["betas"]), group["weight_decay"]) == (2e-4, (0.9, 0.95), 0)
    assert cli.datamodule.batch_size * cli.trainer.accumulate_grad_batches == 1024
    assert (module.pipeline.sampler.steps, module.pipeline.sampler.shift) == (250, 0.3)
    assert (module.pipeline.guidance.start, module.pipeline.guidance.channels) == (0.125, 3)
    assert callback(cli, "EMA").decay == 0.9999
    assert callback(cli, "LastCheckpoint")._every_n_train_steps == 1000  # also where there are no validation latents


REG_RUNS = {"reg80": 100_000, "reg480": 600_000, "reg640": 800_000}


@pytest.mark.parametrize("run", REG_RUNS)
def test_full_size_reg_runs_are_the_published_ones(run):
    plain = ["--model.optimizer.init_args.fused=false"]
    with torch.device("meta"):
        cli = build_ldm("ldm/reg.yaml", f"ldm/{run}.yaml", "trainer/cpu.yaml", options=plain)
    module = cli.model
    assert count(module.model) + module.model.position.numel() == 685_062_304
    assert (cli.trainer.max_steps, module.times, module.model.align_depth) == (REG_RUNS[run], "uniform", 8)
    assert module.weights == {"mse": 1.0, "cosine": 0.0, "align": 0.5, "cls": 0.03}
    (group,) = module.configure_optimizers().param_groups
    assert (group["lr"], tuple(group["betas"]), group["weight_decay"]) == (2e-4, (0.9, 0.95), 0)
    assert cli.datamodule.batch_size * cli.trainer.accumulate_grad_batches == 1024
    assert cli.trainer.gradient_clip_val == 1.0
    assert (module.pipeline.sampler.steps, module.pipeline.sampler.last) == (250, 0.04)
    assert (module.pipeline.guidance.start, module.pipeline.guidance.channels, module.pipeline.guidance.cls_scale) == (
        0.2,
        None,
        4.0,
    )
    assert callback(cli, "EMA").decay == 0.9999


@pytest.mark.parametrize(("size", "parameters"), [("b", 12), ("l", 24), ("1p0b", 24), ("1p6b", 28)])
def test_sizes_of_diffusion_models(size, parameters):
    with torch.device("meta"):
        configs = ("ldm/lightningdit.yaml", "ldm/epochs64.yaml", f"ldm/size/{size}.yaml", "data/latents.yaml")
        model = build_ldm(*configs, "trainer/cpu.yaml").model.model
    assert len(model.blocks) == parameters == SIZES[size.replace("b", "B") if "1p" in size else size.upper()].depth


def test_sampling_builds():
    with torch.device("meta"):
        configs = ("ldm/lightningdit.yaml", "ldm/epochs64.yaml", "ldm/samples.yaml", "trainer/cpu.yaml")
        cli = build_ldm(*configs, options=["--data.root=unused"], command="predict")
    assert cli.datamodule.num_samples == 50_000
    assert callback(cli, "SampleWriter").npz


@pytest.mark.parametrize(("overlay", "command"), [("ldm_train", "fit"), ("ldm_guided", "validate")])
def test_demo_diffusion_builds(overlay, command, photos, tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/photos").symlink_to(photos)  # which the demo's own first command writes
    monkeypatch.chdir(tmp_path)
    cli = build_ldm("demo/ldm.yaml", f"demo/{overlay}.yaml", "trainer/cpu.yaml", command=command)
    assert cli.model.pipeline.guidance.scale == (2.0 if overlay == "ldm_guided" else 1.0)
    assert callback(cli, "Report").path.name == "metrics.json"


@pytest.mark.parametrize("overlays", [["ldm_train"], ["reg_guided"]])
def test_demo_reg_builds(overlays, photos, tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/photos").symlink_to(photos)
    monkeypatch.chdir(tmp_path)
    configs = ("demo/ldm.yaml", "demo/reg.yaml", *(f"demo/{name}.yaml" for name in overlays), "trainer/cpu.yaml")
    cli = build_ldm(*configs, command="fit" if overlays == ["ldm_train"] else "validate")
    assert type(cli.model.alignment) is REG
    assert cli.model.model.grid == (4, 4)
    assert callback(cli, "Report").path.name == "metrics.json"


@pytest.mark.parametrize(("overlay", "terms"), [(None, set()), ("repa", {"align"}), ("reg", {"align", "cls"})])
def test_study_builds(overlay, terms, photos, tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/photos").symlink_to(photos)
    monkeypatch.chdir(tmp_path)
    overlays = [] if overlay is None else [f"demo/align_{overlay}.yaml"]
    cli = build_ldm("demo/ldm.yaml", "demo/study.yaml", *overlays, "trainer/cpu.yaml")
    assert set(cli.model.weights) == {"mse", "cosine"} | terms
    assert type(cli.model.model) is LightningDiT
    assert cli.trainer.max_steps == 1400


@pytest.mark.parametrize("name", ["demo/latents_reg.yaml", "vfm_vae/latents_reg.yaml"])
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


@pytest.mark.parametrize("name", ["test", "test_published"])
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


def test_alignment_of_blocks_builds(offline_networks, photos, tmp_path):
    config = (CONFIGS / "ldm/cknna.yaml").read_text().replace("data/imagenet/val", str(photos / "val"))
    (tmp_path / "cknna.yaml").write_text(config)
    size = "ldm/size/b.yaml"  # a folder of images can't be on the meta device
    cli = build_ldm("ldm/lightningdit.yaml", "ldm/epochs64.yaml", size, "data/latents.yaml", tmp_path / "cknna.yaml")
    assert callback(cli, "CKNNACallback").times == [0.5] and callback(cli, "SampleImages")


def test_evaluation_of_the_demo_builds():
    cli = build("demo/tokenizer.yaml", "demo/weak.yaml", "demo/weak_test.yaml", "trainer/cpu.yaml", command="test")
    assert callback(cli, "CKNNACallback").se_cknna == "each"
    assert callback(cli, "LinearProbeCallback") and callback(cli, "RobustnessCallback")


@pytest.mark.parametrize(("folder", "number"), [("vfm_vae", "rFID 0.52"), ("ldm", "3.80")])
def test_published_results_are_promised_by_the_published_protocol_alone(folder, number):
    assert number in (CONFIGS / folder / "test_published.yaml").read_text()
    assert number not in (CONFIGS / folder / "test.yaml").read_text()


def test_every_config_is_covered_here():
    seen = {"data/imagenet.yaml", "data/photos.yaml", "demo/tokenizer.yaml", "demo/strong.yaml", "demo/weak.yaml"}
    seen |= {"vfm_vae/base.yaml", *(f"vfm_vae/{stage}.yaml" for stage in STAGES), *VFMS}
    seen |= {
        "vfm_vae/as_published.yaml",
        "vfm_vae/discrete.yaml",
        "vfm_vae/512px.yaml",
        "data/512px.yaml",
        "data/imagenet_wds.yaml",
    }
    seen |= {"trainer/multinode.yaml", "trainer/fsdp8_ldm.yaml"}
    seen |= {"trainer/cpu.yaml", "trainer/gpu.yaml", "trainer/ddp8.yaml", "trainer/ddp8_ldm.yaml"}
    seen |= {"ldm/lightningdit.yaml", "ldm/samples.yaml", *(f"ldm/{run}.yaml" for run in RUNS)}
    seen |= {f"ldm/size/{size}.yaml" for size in ("b", "l", "1p0b", "1p6b")}
    seen |= {"data/latents.yaml", "data/imagenet_centre.yaml", "demo/latents.yaml", "vfm_vae/latents.yaml"}
    seen |= {"demo/ldm.yaml", "demo/ldm_train.yaml", "demo/ldm_guided.yaml", "demo/weak_test.yaml"}
    seen |= {"vfm_vae/test.yaml", "vfm_vae/test_published.yaml", "ldm/test.yaml", "ldm/cknna.yaml"}
    seen |= {"ldm/test_published.yaml"}
    seen |= {"ldm/reg.yaml", *(f"ldm/{run}.yaml" for run in REG_RUNS), "vfm_vae/latents_reg.yaml"}
    seen |= {"demo/latents_reg.yaml", "demo/reg.yaml", "demo/reg_guided.yaml", "demo/study.yaml"}
    seen |= {"demo/align_repa.yaml", "demo/align_reg.yaml"}
    assert {str(path.relative_to(CONFIGS)) for path in CONFIGS.rglob("*.yaml")} == seen


@pytest.mark.parametrize(
    ("names", "ranks", "strategy"),
    [
        (["gpu"], 1, "SingleDeviceStrategy"),
        (["ddp8"], 8, "DDPStrategy"),
        (["ddp8_ldm"], 8, "DDPStrategy"),
        (["fsdp8_ldm"], 8, "ModelParallelStrategy"),
        (["ddp8", "multinode"], 32, "DDPStrategy"),
        (["ddp8_ldm", "multinode"], 32, "DDPStrategy"),
    ],
)
def test_trainers_of_gpus_build(names, ranks, strategy):
    trainers = [f"trainer/{name}.yaml" for name in names]
    cli = build("demo/tokenizer.yaml", "demo/strong.yaml", *trainers, options=["--trainer.accelerator=cpu"])
    assert type(cli.trainer.strategy).__name__ == strategy
    assert cli.trainer.world_size == ranks and cli.config.fit.trainer.accelerator == "cpu"
    assert cli.trainer.precision == "bf16-mixed"
    if ranks > 1:
        assert cli.trainer.strategy._timeout == timedelta(minutes=10)
    if names[0] == "ddp8":  # both players' turns leave parameters unused
        assert cli.trainer.strategy._ddp_kwargs["find_unused_parameters"]


@pytest.mark.slow
def test_one_full_size_step_on_cpu(full_size, tmp_path):
    options = [
        "--trainer.max_steps=1",
        "--trainer.enable_checkpointing=false",
        f"--trainer.default_root_dir={tmp_path}",
    ]
    cli = full_size("vfm_vae/strong.yaml", "data/imagenet.yaml", "trainer/cpu.yaml", options=options)
    images = torch.randint(256, (2, 3, 256, 256), dtype=torch.uint8)
    batch = Batch(images, torch.zeros(2, dtype=torch.int64), torch.arange(2))
    watched = {"generator": cli.model.model.adapter.last_encoding_weight}
    watched["discriminator"] = next(cli.model.discriminator.parameters())
    before = {name: weight.detach().clone() for name, weight in watched.items()}
    cli.trainer.fit(cli.model, torch.utils.data.DataLoader([batch], batch_size=None))
    assert cli.model.images_seen == 2
    assert cli.model.guard.num_skipped == 0
    assert all(not torch.equal(before[name], weight) for name, weight in watched.items())


def test_configs_say_little_twice():
    texts = [path.read_text() for path in CONFIGS.rglob("*.yaml")]
    assert sum(text.count("class_path") for text in texts) <= 82  # half as many as when each class was named in full
    assert not [text for text in texts if "class_path: vfm_vae." in text or "feature_channels" in text]


def completed(*configs: str | Path, options: list[str] = ()) -> Namespace:
    """The options that a module would be built by; nothing is built."""

    class Parse(Build):
        def instantiate_classes(self) -> None:
            self.completed = self._completed()

    arguments = ["fit", *(word for config in configs for word in ("-c", str(config))), *options]
    plain = {"auto_configure_optimizers": False, "save_config_callback": None}
    return Parse(TokenizerModule, ImageNetDataModule, args=arguments, **plain).completed.fit


def test_widths_follow_from_the_vfm_in_one_line():
    stage = ["vfm_vae/base.yaml", "vfm_vae/strong.yaml", "data/imagenet.yaml"]
    options = ["--model.model.vfm.name=vit_base_patch14_dinov2.lvd142m", "--model.model.vfm.input_scale=0.875"]
    before = torch.get_rng_state()
    other = completed(
        *stage, options=[*options, "--model.model.adapter.decoded_channels=256", "--seed_everything=false"]
    )
    model = other.model.model.init_args
    adapter = model.adapter.init_args
    assert (adapter.feature_channels, adapter.alignment_channels, adapter.unshuffle) == ([768] * 3, 768, 1)
    assert model.decoder.init_args.in_channels == 256
    assert other.model.discriminator.init_args.interpolation == "bicubic"
    assert torch.equal(torch.get_rng_state(), before)
    given = completed(*stage, options=["--model.model.adapter.alignment_channels=7"]).model.model.init_args.adapter
    assert (given.init_args.alignment_channels, given.init_args.feature_channels) == (7, [1024] * 3)


def test_a_run_tells_its_callbacks_and_its_logger_what_it_is_called():
    writer = ["--trainer.callbacks+=LatentWriter", "--run.output=elsewhere", "--run.folder=some", "--run.name=mine"]
    cli = build("demo/tokenizer.yaml", "demo/strong.yaml", "trainer/cpu.yaml", options=writer)
    assert callback(cli, "Report").name == "mine" and callback(cli, "Report").path == Path("runs/demo/metrics.json")
    assert callback(cli, "LatentWriter").directory == Path("elsewhere")
    assert Path(cli.trainer.log_dir) == Path("some/mine")
    assert cli.given.fit.trainer.callbacks[-1].init_args.directory is None  # in config.yaml, for the next command
