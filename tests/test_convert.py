"""Published files by the command line: what comes out reconstructs, is cached, is measured and goes on training."""

import argparse
import json
import pickle
import sys
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch.callbacks import LambdaCallback

from callbacks.ema import EMA
from callbacks.writers import LatentWriter
from vfm_vae import convert
from vfm_vae.discriminators.patchgan import PatchGAN
from vfm_vae.discriminators.projected import ProjectedDiscriminator
from vfm_vae.published import build_published, timm_name, tokenizer_from_published, tokenizer_to_published
from vfm_vae.published_files import pick, to_published
from vfm_vae.published_names import discriminator_names, patchgan_names
from vfm_vae.tokenizer import VFMVAE, FrozenTokenizer
from vfm_vae.vfm import FrozenVFM

VFM = "vit_photos_patch8_64"
LAYERS = (0, 1, 2)  # of the discriminator's backbone
CONFIG = {
    "total_kimg": 3,
    "G_kwargs": {
        "vfm_name": f"some/where/{VFM}",
        "scale_factor": 1.0,
        "patch_from_layers": [0, -1],
        "patch_in_dimensions": [128, 128],
        "patch_out_dimensions": [8, 8],
        "compression_mode": "continuous",
        "how_to_compress": "attnproj",
        "how_to_decompress": "attnproj",
        "decompress_factor": 4,
        "attnproj_quant_layers": 1,
        "attnproj_post_quant_layers": 1,
        "resolution_compression_factor": 8,
        "z_dimension": 4,
        "z_pooled_resolution": 1,
        "z_dim_for_mapping_mlp_output": 16,
        "concat_z_block_indices": [0, 1, 2],
        "concat_z_mapped_dims": [16, 16, 16],
        "activation_for_concat_z": "lrelu",
        "attn_block_indices": [0],
        "attn_depths": [1],
        "use_gaussian_blur": True,
        "add_additional_convnext": False,
        "num_blocks": 5,
        "synthesis_kwargs": {"channel_base": 2048, "channel_max": 16, "num_res_blocks": 1},
        "legacy": True,
    },
}


def random_model(seed: int) -> VFMVAE:
    """No parameter as a fresh model has it, since zeros and ones would hide what is mixed up."""
    torch.manual_seed(seed)
    model = build_published(CONFIG["G_kwargs"])
    for tensor in model.state_dict().values():
        tensor += 0.1 * torch.randn_like(tensor)
    return model.eval()


@pytest.fixture
def models() -> dict[str, VFMVAE]:
    return {"G": random_model(0), "G_ema": random_model(1)}


@pytest.fixture
def opponents() -> dict[str, torch.nn.Module]:
    torch.manual_seed(2)
    return {"discriminator": ProjectedDiscriminator(VFM, size=64, layers=LAYERS), "patchgan": PatchGAN(base_channels=4)}


@pytest.fixture
def published(models, opponents, tmp_path) -> Path:
    """A file as a public training would leave it, with everything in it, and the public YAML beside it."""
    frozen = {"vfm_encoder.embed.weight": torch.randn(3)}
    content = {
        name: {f"module.{n}": tensor for n, tensor in (tokenizer_to_published(model) | frozen).items()}
        for name, model in models.items()
    }
    heads = to_published(opponents["discriminator"].state_dict(), discriminator_names(len(LAYERS)), {})
    patches = to_published(opponents["patchgan"].state_dict(), patchgan_names(3, features=True), {})
    content["D"] = heads | patches | {"dino.norm.weight": torch.randn(3)}
    content["args"] = argparse.Namespace(batch_size=512)
    torch.save(content, tmp_path / "published.pth")
    (tmp_path / "published.yaml").write_text(yaml.safe_dump(CONFIG))
    return tmp_path / "published.pth"


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["convert", *map(str, arguments)])
    convert.main()


@pytest.fixture
def converted(published, monkeypatch) -> Path:
    out = published.parent / "out"
    run(monkeypatch, published, "--config", published.with_suffix(".yaml"), "--out", out)
    return out


def test_averages_become_a_model_without_the_vfm_at_hand(models, converted):
    loaded = VFMVAE.from_pretrained(converted, vfm=False)
    expected = models["G_ema"].state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())
    assert loaded.absent_vfm["name"] == VFM
    assert loaded.latent_identity()["fingerprint"] is None
    with torch.no_grad():
        z = torch.randn(1, 4, 8, 8)
        assert torch.equal(loaded.decode(z).image, models["G_ema"].decode(z).image)


