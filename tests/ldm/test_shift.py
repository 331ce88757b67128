"""Times that are shifted, in training and in sampling: by a number, or by the one that follows from the latents."""

import math
from functools import partial

import pytest
import torch
from building import build_ldm
from lightning.pytorch import Callback

from ldm import path
from ldm.guidance import Guidance
from ldm.pipeline import LatentDiffusion
from ldm.samplers import Dopri5, Euler, EulerMaruyama, GridSampler, Heun, Sampler, time_grid
from vfm_vae.data.latents import LatentStatistics

AUTO = 8.0  # of latents of 4x4x4


def test_shifts_of_noise_levels_are_the_inverse():
    """As RAE has it: `τ' = σ·τ / (1 + (σ − 1)·τ)`, with noise at τ = 1."""
    t = torch.linspace(0, 1, 33, dtype=torch.float64)
    for sigma in (0.4, 3**0.5, 6.93):
        level = sigma * (1 - t) / (1 + (sigma - 1) * (1 - t))
        assert torch.allclose(path.shifted(t, 1 / sigma), 1 - level, rtol=0, atol=1e-15)


def test_auto_follows_from_the_size_of_latents():
    assert path.shift_for("auto", (4, 32, 32)) == 1
    assert 1 / path.shift_for("auto", (768, 16, 16)) == pytest.approx(math.sqrt(48))  # 6.93, as published
    assert path.shift_for("auto", (32, 16, 16)) == pytest.approx(math.sqrt(0.5))
    assert (path.shift_for(None, (4, 4, 4)), path.shift_for(0.3, (4, 4, 4))) == (1, 0.3)


@pytest.mark.parametrize("distribution", ["uniform", "lognormal"])
def test_training_times_of_either_distribution(distribution):
    normal = torch.randn(100, generator=torch.Generator().manual_seed(0))
    plain = path.times(distribution, normal)
    assert all(torch.equal(path.times(distribution, normal, none), plain) for none in (None, 1, 1.0))
    assert torch.equal(path.times(distribution, normal, 0.25), 0.25 * plain / (1 - 0.75 * plain))


def test_grids_end_where_they_are_told_before_they_are_warped():
    even = torch.linspace(0, 0.999, 7)
    assert torch.equal(time_grid(7, None, 0.999), even)
    assert torch.allclose(Euler(7, 0.5, end=0.999).times, 0.5 * even / (1 - 0.5 * even))
    assert all(torch.equal(Heun(7, none).times, torch.linspace(0, 1, 7)) for none in (None, 1))


def test_the_stochastic_sampler_is_shifted_from_level_to_level():
    even, shifted = EulerMaruyama(10).times, EulerMaruyama(10, shift=0.3).times
    assert torch.equal(shifted[:-1], 0.3 * even[:-1] / (1 + (0.3 - 1) * even[:-1]))
    assert (shifted[0], shifted[-1]) == (0, 1)  # exactly: the last step takes no noise
    assert torch.equal(EulerMaruyama(10, shift=None).times, even)


class Times(Callback):
    """Notes the times of every call of the denoiser."""

    def on_fit_start(self, trainer, pl_module):
        self.seen = []
        pl_module.model.register_forward_pre_hook(lambda model, inputs: self.seen.append(inputs[1].clone()))


def test_training_and_validation_take_the_same_draws_shifted(diffusion, latents, trainer):
    def times(shift) -> torch.Tensor:
        watch = Times()
        end = {"max_steps": 2, "limit_val_batches": 1, "val_check_interval": 1}
        trainer(**end, callbacks=[watch]).fit(diffusion(shift=shift), datamodule=latents())
        return torch.cat(watch.seen)

    plain = times(None)
    assert torch.equal(times(1.0), plain) and len(plain) == 2 * (8 + 5)
    assert torch.equal(times(0.5), path.shifted(plain, 0.5))
    assert torch.equal(times("auto"), path.shifted(plain, AUTO))


@pytest.fixture
def drawn(diffusion):
    """Draws latents with a sampler, and tells the settings of that."""

    def draw(sampler: Sampler) -> tuple[torch.Tensor, dict]:
        model = LatentDiffusion(diffusion().model, sampler, Guidance()).eval()
        torch.nn.init.normal_(model.model.final.out.weight, std=0.1)
        model.normalization.take(LatentStatistics(torch.zeros(1, 4, 1, 1), torch.ones(1, 4, 1, 1)))
        return model.sample([0, 1]).latents, model.settings()["sampler"]

    return draw


