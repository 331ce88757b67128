"""The tokenizer and latent diffusion behind the interfaces of the library diffusers."""

import json
import subprocess
import sys

import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from safetensors.torch import load_file, save_file

from ldm.condition import Labels
from ldm.diffusers import LatentDiffusionModel, LatentDiffusionPipeline
from ldm.guidance import Guidance
from ldm.models.lightningdit import LightningDiT
from ldm.pipeline import LatentDiffusion
from ldm.samplers import Dopri5, Euler, Heun
from vfm_vae.diffusers import AutoencoderVFM
from vfm_vae.modules.adapter import Adapter
from vfm_vae.modules.decoder import Decoder
from vfm_vae.modules.quantizer import VectorQuantizer
from vfm_vae.tokenizer import VFMVAE

MEAN, STD = [0.5, -0.5, 1.5, 0.5], [1.0, 2.0, 1.0, 0.5]


@pytest.fixture
def tokenizer(tiny_model) -> VFMVAE:
    return tiny_model().eval()


@pytest.fixture
def vae(tokenizer) -> AutoencoderVFM:
    return AutoencoderVFM.from_tokenizer(tokenizer, MEAN, STD, sample_size=64)


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.fixture
def diffusion(tokenizer) -> LatentDiffusion:
    torch.manual_seed(0)
    denoiser = LightningDiT(4, 8, 1, 2, 32, 2, num_classes=3)
    for parameter in denoiser.parameters():  # at the start its output is zero
        torch.nn.init.normal_(parameter, std=0.1)
    model = LatentDiffusion(denoiser, Euler(5)).eval()
    model.normalization.mean.copy_(torch.tensor(MEAN).view(1, 4, 1, 1))
    model.normalization.std.copy_(torch.tensor(STD).view(1, 4, 1, 1))
    model.latent_source = tokenizer.latent_identity()
    return model.use_tokenizer(tokenizer)


@pytest.fixture
def pipeline(diffusion) -> LatentDiffusionPipeline:
    return LatentDiffusionPipeline.from_model(diffusion)


@torch.no_grad()
def test_encodes_and_decodes_as_the_tokenizer(vae, tokenizer, images):
    expected, found = tokenizer.encode(images), vae.encode(images).latent_dist
    assert torch.equal(found.mode(), expected.mode())
    assert torch.equal(found.mean, expected.mean)
    assert torch.equal(found.logvar, expected.logvar)
    assert torch.equal(found.std, torch.exp(0.5 * expected.logvar))
    torch.testing.assert_close(found.kl(), expected.kl())
    noise = torch.randn(found.mean.shape, generator=torch.Generator().manual_seed(1))
    assert torch.equal(found.sample(torch.Generator().manual_seed(1)), expected.sample(noise))
    assert torch.equal(vae.decode(found.mode()).sample, tokenizer.decode(expected.mode()).image)


@torch.no_grad()
def test_forward_reconstructs(vae, tokenizer, images):
    expected = tokenizer.decode(tokenizer.encode(images).mode()).image
    assert torch.equal(vae(images).sample, expected)
    assert torch.equal(vae(images, return_dict=False)[0], expected)
    sampled = [vae(images, sample_posterior=True, generator=torch.Generator().manual_seed(s)).sample for s in (1, 1, 2)]
    assert torch.equal(sampled[0], sampled[1])
    assert not torch.equal(sampled[0], sampled[2])


def test_config_says_what_diffusers_reads(vae, tokenizer):
    config = vae.config
    assert (config.in_channels, config.out_channels, config.latent_channels, config.sample_size) == (3, 3, 4, 64)
    assert 2 ** (len(config.block_out_channels) - 1) == tokenizer.compression == 8
    assert config.block_out_channels == [8, 16, 16, 16]
    assert (config.latents_mean, config.latents_std) == (MEAN, STD)
    assert (vae.dtype, vae.device) == (torch.float32, torch.device("cpu"))
    plain = AutoencoderVFM.from_tokenizer(tokenizer).config
    assert (plain.scaling_factor, plain.shift_factor, plain.latents_mean, plain.latents_std) == (1, 0, None, None)


