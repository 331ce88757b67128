import pytest
import torch

from vfm_vae.losses.adversarial import (
    feature_matching_loss,
    hinge_discriminator_loss,
    hinge_generator_loss,
    least_squares_discriminator_loss,
    least_squares_generator_loss,
)


def test_hinge_closed_forms():
    real, generated = torch.tensor([[2.0, 0.5]]), torch.tensor([[-3.0, 1.0]])
    loss_real, loss_generated = hinge_discriminator_loss(real, generated)
    assert (loss_real.item(), loss_generated.item()) == (0.25, 1.0)
    assert hinge_generator_loss(generated).item() == 1.0


def test_confident_discriminator_takes_no_gradient():
    real = torch.full((2, 3), 1.5, requires_grad=True)
    generated = torch.full((2, 3), -1.5, requires_grad=True)
    sum(hinge_discriminator_loss(real, generated)).backward()
    assert not real.grad.any()
    assert not generated.grad.any()


def test_several_scales_weigh_alike():
    small, large = torch.full((2, 1, 2, 2), 4.0), torch.full((2, 1, 9, 9), -2.0)
    assert hinge_generator_loss([small, large]).item() == -1.0
    assert least_squares_generator_loss([small, large]).item() == 9.0


def test_losses_are_float32_whatever_the_logits():
    logits = torch.ones(2, 3, dtype=torch.bfloat16)
    assert hinge_generator_loss(logits).dtype == torch.float32
    assert least_squares_generator_loss(logits).dtype == torch.float32
    assert all(term.dtype == torch.float32 for term in least_squares_discriminator_loss(logits, logits))
    assert feature_matching_loss([[logits, logits]], [[logits, logits]]).dtype == torch.float32


def test_least_squares_closed_forms():
    real, generated = torch.tensor([[2.0, 0.5]]), torch.tensor([[-3.0, 1.0]])
    loss_real, loss_generated = least_squares_discriminator_loss(real, generated)
    assert (loss_real.item(), loss_generated.item()) == (0.625, 5.0)
    assert least_squares_generator_loss(generated).item() == 8.0


def outputs(*values: float) -> list[torch.Tensor]:
    return [torch.full((2, i + 1, 3, 3), float(value)) for i, value in enumerate(values)]


def test_feature_matching_closed_form():
    real = [outputs(1, 2, 3, 4, 0), outputs(0, 0, 0, 0, 0)]
    generated = [outputs(2, 0, 3, 4, 9), outputs(0, 0, 0, 5, 9)]
    assert feature_matching_loss(real, generated).item() == 4.0  # the mean of 1 + 2 and of 5, without the logits
    # Fewer layers weigh more: two features of three outputs by 4/2.
    assert feature_matching_loss([outputs(0, 0, 0)], [outputs(1, 2, 9)]).item() == 6.0


def test_feature_matching_trains_the_generated_side_only():
    real = [[features.requires_grad_() for features in outputs(0, 0, 0)]]
    generated = [[features.requires_grad_() for features in outputs(1, 1, 1)]]
    feature_matching_loss(real, generated).backward()
    assert all(features.grad is None for features in real[0])
    assert [features.grad is None for features in generated[0]] == [False, False, True]


def test_feature_matching_takes_equal_numbers_of_layers_and_scales():
    for other in ([outputs(1, 1)], [outputs(1, 1, 1)] * 2):
        with pytest.raises(ValueError, match="zip"):
            feature_matching_loss([outputs(1, 1, 1)], other)