def test_with_its_vfm_it_encodes_and_its_latents_have_an_identity(converted):
    tokenizer = FrozenTokenizer(str(converted))
    assert tokenizer.encode(torch.zeros(1, 3, 64, 64)).mean.shape == (1, 4, 8, 8)
    assert (
        tokenizer.identity["fingerprint"] == FrozenTokenizer(str(converted / "training.ckpt")).identity["fingerprint"]
    )


def module_of(converted: Path, tiny_module, opponents, **kwargs):
    """What the command line builds of a stage's config and `model.yaml`, which says what the model is."""
    described = yaml.safe_load((converted / "model.yaml").read_text())["model"]["model"]
    assert described["class_path"] == "vfm_vae.tokenizer.VFMVAE"
    module = tiny_module(**kwargs)
    module.model = VFMVAE.from_pretrained(converted)
    return module


def test_training_goes_on_from_it(converted, models, opponents, tiny_module, trainer, data):
    module = module_of(converted, tiny_module, opponents, init_from=str(converted / "training.ckpt"))
    module.discriminator, module.patchgan = (
        ProjectedDiscriminator(VFM, size=64, layers=LAYERS),
        PatchGAN(base_channels=4),
    )
    average = EMA(half_life_images=100)
    begun = {}

    def look(*_) -> None:
        begun.update({name: tensor.clone() for name, tensor in module.state_dict().items()})
        begun["average"] = {name: tensor.clone() for name, tensor in average.weights.items()}

    callbacks = [average, LambdaCallback(on_train_start=look)]
    trainer(max_steps=1, limit_val_batches=0, callbacks=callbacks).fit(module, data())
    assert module.images_seen == 3000 + 8
    for name, tensor in models["G"].state_dict().items():
        assert torch.equal(begun[f"model.{name}"], tensor), name
    for name, tensor in models["G_ema"].named_parameters():
        assert torch.equal(begun["average"][f"model.{name}"], tensor), name
    for part, opponent in opponents.items():
        for name, tensor in opponent.state_dict().items():
            assert torch.equal(begun[f"{part}.{name}"], tensor), name


def test_it_is_measured_and_cached(converted, models, opponents, tiny_module, trainer, data, tmp_path):
    """Though this module has other discriminators than the file."""
    module = module_of(converted, tiny_module, opponents, predict="latents")
    checkpoint = str(converted / "training.ckpt")
    (metrics,) = trainer(callbacks=[EMA()]).validate(module, data(), ckpt_path=checkpoint, weights_only=True)
    writer = LatentWriter(str(tmp_path / "cache"))
    datamodule = data(predict=["val"])
    trainer(callbacks=[EMA(), writer]).predict(module, datamodule, ckpt_path=checkpoint, weights_only=True)
    identity = json.loads((tmp_path / "cache/val/latents.json").read_text())["tokenizer"]
    assert identity == FrozenTokenizer(str(converted)).identity  # of the averages
    assert metrics["val/psnr"] > 0


def test_going_on_within_a_stage_is_refused(converted, opponents, tiny_module, trainer, data):
    module = module_of(converted, tiny_module, opponents)
    with pytest.raises(ValueError, match=r"weights alone can't be resumed; give it to model.init_from instead"):
        trainer(max_steps=1).fit(module, data(), ckpt_path=str(converted / "training.ckpt"), weights_only=True)


def test_a_file_of_the_averages_alone(published, monkeypatch, models):
    """As published for users: no discriminators, and nothing to tell averages from trained weights."""
    torch.save(tokenizer_to_published(models["G_ema"]), published)
    run(monkeypatch, published, "--config", published.with_suffix(".yaml"), "--out", published.parent / "out")
    stored = torch.load(published.parent / "out/training.ckpt", weights_only=True)
    assert "ema" not in stored
    assert all(name.startswith("model.") for name in stored["state_dict"])


def test_our_own_checkpoint_is_shared_as_a_folder(tiny_module, trainer, data, tmp_path, monkeypatch):
    module = tiny_module()
    fitted = trainer(max_steps=1, limit_val_batches=0, callbacks=[EMA(half_life_images=100)])
    fitted.fit(module, data())
    fitted.save_checkpoint(tmp_path / "last.ckpt")
    run(monkeypatch, tmp_path / "last.ckpt", "--out", tmp_path / "out")
    averages = torch.load(tmp_path / "last.ckpt", weights_only=True)["ema"]["weights"]
    loaded = VFMVAE.from_pretrained(tmp_path / "out")
    for name, tensor in loaded.named_parameters():
        assert torch.equal(tensor, averages[f"model.{name}"]), name


