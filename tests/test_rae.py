"""RAE: against diffusers' own, its statistics, and what tells its latents from others'."""

import json
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from command_line import run
from diffusers import AutoencoderRAE
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import load_file, save_file
from training import repeat, weights

from ldm.models.lightningdit import LightningDiT
from ldm.pipeline import LatentDiffusion
from vfm_vae.data.latents import LatentDataset
from vfm_vae.discriminators.projected import ProjectedDiscriminator
from vfm_vae.images import from_uint8
from vfm_vae.losses.objective import Objective
from vfm_vae.module import TokenizerModule
from vfm_vae.pretrained_tokenizer import PretrainedTokenizer
from vfm_vae.rae import RAE
from vfm_vae.tokenizer import FrozenTokenizer
from vfm_vae.vfm import FrozenVFM

ROOT = Path(__file__).parents[1]
VFM = "vit_photos_patch8_64"
SMALL = {"image_size": 64, "decoder_width": 32, "decoder_depth": 1, "decoder_heads": 2, "decoder_mlp_width": 64}
FILE = "diffusion_pytorch_model.safetensors"
IMAGES = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1


def build(layers=(-2,), seed=0, vfm=None, **options) -> RAE:
    """Of latents `[B, 128, 8, 8]`."""
    torch.manual_seed(seed)
    return RAE(FrozenVFM(VFM, layers=layers, **(vfm or {})), **SMALL | options)


def module(model: RAE, objective: dict | None = None, **options) -> TokenizerModule:
    losses = {"kl": 0, "alignment": 0, "multi_resolution": 0, "adversarial": 0.1} | (objective or {})
    optimizers = [partial(torch.optim.Adam, lr=3e-3)] * 2
    return TokenizerModule(
        model, ProjectedDiscriminator(VFM, size=64, layers=(2,)), Objective(**losses), *optimizers, **options
    )


def randomised(model: RAE) -> RAE:
    model.take_statistics(torch.randn(model.latent_shape), torch.rand(model.latent_shape) + 0.5)
    return model.eval()


@pytest.fixture
def published(monkeypatch, tmp_path):
    """Writes a folder as diffusers does, of a small random RAE for 32 px images that are resized to 28 px.

    Options are those of `AutoencoderRAE`.
    """
    # Diffusers looks for a part that newer versions of transformers have dissolved in the model.
    monkeypatch.setattr(transformers.SiglipVisionModel, "vision_model", property(lambda model: model), raising=False)

    def write(kind: str = "dinov2", **options) -> tuple[AutoencoderRAE, Path]:
        torch.manual_seed(0)
        statistics = {"latents_mean": torch.randn(64, 4, 4), "latents_std": torch.rand(64, 4, 4) + 0.5}
        encoder = {"hidden_size": 64, "patch_size": 7, "num_hidden_layers": 2, "input_size": 28}
        decoder = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
        sizes = {f"encoder_{n}": v for n, v in encoder.items()} | {f"decoder_{n}": v for n, v in decoder.items()}
        others = {"patch_size": 8, "encoder_norm_std": [0.2, 0.3, 0.4]}
        model = AutoencoderRAE(kind, **sizes | others | statistics | options)
        model.save_pretrained(tmp_path / kind)
        return model.eval(), tmp_path / kind

    return write


