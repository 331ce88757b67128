"""Every config is built by some test, says little twice, and completes what follows from the rest."""

import json
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from building import CONFIGS, Build, build, callback
from jsonargparse import Namespace
from test_configs_of_diffusion import REG_RUNS, RUNS, T2I_RUNS
from test_configs_of_tokenizers import BASELINES, STAGES, VFMS

from vfm_vae.data.datamodule import ImageNetDataModule
from vfm_vae.module import TokenizerModule
from vfm_vae.run import Run
from vfm_vae.transformers_vfm import TransformersVFM

# Of transformers: published sizes, widths of layers, side of the resized image.
TOWERS = {
    "vfm_vae/vfm/dinov3_large.yaml": (
        {"model_type": "dinov3_vit", "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16},
        [1024, 1024, 1024],
        512,
    ),
    "vfm_vae/vfm/qwen2_5_vl.yaml": (
        {"model_type": "qwen2_5_vl_vision", "hidden_size": 1280, "out_hidden_size": 2048, "depth": 32},
        [5120, 5120, 2048],
        448,
    ),
}


OWN_IMAGES = [f"own_images/{name}.yaml" for name in ("tokenizer", "ldm", "ldm_256px")]
STUDY = ["photos", "tokenizer", "conv", "aligned", "vfm_vae", "vfm_vae_strong", "rae", "latents", "latents_reg", "test"]
STUDY += ["denoiser", "rae_latents", "repa", "reg"]
ABLATION = ["partner", "shift", "wide_head", "internal_head", "data_prediction", "early_times", "muon"]
ABLATION += ["classifier_free", "autoguidance", "internal_guidance"]
STUDY += ["ablation", *(f"ablation/{name}" for name in ABLATION)]
STUDY += [
    f"imagenet/{name}"
    for name in ("plan", "tokenizer", "unaligned", "moments", "test", "denoiser", "rae_latents", "repa", "reg")
]


def test_every_config_is_covered_here():
    seen = {"data/imagenet.yaml", "data/photos.yaml", "demo/tokenizer.yaml", "demo/strong.yaml", "demo/weak.yaml"}
    seen |= {"vfm_vae/base.yaml", *(f"vfm_vae/{stage}.yaml" for stage in STAGES), *VFMS, *TOWERS}
    seen |= {
        "vfm_vae/as_published.yaml",
        "vfm_vae/discrete.yaml",
        "vfm_vae/512px.yaml",
        "data/512px.yaml",
        "data/imagenet_wds.yaml",
    }
    seen |= {"data/folder.yaml", *OWN_IMAGES}  # built by tests/test_tutorials.py
    seen |= {"trainer/multinode.yaml", "trainer/fsdp8_ldm.yaml"}
    seen |= {"trainer/cpu.yaml", "trainer/gpu.yaml", "trainer/ddp8.yaml", "trainer/ddp8_ldm.yaml"}
    seen |= {"ldm/lightningdit.yaml", "ldm/samples.yaml", *(f"ldm/{run}.yaml" for run in RUNS)}
    seen |= {f"ldm/size/{size}.yaml" for size in ("b", "l", "1p0b", "1p6b", "ditdh_s")}
    seen |= {"data/latents.yaml", "data/imagenet_centre.yaml", "demo/latents.yaml", "vfm_vae/latents.yaml"}
    seen |= {"data/captions.yaml", "data/captions_wds.yaml"}  # built by tests/data/test_captions.py
    seen |= {"demo/ldm.yaml", "demo/ldm_train.yaml", "demo/ldm_guided.yaml", "demo/weak_test.yaml"}
    seen |= {"vfm_vae/test.yaml", "vfm_vae/test_published.yaml", "ldm/test.yaml", "ldm/cknna.yaml"}
    seen |= {"ldm/ditdh.yaml", "ldm/rae_ditdh_xl.yaml", *(f"ldm/{run}.yaml" for run in T2I_RUNS)}
    seen |= {"ldm/t2i_test.yaml", "ldm/test_published.yaml", "ldm/best.yaml", "ldm/sweep.yaml", "demo/ldm_sweep.yaml"}
    seen |= {"ldm/reg.yaml", *(f"ldm/{run}.yaml" for run in REG_RUNS), "vfm_vae/latents_reg.yaml"}
    seen |= {"vfm_vae/latents_text.yaml"}
    seen |= {"demo/latents_reg.yaml", "demo/reg.yaml", "demo/reg_guided.yaml"}
    seen |= {"demo/latents_text.yaml", "demo/text.yaml", "demo/text_train.yaml", "demo/text_guided.yaml"}
    seen |= {f"study/{name}.yaml" for name in STUDY}  # built by tests/ldm/test_study.py
    seen |= {f"vfm_vae/baselines/{name}.yaml" for name in BASELINES}
    assert {str(path.relative_to(CONFIGS)) for path in CONFIGS.rglob("*.yaml")} == seen


@pytest.mark.parametrize(
    ("names", "ranks", "strategy"),
    [
        (["gpu"], 1, "SingleDeviceStrategy"),
        pytest.param(["ddp8"], 8, "DDPStrategy", marks=pytest.mark.slow),
        pytest.param(["ddp8_ldm"], 8, "DDPStrategy", marks=pytest.mark.slow),
        (["fsdp8_ldm"], 8, "ModelParallelStrategy"),
        (["ddp8", "multinode"], 32, "DDPStrategy"),
        pytest.param(["ddp8_ldm", "multinode"], 32, "DDPStrategy", marks=pytest.mark.slow),
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


def test_configs_say_little_twice():
    texts = [path.read_text() for path in CONFIGS.rglob("*.yaml")]
    assert sum(text.count("class_path") for text in texts) <= 183  # half as many as when each class was named in full
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


@pytest.mark.parametrize("vfm", TOWERS)
def test_vfms_of_transformers_are_prepared_for(vfm):
    sizes, widths, side = TOWERS[vfm]
    options = [f"--model.model.init_args.vfm.init_args.model_args={json.dumps(sizes)}"]
    module = completed("vfm_vae/base.yaml", "vfm_vae/strong.yaml", "data/imagenet.yaml", vfm, options=options).model
    model = module.model.init_args
    adapter = model.adapter.init_args
    assert (adapter.feature_channels, adapter.alignment_channels) == (widths, widths[-1])
    assert module.discriminator.init_args.interpolation == "bicubic"
    with torch.device("meta"):
        encoder = TransformersVFM(**model.vfm.init_args.as_dict() | {"pretrained": False})
        assert encoder.prepare(torch.zeros(1, 3, 256, 256)).shape[2:] == (side, side)
    assert encoder.grid(256, 256) == (16 * adapter.unshuffle,) * 2 and list(encoder.widths) == widths


def test_a_run_tells_its_callbacks_and_its_logger_what_it_is_called():
    writer = ["--trainer.callbacks+=LatentWriter", "--run.output=elsewhere", "--run.folder=some", "--run.name=mine"]
    cli = build("demo/tokenizer.yaml", "demo/strong.yaml", "trainer/cpu.yaml", options=writer)
    assert callback(cli, "Report").name == "mine" and callback(cli, "Report").path == Path("runs/demo/metrics.json")
    assert callback(cli, "LatentWriter").directory == Path("elsewhere")
    assert Path(cli.trainer.log_dir) == Path("some/mine")
    assert cli.given.fit.trainer.callbacks[-1].init_args.directory is None  # in config.yaml, for the next command


def test_an_explicit_entry_and_folder_win_over_the_callbacks_own_and_the_name_does_not():
    def told(run, former=None):
        report = {"class_path": "callbacks.report.Report", "init_args": {"path": None, "name": former}}
        writer = {"class_path": "callbacks.writers.LatentWriter", "init_args": {"directory": former}}
        run.tell(report)
        run.tell(writer)
        return report["init_args"]["name"], writer["init_args"]["directory"]

    assert told(Run(name="mine"), "former") == ("former", "former") and told(Run(name="mine")) == ("mine", None)
    with pytest.warns(UserWarning, match="run.output: elsewhere takes the place of LatentWriter's directory, former"):
        assert told(Run(name="mine", entry="test", output="elsewhere"), "former") == ("test", "elsewhere")
