"""Reconstruction losses between images in [-1, 1]. Each is a float32 scalar; lower is better.

The first argument receives gradients, the second is the target.
"""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lpips
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.functional.image import structural_similarity_index_measure
from torchvision.models import VGG16_Weights

from vfm_vae.checkpoints import fill, read_published_weights, read_weights
from vfm_vae.contracts import VFM
from vfm_vae.frozen import Frozen
from vfm_vae.images import Interpolation, resize
from vfm_vae.modules.maps import in_fast_layout
from vfm_vae.vfm import FrozenVFM


def l1(images: Tensor, target: Tensor) -> Tensor:
    """Mean absolute error of `[B, 3, H, W]`, not clamped."""
    return F.l1_loss(images.float(), target.float())


def l2(images: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of `[B, 3, H, W]`, not clamped."""
    return F.mse_loss(images.float(), target.float())


def multi_resolution_l1(multiscale: Sequence[Tensor], target: Tensor, interpolation: Interpolation) -> Tensor:
    """Sum over resolutions of the L1 between each image and the target, which is resized with antialiasing.

    Args:
        multiscale: Images of the decoder's earlier blocks, each `[B, 3, h_i, w_i]`.
        target: `[B, 3, H, W]`.
        interpolation: How targets are resized.
    """
    target = target.float()
    return torch.stack([l1(images, resize(target, images.shape[-2:], interpolation)) for images in multiscale]).sum()


class SSIMLoss(nn.Module):
    """`1 - SSIM` (Wang et al., 2004): images clamped to [-1, 1], Gaussian window of 11x11 pixels with σ = 1.5."""

    def forward(self, images: Tensor, target: Tensor) -> Tensor:
        """The loss between `images` and `target`, both `[B, 3, H, W]`, averaged over pixels and batch."""
        with torch.autocast(images.device.type, enabled=False):
            images, target = images.float().clamp(-1, 1), target.float().clamp(-1, 1)
            similarity = structural_similarity_index_measure(images, target, data_range=2.0, sigma=1.5)
            assert isinstance(similarity, Tensor)
            return 1 - similarity


class LPIPSLoss(Frozen):
    """Learned perceptual image patch similarity (Zhang et al., 2018) on VGG-16, version 0.1.

    The linear heads come with the `lpips` package. VGG-16 is torchvision's, read from `$TORCH_HOME/hub/checkpoints` and
    downloaded if it is not there.

    Args:
        weights: A file with torchvision's VGG-16 weights to use instead.

    Attributes:
        name: Name of the distance in logs.

    Raises:
        ValueError: if the weights of VGG-16 can't be loaded, or a file of weights lacks a tensor.
    """

    name = "lpips"

    def __init__(self, weights: str | None = None) -> None:
        url = VGG16_Weights.IMAGENET1K_V1.url
        vgg, place = read_published_weights(weights, url, "VGG-16, for LPIPS")
        with warnings.catch_warnings():  # lpips passes torchvision a deprecated argument
            warnings.simplefilter("ignore", UserWarning)
            network = lpips.LPIPS(net="vgg", pretrained=False, pnet_rand=True, verbose=False)
        # The slices keep torchvision's numbering: `features.12.weight` is `slice3.12.weight` here.
        names = {ours: f"features.{ours.partition('.')[2]}" for ours in network.net.state_dict()}
        if isinstance(vgg, Mapping):
            vgg = {ours: vgg[name] for ours, name in names.items() if name in vgg}
        fill(network.net, vgg, f"weights: {place!r} holds no VGG-16 with torchvision's names, give the file of {url}")
        heads = Path(lpips.__file__).parent / "weights/v0.1/vgg.pth"
        linear = {name.replace("lin", "", 1): values for name, values in read_weights(heads, "lpips").items()}
        fill(network.lins, linear, f"lpips: {str(heads)!r} is another version's; install the package again")
        super().__init__(network)

    def forward(self, images: Tensor, target: Tensor) -> Tensor:
        """Mean distance between `images` and `target`, both `[B, 3, H, W]` in [-1, 1]."""
        with torch.autocast(images.device.type, enabled=False):
            return self.network(in_fast_layout(images.float()), in_fast_layout(target.float())).mean()


class VFMPerceptualLoss(nn.Module):
    """Perceptual distance on a frozen VFM's features, like LPIPS but without learned weights.

    Tokens of every layer are scaled to unit length over channels. Squared differences are summed over channels and
    averaged over tokens and layers: 0 for equal features, 2 for orthogonal ones.

    Args:
        vfm: The VFM whose `layers` are compared.

    Attributes:
        name: Name of the distance in logs, which contains the VFM's.
    """

    def __init__(self, vfm: VFM | Mapping[str, Any]) -> None:
        super().__init__()
        self.vfm = FrozenVFM(**vfm) if isinstance(vfm, Mapping) else vfm
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
