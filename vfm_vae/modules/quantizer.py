"""The discrete tokenizer's latent: vector quantisation with several codebooks."""

import math
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vfm_vae.description import Described
from vfm_vae.options import at_least, positive


class QuantizedPosterior:
    """A posterior with all its mass on one latent, the codewords nearest to the features.

    It has the methods of a `DiagonalGaussian`.

    Args:
        features: Unit slices of the encoder's output, `[K, N, D]` for K codebooks and N = B·h·w tokens.
        codebooks: Unit codewords, `[K, V, D]`.
        indices: The nearest codewords, int64 `[K, N]`.
        shape: B, h and w.
        beta: Weight of the commitment in `vq_loss`.
        temperature: τ of `entropy_loss`.

    Attributes:
        indices: int64 `[B, K, h, w]`, each in 0..V-1.
        mean: The codewords, `[B, C, h, w]` with C = K·D; their gradient goes to the features as if nothing had been
            quantised (straight-through, Bengio et al. 2013).
        frequency: The fraction of this batch's tokens that took each codeword, `[K, V]`.
        usage: Percentage of codewords whose frequency in this batch is above 0.01 / V, a float32 scalar.
    """

    def __init__(
        self,
        features: Tensor,
        codebooks: Tensor,
        indices: Tensor,
        shape: tuple[int, int, int],
        beta: float,
        temperature: float,
    ):
        self._features, self._codebooks = features, codebooks
        self._codewords = gather_codewords(codebooks, indices)  # [K, N, D]
        self._beta, self._temperature = beta, temperature
        self.indices = indices.unflatten(1, shape).transpose(0, 1)
        straight_through = self._codewords.detach() + (features - features.detach())
        self.mean = merge(straight_through, shape)
        self.frequency = frequency_of(indices, codebooks.shape[1])  # [K, V]
        self.usage = 100 * (self.frequency > 0.01 / codebooks.shape[1]).float().mean()

    def mode(self) -> Tensor:
        """The codewords, `[B, C, h, w]`."""
        return self.mean

    def sample(self, noise: Tensor | None = None) -> Tensor:
        """The codewords, `[B, C, h, w]`: there is nothing to draw, so noise changes nothing."""
        return self.mean

    def moments(self) -> Tensor:
        """A discrete latent has no moments.

        Raises:
            ValueError: always.
        """
        raise ValueError("predict: this tokenizer has a quantizer, so its latents have no moments; choose 'latents'")

    def kl(self) -> Tensor:
        """Divergence from a uniform prior over codewords, in nats, `[B]`: the constant `h·w·K·log V`, without gradient.

        A posterior that is certain of its codeword is log V away from it (van den Oord et al. 2017, section 3.1).
        """
        batch, *positions = self.indices.shape
        return self.mean.new_full((batch,), math.prod(positions) * math.log(self._codebooks.shape[1]))

    @property
    def vq_loss(self) -> Tensor:
        """Pulls codewords to features, and with weight β features to codewords (van den Oord et al. 2017, eq. 3).

        A scalar. Its value is (1 + β) times the mean squared error: only the gradients of the two parts differ.
        """
        codebook = F.mse_loss(self._codewords, self._features.detach())
        commitment = F.mse_loss(self._features, self._codewords.detach())
        return codebook + self._beta * commitment

    @property
    def entropy_loss(self) -> Tensor:
        """Mean entropy of tokens' assignments minus the entropy of their mean, averaged over codebooks; a scalar.

        A token's assignment is a softmax over `-‖f - c‖² / τ`. The loss is low where every assignment is certain and
        all codewords are used (Yu et al. 2024, MAGVIT-v2).
        """
        with torch.autocast(self._features.device.type, enabled=False):
            pairs = zip(self._features, self._codebooks, strict=True)
            return torch.stack([_entropy(*pair, self._temperature) for pair in pairs]).mean()