def test_config_says_the_compression_of_as_many_blocks_as_there_are_halvings(tokenizer):
    decoder = Decoder(16, [16, 16, 8], [16], [], 0, w_channels=16, compression=8)
    vae = AutoencoderVFM.from_tokenizer(VFMVAE(tokenizer.adapter, decoder, tokenizer.vfm), sample_size=8)
    assert vae.config.block_out_channels == [8, 16, 16, 16]
    assert vae.decode(torch.randn(1, 4, 1, 3)).sample.shape == (1, 3, 8, 24)


def test_one_factor_normalises_all_latents(vae):
    latents = torch.randn(4, 100_000) * torch.tensor(STD)[:, None] + torch.tensor(MEAN)[:, None]
    scaled = (latents - vae.config.shift_factor) * vae.config.scaling_factor
    assert scaled.mean().item() == pytest.approx(0, abs=0.01)
    assert scaled.std().item() == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize(
    ("mean", "std", "message"),
    [
        (MEAN, None, "give both or none"),
        (MEAN[:3], STD[:3], "latents_mean, latents_std: 4 finite numbers"),
        (MEAN, [1.0, 0.0, 1.0, 1.0], "positive"),
        ([float("nan")] * 4, STD, "finite"),
    ],
)
def test_bad_statistics_are_refused(tokenizer, mean, std, message):
    with pytest.raises(ValueError, match=message):
        AutoencoderVFM.from_tokenizer(tokenizer, mean, std)


def test_size_that_does_not_fit_is_refused(tokenizer):
    with pytest.raises(ValueError, match="image_size: 100 does not fit"):
        AutoencoderVFM.from_tokenizer(tokenizer, sample_size=100)


@torch.no_grad()
def test_a_trainers_loop_runs(vae, tokenizer, images):
    processor = VaeImageProcessor(vae_scale_factor=2 ** (len(vae.config.block_out_channels) - 1))
    pictures = processor.postprocess(images, "pil")
    pixels = processor.preprocess(pictures)  # [B, 3, 64, 64] in [-1, 1]
    shift, scale = vae.config.shift_factor, vae.config.scaling_factor
    latents = (vae.encode(pixels).latent_dist.sample(torch.Generator().manual_seed(0)) - shift) * scale
    decoded = vae.decode(latents / scale + shift, return_dict=False)[0]
    assert decoded.shape == images.shape
    torch.testing.assert_close(decoded, tokenizer.decode(latents / scale + shift).image)
    assert processor.postprocess(decoded, "pil")[0].size == (64, 64)


def test_gradients_reach_all_but_the_vfm(vae, images):
    vae(images).sample.square().mean().backward()
    trained = {name.split(".")[1] for name, weight in vae.named_parameters() if weight.grad is not None}
    assert trained == {"adapter", "decoder"}
    assert not any("vfm" in name for name, _ in vae.named_parameters())
    assert all(weight.grad is None for weight in vae.network.vfm.network.parameters())


@torch.no_grad()
def test_saved_and_loaded_it_is_the_same(vae, images, tmp_path):
    vae.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    assert weights.keys() == vae.state_dict().keys()
    assert not any("vfm" in name for name in weights)
    loaded = AutoencoderVFM.from_pretrained(tmp_path)
    assert not loaded.training
    assert all(loaded.config[name] == value for name, value in vae.config.items() if not name.startswith("_"))
    latents = vae.encode(images).latent_dist.mode()
    assert torch.equal(loaded.decode(latents).sample, vae.decode(latents).sample)
    assert loaded.network.vfm is None, "decoding takes no VFM"
    assert torch.equal(loaded.encode(images).latent_dist.mode(), latents)
    assert loaded.network.vfm.network is not vae.network.vfm.network
    loaded.save_pretrained(tmp_path / "again")
    again = load_file(tmp_path / "again/diffusion_pytorch_model.safetensors")
    assert all(torch.equal(again[name], weight) for name, weight in weights.items())


@pytest.mark.parametrize("kind", ["half", "unrelated"])
@pytest.mark.parametrize("model", ["vae", "transformer"])
def test_every_weight_comes_from_the_file(pipeline, tmp_path, model, kind):
    """Diffusers leaves those that are missing as they were initialised."""
    pipeline.save_pretrained(tmp_path)
    file = tmp_path / model / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    others = dict(list(tensors.items())[::2]) if kind == "half" else {"other": torch.ones(1)}
    save_file(others, file, metadata={"format": "pt"})
    own = {"vae": AutoencoderVFM, "transformer": LatentDiffusionModel}[model]
    for load in (lambda: own.from_pretrained(file.parent), lambda: LatentDiffusionPipeline.from_pretrained(tmp_path)):
        with pytest.raises(
            ValueError, match=rf"^the weights in '.*{model}' are of another .* of {len(tensors)} tensors"
        ):
            load()


