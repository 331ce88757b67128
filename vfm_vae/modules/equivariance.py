"""Equivariance regularisation: transforming an image must transform its latent alike (VFM-VAE, arXiv 2510.18457)."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from vfm_vae.images import Interpolation, resize
from vfm_vae.options import at_least, positive, within


@dataclass(frozen=True)
class Transform:
    """One draw of the regulariser, for a whole batch: it transforms the latent, or the input image, or neither.

    A training step encodes `images = shrink(images)`, decodes `latent(z)`, and compares with `image(images)`.

    Attributes:
        scale: Factor on height and width of the latent and of the target.
        quarter_turns: Clockwise rotations by 90° of the latent and of the target.
        prior_scale: Factor on height and width of the input image (the prior branch).
    """

    scale: float = 1.0
    quarter_turns: int = 0
    prior_scale: float = 1.0

    def shrink(self, images: Tensor, interpolation: Interpolation) -> Tensor:
        """Shrinks images `[B, 3, H, W]` before the VFM, antialiased; the shrunk images are the target, too."""
        return resize(images, _scaled(images, self.prior_scale), interpolation)

    def latent(self, z: Tensor) -> Tensor:
        """Scales latents `[B, C, h, w]`, bilinear without antialiasing, then turns them."""
        z = resize(z, _scaled(z, self.scale), "bilinear", antialias=False)
        return self._turn(z)

    def image(self, images: Tensor, interpolation: Interpolation) -> Tensor:
        """Scales target images `[B, 3, H, W]` as the latent was, but antialiased, then turns them."""
        images = resize(images, _scaled(images, self.scale), interpolation)
        return self._turn(images)

    def _turn(self, maps: Tensor) -> Tensor:
        # rot90 counts anticlockwise.
        return torch.rot90(maps, -self.quarter_turns, (-2, -1)) if self.quarter_turns % 4 else maps


@final
class EquivarianceRegularizer:
    """Draws one transform for each rank's batch.

    With `probability` the latent is scaled and turned; otherwise, with `prior_probability`, the input image is shrunk;
    otherwise nothing happens. A draw is a pure function of the seed, the number of images seen, the rank, the phase of
    the step and the latent's size, so there is no state to store, and a resumed run draws what an uninterrupted one
    does.

    Scales that would give a latent which the decoder can't take are left out: if height and width must be multiples of
    4, a 16x16 latent is scaled by any of the default factors, an 8x8 latent never by 0.25 or 0.75.

    Args:
        probability: How often the latent is transformed, 0 to 1.
        prior_probability: How often the input is shrunk when the latent is not transformed, 0 to 1.
        scales: Factors for the latent, all equally likely.
        prior_scales: Factors for the input image, all equally likely.
        seed: Chooses the sequence of draws.

    Raises:
        ValueError: if an option lies outside its range.
    """

    def __init__(
        self,
        probability: float = 0.5,
        prior_probability: float = 0.25,
        scales: Sequence[float] = (0.25, 0.5, 0.75, 1.0),
        prior_scales: Sequence[float] = (0.25, 0.5, 0.75),
        seed: int = 0,
    ) -> None:
        within(0, 1, probability=probability, prior_probability=prior_probability)
        positive(scales=scales, prior_scales=prior_scales)
        at_least(0, seed=seed)
        self.probability = probability
        self.prior_probability = prior_probability
        self.scales = tuple(scales)
        self.prior_scales = tuple(prior_scales)
        self.seed = seed

    def draw(
        self, images_seen: int, latent_grid: Sequence[int], *, rank: int = 0, phase: str = "", side_multiple: int = 4
    ) -> Transform:
        """The transform of a rank's batch that begins after `images_seen` images.

        Args:
            images_seen: How many images training has seen so far, over all ranks.
            latent_grid: Rows and columns of the untransformed latent.
            rank: The rank whose batch it is.
            phase: Name of the step's phase, where each phase draws for itself.
            side_multiple: Latents' rows and columns must be multiples of this, see `Decoder.side_multiple`.

        Raises:
            ValueError: if those of `latent_grid` are not.
        """
        if any(side % side_multiple for side in latent_grid):
            raise ValueError(f"latent_grid: sides must be multiples of {side_multiple}, given {tuple(latent_grid)}")
        # Seeding by a string hashes it (SHA-512), so that neighbouring counters give unrelated draws.
        generator = random.Random(f"{self.seed} {images_seen} {rank} {phase}")

        def choose(scales: Sequence[float]) -> float:
            usable = [s for s in scales if all(side * s % side_multiple == 0 for side in latent_grid)]
            return generator.choice(usable or [1.0])

        if generator.random() < self.probability:
            return Transform(scale=choose(self.scales), quarter_turns=generator.randrange(4))
        if generator.random() < self.prior_probability:
            return Transform(prior_scale=choose(self.prior_scales))
        return Transform()


def _scaled(maps: Tensor, scale: float) -> tuple[int, int]:
    return round(maps.shape[-2] * scale), round(maps.shape[-1] * scale)