@final
class VectorQuantizer(nn.Module, Described):
    """Vector quantisation of slices of a latent, each by its own codebook (Ma et al. 2025, UniTok).

    Feature slices and codewords are scaled to unit length, and each slice takes the codeword of largest cosine.
    Everything is computed in float32, even under autocast. With several processes, each counts its own usage.

    Args:
        vocabulary_size: Number of codewords in all codebooks together; divisible by num_codebooks.
        num_codebooks: Number of codebooks K, which share codewords and channels equally.
        width: Channels C of the latent; divisible by num_codebooks.
        beta: Weight of the commitment term in the quantisation loss.
        temperature: Temperature τ of the entropy loss.

    Attributes:
        codebooks: Codewords before normalisation, `[K, V, D]` with V = vocabulary_size / K and D = width / K.
        frequency: Running frequencies of codewords in training, `[K, V]`.
        updates: How many training batches the frequencies cover, an int64 scalar.

    Raises:
        ValueError: if codewords or channels do not divide by the codebooks, or a number is out of range.
    """

    frequency: Tensor
    updates: Tensor

    def __init__(
        self,
        vocabulary_size: int = 32768,
        num_codebooks: int = 8,
        width: int = 64,
        beta: float = 0.25,
        temperature: float = 0.01,
    ):
        super().__init__()
        at_least(1, vocabulary_size=vocabulary_size, num_codebooks=num_codebooks, width=width)
        at_least(0, beta=beta)
        positive(temperature=temperature)
        for option, number in {"vocabulary_size": vocabulary_size, "width": width}.items():
            if number % num_codebooks:
                raise ValueError(
                    f"{option}: {number} is no multiple of num_codebooks={num_codebooks}; choose one that is"
                )
        self.width, self.beta, self.temperature = width, beta, temperature
        size, channels = vocabulary_size // num_codebooks, width // num_codebooks
        self.codebooks = nn.Parameter(torch.empty(num_codebooks, size, channels))
        bound = 1 / (36 * math.sqrt(channels))
        nn.init.uniform_(self.codebooks, -bound, bound)
        self.register_buffer("frequency", torch.zeros(num_codebooks, size))
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))

    def forward(self, latents: Tensor) -> QuantizedPosterior:
        """Quantises latents `[B, C, h, w]`.

        Raises:
            ValueError: if C is not the width.
        """
        if latents.shape[1] != self.width:
            raise ValueError(f"width: the quantizer takes {self.width} channels, but was given {latents.shape[1]}")
        batch, _, rows, columns = latents.shape
        shape = batch, rows, columns
        with torch.autocast(latents.device.type, enabled=False):
            features = F.normalize(split(latents.float(), len(self.codebooks)), dim=2)  # [K, N, D]
            codebooks = self._unit_codebooks()  # [K, V, D]
            indices = nearest(features, codebooks)  # [K, N]
            posterior = QuantizedPosterior(features, codebooks, indices, shape, self.beta, self.temperature)
        if self.training and self.codebooks.requires_grad:
            self._count(posterior.frequency, features.detach().isfinite().all())
        return posterior

    def decode_indices(self, indices: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """The latents that indices stand for.

        Args:
            indices: int64, `[B, K, h, w]`, or `[B, K, h·w]` in raster order.
            grid: h and w, where indices come in raster order.

        Returns:
            Latents, `[B, C, h, w]`.

        Raises:
            ValueError: if there are not K indices for each token, the grid has another size, or an index is out of
                range.
        """
        num_codebooks, size, _ = self.codebooks.shape
        if indices.ndim < 3 or indices.shape[1] != num_codebooks:
            raise ValueError(f"indices: expected [B, {num_codebooks}, h, w], got {list(indices.shape)}")
        sides = tuple(indices.shape[2:] if grid is None else grid)
        if len(sides) != 2 or math.prod(sides) != indices.shape[2:].numel():
            raise ValueError(
                f"grid: indices {list(indices.shape)} do not fill rows and columns {list(sides)}; give h and w"
            )
        if indices.numel() and (indices.min() < 0 or indices.max() >= size):
            raise ValueError(f"indices: must be in 0..{size - 1}, got {indices.min()}..{indices.max()}")
        flat = indices.flatten(2).transpose(0, 1).flatten(1)  # [K, N]
        return merge(gather_codewords(self._unit_codebooks(), flat), (indices.shape[0], sides[0], sides[1]))

    def _unit_codebooks(self) -> Tensor:
        return F.normalize(self.codebooks.float(), dim=2)

    @torch.no_grad()
    def _count(self, frequency: Tensor, finite: Tensor) -> None:
        """Averages frequencies: copies the first batch's, then decays by 0.9 up to the 100th batch, 0.99 after."""
        decay = torch.where(self.updates < 100, 0.9, 0.99) * (self.updates > 0)
        weight = (1 - decay) * finite  # a step that gets skipped must leave no trace
        self.frequency.lerp_(frequency, weight)
        self.updates += finite


def split(latents: Tensor, num_codebooks: int) -> Tensor:
    """Channels `[B, C, h, w]` to slices of tokens `[K, B·h·w, C/K]`."""
    return latents.unflatten(1, (num_codebooks, -1)).permute(1, 0, 3, 4, 2).flatten(1, 3)


def merge(slices: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """Slices of tokens `[K, B·h·w, D]` to channels `[B, K·D, h, w]`, the inverse of `split`; `shape` is B, h and w."""
    return slices.unflatten(1, shape).permute(1, 0, 4, 2, 3).flatten(1, 2)


@torch.no_grad()
def nearest(features: Tensor, codebooks: Tensor) -> Tensor:
    """Indices (int64 `[K, N]`) of the codewords `[K, V, D]` nearest to features `[K, N, D]`, all of unit length."""
    # One codebook at a time: all similarities at once would take K times the memory, 4 GB for 128 images of 256 px.
    return torch.stack([(f @ c.mT).argmax(dim=1) for f, c in zip(features, codebooks, strict=True)])


def gather_codewords(codebooks: Tensor, indices: Tensor) -> Tensor:
    """Picks codewords `[K, N, D]` from codebooks `[K, V, D]` by indices `[K, N]`."""
    return codebooks.gather(1, indices[:, :, None].expand(-1, -1, codebooks.shape[2]))


def frequency_of(indices: Tensor, size: int) -> Tensor:
    """The fraction of indices `[K, N]` that each of `size` codewords has: float32 `[K, size]`."""
    counts = torch.zeros(len(indices), size, dtype=torch.int64, device=indices.device)
    return counts.scatter_add_(1, indices, torch.ones_like(indices)) / indices.shape[1]


def _entropy(features: Tensor, codewords: Tensor, temperature: float) -> Tensor:
    """The entropy loss of one codebook: features `[N, D]`, codewords `[V, D]`, all of unit length."""
    logits = (2 * (features @ codewords.mT) - 2) / temperature  # -‖f - c‖² / τ of unit vectors, [N, V]
    log_p = logits.log_softmax(dim=1)
    p = log_p.exp()
    mean = p.mean(dim=0)
    return (mean * (mean + 1e-7).log()).sum() - (p * log_p).sum(dim=1).mean()
