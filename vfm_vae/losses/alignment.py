"""Alignment of latents with a vision foundation model's features: the VF loss of VA-VAE (arXiv 2501.01423)."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from vfm_vae.modules.convnext import no_gradients_of_weights
from vfm_vae.modules.maps import without_autocast


class VFLoss(NamedTuple):
    """The VF loss and its parts, float32 scalars.

    Attributes:
        loss: Weighted sum of the two terms.
        distance: Distance-matrix term, unweighted.
        cosine: Cosine term, unweighted.
    """

    loss: Tensor
    distance: Tensor
    cosine: Tensor


def vf_loss(
    z: Tensor,
    features: Tensor,
    distmat_margin: float = 0.0,
    cos_margin: float = 0.0,
    distmat_weight: float = 1.0,
    cos_weight: float = 1.0,
) -> VFLoss:
    """Draws projected latents towards features of the same shape (marginal losses of VA-VAE).

    The distance term `mean relu(|S_z - S_v| - distmat_margin)` compares the matrices of cosine similarities between all
    positions of an image (`[B, N, N]`, N = h * w); the cosine term `mean relu(1 - cos_margin - cos(z_i, v_i))` compares
    the two at each position.

    Args:
        z: Latents projected to the features' width, `[B, C, h, w]`.
        features: Features of the VFM, `[B, C, h, w]`.
        distmat_margin: Difference of similarities that costs nothing (VA-VAE: 0.25).
        cos_margin: Cosine distance that costs nothing (VA-VAE: 0.5).
        distmat_weight: Weight of the distance term.
        cos_weight: Weight of the cosine term.

    Raises:
        ValueError: if the shapes differ.
    """
    if z.shape != features.shape:
        raise ValueError(f"z: must have the features' shape {tuple(features.shape)}, given {tuple(z.shape)}")
    with torch.autocast(z.device.type, enabled=False):
        z = F.normalize(z.float().flatten(2), dim=1)  # [B, C, N]
        features = F.normalize(features.float().flatten(2), dim=1)  # [B, C, N]
        difference = (z.mT @ z - features.mT @ features).abs()  # [B, N, N]
        distance = F.relu(difference - distmat_margin).mean()
        cosine = F.relu(1 - cos_margin - (z * features).sum(1)).mean()
        return VFLoss(distmat_weight * distance + cos_weight * cosine, distance, cosine)


def pool_tokens(tokens: Tensor, grid: Sequence[int], latent_grid: Sequence[int]) -> Tensor:
    """Average-pools tokens to the latent grid.

    Args:
        tokens: `[B, N, C]` in raster order.
        grid: Rows and columns of the tokens; `N = rows * columns`.
        latent_grid: Rows and columns wanted; each divides the token grid's.

    Returns:
        Feature map `[B, C, h, w]`.

    Raises:
        ValueError: if the latent grid doesn't divide the token grid.
    """
    rows, columns = grid
    if rows % latent_grid[0] or columns % latent_grid[1]:
        raise ValueError(f"latent_grid: must divide the token grid {rows}x{columns}, given {tuple(latent_grid)}")
    maps = tokens.mT.unflatten(2, (rows, columns))  # [B, C, rows, columns]
    return F.avg_pool2d(maps, (rows // latent_grid[0], columns // latent_grid[1]))


def settle(loss: Tensor, inputs: Sequence[Tensor], retain_graph: bool = False) -> Tensor:
    """The same loss, whose gradient at `inputs` is computed here, once, and not in each backward pass that follows.

    What lies between the two, such as a perceptual network, is then freed.

    Args:
        loss: A scalar.
        inputs: Tensors that it depends on, or not.
        retain_graph: Whether it is not freed, as another loss shares it.
    """
    if not loss.requires_grad:  # nothing was weighed
        return loss
    inputs = [x for x in inputs if x.requires_grad]
    with without_autocast(loss):
        gradients = torch.autograd.grad(loss, inputs, retain_graph=retain_graph, allow_unused=True)
    used = [(x, gradient) for x, gradient in zip(inputs, gradients, strict=True) if gradient is not None]
    return _Settled.apply(loss.detach(), [gradient for _, gradient in used], *(x for x, _ in used))


class _Settled(torch.autograd.Function):
    """A scalar with gradients that are known already."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: list[Tensor], *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(*gradients)
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *(known * gradient for known in ctx.saved_tensors)


def adaptive_weight(
    reconstruction_loss: Tensor, alignment_loss: Tensor, weight: Tensor, maximum: float = 1e8
) -> Tensor:
    """Balances the alignment loss against the reconstruction (adaptive weighting of VA-VAE; VQGAN's rule).

    `||grad L_rec|| / (||grad L_vf|| + 1e-4)`, both gradients taken at the last weight that the two losses share. The
    graph is kept for the backward pass that follows; no gradient is accumulated. Costs a backward pass through the
    decoder, without its weights' gradients; give a `settle`d loss, so that what lies behind the decoder isn't passed
    twice. An adversarial loss is balanced alike, at the decoder's last weight, which costs next to nothing.

    Args:
        reconstruction_loss: Sum of the weighted reconstruction terms, a scalar.
        alignment_loss: The VF loss, a scalar.
        weight: The parameter whose gradients are compared.
        maximum: What the result is clamped to.

    Returns:
        Detached scalar in `[0, maximum]`.
    """
    with without_autocast(weight):
        with no_gradients_of_weights():
            (reconstruction,) = torch.autograd.grad(reconstruction_loss, weight, retain_graph=True)
        (alignment,) = torch.autograd.grad(alignment_loss, weight, retain_graph=True)
    ratio = reconstruction.float().norm() / (alignment.float().norm() + 1e-4)
    return ratio.clamp(0, maximum).detach()
