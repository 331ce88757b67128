"""Classifier-free guidance: what is computed, and what comes out."""

import pytest
import torch

from ldm.condition import Labels
from ldm.guidance import Guidance
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


def test_another_scale_leaves_the_rest():
    assert vars(Guidance(2.0, 0.1, 0.9, 3, 1.5).with_scale(5.0)) == vars(Guidance(5.0, 0.1, 0.9, 3, 1.5))


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