def test_a_refused_file_leaves_what_was_there(converted, published, monkeypatch):
    before = {path.name: path.read_bytes() for path in converted.iterdir()}
    content = torch.load(published, weights_only=False)
    content["D"]["unknown"] = torch.zeros(1)
    torch.save(content, published)
    with pytest.raises(SystemExit):
        run(monkeypatch, published, "--config", published.with_suffix(".yaml"), "--out", converted)
    assert {path.name: path.read_bytes() for path in converted.iterdir()} == before


def test_a_place_is_taken_for_averages_by_the_whole_word():
    weights = {"x.weight": torch.zeros(1)}
    assert pick({"remaining": weights}, "x.") == (weights, None)
    assert pick({"G": weights, "G_ema": weights}, "x.") == (weights, weights)
    assert pick({"state": {"EMA": weights}}, "x.") == (None, weights)


class Foreign:
    """Something that only code can read back."""


MISTAKES = {
    "no file": (["nowhere.pth"], "source: there is no file 'nowhere.pth'"),
    "a denoiser": (["denoiser.ckpt"], "'denoiser.ckpt' is a diffusion model's checkpoint: use python -m ldm.convert"),
    "a folder's file": (
        ["diffusion_pytorch_model.safetensors"],
        "source: 'diffusion_pytorch_model.safetensors' is only the weights of a folder whose config.json says",
    ),
    "no config": (["published.pth"], "config: published weights need the public YAML"),
    "missing config": (["published.pth", "--config=nowhere.yaml"], "config: there is no file 'nowhere.yaml'"),
    "no yaml": (["published.pth", "--config=broken.yaml"], "config: 'broken.yaml' is no YAML"),
    "other config": (["published.pth", "--config=other.yaml"], "is no public VFM-VAE configuration"),
    "half a config": (["published.pth", "--config=half.yaml"], "config: the option 'patch_in_dimensions' is missing"),
    "unknown vfm": (["published.pth", "--config=qwen.yaml"], "vfm: 'Qwen2.5-VL-3B-Instruct' is no VFM that timm"),
    "needs code": (["code.pth", "--config=published.yaml"], "is refused: reading it would run code"),
    "no weights": (["text.pth", "--config=published.yaml"], "source: 'text.pth' can't be read as weights"),
    "other weights": (["else.pth", "--config=published.yaml"], "holds no weights of a VFM-VAE generator"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_ends_with_one_line(published, monkeypatch, capsys, mistake):
    arguments, message = MISTAKES[mistake]
    monkeypatch.chdir(published.parent)
    generator = CONFIG["G_kwargs"]
    Path("broken.yaml").write_text("{")
    Path("other.yaml").write_text("model: LightningDiT\n")
    Path("half.yaml").write_text(yaml.safe_dump({"patch_from_layers": [0, -1], "z_dimension": 4}))
    Path("qwen.yaml").write_text(
        yaml.safe_dump(generator | {"vfm_name": "Qwen2.5-VL-3B-Instruct", "scale_factor": 2.0})
    )
    torch.save({"model": Foreign()}, "code.pth")
    Path("text.pth").write_text("not weights")
    torch.save({"weight": torch.zeros(1)}, "else.pth")
    torch.save({"weight": torch.zeros(1)}, "diffusion_pytorch_model.safetensors")
    torch.save({"state_dict": {}, "tokenizer": None}, "denoiser.ckpt")
    with pytest.raises(SystemExit) as stopped:
        run(monkeypatch, *arguments, "--out=out")
    assert stopped.value.code == 2
    first, second = capsys.readouterr().err.strip().split("\n")
    assert message in first
    assert second == "(VFM_VAE_DEBUG=1 shows the traceback)"
    assert not Path("out").exists()


def test_nothing_is_run_to_read_a_file(published, monkeypatch, tmp_path):
    class Harmful:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    with (tmp_path / "harmful.pth").open("wb") as file:
        pickle.dump({"model": Harmful()}, file)
    with pytest.raises(SystemExit):
        run(monkeypatch, tmp_path / "harmful.pth", "--config", published.with_suffix(".yaml"), "--out=out")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("your_path/huggingface/siglip2-large-patch16-512", "vit_large_patch16_siglip_512.v2_webli"),
        ("google/siglip2-so400m-patch16-384/", "vit_so400m_patch16_siglip_384.v2_webli"),
        ("facebook/dinov2-large", "vit_large_patch14_dinov2.lvd142m"),
        ("facebook/dinov2-with-registers-base", "vit_base_patch14_reg4_dinov2.lvd142m"),
        ("eva_giant_patch14_336.clip_ft_in1k", "eva_giant_patch14_336.clip_ft_in1k"),
        ("facebook/vit-mae-large", "vit_large_patch16_224.mae"),
        ("openai/clip-vit-large-patch14-336", "vit_large_patch14_clip_quickgelu_336.openai"),
        ("Qwen2.5-VL-3B-Instruct", None),
    ],
)
def test_vfms_have_timm_names(name, expected):
    assert timm_name(name) == expected


