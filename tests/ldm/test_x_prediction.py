"""Networks that predict data: their velocities, their targets, and what samplers make of them."""

import math

import pytest
import torch
from test_denoiser import every_class, inputs, randomised, small

from ldm import path
from ldm.condition import Labels
from ldm.guidance import Guidance
from ldm.models.denoiser import Denoiser, Prediction
from ldm.objective import denoising_errors
from ldm.samplers import Dopri5, Euler, EulerMaruyama, Heun

LABELS = Labels(torch.zeros(2, dtype=torch.long), 1)


class Knows(Denoiser):
    """Predicts the data that it is given, halfway too."""

    def __init__(self, data: torch.Tensor, cls_channels: int = 0):
        super().__init__(3, 4, 1, cls_channels, base_depth=1, predicts="data")
        self.data, self.blocks = data, torch.nn.ModuleList()

    def forward(self, state, t, condition, align=False, base=False):
        velocity = self.as_velocity(self.data.to(state.dtype), state, t)
        return Prediction(velocity, None, velocity if base else None)


def data_of(cls_channels: int = 0) -> torch.Tensor:
    shape = (2, 48 + cls_channels) if cls_channels else (2, 3, 4, 4)
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("cls_channels", [0, 6])
@pytest.mark.parametrize("time", [0.0, 0.3, 0.97, 1 - 2**-24, 1.0])
def test_who_knows_the_data_has_no_error(cls_channels, time):
    data = data_of(cls_channels)
    model, noise = Knows(data, cls_channels), torch.randn_like(data)
    errors = denoising_errors(model, None, data, None, noise, torch.full((2,), time), LABELS)
    assert set(errors) == {"mse", "cosine", "base"} | ({"cls"} if cls_channels else set())
    certain = 0.0 if time < 0.98 else 2.0  # where nothing is left to predict, its direction means nothing
    assert all((error >= 0).all() and (error <= certain + 1e-6).all() for error in errors.values())
    assert (errors["mse"] == 0).all()


@pytest.mark.parametrize("time", [0.0, 0.5, 0.9, 0.95, 0.99])
def test_the_target_is_the_velocity_up_to_the_limit_and_smaller_beyond(time):
    """So a network of zeros is as wrong as theory says: its velocity is `−x_t` over the time left, 0.05 at least."""
    data, left = data_of(), max(1 - time, 0.05)
    noise, t = torch.randn_like(data), torch.full((2,), time)
    noisy = path.interpolate(data, noise, t)
    target = Knows(data).as_velocity(data, noisy, t)
    assert torch.allclose(target, (data - noise) * (1 - time) / left, atol=1e-5)
    model = Knows(torch.zeros_like(data))
    errors = denoising_errors(model, None, data, None, noise, t, LABELS)
    assert torch.allclose(errors["mse"], data.square().mean((1, 2, 3)) / left**2, rtol=1e-4)
    cosine = torch.cosine_similarity(-noisy, data - noise, dim=1).mean((1, 2))
    assert torch.allclose(errors["cosine"], 1 - cosine, atol=1e-4)


@every_class
def test_both_outputs_of_a_denoiser_are_data(kind):
    """The same weights as those of a velocity: what they give is converted once, also for the class token."""
    t = torch.tensor([0.25, 0.98])
    models = [randomised(small(kind, "reg", base_depth=1, predicts=predicts)) for predicts in ("velocity", "data")]
    (state, _, told), outputs = inputs(models[0]), []
    for model in models:
        prediction = model(state, t, told, base=True)
        outputs.append((prediction.velocity, prediction.base))
    for output, velocity in zip(*outputs, strict=True):
        assert torch.allclose(velocity, (output - state) / torch.tensor([[0.75], [0.05]]), rtol=1e-5)


@every_class
def test_velocities_are_float32_under_autocast(kind):
    model = randomised(small(kind, "none", base_depth=1, predicts="data"))
    for parameter in model.parameters():
        parameter.data.mul_(0.2)
    state, _, told = inputs(model)
    t = torch.tensor([0.5, 1.0])
    full = model(state, t, told, base=True)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(state, t, told, base=True)
    for expected, found in ((full.velocity, mixed.velocity), (full.base, mixed.base)):
        assert found.dtype == torch.float32
        assert (found - expected).norm() < 0.05 * expected.norm()
    halved = model.as_velocity(state.bfloat16(), state.bfloat16() + 0.01, t.bfloat16())
    assert halved.dtype == torch.float32


