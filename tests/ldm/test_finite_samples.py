"""Samples and statistics that hold nan or inf end with one line, whoever draws or adds them."""

import math
from types import SimpleNamespace

import pytest
import torch

from ldm.models.lightningdit import LightningDiT
from ldm.normalization import LatentNormalization
from ldm.pipeline import LatentDiffusion
from ldm.samplers import Dopri5, Euler, EulerMaruyama, Heun
from vfm_vae.data.latents import LatentStatistics, RunningStatistics

KNOWN = LatentStatistics(torch.zeros(1, 4, 1, 1), torch.ones(1, 4, 1, 1))


@pytest.fixture
def model() -> LatentDiffusion:
    torch.manual_seed(0)
    denoiser = LightningDiT(in_channels=4, input_size=4, depth=1, width=32, num_heads=2, num_classes=3)
    model = LatentDiffusion(denoiser, Euler(3))
    model.normalization.take(KNOWN)
    return model.eval()


@pytest.mark.parametrize("sampler", [Euler(3), Heun(3), EulerMaruyama(3), Dopri5()])
def test_a_denoiser_whose_weights_are_broken_draws_nothing(model, sampler):
    model.sampler = sampler
    with torch.no_grad():
        next(model.model.parameters()).view(-1)[0] = math.nan
    with pytest.raises(ValueError, match=r"^samples: .*; either the weights are broken \(give another --ckpt_path\)"):
        model.sample([0, 1])


def test_a_tokenizer_whose_weights_are_broken_decodes_nothing(model):
    def decode(latents):
        return SimpleNamespace(image=latents[:, :3] * torch.tensor([1.0, math.nan])[:, None, None, None])

    model.tokenizer = SimpleNamespace(network=SimpleNamespace(decode=decode))
    with pytest.raises(ValueError, match=r"^images: 1 of 2 hold nan or inf"):
        model.sample([0, 1])


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_cache_that_is_not_finite_has_no_statistics(value):
    running = RunningStatistics(4)
    latents = torch.zeros(3, 4, 2, 2)
    latents[1, 2, 0, 1] = value
    running.add(latents)
    with pytest.raises(ValueError, match=r"^latents: some of 12 values of a channel hold nan or inf"):
        running.compute()
    for statistics in (KNOWN._replace(mean=KNOWN.mean + value), KNOWN._replace(std=KNOWN.std + value)):
        with pytest.raises(ValueError, match=r"^the latents' statistics hold nan or inf: the cache or the tokenizer"):
            LatentNormalization(4).take(statistics)
