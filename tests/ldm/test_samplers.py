"""Samplers against a flow that is known in closed form: Gaussian data of mean m and standard deviation s.

Then `x_t` is Gaussian with mean t·m and variance t²s² + (1 − t)², the velocity is linear in x, and noise e flows to
m + s·e exactly.
"""

import math

import pytest
import torch

from ldm import path
from ldm.condition import Labels
from ldm.guidance import Guidance
from ldm.models.lightningdit import LightningDiT
from ldm.samplers import Dopri5, Euler, EulerMaruyama, Heun, time_grid

MEAN, STD = 1.5, 0.4


def field(x, t):
    t = t.to(x)
    variance = t**2 * STD**2 + (1 - t) ** 2
    return MEAN + (t * STD**2 - (1 - t)) / variance * (x - t * MEAN)


def error(sampler) -> float:
    noise = torch.linspace(-2, 2, 41, dtype=torch.float64).reshape(1, -1)
    return (sampler(field, noise) - (MEAN + STD * noise)).abs().max().item()


@pytest.mark.parametrize("shift", [1.0, 0.3, 2.0])
@pytest.mark.parametrize(("sampler", "order"), [(Euler, 1), (Heun, 2)])
def test_grid_samplers_converge_at_their_order(sampler, order, shift):
    coarse, fine = (error(sampler(steps + 1, shift)) for steps in (800, 1600))
    assert math.log2(coarse / fine) == pytest.approx(order, abs=0.05)
    assert fine < (2e-3 if order == 1 else 4e-7)


def test_dopri5_keeps_its_tolerance():
    assert error(Dopri5(atol=1e-6, rtol=1e-6)) < 1e-5
    assert error(Dopri5(atol=1e-9, rtol=1e-9)) < 1e-7  # the ends of time are float32


def test_dopri5_converges_at_its_order():
    """Between two tolerances the error falls with the fifth power of the evaluations, or a little faster."""
    evaluations, errors = [], []
    for tolerance in (1e-4, 1e-11):
        calls = []
        noise = torch.linspace(-2, 2, 41, dtype=torch.float64).reshape(1, -1)
        samples = Dopri5(tolerance, tolerance)(lambda x, t, calls=calls: calls.append(t) or field(x, t), noise)
        evaluations.append(len(calls))
        errors.append((samples - (MEAN + STD * noise)).abs().max().item())
    order = math.log(errors[0] / errors[1]) / math.log(evaluations[1] / evaluations[0])
    assert 4.5 < order < 6.5


def test_number_of_evaluations():
    calls = []

    def counted(x, t):
        calls.append(t.item())
        return field(x, t)

    noise = torch.zeros(1, 1)
    for sampler, expected in ((Euler(10), 9), (Heun(10), 18), (EulerMaruyama(10), 10)):
        calls.clear()
        sampler(counted, noise)
        assert len(calls) == expected
        assert min(calls) == 0
    assert max(calls) == pytest.approx(0.96)  # the SDE's last step starts at noise level 0.04


@pytest.mark.parametrize("steps", [250])
def test_sde_has_the_right_mean_and_variance(steps):
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(20_000, generator=generator, dtype=torch.float64)
    samples = EulerMaruyama(steps)(field, noise, lambda: torch.randn(20_000, generator=generator, dtype=torch.float64))
    assert samples.mean().item() == pytest.approx(MEAN, abs=0.02)
    assert samples.std().item() == pytest.approx(STD, rel=0.03)


def test_sde_draws_fresh_noise_but_for_the_last_step():
    draws = []
    noise = torch.zeros(4, 3)

    def fresh():
        draws.append(torch.randn_like(noise))
        return draws[-1]

    EulerMaruyama(10)(field, noise, fresh)
    assert len(draws) == 9


def test_score_is_that_of_the_gaussian():
    t = torch.tensor([0.0, 0.3, 0.8], dtype=torch.float64)
    x = torch.tensor([[0.5], [-1.0], [2.0]], dtype=torch.float64)
    velocity = torch.cat([field(row[None], time) for row, time in zip(x, t, strict=True)])
    variance = t**2 * STD**2 + (1 - t) ** 2
    expected = -(x - (t * MEAN)[:, None]) / variance[:, None]
    assert torch.allclose(path.score(velocity, x, t), expected)


def test_velocity_is_the_derivative_of_the_path():
    data, noise = torch.randn(2, 3, 4, 4, 4, dtype=torch.float64)
    t = torch.tensor([0.0, 0.4, 0.9], dtype=torch.float64)
    slope = (path.interpolate(data, noise, t + 1e-6) - path.interpolate(data, noise, t)) / 1e-6
    assert torch.allclose(slope, path.velocity(data, noise), atol=1e-6)
    assert torch.equal(path.interpolate(data, noise, torch.zeros(3)), noise)
    assert torch.equal(path.interpolate(data, noise, torch.ones(3)), data)


def test_shift_spends_steps_near_noise_or_near_data():
    even, near_noise, near_data = (time_grid(101, shift) for shift in (1.0, 0.3, 3.0))
    assert torch.equal(even, torch.linspace(0, 1, 101))
    assert (near_noise < 0.5).sum() > 70 and (near_data > 0.5).sum() > 70
    assert near_noise[0] == near_data[0] == 0 and near_noise[-1] == near_data[-1] == 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Euler(1), "steps: must be at least 2, given 1"),
        (lambda: EulerMaruyama(10, 1.0), "last: a noise level"),
        (lambda: path.times("cosine", torch.zeros(1)), "times: 'uniform' or 'lognormal'"),
    ],
)
def test_bad_options_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("sampler", [Euler(4, 0.3), Heun(4), EulerMaruyama(4)])
@pytest.mark.parametrize("guidance", [Guidance(), Guidance(2.0, start=0.5, channels=3)])
def test_the_state_stays_on_its_device(sampler, guidance):
    """The meta device computes nothing, but refuses to meet another, as a GPU does."""
    with torch.device("meta"):
        model = LightningDiT(4, 4, 1, 2, 32, 2, num_classes=3)
        noise, labels = torch.empty(2, 4, 4, 4), Labels(torch.zeros(2, dtype=torch.int64), 3)
    samples = sampler(guidance.field(model, labels), noise)
    assert samples.device.type == "meta" and samples.dtype == torch.float32