@torch.no_grad()
def test_half_precision_is_near(vae, images, tmp_path):
    vae.save_pretrained(tmp_path)
    half = AutoencoderVFM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    latents = vae.encode(images).latent_dist.mode()
    found = half.encode(images.bfloat16()).latent_dist.mode()
    assert (half.dtype, found.dtype) == (torch.bfloat16, torch.bfloat16)
    torch.testing.assert_close(found.float(), latents, atol=0.02, rtol=0.05)
    decoded = half.decode(found).sample
    torch.testing.assert_close(decoded.float(), vae.decode(latents).sample, atol=0.05, rtol=0.05)


@torch.no_grad()
def test_slices_decode_the_same(vae):
    latents = torch.randn(3, 4, 8, 8)
    whole = vae.decode(latents).sample
    vae.enable_slicing()
    torch.testing.assert_close(vae.decode(latents).sample, whole)


@torch.no_grad()
def test_discrete_latents_are_certain(tiny_model, images):
    continuous = tiny_model()
    adapter = Adapter(**continuous.adapter.arguments | {"gaussian": False})
    quantizer = VectorQuantizer(vocabulary_size=16, num_codebooks=2, width=4)
    tokenizer = VFMVAE(adapter, continuous.decoder, continuous.vfm, quantizer).eval()
    latent_dist = AutoencoderVFM.from_tokenizer(tokenizer, sample_size=64).encode(images).latent_dist
    expected = tokenizer.encode(images).mode()
    assert torch.equal(latent_dist.mode(), expected)
    assert torch.equal(latent_dist.sample(), expected)
    assert latent_dist.kl().item() == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 0}, "format version 0"),
        ({"model": {"class_path": "torch.nn.Linear", "init_args": {}}}, "only classes of this project"),
        ({"model": {"class_path": "vfm_vae.tokenizer.VFMVAE", "init_args": {}}}, "does not fit VFMVAE"),
    ],
)
def test_foreign_descriptions_are_refused(vae, tmp_path, change, message):
    vae.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["description"] |= change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        AutoencoderVFM.from_pretrained(tmp_path)


@pytest.mark.parametrize("guidance_scale", [None, 2.0])
def test_pipeline_draws_what_latent_diffusion_draws(pipeline, diffusion, guidance_scale):
    index = torch.tensor([7, 3])
    expected = diffusion.sample([0, 2], seed=3, guidance_scale=guidance_scale, index=index)
    options = {"seed": 3, "guidance_scale": guidance_scale, "index": index}
    assert torch.equal(pipeline([0, 2], output_type="latent", **options).images, expected.latents)
    found = pipeline([0, 2], output_type="pt", **options).images
    assert torch.equal(found, expected.images * 0.5 + 0.5)


def test_pipeline_takes_steps(pipeline, diffusion):
    found = pipeline([1], seed=0, num_inference_steps=3, output_type="latent").images
    assert torch.equal(pipeline([1], seed=0, output_type="latent").images, diffusion.sample([1]).latents)
    diffusion.sampler = Euler(3)
    assert torch.equal(found, diffusion.sample([1]).latents)


def test_pipeline_makes_pictures(pipeline):
    pictures = pipeline([0, 1], seed=0).images
    arrays = pipeline([0, 1], seed=0, output_type="np", return_dict=False)[0]
    assert [(picture.mode, picture.size) for picture in pictures] == [("RGB", (64, 64))] * 2
    assert arrays.shape == (2, 64, 64, 3)
    assert 0 <= arrays.min() <= arrays.max() <= 1


def test_generators_give_other_images_each_time(pipeline):
    def draw(generator):
        return pipeline(1, generator=generator, output_type="latent").images

    generator = torch.Generator().manual_seed(0)
    first, second = draw(generator), draw(generator)
    assert not torch.equal(first, second)
    assert torch.equal(first, draw(torch.Generator().manual_seed(0)))
    assert not torch.equal(draw(None), draw(None))