def reconstructed(model: AutoencoderRAE, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents and reconstructions by diffusers, in [-1, 1]."""
    with torch.no_grad():
        z = model.encode((images + 1) / 2).latent
        return z, 2 * model.decode(z).sample - 1


@pytest.mark.parametrize("kind", ["dinov2", "siglip2", "mae"])
def test_it_equals_diffusers_bit_for_bit(published, kind):
    theirs, folder = published(kind)
    images = IMAGES[..., :32, :32]
    z, expected = reconstructed(theirs, images)
    ours = FrozenTokenizer(str(folder)).network
    assert torch.equal(ours.encode(images).mode(), z) and torch.equal(ours.decode(z).image, expected)
    assert z.std() > 0.1 and not ours.training
    decoder = RAE.from_diffusers(folder, vfm=False)
    assert torch.equal(decoder.decode(z).image, expected) and decoder.latent_identity() == ours.latent_identity()
    decoder.save_pretrained(folder / "ours")
    again = FrozenTokenizer(str(folder / "ours"), vfm_weights=str(folder / FILE))
    assert torch.equal(again.encode(images).mode(), z) and again.identity == ours.latent_identity()
    with pytest.raises(ValueError, match=f"vfm_weights: the encoder 'rae_{kind}_64x2' .* that folder's {FILE}"):
        FrozenTokenizer(str(folder / "ours"))


# How tensors were called when folders were published, by how they are called now.
FORMER = {
    "dinov2": {r"attention\.([qkv])_proj": r"attention.attention.\1", "attention.o_proj": "attention.output.dense"},
    "siglip2": {r"^encoder\.": "encoder.vision_model."},
    "mae": {
        r"^encoder\.layers": "encoder.encoder.layer",
        r"attention\.([qkv])_proj": r"attention.attention.\1",
        r"attention\.o_proj": "attention.output.dense",
        r"mlp\.fc1": "intermediate.dense",
        r"mlp\.fc2": "output.dense",
    },
}
WORDS = {
    r"attention\.q\.": "attention.query.",
    r"attention\.k\.": "attention.key.",
    r"attention\.v\.": "attention.value.",
}


@pytest.mark.parametrize("kind", FORMER)
def test_folders_from_before_transformers_renamed_its_tensors(published, kind):
    _, folder = published(kind)
    ours = RAE.from_diffusers(folder)
    tensors = load_file(folder / FILE)
    for new, old in (FORMER[kind] | WORDS).items():
        tensors = {re.sub(new, old, name): value for name, value in tensors.items()}
    assert tensors.keys() != load_file(folder / FILE).keys()
    save_file(tensors, folder / FILE)
    again = RAE.from_diffusers(folder)
    images = IMAGES[..., :32, :32]
    assert torch.equal(again.encode(images).mode(), ours.encode(images).mode())
    assert again.latent_identity() == ours.latent_identity()


def test_a_scaling_factor_becomes_part_of_the_statistics(published):
    theirs, folder = published(scaling_factor=0.5)
    images = IMAGES[..., :32, :32]
    z, expected = reconstructed(theirs, images)
    ours = RAE.from_diffusers(folder)
    assert torch.allclose(ours.encode(images).mode(), z, atol=1e-5)
    assert torch.allclose(ours.decode(z).image, expected, atol=1e-5)


def test_folders_of_something_else_are_refused(published, tmp_path):
    _, folder = published()
    config = json.loads((folder / "config.json").read_text())
    for change, message in (
        ({"_class_name": "AutoencoderKL"}, "holds no AutoencoderRAE of diffusers"),
        ({"encoder_type": "clip"}, "of dinov2, siglip2, mae"),
        ({"reshape_to_2d": False}, "has reshape_to_2d=false"),
        ({"decoder_num_hidden_layers": 2}, "do not fit: of .* missing"),
    ):
        (folder / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(ValueError, match=message):
            RAE.from_diffusers(folder)
    with pytest.raises(ValueError, match=r"name: .* holds no AutoencoderRAE"):
        RAE.from_diffusers(tmp_path)


def test_the_latent_is_a_sum_of_normalised_layers_and_then_normalised_itself():
    model = randomised(build(layers=[2, 5, -2]))
    layers = FrozenVFM(VFM, layers=[2, 5, 6])(IMAGES).layers
    tokens = sum(F.layer_norm(layer, (128,), eps=1e-6) for layer in layers)
    raw = tokens.mT.reshape(2, 128, 8, 8)
    posterior = model.encode(IMAGES)
    assert torch.allclose(posterior.mode(), (raw - model.mean) / (model.std + 1e-5), atol=1e-5)
    assert torch.equal(posterior.sample(torch.randn_like(raw)), posterior.mode())
    mean, std = posterior.moments().chunk(2, dim=1)
    assert torch.equal(mean, posterior.mode()) and not std.any()


def test_other_sizes_are_encoded_by_statistics_of_their_surroundings():
    model = randomised(build())
    smaller, larger = IMAGES[..., :32, :32], IMAGES.repeat_interleave(2, 2).repeat_interleave(2, 3)
    for images, resized in (
        (smaller, lambda x: F.avg_pool2d(x, 2)),
        (larger, lambda x: F.interpolate(x[None], None, 2)[0]),
    ):
        expected = (model.raw_latents(images) - resized(model.mean)) / (resized(model.std) + 1e-5)
        assert torch.allclose(model.encode(images).mode(), expected, atol=1e-5)


def test_what_follows_from_the_vfm_need_not_be_given():
    vfm = {"class_path": "vfm_vae.vfm.FrozenVFM", "init_args": {"name": VFM, "layers": [1, 2], "input_scale": 0.5}}
    assert RAE.complete({"vfm": vfm}) == {"vfm": vfm, "latent_channels": 128, "compression": 16}
    assert RAE.complete({"vfm": vfm, "compression": 8})["compression"] == 8
    model = build()
    assert (model.latent_channels, model.compression, model.latent_shape) == (128, 8, (128, 8, 8))


def test_the_identity_is_of_what_encodes_alone():
    def fingerprint(model: RAE) -> str:
        return model.latent_identity()["fingerprint"]

    model = build()
    assert fingerprint(model) == fingerprint(build(seed=1, decoder_depth=2, statistics_images=5))
    assert model.latent_identity() | {"fingerprint": ""} == {
        "tokenizer": "RAE",
        "fingerprint": "",
        "channels": 128,
        "compression": 8,
    }
    others = [randomised(build()), build(layers=[-1]), build(layers=[-2, -3]), build(norm_eps=1e-12)]
    others += [build(vfm={"pretrained": False})]
    assert len({fingerprint(other) for other in [model, *others]}) == 6


def test_a_denoiser_refuses_latents_of_another_rae():
    diffusion = LatentDiffusion(LightningDiT(128, 8, 1, 1, 8, 2))
    diffusion.latent_source = build().latent_identity()
    diffusion.use_tokenizer(build(seed=1))
    with pytest.raises(ValueError, match=r"tokenizer: it is of another tokenizer \(RAE, .*expected \(RAE"):
        diffusion.use_tokenizer(randomised(build()))


def test_a_folder_brings_it_back_without_the_vfms_weights(tmp_path):
    model = randomised(build())
    model.save_pretrained(tmp_path)
    assert not any(name.startswith("vfm") for name in load_file(tmp_path / "model.safetensors"))
    z = model.encode(IMAGES).mode()
    again, decoder = RAE.from_pretrained(tmp_path), RAE.from_pretrained(tmp_path, vfm=False)
    assert torch.equal(again.encode(IMAGES).mode(), z) and again.latent_identity() == model.latent_identity()
    assert torch.equal(decoder.decode(z).image, model.decode(z).image)
    for ask in (decoder.encode, lambda images: decoder.interpolation):
        with pytest.raises(ValueError, match="this RAE has no VFM to encode with"):
            ask(IMAGES)
    with pytest.raises(ValueError, match="trained on other weights of"):
        RAE.from_pretrained(tmp_path, vfm=False).attach_vfm(str(other_weights(tmp_path)))


def other_weights(folder: Path) -> Path:
    save_file(FrozenVFM(VFM, pretrained=False).network.state_dict(), folder / "other.safetensors")
    return folder / "other.safetensors"


def test_images_of_another_size_take_the_average_of_the_statistics():
    """As shrunk images do, whose latents are compared, and never decoded."""
    model = build(image_size=64)
    model.take_statistics(torch.randn(model.latent_shape), torch.rand(model.latent_shape) + 0.5)
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        raw, z = model.raw_latents(images), model.encode(images).mode()
    assert z.shape[2:] == (4, 4)
    mean, std = (values.unflatten(1, (4, 2)).unflatten(3, (4, 2)).mean((2, 4)) for values in (model.mean, model.std))
    assert torch.allclose(z, (raw - mean) / std, atol=1e-4)


def test_mistakes_are_named():
    model = build()
    model.check_image_size(64)
    for call, message in (
        (lambda: model.check_image_size(128), "image_size: 128 does not fit this RAE, .* give 64"),
        (lambda: model.decode(torch.zeros(1, 128, 4, 4)), r"latents: this RAE decodes \[128, 8, 8\] alone"),
        (lambda: RAE(**SMALL), "latent_channels, compression: a RAE without a VFM needs both"),
        (lambda: build(latent_channels=64), r"widths \[128\], but this RAE has latent_channels=64"),
        (lambda: build(compression=16), "a token for every 8 pixels, but this RAE has compression=16"),
        (lambda: build(image_size=60), "image_size: must be a multiple of 8"),
        (lambda: build(decoder_heads=3), "decoder_width: must be a multiple of 12 with decoder_heads=3"),
        (lambda: build(pixel_std=[0.2, 0.0, 0.2]), "pixel_std: must be above 0"),
        (lambda: build(pixel_mean=[0.5]), "pixel_mean, pixel_std: 3 numbers each"),
        (lambda: build(statistics_images=-1), "statistics_images: must be at least 0"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.fixture
def all_images(data):
    """The training images, as evaluation crops them."""
    datamodule = data(val_batch_size=26)
    datamodule.setup("fit")
    return torch.cat([from_uint8(batch.images) for batch in datamodule.spread_dataloader(100)])


def test_statistics_are_measured_before_the_first_step(data, trainer, all_images):
    means = []
    for asked, options in ((1000, {}), (52, {"num_workers": 1, "val_batch_size": 4})):  # there are no more than 52
        model = build(statistics_images=asked)
        trainer(max_steps=1, limit_val_batches=0).fit(module(model), datamodule=data(**options))
        with torch.no_grad():
            z = model.encode(all_images).mode()
        assert z.mean(0).abs().max() < 1e-5
        assert torch.allclose(z.std(0, correction=0), torch.ones(model.latent_shape), atol=1e-3)
        means.append(model.mean)
    assert torch.allclose(*means, atol=1e-6)
    some = build(statistics_images=10)
    trainer(max_steps=1, limit_val_batches=0).fit(module(some), datamodule=data())
    assert (some.mean - means[0]).abs().max() > 0.01


def test_statistics_come_with_images_alone(data, batch, trainer):
    with pytest.raises(ValueError, match=r"model\.statistics_images: 5 images are to be measured, but .* set 0"):
        trainer(max_steps=1).fit(module(build(statistics_images=5)), repeat(batch))
    model = build(statistics_images=0)
    trainer(max_steps=1, limit_val_batches=0).fit(module(model), datamodule=data())
    assert not model.mean.any() and (model.std == 1).all()


def test_later_stages_and_resumed_runs_keep_the_statistics(data, trainer, tmp_path, monkeypatch):
    save = ModelCheckpoint(tmp_path, save_last=True, every_n_train_steps=1, enable_version_counter=False)
    first = build(statistics_images=20)
    options = {"max_steps": 1, "limit_val_batches": 0}
    trainer(**options, enable_checkpointing=True, callbacks=[save]).fit(module(first), datamodule=data())
    path = str(tmp_path / "last.ckpt")
    monkeypatch.setattr(RAE, "take_statistics", lambda *_: pytest.fail("measured again"))
    resumed, later = build(seed=1, statistics_images=52), build(seed=2, statistics_images=52)
    trainer(max_steps=2, limit_val_batches=0).fit(module(resumed), datamodule=data(), ckpt_path=path)
    stored = torch.load(path, weights_only=True)
    converted = str(tmp_path / "converted.ckpt")  # as published weights are, which count no images
    torch.save(stored | {"images_seen": 0}, converted)
    trainer(max_steps=1, limit_val_batches=0).fit(module(later, init_from=converted), datamodule=data())
    assert first.mean.any() and torch.equal(resumed.mean, first.mean) and torch.equal(later.std, first.std)
    assert stored["vfm"]["name"] == VFM
    assert not any("vfm" in name or "network" in name for name in stored["state_dict"])
    read = PretrainedTokenizer.from_checkpoint(path)
    assert type(read) is RAE and read.latent_identity() == first.latent_identity()
    assert torch.equal(read.encode(IMAGES).mode(), first.encode(IMAGES).mode())


def test_a_batch_is_learnt_while_the_vfm_stays(batch):
    model = build(decoder_depth=2, decoder_width=64)
    vfm, images = weights(model.vfm.network), from_uint8(batch.images[:4])
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(40):
        loss = (model.decode(model.encode(images).sample()).image - images).abs().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
    assert all(torch.equal(tensor, vfm[name]) for name, tensor in model.vfm.network.state_dict().items())
    assert model.last_decoding_weight.grad is not None


def test_a_point_has_no_divergence(batch, trainer):
    with pytest.raises(ValueError, match=r"objective\.kl: .* has no KL divergence; set it to 0"):
        trainer(max_steps=1).fit(module(build(statistics_images=0), {"kl": 1e-6}), repeat(batch))


@pytest.mark.slow
def test_two_processes_measure_what_one_does(photos, tmp_path):
    (tmp_path / "measure.py").write_text(MEASURE)
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",
        "PYTHONPATH": f"{ROOT}:{ROOT}/tests",
    }
    for devices in (1, 2):
        command = [sys.executable, "measure.py", str(devices), str(photos)]
        subprocess.run(command, cwd=tmp_path, env=environment, stdin=subprocess.DEVNULL, timeout=120, check=False)
    one, first, second = (torch.load(tmp_path / f"{name}.pt") for name in ("1_0", "2_0", "2_1"))
    for name in ("mean", "std"):
        assert torch.equal(first[name], second[name]) and torch.allclose(first[name], one[name], atol=1e-6)


MEASURE = """
import sys

import torch
from lightning.pytorch import Trainer
from test_rae import build, module
from vfm_vae.data.datamodule import ImageNetDataModule

devices = int(sys.argv[1])
model = build(statistics_images=11)  # the ranks' parts differ
run = Trainer(
    accelerator="cpu", devices=devices, max_steps=1, logger=False,
    strategy="ddp_find_unused_parameters_true" if devices > 1 else "auto",
    enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0,
)
data = ImageNetDataModule(sys.argv[2], image_size=64, batch_size=8, val_batch_size=4, num_workers=0)
run.fit(module(model), datamodule=data)
torch.save({"mean": model.mean, "std": model.std}, f"{devices}_{run.global_rank}.pt")
"""

TOKENIZER = """
seed_everything: 0
run: {name: rae}
model:
  model:
    class_path: RAE
    init_args:
      vfm: {class_path: FrozenVFM, init_args: {name: vit_photos_patch8_64, layers: [-2]}}
      image_size: 64
      decoder_width: 32
      decoder_depth: 1
      decoder_heads: 2
      decoder_mlp_width: 64
  discriminator: {backbone: vit_photos_patch8_64, size: 64, layers: [2]}
  objective: {multi_resolution: 0.0, alignment: 0.0, kl: 0.0, adversarial: 0.1}
  optimizer: {class_path: Adam, init_args: {lr: 0.002}}
  discriminator_optimizer: {class_path: Adam, init_args: {lr: 0.002}}
  equivariance: {probability: 0.5, prior_probability: 0.0}
data: {root: photos, image_size: 64, batch_size: 8, val_batch_size: 26, num_workers: 0, predict: [train, val]}
trainer:
  accelerator: cpu
  max_steps: 2
  log_every_n_steps: 1
  enable_progress_bar: false
  callbacks:
  - EMA
  - {class_path: ModelCheckpoint, init_args: {save_last: true, enable_version_counter: false}}
"""
DIFFUSION = """
seed_everything: 0
run: {name: diffusion}
model:
  model: {class_path: LightningDiT, init_args: {input_size: 8, depth: 1, width: 24, num_heads: 2, num_classes: 13}}
  optimizer: {class_path: AdamW, init_args: {lr: 0.001}}
  sampler: {class_path: Euler, init_args: {steps: 2}}
data: {root: latents, source: latents, batch_size: 8, val_batch_size: 26, num_workers: 0}
trainer:
  accelerator: cpu
  max_steps: 3
  log_every_n_steps: 1
  enable_progress_bar: false
  callbacks:
  - {class_path: ModelCheckpoint, init_args: {save_last: true, enable_version_counter: false}}
"""
CACHE = ["--model.predict=moments", "--trainer.callbacks=[{class_path: LatentWriter, init_args: {directory: latents}}]"]
SAMPLES = "--trainer.callbacks=[{class_path: SampleWriter, init_args: {npz: true, directory: samples}}]"


@pytest.fixture
def folder(tmp_path, photos) -> Path:
    (tmp_path / "tokenizer.yaml").write_text(TOKENIZER)
    (tmp_path / "diffusion.yaml").write_text(DIFFUSION)
    (tmp_path / "photos").symlink_to(photos)
    return tmp_path


def succeed(folder: Path, program: str, *arguments: str) -> None:
    ended = run(folder, program, *arguments)
    assert ended.code == 0, ended.err


def diffuses(folder: Path, tokenizer: Path, channels: int) -> None:
    """A denoiser learns from the cache and draws images that the tokenizer decodes."""
    options = [f"--model.model.init_args.in_channels={channels}", f"--model.tokenizer={{checkpoint: {tokenizer}}}"]
    succeed(folder, "ldm", "fit", "-c", "diffusion.yaml", *options)
    checkpoint = ["--ckpt_path=runs/diffusion/checkpoints/last.ckpt", "--data.num_samples=3"]
    succeed(folder, "ldm", "predict", "-c", "diffusion.yaml", *options, *checkpoint, SAMPLES)
    with np.load(folder / "samples.npz") as samples:
        assert samples["arr_0"].shape == (3, 64, 64, 3)


@pytest.mark.slow
def test_one_that_is_trained_here_makes_latents_for_diffusion(folder):
    succeed(folder, "vfm_vae", "fit", "-c", "tokenizer.yaml")
    last = folder / "runs/rae/checkpoints/last.ckpt"
    succeed(folder, "vfm_vae", "predict", "-c", "tokenizer.yaml", *CACHE, "--ckpt_path", str(last))
    diffuses(folder, last, 128)


@pytest.mark.slow
def test_a_folder_of_diffusers_makes_latents_for_diffusion(folder, published, data):
    theirs, source = published(encoder_input_size=56, latents_mean=torch.ones(1), latents_std=torch.ones(1))
    succeed(folder, "vfm_vae.convert", str(source), "--out", "converted")
    files = ["-c", "tokenizer.yaml", "-c", "converted/model.yaml", "--ckpt_path", "converted/training.ckpt"]
    succeed(folder, "vfm_vae", "predict", *files, *CACHE)
    cached = LatentDataset(folder / "latents/val", train=False)
    images = from_uint8(next(iter(data().evaluation_dataloader("val"))).images)
    expected = reconstructed(theirs, images)[0]
    assert torch.allclose(torch.stack([cached[row][0] for row in range(len(images))]), expected, atol=1e-5)
    diffuses(folder, source, 64)
