"""Losses and equivariance transforms against published reference tensors, in float32."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from vfm_vae.images import resize
from vfm_vae.losses.alignment import vf_loss
from vfm_vae.losses.reconstruction import SSIMLoss, l1, l2
from vfm_vae.modules.equivariance import Transform

REFERENCE = load_file(Path(__file__).parent / "data" / "losses.safetensors")
MARGINS = {
    "m0": {},
    "m1": {"distmat_margin": 0.25, "cos_margin": 0.5},
    "m2": {"distmat_margin": 0.1, "cos_margin": 0.2, "distmat_weight": 0.5, "cos_weight": 2.0},
}
EQUIVARIANCE_CASES = [(0.25, 0), (0.5, 1), (0.75, 2), (1.0, 3), (0.5, 3)]


def check(actual: torch.Tensor, name: str, tolerance: float = 1e-5) -> None:
    expected = REFERENCE[f"output/{name}"]
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max(), name


@pytest.mark.parametrize("margins", MARGINS)
@pytest.mark.parametrize("case", ["vf0", "vf1"])
def test_vf_loss(case, margins):
    z = REFERENCE[f"input/{case}/z"].clone().requires_grad_()
    terms = vf_loss(z, REFERENCE[f"input/{case}/aux"], **MARGINS[margins])
    terms.loss.backward()
    check(terms.loss.detach(), f"{case}/{margins}.loss")
    check(terms.distance.detach(), f"{case}/{margins}.distance_term")
    check(terms.cosine.detach(), f"{case}/{margins}.cosine_term")
    check(z.grad, f"{case}/{margins}.grad_z", 1e-4)


@pytest.mark.parametrize("case", [0, 1])
def test_pixel_losses_and_ssim(case):
    generated = REFERENCE[f"input/ssim{case}/generated"].clone().requires_grad_()
    target = REFERENCE[f"input/ssim{case}/target"]
    check(l1(generated, target).detach(), f"pixel{case}/l1")
    check(l2(generated, target).detach(), f"pixel{case}/l2")
    loss = SSIMLoss()(generated, target)
    loss.backward()
    check(loss.detach(), f"ssim{case}/loss")
    check(generated.grad, f"ssim{case}/grad_generated", 1e-4)


@pytest.mark.parametrize(("scale", "turns"), EQUIVARIANCE_CASES)
def test_equivariance(scale, turns):
    transform = Transform(scale=scale, quarter_turns=turns)
    case = f"scale{scale}_turns{turns}"
    check(transform.latent(REFERENCE["input/eq/latent"]), f"eq/latent.{case}")
    for interpolation in ("bilinear", "bicubic"):
        image = transform.image(REFERENCE["input/eq/image"], interpolation)
        check(image, f"eq/image_{interpolation}.{case}")


@pytest.mark.parametrize("side", [8, 16, 32])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_targets_of_several_resolutions(interpolation, side):
    target = resize(REFERENCE["input/eq/image"], (side, side), interpolation)
    check(target, f"eq/multiscale_{interpolation}.{side}")
