import torch

from vfm_vae.losses.adversarial import hinge_discriminator_loss, hinge_generator_loss


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


def test_losses_are_float32_whatever_the_logits():
    logits = torch.ones(2, 3, dtype=torch.bfloat16)
    assert hinge_generator_loss(logits).dtype == torch.float32
