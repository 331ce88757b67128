"""What a denoiser is trained by, errors of its prediction at noisy latents; and what its blocks make of such."""

import torch
from torch import Tensor

from ldm import path
from ldm.alignment import REPA
from ldm.models.denoiser import Denoiser
from vfm_vae.data.sampling import IndexedNoise


def denoising_errors(
    model: Denoiser,
    alignment: REPA | None,
    x: Tensor,
    features: Tensor | None,
    noise: tuple[Tensor, Tensor],
    t: Tensor,
    y: Tensor,
) -> dict[str, Tensor]:
    """The terms of the objective for each sample, `[B]`.

    `mse` and `cosine` of the velocity (LightningDiT, arXiv 2501.01423, section 3.4), and those of the alignment.

    Args:
        model: Predicts.
        alignment: Of its tokens to a VFM's features; None for none.
        x: Normalised latents, `[B, C, h, w]`.
        features: The VFM's, `[B, 1 + N, D]`, where there is an alignment.
        noise: Like the latents, and like the class token, `[B, cls_channels]`.
        t: Times, `[B]`.
        y: Labels, int64 `[B]`.
    """
    token = path.interpolate(features[:, 0], noise[1], t) if model.cls_channels else None
    prediction = model(path.interpolate(x, noise[0], t), t, y, token, align=alignment is not None)
    velocity, target = prediction.velocity.float(), path.velocity(x, noise[0])
    errors = {"mse": path.squared_error(velocity, target), "cosine": path.cosine_error(velocity, target)}
    return errors | (alignment.errors(prediction, features, noise[1]) if alignment is not None else {})


def block_features(
    model: Denoiser, x: Tensor, cls_token: Tensor | None, noise: IndexedNoise, time: float
) -> list[Tensor]:
    """Patch tokens after every block, averaged, float32 `[B, D]` each, of latents at one time and without a label.

    Args:
        model: Whose blocks.
        x: Normalised latents, `[B, C, h, w]`.
        cls_token: The VFM's, `[B, cls_channels]`, where the model has one.
        noise: Of each sample, by its number.
        time: In [0, 1], 0 being noise.
    """
    t, labels = x.new_full((len(x),), time), torch.full((len(x),), model.null_label, device=x.device)
    x = path.interpolate(x, noise.normal(*model.latent_shape), t)
    if cls_token is not None:
        cls_token = path.interpolate(cls_token, noise.normal(model.cls_channels), t)
    return model.block_features(x, t, labels, cls_token)


def rehearse(model: Denoiser, alignment: REPA | None, batch_size: int) -> bool:
    """Forward and backward pass on the meta device, which computes nothing but goes through all products.

    Args:
        model: A twin of it is made from its arguments.
        alignment: Of its tokens to a VFM's features; None for none.
        batch_size: Of the step.

    Returns:
        Whether the model says what it was made of.
    """
    if not hasattr(model, "arguments"):
        return False
    with torch.device("meta"):
        twin = type(model)(**model.arguments)
        x, t = torch.empty(batch_size, *model.latent_shape), torch.empty(batch_size)
        features = torch.empty(batch_size, 1 + model.grid[0] * model.grid[1], max(model.align_channels, 1))
        noise = torch.empty_like(x), torch.empty(batch_size, model.cls_channels)
        y = torch.empty(batch_size, dtype=torch.int64)
        errors = denoising_errors(twin, alignment, x, features if alignment else None, noise, t, y)
        sum(error.mean() for error in errors.values()).backward()
    return True
