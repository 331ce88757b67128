"""Internal guidance: one pass through the denoiser, and classifier-free guidance on top of it."""

import pytest
import torch
from latent_cache import NUM_CLASSES

from ldm.condition import Labels
from ldm.guidance import Guidance, InternalGuidance
from ldm.models.denoiser import Denoiser, Prediction
from ldm.models.lightningdit import LightningDiT
from ldm.models.sit import SiT
from ldm.pipeline import LatentDiffusion
from ldm.samplers import Dopri5, Euler, EulerMaruyama, Heun
from vfm_vae.data.latents import LatentStatistics

NULL = 10
LABELS = torch.tensor([1, 2, 3])


class Halfway(Denoiser):
    """Predicts its label, and halfway a third of it; notes how many rows it is asked for, and whether halfway, too."""

    def __init__(self, cls_channels: int = 0):
        super().__init__(4, 2, NULL, cls_channels, base_depth=1)
        self.asked = []

    def forward(self, state, t, condition, align=False, base=False):
        self.asked.append((len(state), base))
        velocity = state + condition.labels.reshape(-1, *(1,) * (state.ndim - 1)).float()
        return Prediction(velocity, None, (velocity - state) / 3 + state if base else None)


def run(guidance, t, model):
    x = torch.randn(3, *model.state_shape, generator=torch.Generator().manual_seed(0))
    return x, guidance.field(model, Labels(LABELS, NULL))(x, torch.tensor(t))


def internal(labels, scale):
    return labels / 3 + scale * (labels - labels / 3)


@pytest.mark.parametrize(("t", "guided"), [(0.1, False), (0.2, True), (0.9, True), (0.95, False)])
def test_it_takes_one_pass_of_as_many_rows_as_samples(t, guided):
    model = Halfway()
    x, velocity = run(InternalGuidance(1.78, 0.2, 0.9), t, model)
    assert model.asked == [(3, guided)]
    expected = internal(LABELS, 1.78) if guided else LABELS
    assert torch.allclose(velocity, x + expected[:, None, None, None])


def test_at_scale_one_nothing_is_asked_halfway():
    model = Halfway()
    x, velocity = run(InternalGuidance(), 0.5, model)
    assert model.asked == [(3, False)]
    assert torch.equal(velocity, x + LABELS[:, None, None, None])


@pytest.mark.parametrize(
    ("t", "asked", "expected"),
    [
        (0.05, (3, False), LABELS),
        (0.2, (3, True), internal(LABELS, 1.5)),
        (0.4, (6, True), internal(NULL, 1.5) + 2.0 * (internal(LABELS, 1.5) - internal(NULL, 1.5))),
        (0.8, (6, False), NULL + 2.0 * (LABELS - NULL)),
        (0.95, (3, False), LABELS),
    ],
)
def test_on_top_of_it_each_guidance_keeps_to_its_own_interval(t, asked, expected):
    model = Halfway()
    guidance = Guidance(2.0, 0.3, 0.9, inner=InternalGuidance(1.5, 0.1, 0.5))
    x, velocity = run(guidance, t, model)
    assert model.asked == [asked]
    assert torch.allclose(velocity, x + expected[:, None, None, None], atol=1e-5)


def test_another_scale_is_the_outer_one_and_scale_one_is_no_guidance_at_all():
    guidance = Guidance(2.0, inner=InternalGuidance(1.5))
    assert guidance.with_scale(3.0).inner is guidance.inner
    assert guidance.with_interval(0.2, 0.5).inner is guidance.inner
    assert not guidance.with_scale(1.0).acts
    inner_alone, model = Guidance(1.0, inner=InternalGuidance(1.5)), Halfway()
    assert inner_alone.acts
    run(inner_alone, 0.5, model)
    assert model.asked == [(3, True)]


