"""The discrete tokenizer's latent: vector quantisation with several codebooks."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vfm_vae.options import at_least, positive
from vfm_vae.pretrained import remembers_arguments


class QuantizedPosterior:
    """All its mass on one latent: the codewords nearest to the features. Stands in for a `DiagonalGaussian`.

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
        frequency: How often each codeword was taken in this batch, as a part of N, `[K, V]`.
        usage: Percentage of codewords with a frequency above 0.01 / V in this batch, a float32 scalar.
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
        """A discrete latent has none.

        Raises:
            ValueError: always.
        """
        raise ValueError("predict: moments are a Gaussian latent's, and this tokenizer has a quantizer; choose latents")

    def kl(self) -> Tensor:
        """Divergence from a uniform prior over codewords, in nats, `[B]`: the constant `h·w·K·log V`, without gradient.

        A posterior that is certain of its codeword is log V away from it (van den Oord et al. 2017, section 3.1).
        """
        batch, *positions = self.indices.shape
        return self.mean.new_full((batch,), math.prod(positions) * math.log(self._codebooks.shape[1]))

    @property
    def vq_loss(self) -> Tensor:
        """Codewords drawn to features, and β times features to codewords (van den Oord et al. 2017, eq. 3), a scalar.

        The mean squared error, (1 + β) times in value: only the gradients of the two parts differ.
        """
        codebook = F.mse_loss(self._codewords, self._features.detach())
        commitment = F.mse_loss(self._features, self._codewords.detach())
        return codebook + self._beta * commitment

    @property
    def entropy_loss(self) -> Tensor:
        """Entropy of a token's assignment less that of the batch's mean assignment, mean over codebooks, a scalar.

        The assignment is a softmax over `-‖f - c‖² / τ`; a low loss is certain of every token and uses all codewords
        (Yu et al. 2024, MAGVIT-v2).
        """
        with torch.autocast(self._features.device.type, enabled=False):
            pairs = zip(self._features, self._codebooks, strict=True)
            return torch.stack([_entropy(*pair, self._temperature) for pair in pairs]).mean()


class VectorQuantizer(nn.Module):
    """Vector quantisation of slices of a latent, each by a codebook of its own (Ma et al. 2025, UniTok).

    Feature slices and codewords are brought to unit length, and the nearest codeword by cosine is taken. Everything is
    computed in float32, under autocast too. Over several processes, usage is each one's own.

    Args:
        vocabulary_size: Codewords of all codebooks together.
        num_codebooks: Codebooks K, which share codewords and channels equally.
        width: Channels C of the latent.
        beta: Weight of the commitment in the quantisation loss.
        temperature: τ of the entropy loss.

    Attributes:
        codebooks: Codewords before normalisation, `[K, V, D]` with V = vocabulary_size / K and D = width / K.
        frequency: Running frequencies of codewords in training, `[K, V]`.
        updates: Training batches that they cover, an int64 scalar.

    Raises:
        ValueError: if codewords or channels do not divide by the codebooks, or a number is out of range.
    """

    @remembers_arguments
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
                raise ValueError(f"{option}: {number} does not divide by {num_codebooks} codebooks; give a multiple")
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
            raise ValueError(f"width: the quantizer takes {self.width} channels, {latents.shape[1]} were given")
        shape = (latents.shape[0], *latents.shape[2:])
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
            ValueError: if the codebooks are other in number, the grid is another, or an index is out of range.
        """
        num_codebooks, size, _ = self.codebooks.shape
        if indices.ndim < 3 or indices.shape[1] != num_codebooks:
            raise ValueError(f"indices: expected [B, {num_codebooks}, h, w], got {list(indices.shape)}")
        grid = tuple(indices.shape[2:] if grid is None else grid)
        if len(grid) != 2 or math.prod(grid) != indices.shape[2:].numel():
            raise ValueError(f"grid: {list(grid)} are no rows and columns of indices {list(indices.shape)}")
        if indices.numel() and (indices.min() < 0 or indices.max() >= size):
            raise ValueError(f"indices: a codebook has codewords 0..{size - 1}, got {indices.min()}..{indices.max()}")
        flat = indices.flatten(2).transpose(0, 1).flatten(1)  # [K, N]
        return merge(gather_codewords(self._unit_codebooks(), flat), (indices.shape[0], *grid))

    def _unit_codebooks(self) -> Tensor:
        return F.normalize(self.codebooks.float(), dim=2)

    @torch.no_grad()
    def _count(self, frequency: Tensor, finite: Tensor) -> None:
        """Averages frequencies: the first batch's are copied, then decay is 0.9 up to the 100th batch, 0.99 after."""
        decay = torch.where(self.updates < 100, 0.9, 0.99) * (self.updates > 0)
        weight = (1 - decay) * finite  # a step that is skipped must leave no trace
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
    """The codeword `[K, V, D]` of largest cosine for each feature `[K, N, D]`, all of unit length: int64 `[K, N]`."""
    # One codebook at a time: all similarities at once would take K times the memory, 4 GB for 128 images of 256 px.
    return torch.stack([(f @ c.mT).argmax(dim=1) for f, c in zip(features, codebooks, strict=True)])


def gather_codewords(codebooks: Tensor, indices: Tensor) -> Tensor:
    """Picks codewords `[K, N, D]` from codebooks `[K, V, D]` by indices `[K, N]`."""
    return codebooks.gather(1, indices[:, :, None].expand(-1, -1, codebooks.shape[2]))


def frequency_of(indices: Tensor, size: int) -> Tensor:
    """How often each of `size` codewords is among indices `[K, N]`, as a part of N: float32 `[K, size]`."""
    counts = torch.zeros(len(indices), size, dtype=torch.int64, device=indices.device)
    return counts.scatter_add_(1, indices, torch.ones_like(indices)) / indices.shape[1]


def _entropy(features: Tensor, codewords: Tensor, temperature: float) -> Tensor:
    """The entropy loss of one codebook: features `[N, D]`, codewords `[V, D]`, all of unit length."""
    logits = (2 * (features @ codewords.mT) - 2) / temperature  # -‖f - c‖² / τ of unit vectors, [N, V]
    log_p = logits.log_softmax(dim=1)
    p = log_p.exp()
    mean = p.mean(dim=0)
    return (mean * (mean + 1e-7).log()).sum() - (p * log_p).sum(dim=1).mean()
