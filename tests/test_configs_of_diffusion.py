"""The configs of diffusion models build the published runs, at full size and in the demo."""

import json
from pathlib import Path

import pytest
import torch
from building import build_ldm, callback, count

from ldm.alignment import REG
from ldm.models.lightningdit import SIZES
from vfm_vae.embedded.captions import write_prompts

RUNS = {"epochs64": (80_000, "lognormal"), "epochs80": (100_000, "lognormal")}
RUNS |= {"epochs560": (600_000, "lognormal"), "epochs560_uniform": (700_000, "uniform")}


FIRST, *OTHERS = RUNS


@pytest.mark.parametrize(
    ("run", "data"),
    [
        *((run, "latents") for run in RUNS),
        (FIRST, "imagenet_centre"),
        *(pytest.param(run, "imagenet_centre", marks=pytest.mark.slow) for run in OTHERS),
    ],
)
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


@pytest.mark.parametrize(("size", "parameters"), [("", 838_675_796), ("ditdh_s", 196_455_764)])
def test_the_run_with_a_wide_head_is_the_published_one(size, parameters):
    overlay = [f"ldm/size/{size}.yaml"] if size else []
    plain = ["--model.optimizer.init_args.fused=false"]
    with torch.device("meta"):
        cli = build_ldm("ldm/ditdh.yaml", "ldm/rae_ditdh_xl.yaml", *overlay, "trainer/cpu.yaml", options=plain)
    module, model = cli.model, cli.model.model
    assert count(model) + model.position.numel() + model.time_embed.frequencies.numel() == parameters
    images, epoch = 1_281_167, 1251
    assert epoch == images // 1024 and cli.trainer.max_steps == 80 * epoch
    assert (module.times, module.weights["cosine"]) == ("lognormal", 0.0)
    noise_shift = 1 / module.pipeline.sampler.fitted_to(model.latent_shape).shift
    assert noise_shift == pytest.approx((768 * 16 * 16 / 4096) ** 0.5) == pytest.approx(6.93, abs=0.01)
    assert (module.pipeline.sampler.steps, module.pipeline.sampler.end) == (50, 0.999)
    (optimizer,), (settings,) = module.configure_optimizers()
    (group,), schedule = optimizer.param_groups, settings["scheduler"].lr_lambdas[0]
    assert (group["initial_lr"], tuple(group["betas"]), group["weight_decay"]) == (2e-4, (0.9, 0.95), 0)
    assert [schedule(n * epoch) for n in (0, 40, 420, 800, 1400)] == pytest.approx([1, 1, 0.55, 0.1, 0.1])
    assert cli.datamodule.batch_size * cli.trainer.accumulate_grad_batches == 1024
    assert cli.trainer.gradient_clip_val == 1.0
    assert callback(cli, "EMA").decay == 0.9995


def test_what_is_recommended_is_reg_with_an_internal_head():
    with torch.device("meta"):
        reg, best = (build_ldm("ldm/reg.yaml", f"ldm/{run}.yaml", "trainer/cpu.yaml") for run in ("reg640", "best"))
    assert best.model.model.base_depth == 8 and best.trainer.max_steps == reg.trainer.max_steps
    assert best.model.weights == reg.model.weights | {"base": 1.0}
    assert 0 < count(best.model.model) - count(reg.model.model) < 0.01 * count(reg.model.model)


@pytest.mark.parametrize(("size", "parameters"), [("b", 12), ("l", 24), ("1p0b", 24), ("1p6b", 28)])
def test_sizes_of_diffusion_models(size, parameters):
    with torch.device("meta"):
        configs = ("ldm/lightningdit.yaml", "ldm/epochs64.yaml", f"ldm/size/{size}.yaml", "data/latents.yaml")
        model = build_ldm(*configs, "trainer/cpu.yaml").model.model
    assert len(model.blocks) == parameters == SIZES[size.replace("b", "B") if "1p" in size else size.upper()].depth


T2I_RUNS = {"t2i_lumina": (1_754_933_536, 1e-4, 0.0, 2.0), "t2i_lightningdit": (826_304_416, 2e-4, 1.0, 1.0)}


@pytest.mark.parametrize("run", T2I_RUNS)
def test_full_size_text_to_image_builds(run: str, tmp_path: Path):
    sizes = {"hidden_size": 2048, "num_hidden_layers": 36, "num_attention_heads": 16, "vocab_size": 151936}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2_5_vl", "text_config": sizes}))
    options = [f"--model.conditioning.encoder.name={tmp_path}", "--model.optimizer.init_args.fused=false"]
    with torch.device("meta"):
        cli = build_ldm(f"ldm/{run}.yaml", "trainer/cpu.yaml", options=options)
    module, (parameters, rate, cosine, clip) = cli.model, T2I_RUNS[run]
    assert count(module.model) == parameters
    assert module.model.text_channels == module.conditioning.text_channels == 2048
    assert not module.conditioning.text_encoder.is_loaded
    made = module.configure_optimizers()
    (group,) = (made if isinstance(made, torch.optim.Optimizer) else made[0][0]).param_groups
    assert (group.get("initial_lr", group["lr"]), group["weight_decay"]) == (rate, 0)
    assert (module.weights["cosine"], cli.trainer.gradient_clip_val, module.label_drop) == (cosine, clip, 0.1)
    assert cli.datamodule.batch_size * cli.trainer.accumulate_grad_batches == 1024
    assert (module.times, module.pipeline.guidance.scale, cli.trainer.max_steps) == ("lognormal", 4.0, 100_000)
    assert len(callback(cli, "SampleImages").prompts) == 4


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


@pytest.mark.parametrize(("overlay", "command"), [("text_train", "fit"), ("text_guided", "predict")])
def test_demo_text_builds(overlay, command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_prompts(tmp_path / "runs/demo/prompts.jsonl")
    cli = build_ldm("demo/text.yaml", f"demo/{overlay}.yaml", "trainer/cpu.yaml", command=command)
    assert cli.model.model.text_channels == cli.model.conditioning.text_encoder.width == 64
    if command == "fit":
        schedule = cli.model.schedules["lr_scheduler"].make(torch.optim.SGD([torch.zeros(1)], lr=1.0))
        assert schedule.lr_lambdas[0](cli.trainer.max_steps) == 0 < schedule.lr_lambdas[0](cli.trainer.max_steps - 1)
    else:
        assert len(cli.datamodule.samples) == 4 * 13 * 8 and cli.model.pipeline.guidance.scale > 1
        assert callback(cli, "SampleWriter").directory.name == "samples_text"
