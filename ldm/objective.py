"""The training objective of denoisers, and the features of their blocks at noisy latents."""

from collections.abc import Mapping
from functools import reduce

import torch
from torch import Tensor

from ldm import path
from ldm.alignment import REPA
from ldm.condition import Condition
from ldm.models.denoiser import Denoiser
from vfm_vae.data.sampling import IndexedNoise

EQUAL = {"mse": 1.0, "cosine": 1.0, "cls": 1.0}


def denoising_errors(
    model: Denoiser,
    alignment: REPA | None,
    state: Tensor,
    features: Tensor | None,
    noise: Tensor,
    t: Tensor,
    condition: Condition,
    weights: Mapping[str, float] = EQUAL,
) -> dict[str, Tensor]:
    """The terms of the objective for each sample, `[B]`.

    `mse` and `cosine` of the latents' velocity (LightningDiT, arXiv 2501.01423, section 3.4); `align` for the
    alignment; `cls` of the class token's velocity, where there is one (REG, arXiv 2507.01467, section 3); `base`, the
    weighted sum of the velocity's errors at the internal head, where there is one (RAE v2, arXiv 2605.18324).

    Args:
        model: The denoiser.
        alignment: Aligns its tokens to a VFM's features; None for none.
        state: What is diffused, of the data: normalised latents, with the class token where the model has one.
        features: The VFM's, `[B, 1 + N, D]`, where there is an alignment.
        noise: Standard normal, like the state.
        t: Times, `[B]`.
        condition: What the model is told.
        weights: Weights of the terms within `base`.
    """
    noisy = path.interpolate(state, noise, t)
    asked = {"base": True} if model.base_depth else {}  # others need not know that argument
    prediction = model(noisy, t, condition, align=alignment is not None, **asked)
    perfect = state if model.predicts == "data" else path.velocity(state, noise)
    target = model.as_velocity(perfect, noisy, t)
    errors = _velocity_errors(model, prediction.velocity, target)
    if alignment is not None:
        assert prediction.projected is not None and features is not None
        errors |= {"align": alignment.error(prediction.projected, features)}
    if model.base_depth:
        assert prediction.base is not None
        errors |= {"base": weighted_sum(weights, _velocity_errors(model, prediction.base, target))}
    return errors


def _velocity_errors(model: Denoiser, prediction: Tensor, target: Tensor) -> dict[str, Tensor]:
    """Errors of velocities of states: of the latents', and of the class token's where there is one."""
    latents, token = model.split(prediction.float())
    wanted, wanted_token = model.split(target)
    errors = {"mse": path.squared_error(latents, wanted), "cosine": path.cosine_error(latents, wanted)}
    if token is not None and wanted_token is not None:
        errors |= {"cls": path.squared_error(token, wanted_token)}
    return errors


def weighted_sum(weights: Mapping[str, float], terms: Mapping[str, Tensor]) -> Tensor:
    """The sum of terms of the objective, each times its weight, in the order of the weights."""
    return reduce(torch.add, (weights[name] * terms[name] for name in sorted(terms, key=[*weights].index)))


def block_features(
    model: Denoiser, state: Tensor, condition: Condition, noise: IndexedNoise, time: float
) -> list[Tensor]:
    """Patch tokens after every block, averaged, float32 `[B, D]` each, of noisy states at one time.

    Args:
        model: The denoiser.
        state: What is diffused, of the data.
        condition: What the model is told.
        noise: Random numbers of each sample, by its number.
        time: Time in [0, 1], 0 being noise.
    """
    t = state.new_full((len(state),), time)
    drawn = model.join(noise.normal(*model.latent_shape), noise.normal(model.cls_channels))
    return model.block_features(path.interpolate(state, drawn, t), t, condition)


def rehearse(model: Denoiser, alignment: REPA | None, condition: Condition) -> None:
    """Forward and backward pass on the meta device, which computes nothing but goes through all products.

    Args:
        model: The denoiser, of which a twin is made from its arguments.
        alignment: Aligns its tokens to a VFM's features; None for none.
        condition: The condition of a step's batch.
    """
    with torch.device("meta"):
        twin = type(model)(**model.arguments)
        state, t = torch.empty(len(condition), *model.state_shape), torch.empty(len(condition))
        features = torch.empty(len(condition), 1 + model.grid[0] * model.grid[1], max(model.align_channels, 1))
        errors = denoising_errors(twin, alignment, state, features, torch.empty_like(state), t, condition.to("meta"))
        torch.stack([error.mean() for error in errors.values()]).sum().backward()
