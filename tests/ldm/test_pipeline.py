"""From labels to latents and images without Lightning, as folders and from checkpoints."""

from pathlib import Path

import pytest
import torch

from callbacks.ema import EMA
from ldm.guidance import Guidance
from ldm.models.lightningdit import LightningDiT
from ldm.models.sit import SiT
from ldm.pipeline import LatentDiffusion
from ldm.samplers import Dopri5, Euler, EulerMaruyama, Heun
from vfm_vae.data.latents import LatentStatistics
from vfm_vae.tokenizer import VFMVAE


@pytest.fixture
def model() -> LatentDiffusion:
    """Of latents `[B, 4, 8, 8]`, as `tiny_model` has them."""
    torch.manual_seed(0)
    network = LightningDiT(in_channels=4, input_size=8, depth=2, width=32, num_heads=2, num_classes=3)
    for parameter in network.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    model = LatentDiffusion(network, Euler(6, shift=0.3), Guidance(2.0, start=0.2, channels=3)).eval()
    statistics = LatentStatistics(torch.randn(1, 4, 1, 1), 1 + torch.rand(1, 4, 1, 1))
    model.normalization.take(statistics)
    return model


def test_samples_come_back_bit_by_bit(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = LatentDiffusion.from_pretrained(tmp_path)
    assert not loaded.training
    samples = model.sample([0, 2, 2], seed=3)
    assert samples.images is None
    assert torch.equal(loaded.sample([0, 2, 2], seed=3).latents, samples.latents)
    assert loaded.pretrained_config() == model.pretrained_config()


def test_a_sample_depends_on_its_number_label_and_seed_alone(model):
    latents = model.sample([0, 1, 2], seed=3).latents
    alone = model.sample([2], seed=3, index=torch.tensor([2])).latents
    assert torch.allclose(alone[0], latents[2], atol=1e-5)
    assert not torch.allclose(model.sample([0, 1, 2], seed=4).latents, latents)
    assert not torch.allclose(model.sample([0, 1, 2], seed=3, guidance_scale=1.0).latents, latents)


def test_images_are_decoded_by_a_tokenizer_without_its_vfm(model, tiny_model, tmp_path):
    tokenizer = tiny_model().eval()
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    model.latent_source = tokenizer.latent_identity()
    model.save_pretrained(tmp_path / "model")
    loaded = LatentDiffusion.from_pretrained(tmp_path / "model", tokenizer=tmp_path / "tokenizer")
    assert loaded.tokenizer.network.vfm is None
    samples = loaded.sample([1], seed=0)
    with torch.no_grad():
        expected = tokenizer.decode(samples.latents).image.clamp(-1, 1)
    assert torch.equal(samples.images, expected)
    assert "tokenizer" not in " ".join(loaded.state_dict())


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (None, "the latents of a tokenizer that is not known,"),
        ({"tokenizer": "MyVAE"}, "the latents of MyVAE,"),
        ({"vfm": "vit"}, "the latents of a VFM-VAE (arXiv 2510.18457) with vit,"),
    ],
)
def test_its_card_says_whose_latents_it_makes(model, source, said):
    model.latent_source = source
    assert said in model.model_card()


def test_another_tokenizer_is_refused(model, tiny_model):
    model.latent_source = tiny_model().latent_identity() | {"fingerprint": "0" * 64}
    with pytest.raises(ValueError, match="tokenizer: it is of another tokenizer"):
        model.use_tokenizer(tiny_model())


@pytest.mark.parametrize("named", [{}, {"vfm": "another"}])
def test_a_tokenizer_known_by_name_alone_is_compared_by_that(model, tiny_model, named):
    model.latent_source = tiny_model().latent_identity() | {"fingerprint": None} | named
    if named:
        with pytest.raises(ValueError, match="weights not known"):
            model.use_tokenizer(tiny_model())
    else:
        assert isinstance(model.use_tokenizer(tiny_model()).tokenizer.network, VFMVAE)


def test_without_statistics_nothing_is_saved_or_drawn(model, tmp_path):
    fresh = LatentDiffusion(model.model)
    with pytest.raises(ValueError, match="statistics of latents are unknown"):
        fresh.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="only a trained model can sample"):
        fresh.sample([0])


def test_labels_that_are_no_classes_and_seeds_that_are_none_are_named(model):
    with pytest.raises(ValueError, match=r"labels: the classes are 0 to 2, given \[3\]"):
        model.sample([0, 3])
    with pytest.raises(ValueError, match="seed: must be at least 0, given -1"):
        model.sample([0], seed=-1)


def test_a_checkpoint_samples_what_its_module_does(diffusion, latents, trainer, tmp_path):
    """By the averaged weights, for the same seed, numbers and labels."""
    module = diffusion()
    average = EMA(decay=0.5)
    fitted = trainer(max_steps=3, limit_val_batches=0, callbacks=[average])
    fitted.fit(module, latents())
    fitted.save_checkpoint(tmp_path / "last.ckpt")
    loaded = LatentDiffusion.from_checkpoint(tmp_path / "last.ckpt")
    average.on_validation_start(fitted, module)
    index, labels = torch.tensor([5, 7]), torch.tensor([0, 2])
    expected = module.draw(index, labels, decode=False).latents
    assert torch.equal(loaded.sample(labels, seed=1, index=index).latents, expected)


def test_a_file_of_something_else_is_named(tmp_path):
    torch.save({"state_dict": {}}, tmp_path / "else.ckpt")
    with pytest.raises(ValueError, match="is not a diffusion model's: give a checkpoint that `python -m ldm fit`"):
        LatentDiffusion.from_checkpoint(tmp_path / "else.ckpt")


def test_it_moves_as_one(model, tiny_model, tmp_path: Path):
    moved = model.use_tokenizer(tiny_model()).to(torch.float64)
    assert next(moved.tokenizer.network.parameters()).dtype == torch.float64


@pytest.mark.parametrize("sampler", [EulerMaruyama(4), Euler(4), Heun(3), Dopri5()])
def test_reg_draws_its_class_token_along(sampler, tmp_path):
    network = SiT(4, 4, depth=2, width=32, num_heads=2, num_classes=3, cls_channels=8, align_channels=8, align_depth=1)
    model = LatentDiffusion(network, sampler, Guidance(3.0, start=0.2, cls_scale=4.0)).eval()
    for parameter in network.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.normalization.take(LatentStatistics(torch.zeros(1, 4, 1, 1), torch.ones(1, 4, 1, 1)))
    model.save_pretrained(tmp_path)
    latents = model.sample([0, 1, 2], seed=3).latents
    assert latents.shape == (3, 4, 4, 4)
    assert latents.isfinite().all()
    assert torch.equal(LatentDiffusion.from_pretrained(tmp_path).sample([0, 1, 2], seed=3).latents, latents)
    if not isinstance(sampler, Dopri5):  # whose steps depend on the batch
        alone = model.sample([2], seed=3, index=torch.tensor([2])).latents
        assert torch.allclose(alone[0], latents[2], atol=1e-4)


def test_another_sampler_and_guidance_are_saved(model, tmp_path):
    model.sampler, model.guidance = Heun(3), Guidance(5.0, end=0.9)
    model.save_pretrained(tmp_path)
    loaded = LatentDiffusion.from_pretrained(tmp_path)
    assert (type(loaded.sampler), loaded.sampler.arguments) == (Heun, {"steps": 3, "shift": 1.0, "end": 1.0})
    assert loaded.guidance.arguments == model.guidance.arguments