@pytest.mark.parametrize("make", [Euler, Heun, EulerMaruyama])
def test_samples_take_the_number_that_auto_stands_for(make, drawn):
    (auto, told), (number, same) = (drawn(make(4, shift=shift)) for shift in ("auto", AUTO))
    (none, _), (even, plain) = (drawn(make(4, shift=shift)) for shift in (None, 1.0))
    assert torch.equal(auto, number) and torch.equal(none, even) and not torch.equal(auto, none)
    assert told == same and told["shift"] == AUTO
    assert plain == {"class": make.__name__} | {  # as the folders of samples note it that former versions began
        "Euler": {"steps": 4, "shift": 1.0}, "Heun": {"steps": 4, "shift": 1.0},
        "EulerMaruyama": {"steps": 4, "last": 0.04},
    }[make.__name__]  # fmt: skip


def test_auto_stays_auto_in_what_is_saved(diffusion, tmp_path):
    model = LatentDiffusion(diffusion().model, Heun(3, "auto"))
    model.normalization.take(LatentStatistics(torch.zeros(1, 4, 1, 1), torch.ones(1, 4, 1, 1)))
    model.eval().sample([0])
    assert model.described()["model"]["init_args"]["sampler"]["init_args"]["shift"] == "auto"
    model.save_pretrained(tmp_path)
    loaded = LatentDiffusion.from_pretrained(tmp_path).sampler
    assert (loaded.shift, loaded.fitted_to((768, 16, 16)).shift) == ("auto", pytest.approx(1 / math.sqrt(48)))


class Thirds(GridSampler):  # of others, with arguments of its own and no call of GridSampler's `__init__`
    def __init__(self, half: int):
        self.steps = 2 * half

    def __call__(self, field, noise, fresh_noise=None):
        return noise + len(self.times)


class Constant(Sampler):
    def __init__(self, value: float = 2.0):
        self.value = value

    def __call__(self, field, noise, fresh_noise=None):
        return noise * 0 + self.value


def test_samplers_of_others_need_not_know_of_it(drawn):
    latents, told = drawn(Constant())
    assert (latents == 2).all() and told == {"class": "Constant", "value": 2.0}
    latents, told = drawn(Thirds(2))
    assert latents.isfinite().all() and told == {"class": "Thirds", "half": 2}
    assert Dopri5().fitted_to((4, 4, 4)).arguments == Dopri5().arguments


@pytest.mark.parametrize("make", [Euler, Heun, EulerMaruyama])
def test_a_sampler_alone_can_not_know_it(make):
    with pytest.raises(ValueError, match=r"^sampler\.shift: 'auto' follows from the shape of the latents"):
        make(4, shift="auto")(lambda x, t: x, torch.zeros(1, 4))


def test_mistakes_are_named(diffusion):
    for make in (partial(diffusion), partial(Euler, 4), partial(EulerMaruyama, 4)):
        for wrong, message in (
            ("half", "shift: a number above 0, 'auto' or null, given 'half'"),
            (0.0, "shift: must be"),
        ):
            with pytest.raises(ValueError, match=f"^{message}"):
                make(shift=wrong)
    with pytest.raises(ValueError, match=r"^end: must be in \[0, 1\], given 1\.1"):
        Euler(4, end=1.1)


def test_the_command_line_takes_them():
    options = ["--model.shift=auto", "--model.sampler.shift=auto", "--model.optimizer.fused=false"]
    options += [f"--model.lr_scheduler{option}" for option in ("=WarmupDecay", ".warmup_steps=4", ".constant_steps=9")]
    with torch.device("meta"):
        module = build_ldm("ldm/lightningdit.yaml", "data/latents.yaml", "trainer/cpu.yaml", options=options).model
    assert (module.shift, module.pipeline.sampler.shift) == (math.sqrt(0.5), "auto")
    (optimizer,), _ = module.configure_optimizers()
    assert optimizer.param_groups[0]["lr"] == 2e-4 / 4
