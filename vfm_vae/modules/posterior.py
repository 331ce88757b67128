"""Posteriors of continuous tokenizers: a Gaussian, or a single point."""

import torch
from torch import Tensor


class DiagonalGaussian:
    """A normal distribution with a diagonal covariance over latents.

    Computed in float32, whatever the moments' precision: a log-variance in bfloat16 has steps of 1 %.

    Args:
        moments: Means, then log-variances, `[B, 2C, h, w]`; log-variances are clamped to [-30, 20].

    Attributes:
        mean: `[B, C, h, w]`.
        logvar: `[B, C, h, w]`, clamped.
    """

    def __init__(self, moments: Tensor):
        self.mean, logvar = moments.float().chunk(2, dim=1)
        self.logvar = logvar.clamp(-30.0, 20.0)

    def mode(self) -> Tensor:
        """The mean, `[B, C, h, w]`."""
        return self.mean

    def sample(self, noise: Tensor | None = None) -> Tensor:
        """`mean + exp(logvar / 2) · noise`, `[B, C, h, w]`; fresh standard normal noise unless it is given."""
        noise = torch.randn_like(self.mean) if noise is None else noise
        return self.mean + torch.exp(0.5 * self.logvar) * noise

    def moments(self) -> Tensor:
        """Means, then standard deviations, `[B, 2C, h, w]`."""
        return torch.cat([self.mean, torch.exp(0.5 * self.logvar)], dim=1)

    def kl(self) -> Tensor:
        """Divergence from N(0, I) in nats, summed over latent dimensions (Kingma & Welling 2014, appendix B), `[B]`."""
        return 0.5 * (self.mean.square() + self.logvar.exp() - 1.0 - self.logvar).sum(dim=(1, 2, 3))


class PointPosterior:
    """The posterior of an encoder that knows its latent for certain; it has no prior, and no divergence from one.

    Args:
        z: The latent, `[B, C, h, w]`.

    Attributes:
        mean: The latent in float32.
    """

    def __init__(self, z: Tensor):
        self.mean = z.float()

    def mode(self) -> Tensor:
        """The latent, `[B, C, h, w]`."""
        return self.mean

    def sample(self, noise: Tensor | None = None) -> Tensor:
        """The latent, whatever the noise."""
        return self.mean

    def moments(self) -> Tensor:
        """The latent, then standard deviations of 0, `[B, 2C, h, w]`."""
        return torch.cat([self.mean, torch.zeros_like(self.mean)], dim=1)
