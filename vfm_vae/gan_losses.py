"""The adversarial losses of one step, of the generator and of the discriminators."""

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property

import torch
from torch import Tensor

from vfm_vae.discriminators.patchgan import PatchGAN
from vfm_vae.discriminators.projected import ProjectedDiscriminator
from vfm_vae.losses.adversarial import (
    feature_matching_loss,
    hinge_discriminator_loss,
    hinge_generator_loss,
    least_squares_discriminator_loss,
    least_squares_generator_loss,
)
from vfm_vae.losses.objective import Objective

DISCRIMINATOR_LOSSES: Mapping[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "hinge": hinge_discriminator_loss,
    "least_squares": least_squares_discriminator_loss,
}
GENERATOR_LOSSES: Mapping[str, Callable[..., Tensor]] = {
    "hinge": hinge_generator_loss,
    "least_squares": least_squares_generator_loss,
}


class GANLosses:
    """Losses of a projected discriminator and of a PatchGAN, of whichever there are, on the same real images.

    Args:
        discriminator: Trained by hinge losses; None where there is none.
        patchgan: Trained by the losses that it names; its features are matched as well. None where there is none.
        real: Images as they should be, `[B, 3, H, W]` in [-1, 1].

    Attributes:
        logits: Mean logits of the projected discriminator by name, once its own terms are known.
    """

    def __init__(self, discriminator: ProjectedDiscriminator | None, patchgan: PatchGAN | None, real: Tensor):
        self.discriminator, self.patchgan, self.real = discriminator, patchgan, real
        self.logits: dict[str, Tensor] = {}

    @cached_property
    def _real_patches(self) -> list[list[Tensor]]:
        """The PatchGAN's features of real images, used by the generator's loss and then by the PatchGAN's own."""
        return [] if self.patchgan is None else self.patchgan(self.real)

    def generator_terms(self, generated: Tensor, alone: bool = False) -> dict[str, Tensor]:
        """The generator's unweighted terms by name; the discriminators' weights take no gradient from them.

        Args:
            generated: Its images, `[B, 3, H, W]` in [-1, 1].
            alone: Whether `discriminator_terms` do not follow, so that of real images nothing is kept for them.
        """
        with torch.set_grad_enabled(not alone):
            real = self._real_patches
        self._train(False)
        terms: dict[str, Tensor] = {}
        if self.discriminator is not None:
            terms["adversarial"] = hinge_generator_loss(self.discriminator(generated))
        if self.patchgan is not None:
            patches = self.patchgan(generated)
            terms["adversarial_patch"] = GENERATOR_LOSSES[self.patchgan.loss](_logits(patches))
            terms["feature_matching"] = feature_matching_loss(real, patches)
        self._train(True)
        return terms

    def discriminator_terms(self, generated: Tensor) -> dict[str, Tensor]:
        """The discriminators' terms by name, whose sum they minimise; `generated` takes no gradient."""
        generated = generated.detach()
        terms: dict[str, Tensor] = {}
        if self.discriminator is not None:
            fake = self.discriminator(generated)  # first, as published: each pass moves the spectral norms' vectors on
            real = self.discriminator(self.real)
            self.logits = {"logits_real": real.detach().mean(), "logits_generated": fake.detach().mean()}
            losses = hinge_discriminator_loss(real, fake)
            terms |= dict(zip(("discriminator_real", "discriminator_generated"), losses, strict=True))
        if self.patchgan is not None:
            loss = DISCRIMINATOR_LOSSES[self.patchgan.loss]
            losses = loss(_logits(self._real_patches), _logits(self.patchgan(generated)))
            terms |= dict(zip(("patchgan_real", "patchgan_generated"), losses, strict=True))
        return terms

    def _train(self, wanted: bool) -> None:
        for player in (self.discriminator, self.patchgan):
            if player is not None:
                player.requires_grad_(wanted)


def check_opponents(
    objective: Objective,
    discriminator: ProjectedDiscriminator | None,
    patchgan: PatchGAN | None,
    has_optimizer: bool,
    discriminate_from: int | None,
) -> None:
    """Checks that losses have their discriminators, and these what they need to learn in time.

    Args:
        objective: Weighs the generator's losses.
        discriminator: None where there is none.
        patchgan: None where there is none.
        has_optimizer: Whether there is an optimizer of discriminators.
        discriminate_from: Images after which they learn; None for those after which their losses are weighed.

    Raises:
        ValueError: if not.
    """
    needed = {
        "adversarial": (discriminator, "a discriminator; give model.discriminator"),
        "adversarial_patch": (patchgan, "a PatchGAN; give model.patchgan"),
        "feature_matching": (patchgan, "a PatchGAN; give model.patchgan"),
    }
    for name, (opponent, what) in needed.items():
        if objective.weights[name] and opponent is None:
            raise ValueError(f"objective.{name}: {objective.weights[name]:g} needs {what}, or set 0")
    if not has_optimizer and not (discriminator is None and patchgan is None):
        raise ValueError("discriminator_optimizer: discriminators need one; give it, or set both of them to null")
    if discriminate_from is not None and discriminate_from > objective.adversarial_from:
        raise ValueError(
            f"discriminate_from: must be at most objective.adversarial_from={objective.adversarial_from}, so that the "
            f"tokenizer meets no untrained discriminator, given {discriminate_from}"
        )


def _logits(patches: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """The last output of every scale."""
    return [outputs[-1] for outputs in patches]
