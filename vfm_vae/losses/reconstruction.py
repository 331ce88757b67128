"""Reconstruction losses between images in [-1, 1], each a float32 scalar, lower is better.

The first argument takes gradients, the second is the target.
"""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import lpips
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.functional.image import structural_similarity_index_measure
from torchvision.models import VGG16_Weights

from vfm_vae.modules.maps import in_fast_layout
from vfm_vae.modules.resize import resize
from vfm_vae.vfm import Frozen, FrozenVFM, Interpolation


def l1(images: Tensor, target: Tensor) -> Tensor:
    """Mean absolute error of `[B, 3, H, W]`, not clamped."""
    return F.l1_loss(images.float(), target.float())


def l2(images: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of `[B, 3, H, W]`, not clamped."""
    return F.mse_loss(images.float(), target.float())


def multi_resolution_l1(multiscale: Sequence[Tensor], target: Tensor, interpolation: Interpolation) -> Tensor:
    """Sum over resolutions of the L1 between each image and the target, resized to it with antialias.

    Args:
        multiscale: images of the decoder's earlier blocks, each `[B, 3, h_i, w_i]`.
        target: `[B, 3, H, W]`.
        interpolation: the VFM's for targets.
    """
    target = target.float()
    return torch.stack([l1(images, resize(target, images.shape[-2:], interpolation)) for images in multiscale]).sum()


class SSIMLoss(nn.Module):
    """`1 - SSIM` (Wang et al., 2004): images clamped to [-1, 1], Gaussian window of 11x11 pixels with σ = 1.5."""

    def forward(self, images: Tensor, target: Tensor) -> Tensor:
        """Loss of `images` against `target`, both `[B, 3, H, W]`, as the mean over pixels and batch."""
        with torch.autocast(images.device.type, enabled=False):
            images, target = images.float().clamp(-1, 1), target.float().clamp(-1, 1)
            return 1 - structural_similarity_index_measure(images, target, data_range=2.0, sigma=1.5)


class LPIPSLoss(Frozen):
    """Learned perceptual image patch similarity (Zhang et al., 2018) on VGG-16, version 0.1.

    The linear heads come with the `lpips` package; VGG-16 itself is torchvision's, read from
    `$TORCH_HOME/hub/checkpoints` and downloaded to it when it is not there.

    Args:
        weights: file with torchvision's VGG-16 weights, to take instead.

    Attributes:
        name: what the distance is called in logs.

    Raises:
        ValueError: if the weights of VGG-16 can't be had.
    """

    name = "lpips"

    def __init__(self, weights: str | None = None) -> None:
        state = _vgg16_state(weights)
        with warnings.catch_warnings():  # lpips asks torchvision for a random network in an old way
            warnings.simplefilter("ignore", UserWarning)
            network = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)
        # The slices keep torchvision's numbering: `features.12.weight` is `slice3.12.weight` here.
        for piece in network.net.children():
            piece.load_state_dict({name: state[f"features.{name}"] for name in piece.state_dict()})
        super().__init__(network)

    def forward(self, images: Tensor, target: Tensor) -> Tensor:
        """Mean distance between `images` and `target`, both `[B, 3, H, W]` in [-1, 1]."""
        with torch.autocast(images.device.type, enabled=False):
            return self.network(in_fast_layout(images.float()), in_fast_layout(target.float())).mean()


def _vgg16_state(weights: str | None) -> Mapping[str, Tensor]:
    published = VGG16_Weights.IMAGENET1K_V1
    place = weights or str(Path(torch.hub.get_dir()) / "checkpoints" / published.url.rpartition("/")[2])
    try:
        if weights is not None:
            state = torch.load(weights, map_location="cpu", weights_only=True)
        else:
            state = published.get_state_dict(progress=True, check_hash=True, weights_only=True)
    except (OSError, RuntimeError, UnpicklingError) as error:
        cause = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(
            f"weights: those of VGG-16, for LPIPS, could not be had from {place!r} ({cause}); put "
            f"{published.url} there, or give its file as `weights`"
        ) from error
    if "features.28.weight" not in state:
        raise ValueError(f"weights: no VGG-16 with torchvision's names in {place!r}; give the file of {published.url}")
    return state


class VFMPerceptualLoss(nn.Module):
    """Perceptual distance on a frozen VFM's features, in LPIPS' manner without learned weights.

    Tokens of every layer are scaled to unit length over channels; the squared differences are summed over channels and
    averaged over tokens and layers: 0 for equal features, 2 for orthogonal ones.

    Args:
        vfm: the model, or its arguments; its `layers` are those compared.

    Attributes:
        name: what the distance is called in logs, after the model.
    """

    def __init__(self, vfm: FrozenVFM | Mapping[str, Any]) -> None:
        super().__init__()
        self.vfm = vfm if isinstance(vfm, FrozenVFM) else FrozenVFM(**vfm)
        self.name = f"perceptual_{self.vfm.name.split('.')[0]}"

    def forward(self, images: Tensor, target: Tensor) -> Tensor:
        """Mean distance between `images` and `target`, both `[B, 3, H, W]` in [-1, 1], of a size that the VFM takes."""
        layers = self.vfm.differentiable(images).layers  # each [B, N, C]
        target_layers = self.vfm(target).layers
        distances = [
            (F.normalize(tokens.float(), dim=-1) - F.normalize(target_tokens.float(), dim=-1)).square().sum(-1).mean()
            for tokens, target_tokens in zip(layers, target_layers, strict=True)
        ]
        return torch.stack(distances).mean()
