"""Validation of a tokenizer: it repeats, and its reconstructions are those that the options ask for."""

import pytest
import torch
from training import repeat

from callbacks.evaluation import rows_of
from vfm_vae.data.datamodule import ImageNetDataModule
from vfm_vae.types import Batch


def test_validation_repeats_and_needs_the_whole_set(tiny_module, trainer, data):
    module = tiny_module()
    small, large = (
        trainer().validate(module, datamodule=data(val_batch_size=size), verbose=False)[0] for size in (7, 26)
    )
    assert small.keys() >= {"val/psnr", "val/ssim", "val/perceptual_vit_photos_patch8_64", "val/psnr_thumbnail"}
    assert small == pytest.approx(large, rel=1e-4)


def test_thumbnail_baseline_is_exact_for_constant_images(tiny_module, trainer, batch):
    flat = Batch(torch.full_like(batch.images, 77), batch.labels, batch.index)
    result = trainer().validate(tiny_module(), repeat(flat, 1), verbose=False)[0]
    assert result["val/psnr_thumbnail"] == float("inf")


def test_a_sampled_evaluation_belongs_to_the_image(tiny_module, batch):
    module = tiny_module(evaluate="sample").eval()
    mode = tiny_module().eval()
    whole = module.latents(batch)
    part = rows_of(batch, slice(1, 2))
    torch.testing.assert_close(module.latents(part), whole[1:2], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(whole, mode.latents(batch))
    assert module.latents(batch) is not module.latents(part)  # kept for the batch at hand alone


def test_reconstructions_are_rounded_or_truncated(tiny_module, batch):
    rounded, truncated = (tiny_module(rounding=how).eval() for how in ("round", "truncate"))
    pixels = [((m.evaluation_images(batch)[1] + 1) * 127.5) for m in (rounded, truncated)]
    assert all(torch.allclose(x, x.round(), atol=1e-3) for x in pixels)
    difference = pixels[0].round() - pixels[1].round()
    assert set(difference.unique().tolist()) == {0.0, 1.0}


@pytest.mark.parametrize("asked", [{"num_samples": 2}, {"prompts": ["a cat"]}])
def test_samples_are_not_asked_of_a_tokenizer(tiny_module, trainer, photos, asked):
    data = ImageNetDataModule(photos, image_size=64, num_workers=0, **asked)
    for command in (trainer().test, trainer().predict):
        with pytest.raises(ValueError, match=r"^data\.num_samples, data\.prompts: a tokenizer draws no samples; leave"):
            command(tiny_module(), datamodule=data)