@pytest.mark.parametrize(
    "changes",
    [
        {"vfm_name": "facebook/dinov2-large", "scale_factor": 1.75},  # 448 px in patches of 14
        {"vfm_name": "eva_giant_patch14_336.clip_ft_in1k", "scale_factor": 1.75, "patch_in_dimensions": [1408] * 3},
        {"vfm_name": "facebook/vit-mae-large", "scale_factor": 1.0},
        {"patch_from_layers": [0, 8, 16, -1], "patch_in_dimensions": [1024] * 4, "patch_out_dimensions": [32] * 4},
        {"attnproj_quant_layers": 2, "attnproj_post_quant_layers": 3},
        {"how_to_compress": "conv", "how_to_decompress": "conv", "use_gaussian_blur": False},
        {"z_dimension": 16, "decompress_factor": 32, "z_pooled_resolution": 2, "legacy": False},
        {"concat_z_block_indices": [0, 1, 2, 3, 4], "concat_z_mapped_dims": [512, 256, 128, 128, 64]},
        {"attn_block_indices": [1]},
    ],
)
def test_any_configuration_goes_there_and_back(changes):
    keys = json.loads((Path(__file__).parent / "parity/data/tokenizer_keys.json").read_text())
    config = keys["config"] | changes
    config["attn_depths"] = [2] * len(config["attn_block_indices"])
    with torch.device("meta"):
        model = build_published(config)
        published = tokenizer_to_published(model)
        again = tokenizer_to_published(tokenizer_from_published(published, config))
    assert {name: tensor.shape for name, tensor in again.items()} == {n: t.shape for n, t in published.items()}
    assert model.adapter.unshuffle == round(
        config["scale_factor"] * 16 / (14 if config["scale_factor"] == 1.75 else 16)
    )


# What the routes of blocks 0, 1 and 2 begin with there: half of the latent's sides, all of them, twice as many.
STAGES = [("1.0", "2.0"), ("0.0", "1.0"), ("0.0", "2.0")]


@pytest.mark.parametrize("downsampling", ["unshuffle", "pooling"])
def test_five_blocks_at_compression_16_go_there_and_back(downsampling):
    sizes = {"scale_factor": 0.5, "resolution_compression_factor": 16, "how_to_process_concat_z": downsampling}
    config = CONFIG["G_kwargs"] | sizes
    vfm = FrozenVFM(VFM, layers=[0, -1], input_scale=0.5)
    model = build_published(config, vfm)
    for tensor in model.state_dict().values():
        tensor += 0.1 * torch.randn_like(tensor)
    published = tokenizer_to_published(model)
    again = tokenizer_from_published(published, config, vfm)
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())
    for block, stages in enumerate(STAGES):
        assert {f"synthesis.z_convs.{block}.{stage}.weight" for stage in stages} <= published.keys()
    channels = 16 if downsampling == "pooling" else 4 * 16
    assert published["synthesis.z_convs.0.1.0.weight"].shape == (channels, 1, 3, 3)
    images = torch.rand(1, 3, 64, 96) * 2 - 1
    z = model.eval().encode(images).mode()
    assert (model.compression, model.decoder.side_multiple, z.shape[2:]) == (16, 2, (4, 6))
    assert torch.equal(again.decode(z).image, model.decode(z).image)
    assert model.decode(z).image.shape == images.shape


def test_what_is_no_way_to_bring_the_latent_to_blocks():
    with pytest.raises(ValueError, match="concat_z='crop' is not supported, only 'unshuffle' or 'pooling' is"):
        build_published(CONFIG["G_kwargs"] | {"how_to_process_concat_z": "crop"})


def test_real_values_go_there_and_back():
    model = random_model(3)
    again = tokenizer_from_published(tokenizer_to_published(model), CONFIG["G_kwargs"])
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_a_blur_that_is_another_is_named():
    weights = tokenizer_to_published(random_model(3))
    name = "synthesis.blocks.1.last_upsample_conv.blur_weight"
    with pytest.raises(ValueError, match=r"other constants than the published ones: \['synthesis\.blocks\.1\.last"):
        tokenizer_from_published(weights | {name: weights[name] + 0.1}, CONFIG["G_kwargs"])
