"""The quantiser against published reference tensors, in float32."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from vfm_vae.modules.quantizer import QuantizedPosterior, VectorQuantizer

REFERENCE = load_file(Path(__file__).parent / "data" / "quantizer.safetensors")
GRID = (2, 5)
NUM_CODEBOOKS = 4


def check(actual: torch.Tensor, name: str, tolerance: float = 1e-5) -> None:
    expected = REFERENCE[f"output/vq/{name}"]
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max(), name


def maps(tokens: torch.Tensor) -> torch.Tensor:
    return tokens.mT.unflatten(2, GRID)


def tokens(maps: torch.Tensor) -> torch.Tensor:
    return maps.flatten(2).mT


@pytest.fixture
def quantizer() -> VectorQuantizer:
    module = VectorQuantizer(vocabulary_size=64, num_codebooks=NUM_CODEBOOKS, width=16, beta=0.25, temperature=0.01)
    names = [f"weights/vq/codebooks.{k}.codebook.weight" for k in range(NUM_CODEBOOKS)]
    module.codebooks.data = torch.stack([REFERENCE[name] for name in names])
    return module


@pytest.fixture
def latents() -> torch.Tensor:
    return REFERENCE["input/vq/input"].clone().requires_grad_()


@pytest.fixture
def posterior(quantizer: VectorQuantizer, latents: torch.Tensor) -> QuantizedPosterior:
    return quantizer(maps(latents))


def test_assignment_and_losses(posterior):
    assert torch.equal(posterior.indices.flatten(2), REFERENCE["output/vq/indices"])
    check(tokens(posterior.mode()).detach(), "output")
    check(posterior.vq_loss.detach(), "vq_loss")
    check(posterior.entropy_loss.detach(), "entropy_loss")
    check(posterior.usage, "usage")


def test_gradients_of_the_losses(quantizer, posterior, latents):
    (posterior.vq_loss + posterior.entropy_loss).backward()
    check(latents.grad, "grad_input_of_vq_plus_entropy", 1e-4)
    for k, gradient in enumerate(quantizer.codebooks.grad):
        check(gradient, f"grad_weight.codebooks.{k}.codebook.weight", 1e-4)


def test_gradient_goes_straight_through(quantizer, posterior, latents):
    posterior.sample().square().mean().backward()
    check(latents.grad, "grad_input_of_output_sqmean", 1e-4)
    assert quantizer.codebooks.grad is None


def test_running_frequencies(quantizer):
    latents = REFERENCE["input/vq/input"]
    for call, batch in enumerate([latents, latents.flip(0) * 0.5 + 0.1], start=1):
        quantizer(maps(batch))
        for k, frequency in enumerate(quantizer.frequency):
            check(frequency, f"buffer_after_{call}.codebooks.{k}.vocab_usage")


def test_latents_from_indices(quantizer):
    check(tokens(quantizer.decode_indices(REFERENCE["output/vq/indices"], GRID)).detach(), "decoded_from_indices")
