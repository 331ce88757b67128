"""The objective of REG and of REPA against published values and gradients, in float32."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ldm.alignment import REG, alignment_error
from ldm.condition import Labels
from ldm.objective import denoising_errors
from ldm.published import published_name, reg_from_published

DATA = Path(__file__).parent / "data"
REFERENCE = load_file(DATA / "reg_a.safetensors")
SETTINGS = json.loads((DATA / "reg_a.json").read_text())


def select(prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in REFERENCE.items() if name.startswith(prefix)}


def test_values_and_gradients():
    """Published time is 1 − t here; errors are the same."""
    model = reg_from_published(select("weights/"), SETTINGS["config"])
    alignment, given = REG(weight=SETTINGS["proj_coeff"], cls_weight=SETTINGS["cls_coeff"]), select("loss/")
    state, noise = model.join(given["images"], given["zs"][:, 0]), model.join(given["noise"], given["noise_cls"])
    condition = Labels(given["y"], model.num_classes)
    errors = denoising_errors(model, alignment, state, given["zs"], noise, 1 - given["time"], condition)
    for ours, published in (("mse", "denoising"), ("cls", "cls")):
        assert (errors[ours] - given[f"{published}_per_sample"]).abs().max() <= 1e-5
    assert errors["align"].mean().item() == pytest.approx(given["proj"].item(), abs=1e-5)
    total = errors["mse"].mean() + sum(weight * errors[name].mean() for name, weight in alignment.weights.items())
    assert total.item() == pytest.approx(given["total"].item(), abs=1e-5)
    total.backward()
    compared = 0
    for name, parameter in model.named_parameters():
        expected = given.get(f"grad/{published_name(name)}")
        if expected is None:
            continue
        sign = -1 if name.startswith("final.") else 1  # outputs were turned around
        assert torch.allclose(sign * parameter.grad, expected, rtol=1e-3, atol=2e-6), name
        compared += 1
    assert compared == len([name for name in given if name.startswith("grad/")]) > 4


def test_repa_takes_patch_tokens_alone():
    projected, features = REFERENCE["loss/zs_tilde"], REFERENCE["loss/zs"]
    values = SETTINGS["loss_values"]
    assert alignment_error(projected, features).mean().item() == pytest.approx(values["proj"], abs=1e-5)
    expected = REFERENCE["loss/repa_proj_patch_tokens_only"].item()
    assert alignment_error(projected[:, 1:], features[:, 1:]).mean().item() == pytest.approx(expected, abs=1e-5)
