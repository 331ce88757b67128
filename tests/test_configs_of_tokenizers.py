"""The configs of tokenizers build the published stages, at full size and in the demo."""

from collections.abc import Iterable
from itertools import product
from pathlib import Path

import pytest
import torch
from building import OFFLINE, Build, build, count

from vfm_vae.conv_vae import ConvVAE
from vfm_vae.data.transforms import CentreCrop, ResizeAndCrop
from vfm_vae.rae import RAE
from vfm_vae.types import Batch


@pytest.fixture
def full_size(vgg: list[str], tmp_path: Path):
    """Builds a full-size stage, its callbacks' VFMs left out: those would be downloaded."""

    def make(*configs: str, options: list[str] = (), offline: list[str] = OFFLINE) -> Build:
        (tmp_path / "no_callbacks.yaml").write_text("trainer: {callbacks: [], logger: false}")
        return build("vfm_vae/base.yaml", *configs, tmp_path / "no_callbacks.yaml", options=[*offline, *vgg, *options])

    return make


STAGES = ["strong", "weak", "ssim", "patchgan"]
VFMS = {"vfm_vae/vfm/dinov2_large.yaml": 1, "vfm_vae/vfm/dinov2_large_reg.yaml": 5}  # class token and registers


DINO = ["vfm_vae/vfm/dinov2_large.yaml"]


def slow_but(*fast: tuple, cases: Iterable[tuple]) -> list:
    """Cases of which some prove the kind, and the rest its every member."""
    return [case if case in fast else pytest.param(*case, marks=pytest.mark.slow) for case in cases]


@pytest.mark.parametrize(
    ("stage", "vfm"), slow_but(("strong", []), ("patchgan", DINO), cases=product(STAGES, ([], DINO)))
)
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


@pytest.mark.parametrize(
    ("stage", "recipe"),
    [(stage, "recommended") for stage in STAGES]
    + slow_but(("patchgan", "as_published"), cases=[(stage, "as_published") for stage in STAGES]),
)
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


@pytest.mark.parametrize("data", [pytest.param("imagenet", marks=pytest.mark.slow), "imagenet_wds"])
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


@pytest.mark.parametrize(("stage", "vfm"), slow_but(("weak", []), cases=product(["strong", "weak"], ([], DINO))))
def test_discrete_stages_build(full_size, stage, vfm):
    with torch.device("meta"):
        module = full_size(f"vfm_vae/{stage}.yaml", "vfm_vae/discrete.yaml", "data/imagenet.yaml", *vfm).model
    assert tuple(module.model.quantizer.codebooks.shape) == (8, 4096, 8)
    assert module.model.adapter.fuse[-1].mlp.out.out_features == module.model.latent_channels == 64
    assert [module.objective.weights[name] for name in ("kl", "quantization", "entropy")] == [0, 1, 0]


# Class, parameters that train, images, batch, rate, when the discriminators learn and are heard, weights.
BASELINES = {
    "sdvae": (
        ConvVAE, 83_653_863, 23_700_000, 96, 4.32e-4, (4_800_000, 4_800_000),
        {"l1": 3 * 256**2, "perceptual": 3 * 256**2, "kl": 1e-6, "adversarial_patch": 0.5},
    ),
    "vavae": (
        ConvVAE, 69_868_835, 64_000_000, 256, 1e-4, (0, 0),
        {"l1": 3 * 256**2, "perceptual": 3 * 256**2, "kl": 1e-6, "adversarial_patch": 0.5, "alignment": 0.1},
    ),
    "rae": (
        RAE, 415_056_640, 20_500_000, 512, 2e-4, (7_690_000, 10_250_000),
        {"l1": 1, "perceptual": 1, "adversarial": 0.75},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BASELINES)
def test_baselines_have_the_published_settings(full_size, name):
    kind, size, images, batch, rate, starts, weights = BASELINES[name]
    given = [name] if name != "vavae" else ["sdvae", "vavae"]
    offline = [option for option in OFFLINE if name == "rae" or (name == "vavae" and "vfm" in option)]
    configs = (f"vfm_vae/baselines/{config}.yaml" for config in given)
    with torch.device("meta"):
        cli = full_size(*configs, "data/imagenet.yaml", offline=offline)
    module, model, objective = cli.model, cli.model.model, cli.model.objective
    assert type(model) is kind and sum(p.numel() for p in model.parameters() if p.requires_grad) == size
    assert (module.max_images, cli.datamodule.batch_size * module.accumulate_grad_batches) == (images, batch)
    assert (module.discriminate_from, objective.adversarial_from) == starts and objective.adaptive_adversarial
    assert {name: weight for name, weight in objective.weights.items() if weight} == weights
    assert module.latent_noise == (0.8 if name == "rae" else 0) and module.equivariance.probability == 0
    assert (module.discriminator is None) == (module.patchgan is not None) == (name != "rae")
    assert module.patchgan is None or (module.patchgan.loss, len(module.patchgan.scales)) == ("hinge", 1)
    betas = (0.9, 0.95) if name == "rae" else (0.5, 0.9)
    made = module.configure_optimizers()
    optimizers, schedules = made if name == "rae" else (made, [])
    for optimizer in optimizers:
        assert (optimizer.defaults["lr"], tuple(optimizer.defaults["betas"])) == (rate, betas)
    for schedule in schedules:
        (factor,), epoch = schedule["scheduler"].lr_lambdas, 1_281_167 // 512
        assert [factor(epoch * n) for n in (0, 1, 8.5, 16, 17)] == pytest.approx([1 / epoch, 1, 0.55, 0.1, 0.1])
    assert len(schedules) == (2 if name == "rae" else 0)
    grid = {"sdvae": (4, 8), "vavae": (32, 16), "rae": (768, 16)}[name]
    assert (model.latent_channels, model.compression) == grid and (model.vfm is None) == (name == "sdvae")
    if name == "vavae":  # in its 224 px there are as many tokens as positions of the latent
        assert objective.margins == {"distmat_margin": 0.25, "cos_margin": 0.5} and model.vfm.grid(256, 256) == (16, 16)
    model.check_image_size(256)


@pytest.mark.parametrize("trainer", ["trainer/cpu.yaml"])
@pytest.mark.parametrize("stage", ["strong", "weak"])
def test_demo_stages_build(stage, trainer):
    cli = build("demo/tokenizer.yaml", f"demo/{stage}.yaml", "data/photos.yaml", trainer)
    assert cli.model.objective.weights["alignment"] == {"strong": 5.0, "weak": 1.0}[stage]
    assert any(type(callback).__name__ == "Report" for callback in cli.trainer.callbacks)


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