def test_channels_and_the_class_token_are_guided_as_by_other_guidance():
    model = Halfway(cls_channels=2)
    x, velocity = run(InternalGuidance(2.0, channels=1, cls_scale=4.0), 0.5, model)
    moved = velocity - x
    assert torch.allclose(moved[:, :4], internal(LABELS, 2.0)[:, None].expand(3, 4), atol=1e-5)
    assert torch.allclose(moved[:, 4:16], LABELS[:, None].float().expand(3, 12), atol=1e-5)
    assert torch.allclose(moved[:, 16:], internal(LABELS, 4.0)[:, None].expand(3, 2), atol=1e-5)


def small(kind=LightningDiT, **options):
    torch.manual_seed(0)
    model = kind(in_channels=4, input_size=4, depth=2, width=32, num_heads=2, num_classes=3, base_depth=1, **options)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


def drawing(network, sampler, guidance):
    diffusion = LatentDiffusion(network, sampler, guidance).eval()
    diffusion.normalization.take(LatentStatistics(torch.zeros(1, 4, 1, 1), torch.ones(1, 4, 1, 1)))
    return diffusion


@pytest.mark.parametrize("sampler", [Euler(5, shift=0.3), Heun(4), Dopri5(), EulerMaruyama(5)], ids=type)
def test_samples_by_every_sampler_come_back_from_their_folder(sampler, tmp_path):
    model = drawing(small(), sampler, InternalGuidance(1.78, end=0.9))
    calls = []
    handle = model.model.register_forward_pre_hook(lambda module, given: calls.append(len(given[0])))
    latents = model.sample([0, 1, 2]).latents
    assert set(calls) == {3}
    handle.remove()
    plain = model.sample([0, 1, 2], guidance_scale=1.0).latents
    assert not torch.allclose(latents, plain, atol=1e-2)
    model.save_pretrained(tmp_path)
    loaded = LatentDiffusion.from_pretrained(tmp_path)
    assert torch.equal(loaded.sample([0, 1, 2]).latents, latents)
    assert loaded.settings() == model.settings()
    assert loaded.settings()["guidance"]["class"] == "InternalGuidance"


def test_guidance_on_top_comes_back_from_its_folder(tmp_path):
    model = drawing(small(), Euler(4), Guidance(2.0, 0.2, inner=InternalGuidance(1.5, end=0.9)))
    model.save_pretrained(tmp_path)
    loaded = LatentDiffusion.from_pretrained(tmp_path)
    assert torch.equal(loaded.sample([0, 1]).latents, model.sample([0, 1]).latents)
    assert loaded.settings() == model.settings()
    assert loaded.settings()["guidance"]["inner"]["end"] == 0.9


def test_a_class_token_is_drawn_along():
    network = small(SiT, cls_channels=6, align_channels=6, align_depth=1)
    latents = [
        drawing(network, EulerMaruyama(5), InternalGuidance(2.0, cls_scale=scale)).sample([0, 1]).latents
        for scale in (0.0, 3.0)
    ]
    assert latents[0].shape == (2, 4, 4, 4)
    assert not torch.allclose(*latents, atol=1e-3)  # the token acts on the latents


@pytest.mark.parametrize("guidance", [InternalGuidance(1.78), Guidance(2.0, inner=InternalGuidance(1.5))])
def test_a_denoiser_without_an_internal_head_is_refused(guidance, diffusion):
    with pytest.raises(ValueError, match=r"^guidance: InternalGuidance leads away .* this LightningDiT has no"):
        diffusion(guidance=guidance)
    assert diffusion({"base_depth": 1}, guidance=guidance).pipeline.guidance is guidance
    network = LightningDiT(in_channels=4, input_size=4, depth=1, width=32, num_heads=2, num_classes=NUM_CLASSES)
    with pytest.raises(ValueError, match="train one with base_depth"):
        drawing(network, Euler(2), guidance).sample([0])


def test_channels_of_an_inner_guidance_are_checked_too(diffusion):
    with pytest.raises(ValueError, match=r"^guidance\.channels: must be in \[1, 4\], given 5"):
        diffusion({"base_depth": 1}, guidance=Guidance(2.0, inner=InternalGuidance(1.5, channels=5)))
