"""A pipeline of the library diffusers that takes prompts."""

import pytest
import torch

from ldm.diffusers import LatentDiffusionModel, LatentDiffusionPipeline, TextToImagePipeline
from ldm.guidance import Guidance
from ldm.models.lightningdit import LightningDiT
from ldm.models.text_lightningdit import TextLightningDiT
from ldm.pipeline import LatentDiffusion
from ldm.samplers import Euler
from ldm.text import Captions
from vfm_vae.text import HashedWords

PROMPTS = ["a cat on the left", "a red rocket"]


def drawing(denoiser, conditioning, tokenizer) -> LatentDiffusion:
    """As after training: no output is zero, and latents have statistics."""
    torch.manual_seed(0)
    for parameter in denoiser.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    model = LatentDiffusion(denoiser, Euler(5), Guidance(2.0), conditioning).eval()
    model.normalization.mean.zero_()
    model.normalization.std.fill_(1.0)
    model.latent_source = tokenizer.latent_identity()
    return model.use_tokenizer(tokenizer)


@pytest.fixture
def model(tiny_model) -> LatentDiffusion:
    denoiser = TextLightningDiT(8, 4, 8, patch_size=1, depth=2, width=32, num_heads=2)
    return drawing(denoiser, Captions(HashedWords(8, 6)), tiny_model().eval())


@pytest.fixture
def pipeline(model) -> TextToImagePipeline:
    return TextToImagePipeline.from_model(model)


def test_images_are_those_of_the_model(model, pipeline):
    found = pipeline(PROMPTS, num_images_per_prompt=2, guidance_scale=3.0, seed=4, output_type="pt").images
    repeated = [PROMPTS[0], PROMPTS[0], PROMPTS[1], PROMPTS[1]]
    expected = model.sample(prompts=repeated, seed=4, guidance_scale=3.0).images
    torch.testing.assert_close(found, expected / 2 + 0.5, atol=1e-6, rtol=0)
    assert (found[0] - found[1]).abs().max() > 0.01 and (found[0] - found[2]).abs().max() > 0.01
    (alone,) = pipeline(PROMPTS[1], guidance_scale=3.0, seed=4, index=torch.tensor([3]), output_type="pt").images
    torch.testing.assert_close(alone, found[3], atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_saved_and_loaded_it_draws_the_same(pipeline, tmp_path, dtype):
    pipeline.save_pretrained(tmp_path)
    loaded = TextToImagePipeline.from_pretrained(tmp_path, dtype=dtype)
    conditioning = loaded.transformer.diffusion.conditioning
    assert conditioning.text_encoder.source() == HashedWords(8, 6).source()
    expected, found = (p(PROMPTS, seed=3, output_type="latent").images for p in (pipeline, loaded))
    if dtype is None:
        assert torch.equal(found, expected)
    else:
        torch.testing.assert_close(found, expected, atol=0.05 * expected.std().item(), rtol=0.05)


def test_what_does_not_fit_is_refused(pipeline, tiny_model):
    for prompt in ([], [3]):
        with pytest.raises(ValueError, match="prompts: give at least one text"):
            pipeline(prompt)
    with pytest.raises(ValueError, match="num_images_per_prompt"):
        pipeline("a cat", num_images_per_prompt=0)
    of_classes = drawing(LightningDiT(4, 8, 1, 2, 32, 2, num_classes=3), None, tiny_model().eval())
    with pytest.raises(ValueError, match="takes no prompts; use LatentDiffusionPipeline"):
        TextToImagePipeline.from_model(of_classes)
    assert LatentDiffusionPipeline.from_model(of_classes)([0], seed=0, output_type="latent").images.shape[0] == 1


def test_folders_of_another_text_encoder_are_refused(pipeline):
    description = dict(pipeline.transformer.config.description)
    description["text"] = description["text"] | {"fingerprint": "0" * 64}
    with pytest.raises(ValueError, match="another text encoder"):
        LatentDiffusionModel(description, 4, (8, 8), None)