def test_velocity_is_the_denoisers(pipeline, diffusion):
    x, t, labels = torch.randn(2, 4, 8, 8), torch.tensor([0.2, 0.7]), torch.tensor([0, 3])
    expected = diffusion.model(x, t, Labels(labels, 3)).velocity
    assert torch.equal(pipeline.transformer(x, t, labels).sample, expected)
    assert torch.equal(pipeline.transformer(x, t, Labels(labels, 3)).sample, expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"class_labels": [0, 3]}, r"labels: the classes are 0 to 2, given \[3\]"),
        ({"class_labels": [0], "output_type": "jpeg"}, "output_type: one of pil, np, pt, latent, given 'jpeg'"),
        ({"class_labels": [0], "seed": 0, "generator": torch.Generator()}, "seed, generator: give one of the two"),
        ({"class_labels": [0], "num_inference_steps": 1}, "steps: must be at least 2, given 1"),
    ],
)
def test_bad_options_are_refused(pipeline, options, message):
    with pytest.raises(ValueError, match=message):
        pipeline(**options)


def test_pipeline_takes_the_sampler_and_guidance_of_now(diffusion, tmp_path):
    diffusion.sampler, diffusion.guidance = Heun(4), Guidance(3.0)
    LatentDiffusionPipeline.from_model(diffusion).save_pretrained(tmp_path)
    loaded = LatentDiffusionPipeline.from_pretrained(tmp_path)
    assert torch.equal(loaded([1], seed=0, output_type="latent").images, diffusion.sample([1]).latents)


def test_adaptive_samplers_take_no_steps(diffusion):
    diffusion.sampler = Dopri5()
    with pytest.raises(ValueError, match="num_inference_steps: Dopri5 chooses its steps itself"):
        LatentDiffusionPipeline.from_model(diffusion)([0], num_inference_steps=3)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_pipeline_saved_and_loaded_draws_the_same(pipeline, tmp_path, dtype):
    pipeline.save_pretrained(tmp_path)
    loaded = LatentDiffusionPipeline.from_pretrained(tmp_path, dtype=dtype)
    assert loaded.vae.network.vfm is None
    expected, found = (p([0, 2], seed=3, output_type="pt").images for p in (pipeline, loaded))
    if dtype is None:
        assert torch.equal(found, expected)
        assert loaded.transformer.diffusion.latent_source == pipeline.transformer.diffusion.latent_source
    else:
        torch.testing.assert_close(found, expected, atol=0.05, rtol=0)


def test_parts_load_alone(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path)
    vae = AutoencoderVFM.from_pretrained(tmp_path, subfolder="vae")
    transformer = LatentDiffusionModel.from_pretrained(tmp_path, subfolder="transformer")
    assert (vae.config.sample_size, vae.config.latents_mean) == (64, MEAN)
    assert (transformer.config.in_channels, transformer.config.sample_size) == (4, [8, 8])
    assert LatentDiffusionPipeline(transformer, vae)([0]).images[0].size == (64, 64)


def test_another_tokenizer_is_refused(pipeline, tiny_model):
    other = tiny_model()
    torch.nn.init.zeros_(next(other.adapter.layers.parameters()))
    with pytest.raises(ValueError, match="vae: it is of another tokenizer"):
        LatentDiffusionPipeline(pipeline.transformer, AutoencoderVFM.from_tokenizer(other))


def test_pipeline_needs_tokenizer_and_statistics(diffusion):
    diffusion.normalization.mean.fill_(torch.nan)
    with pytest.raises(ValueError, match="the statistics of latents are unknown"):
        LatentDiffusionPipeline.from_model(diffusion)
    with pytest.raises(ValueError, match="tokenizer: the model has none"):
        LatentDiffusionPipeline.from_model(diffusion.use_tokenizer(None))


def test_only_who_needs_them_waits_for_large_libraries():
    """Torchmetrics imports names of transformers; it is the models that take long. Photographs need scikit-learn."""
    large = "{'diffusers', 'transformers.modeling_utils', 'sklearn'}"
    code = f"import sys, vfm_vae.__main__, vfm_vae.convert, ldm.__main__; sys.exit(bool({large} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