def sampled(sampler, num: int = 2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Data, the noise that sampling begins with, and what it ends at with a network that knows the data."""
    data, noise = torch.randn(2, num, 3, 4, 4, generator=torch.Generator().manual_seed(5))
    field = Guidance().field(Knows(data), Labels(torch.zeros(num, dtype=torch.long), 1))
    with torch.no_grad():
        return data, noise, sampler(field, noise)


@pytest.mark.parametrize("sampler", [Euler(2), Euler(21), Euler(50, shift=0.1)])
def test_a_last_step_that_begins_before_the_limit_ends_at_the_data(sampler):
    assert sampler.times[-2] <= 0.95 + 1e-6
    data, _, found = sampled(sampler)
    assert torch.allclose(found, data, atol=1e-5)


@pytest.mark.parametrize("sampler", [Euler(251), Heun(251), Dopri5()], ids=lambda value: type(value).__name__)
def test_finer_grids_leave_a_little_noise(sampler):
    """Within the limit the way to the data is exponential: 1/e of the noise at t = 0.95 is left, 1.8 %."""
    data, noise, found = sampled(sampler)
    left = (found - data) / (noise - data)
    assert left.mean().item() == pytest.approx(0.05 / math.e, abs=2e-3)
    assert left.std() < 1e-3


def test_a_wide_last_step_of_heun_goes_half_the_way():
    """At t = 1 there is nowhere left to go, and it takes the mean of both ends of the step."""
    data, noise, found = sampled(Heun(2))
    assert torch.allclose(found, (data + noise) / 2, atol=1e-5)


@pytest.mark.parametrize(("last", "share"), [(0.05, 1.0), (0.04, 0.985)])
def test_the_sde_is_free_of_bias_where_its_last_step_begins_at_the_limit(last, share):
    """The score is made of the velocity, so beyond the limit it pulls towards zero."""
    torch.manual_seed(0)
    data, _, found = sampled(EulerMaruyama(250, last), num=200)
    assert ((found * data).mean() / data.square().mean()).item() == pytest.approx(share, abs=3e-3)
    assert (found - share * data).std() < 0.06


def test_one_batch_is_learned(diffusion, latents, trainer):
    module = diffusion({"predicts": "data", "base_depth": 1})
    losses = []
    module.log = lambda name, value, **_: losses.append(float(value)) if name == "train/loss" else None
    module.log_dict = lambda *_, **__: None
    trainer(max_steps=60, limit_val_batches=0, log_every_n_steps=1).fit(module, latents(batch_size=16))
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    samples = module.draw(torch.arange(6), torch.tensor([0, 1, 2] * 2), decode=False).latents
    assert samples.isfinite().all()


def test_weights_of_a_velocity_are_not_taken_for_those_of_data(diffusion, latents, trainer, tmp_path):
    """Nor the other way round, when training goes on as when it begins from them."""
    files = {}
    for predicts in ("velocity", "data"):
        run = trainer(max_steps=1, limit_val_batches=0)
        run.fit(diffusion({"predicts": predicts}), latents())
        files[predicts] = tmp_path / f"{predicts}.ckpt"
        run.save_checkpoint(files[predicts])
    for predicts, other in (("velocity", "data"), ("data", "velocity")):
        message = f"predicts '{other}', but model.predicts is '{predicts}'; set it to '{other}'"
        with pytest.raises(ValueError, match=f"^ckpt_path: the checkpoint's denoiser {message}"):
            trainer().validate(diffusion({"predicts": predicts}), latents(), ckpt_path=files[other], weights_only=True)
        with pytest.raises(ValueError, match=f"^init_from: the checkpoint's denoiser {message}"):
            trainer(max_steps=1).fit(diffusion({"predicts": predicts}, init_from=str(files[other])), latents())
        trainer(max_steps=2, limit_val_batches=0).fit(
            diffusion({"predicts": predicts}), latents(), ckpt_path=files[predicts], weights_only=True
        )
