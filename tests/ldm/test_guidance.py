"""Classifier-free guidance: what is computed, and what comes out."""

import pytest
import torch

from ldm.condition import Labels
from ldm.guidance import Guidance, InternalGuidance
from ldm.models.denoiser import Denoiser, Prediction

NULL = 10


class Model(Denoiser):
    """Predicts its label, everywhere; counts what it is asked for."""

    def __init__(self, in_channels: int = 4, input_size: int = 2, cls_channels: int = 0):
        super().__init__(in_channels, input_size, NULL, cls_channels)
        self.sizes = []

    def forward(self, state, t, condition, align=False):
        self.sizes.append(len(state))
        assert t.shape == condition.labels.shape == (len(state),)
        return Prediction(state + condition.labels.reshape(-1, *(1,) * (state.ndim - 1)))


def run(guidance, t, model=None):
    x, labels = torch.randn(3, 4, 2, 2, generator=torch.Generator().manual_seed(0)), torch.tensor([1, 2, 3])
    return x, labels, guidance.field(model or Model(), Labels(labels, NULL))(x, torch.tensor(t))


@pytest.mark.parametrize(("t", "guided"), [(0.1, False), (0.125, True), (0.5, True), (0.75, True), (0.76, False)])
def test_the_unconditional_half_is_computed_inside_the_interval_only(t, guided):
    model = Model()
    x, labels, velocity = run(Guidance(3.0, 0.125, 0.75), t, model)
    assert model.sizes == [6 if guided else 3]
    labels = labels[:, None, None, None]
    expected = x + (NULL + 3.0 * (labels - NULL) if guided else labels)
    assert torch.allclose(velocity, expected)


def test_scale_one_is_no_guidance():
    model = Model()
    run(Guidance(1.0), 0.5, model)
    assert model.sizes == [3]


def test_channels_beyond_the_guided_ones_are_conditional():
    x, labels, velocity = run(Guidance(3.0, channels=3), 0.5)
    labels = labels[:, None, None, None]
    assert torch.allclose(velocity[:, :3], (x + NULL + 3.0 * (labels - NULL))[:, :3])
    assert torch.allclose(velocity[:, 3:], (x + labels)[:, 3:])
    _, _, everything = run(Guidance(3.0, channels=4), 0.5)
    assert torch.equal(everything, run(Guidance(3.0), 0.5)[2])


@pytest.mark.parametrize("kind", [Guidance, InternalGuidance])
def test_another_scale_or_interval_leaves_the_rest(kind):
    guidance = kind(2.0, 0.1, 0.9, 3, 1.5)
    assert vars(guidance.with_scale(5.0)) == vars(kind(5.0, 0.1, 0.9, 3, 1.5))
    assert vars(guidance.with_interval(0.3, 0.4)) == vars(kind(2.0, 0.3, 0.4, 3, 1.5))
    assert type(guidance.with_scale(5.0)) is type(guidance.with_interval(0.3, 0.4)) is kind


@pytest.mark.parametrize("end", [0.1, 0.2, 0.3, 0.7, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rounding_excludes_no_end_of_the_interval(end, dtype):
    """As float32, 0.3 is above 0.3 and 0.7 below; and 1 − 0.8 is below 0.2 in any precision."""
    for time in (torch.tensor(end, dtype=dtype), 1 - torch.tensor(1 - end, dtype=dtype)):
        assert Guidance(2.0, start=end).acts_at(time.item())
        assert Guidance(2.0, end=end).acts_at(time.item())
    assert not Guidance(2.0, start=end).acts_at(end - 1e-5)
    assert not Guidance(2.0, end=end).acts_at(end + 1e-5)


def test_settings_of_samples_are_those_of_former_versions():
    """Folders of samples are completed by the same settings alone."""
    assert Guidance(2.0, start=0.1).settings() == {
        "scale": 2.0,
        "start": 0.1,
        "end": 1.0,
        "channels": None,
        "cls_scale": 0.0,
    }


@pytest.mark.parametrize("options", [{"start": -0.1}, {"start": 0.6, "end": 0.5}, {"end": 1.1}, {"channels": 0}])
def test_bad_options_are_named(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        Guidance(2.0, **options)


@pytest.mark.parametrize("cls_scale", [0.0, 2.0])
def test_a_class_token_has_its_own_scale(cls_scale):
    labels = torch.tensor([1, 2])
    field = Guidance(3.0, cls_scale=cls_scale).field(Model(5, 1, cls_channels=3), Labels(labels, NULL))
    velocity = field(torch.zeros(2, 8), torch.tensor(0.5))
    assert torch.allclose(velocity[:, :5], (NULL + 3.0 * (labels - NULL)).float()[:, None])
    token = NULL + 2.0 * (labels - NULL) if cls_scale else labels
    assert torch.allclose(velocity[:, 5:], token.float()[:, None])


def test_beside_a_class_token_channels_are_guided_alike():
    """Of a latent of 3 channels and 4 positions, laid flat, the first channel alone."""
    labels = torch.tensor([1])
    field = Guidance(3.0, channels=1).field(Model(3, 2, cls_channels=2), Labels(labels, NULL))
    velocity = field(torch.zeros(1, 14), torch.tensor(0.5))
    assert (velocity[0, :4] == NULL + 3.0 * (1 - NULL)).all()
    assert (velocity[0, 4:] == 1).all()
