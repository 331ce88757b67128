"""Path, losses, samplers and normalisation of latents against published numbers, in float32."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_lightningdit_parity import close, fixture

from ldm import path
from ldm.condition import Labels
from ldm.guidance import Guidance
from ldm.normalization import LatentNormalization
from ldm.samplers import Dopri5, Euler, EulerMaruyama, Heun, time_grid
from vfm_vae.data.latents import LatentDataset, LatentStatistics, RunningStatistics

REFERENCE = load_file(Path(__file__).parent / "data" / "transport.safetensors")
LATENTS = {name.removeprefix("latent_norm/"): t for name, t in REFERENCE.items() if name.startswith("latent_norm/")}
NULL = 10


def test_path_losses_and_gradients():
    data, noise, t, y = (REFERENCE[f"loss/{name}"] for name in ("x1", "x0", "t", "y"))
    _, _, model = fixture("a")
    x, target = path.interpolate(data, noise, t), path.velocity(data, noise)
    close(x, REFERENCE["loss/xt"], 1e-6)
    close(target, REFERENCE["loss/ut"], 1e-6)
    prediction = model(x, t, Labels(y, NULL)).velocity
    close(prediction.detach(), REFERENCE["loss/pred"])
    mse, cosine = path.squared_error(prediction, target), path.cosine_error(prediction, target)
    close(mse.detach(), REFERENCE["loss/mse_per_sample"], 1e-5)
    close(cosine.detach(), REFERENCE["loss/cos_per_sample"], 1e-5)
    total = mse.mean() + cosine.mean()
    close(total.detach(), REFERENCE["loss/total"], 1e-5)
    model.zero_grad()
    total.backward()
    weights = {
        "x_embedder.proj.weight": model.patch_embed.proj.weight,
        "y_embedder.embedding_table.weight": model.label_embed.weight,
        "t_embedder.mlp.2.bias": model.time_embed.mlp[2].bias,
        "blocks.0.adaLN_modulation.1.bias": model.blocks[0].modulation.bias,
        "blocks.1.attn.proj.bias": model.blocks[1].attention.out.bias,
        "final_layer.linear.weight": model.final.out.weight,
    }
    assert {f"loss/grad/{name}" for name in weights} == {name for name in REFERENCE if name.startswith("loss/grad/")}
    for name, weight in weights.items():
        assert torch.allclose(weight.grad, REFERENCE[f"loss/grad/{name}"], rtol=1e-3, atol=2e-6), name


def test_lognormal_times():
    probability = REFERENCE["lognorm/quantile_prob"]
    normal = torch.special.ndtri(probability)
    close(path.times("lognormal", normal), REFERENCE["lognorm/quantile_exact"], 1e-6)
    drawn = path.times("lognormal", torch.randn(400_000, generator=torch.Generator().manual_seed(0)).double())
    close(drawn.quantile(probability), REFERENCE["lognorm/quantile_sampled"], 3e-3)


def test_uniform_times_are_uniform():
    quantiles = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    close(path.times("uniform", torch.special.ndtri(quantiles)), quantiles, 1e-9)


@pytest.mark.parametrize("shift", [0, 0.3])
@pytest.mark.parametrize("steps", [10, 250])
def test_grids_are_exact(steps, shift):
    assert torch.equal(time_grid(steps, shift or 1.0), REFERENCE[f"ode_grid/n{steps}_shift{shift}"])


@pytest.mark.parametrize(
    ("run", "sampler", "tolerance"),
    [
        ("euler10_shift0.3_cfg", Euler(10, 0.3), 1e-4),
        ("euler10_shift0.3_nocfg", Euler(10, 0.3), 1e-4),
        ("euler10_shift0_nocfg", Euler(10), 1e-4),
        ("euler250_shift0.3_cfg", Euler(250, 0.3), 1e-4),
        ("heun2_10_shift0.3_nocfg", Heun(10, 0.3), 1e-4),
        ("dopri5_10_shift0.3_nocfg", Dopri5(), 1e-3),
        ("dopri5_10_shift0.3_cfg", Dopri5(), 0.2),  # guidance switches on inside: sensitive to rounding
    ],
)
@torch.no_grad()
def test_ode_samples(run, sampler, tolerance):
    _, _, model = fixture("a")
    guidance = Guidance() if "nocfg" in run else Guidance(4.0, start=0.125, channels=3)
    samples = sampler(guidance.field(model, Labels(REFERENCE["ode/y"], NULL)), REFERENCE["ode/noise"])
    close(samples, REFERENCE[f"ode/{run}/final"], tolerance)


def test_sde_levels_are_the_published_ones():
    levels = 1 - EulerMaruyama(10).times
    close(levels[:-1], torch.linspace(1, 0.04, 10, dtype=torch.float64), 1e-12)
    assert levels[-1] == 0


def test_statistics_and_normalisation():
    running = RunningStatistics(8)
    for shard in LATENTS["latents"].split([5, 3]):
        running.add(shard)
    statistics = running.compute()
    close(statistics.mean, LATENTS["mean"], 1e-6)
    close(statistics.std, LATENTS["std"], 1e-6)
    normalization = LatentNormalization(8)
    normalization.take(statistics)
    mirrored = (LATENTS["uniform"] <= 0.5)[:, None, None, None]
    items = torch.where(mirrored, LATENTS["latents_flip"], LATENTS["latents"])
    close(normalization(items), LATENTS["items"], 1e-5)
    close(normalization.inverse(REFERENCE["ode/euler10_shift0.3_cfg/final"]), LATENTS["denormalised_final"], 1e-5)


def test_a_folder_as_lightningdit_writes_it_is_read(tmp_path):
    names = ("latents", "latents_flip", "labels")
    for number, rows in enumerate((slice(0, 5), slice(5, 8))):
        shard = {name: LATENTS[name][rows].contiguous() for name in names}
        save_file(shard, tmp_path / f"latents_rank00_shard{number:03d}.safetensors")
    torch.save({"mean": LATENTS["mean"], "std": LATENTS["std"]}, tmp_path / "latents_stats.pt")
    dataset = LatentDataset(tmp_path, train=False)
    assert len(dataset) == 8 and dataset.shape == (8, 4, 4) and dataset.tokenizer is None
    assert np.array_equal(dataset.labels, LATENTS["labels"].numpy())
    assert torch.equal(torch.stack([dataset[i][0] for i in range(8)]), LATENTS["latents"])
    assert torch.equal(LatentStatistics.read(tmp_path).std, LATENTS["std"])
