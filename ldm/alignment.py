"""Alignment of a denoiser to a vision foundation model (VFM): REPA, and REG with the VFM's class token.

Features are the VFM's of the clean image, `[B, 1 + N, D]`: its class token (or what stands for it), then its patch
tokens in raster order, after the final norm.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.models.denoiser import Denoiser
from vfm_vae.contracts import VFM
from vfm_vae.images import from_uint8
from vfm_vae.options import at_least
from vfm_vae.types import Batch, LatentBatch
from vfm_vae.vfm import check_frozen, check_vfm, vfm_identity

# What a VFM's source says that changes no features, or that the fingerprint tells.
UNSEEN = {"layers", "weights", "precision", "pretrained", "model_args", "target_interpolation"}


def alignment_error(projected: Tensor, features: Tensor) -> Tensor:
    """Minus the cosine between tokens, averaged over them (Yu et al. 2025, REPA, arXiv 2410.06940, eq. 8).

    Args:
        projected: `[B, N, D]`.
        features: The same shape.

    Returns:
        `[B]`, in [-1, 1].
    """
    return -F.cosine_similarity(projected.float(), features.float(), dim=2).mean(1)


def spatially_normalised(patches: Tensor, gamma: float) -> Tensor:
    """Takes out what all tokens of an image share: `(x − γ · mean) / (std + 1e-6)`, both over tokens, per channel.

    What is left tells places of the image apart (Singh et al. 2025, iREPA, arXiv 2512.10794).

    Args:
        patches: Patch tokens, `[B, N, D]`.
        gamma: How much of the mean is subtracted; 1 for all of it.

    Returns:
        Like `patches`.
    """
    std, mean = torch.std_mean(patches, dim=1, correction=0, keepdim=True)  # [B, 1, D] each
    return (patches - gamma * mean) / (std + 1e-6)


class REPA(nn.Module):
    """Aligns a block's projected patch tokens to the VFM's (REPA, Yu et al. 2025, arXiv 2410.06940).

    Args:
        vfm: The VFM; null if its features are cached beside the latents.
        weight: Weight of the alignment error in the loss.
        spatial_norm: How much of the mean over patch tokens is subtracted from the VFM's, which are divided by their
            standard deviation then (iREPA); 1 subtracts all of it, null leaves the tokens as they are.
    """

    has_class_token = False

    def __init__(self, vfm: VFM | None = None, weight: float = 0.5, spatial_norm: float | None = None):
        super().__init__()
        at_least(0, weight=weight, spatial_norm=spatial_norm)
        if vfm is not None:
            check_frozen(vfm)
        self.vfm, self.weight, self.spatial_norm = vfm, weight, spatial_norm

    @property
    def weights(self) -> dict[str, float]:
        """Weights of the terms of the objective, by name."""
        return {"align": self.weight}

    def features(self, batch: Batch | LatentBatch) -> Tensor:
        """The VFM's features of a batch's clean images, float32 `[B, 1 + N, D]`."""
        if isinstance(batch, LatentBatch):
            assert batch.features is not None  # `check_features` and `check_images` have seen to both
            return batch.features.float()
        assert self.vfm is not None
        return self.vfm(from_uint8(batch.images)).sequence

    def error(self, projected: Tensor, features: Tensor) -> Tensor:
        """The alignment error, `[B]`.

        Args:
            projected: The denoiser's projected tokens, `[B, prefix + N, D]`.
            features: The VFM's of the clean images, `[B, 1 + N, D]`.
        """
        if self.spatial_norm is not None:
            class_token, patches = features[:, :1].float(), features[:, 1:].float()
            features = torch.cat([class_token, spatially_normalised(patches, self.spatial_norm)], dim=1)
        return alignment_error(projected, features if self.has_class_token else features[:, 1:])

    def check_model(self, model: Denoiser) -> None:
        """Checks that the denoiser has the parts that are aligned, and no others.

        Raises:
            ValueError: if not.
        """
        if not model.align_channels:
            raise ValueError("model.align_channels: alignment needs the width of the VFM's tokens, given 0")
        if self.has_class_token != bool(model.cls_channels):
            fits = "the width of the VFM's class token" if self.has_class_token else "0"
            raise ValueError(f"model.cls_channels: {type(self).__name__} goes with {fits}, given {model.cls_channels}")
        if self.vfm is not None:
            self._check_shape(model, (None, self.vfm.width), f"model.alignment.vfm: {self.vfm.name} gives")

    def check_features(
        self, shape: tuple[int, ...] | None, source: Mapping[str, Any] | None, model: Denoiser, place: str
    ) -> None:
        """Checks that cached features fit.

        Args:
            shape: (1 + N, D) of those that a cache holds; None where it holds none.
            source: What it says of their VFM, see `VFM.source`; None where it says nothing.
            model: The denoiser.
            place: Names the cache.

        Raises:
            ValueError: if it holds none, of another shape, or of another VFM than `vfm`.
        """
        if shape is None:
            raise ValueError(
                f"data.root: {place} holds no VFM features to align to; make it with configs/vfm_vae/latents_reg.yaml"
            )
        self._check_shape(model, (shape[0], shape[1]), f"data.root: the features in {place} have")
        if self.vfm is not None and source is not None:
            ours = self.vfm.source()
            compared = sorted({*ours, *source} - UNSEEN)
            if other := [name for name in compared if source.get(name) != ours.get(name)]:
                raise ValueError(
                    f"data.root: the features in {place} are of another VFM than model.alignment.vfm: {other}; give it "
                    "these as the cache has them (antialias_positions: true where it names none), or make it anew"
                )

    def identity(self) -> dict[str, str | bool] | None:
        """How a checkpoint describes the VFM that was used; None if its features were cached."""
        return None if self.vfm is None else vfm_identity(self.vfm)

    def go_on_as(self, stored: Mapping[str, Any] | None) -> None:
        """Checks that the VFM is that of a checkpoint, and makes it resample positions in the same way.

        Args:
            stored: Its `identity`; None where it says nothing, as older ones do.

        Raises:
            ValueError: if it is another VFM.
        """
        if self.vfm is not None:
            ours = vfm_identity(self.vfm) or {}
            known = {name: value for name, value in ours.items() if name in ("name", "class_path")}
            check_vfm(self.vfm, {"vfm": stored or known | {"fingerprint": None}}, "model.alignment.vfm")

    def check_images(self, image_size: int, model: Denoiser) -> None:
        """Checks that there is a VFM for images, with as many tokens as the denoiser has.

        Raises:
            ValueError: if not.
        """
        if self.vfm is None:
            raise ValueError("model.alignment.vfm: training on images needs the VFM; give it, or cached features")
        rows, columns = self.vfm.grid(image_size, image_size)
        self._check_shape(model, (1 + rows * columns, self.vfm.width), f"model.alignment.vfm: {self.vfm.name} gives")

    def _check_shape(self, model: Denoiser, shape: tuple[int | None, int], what: str) -> None:
        num_tokens, width = shape
        wanted = model.grid[0] * model.grid[1]
        if num_tokens not in (None, 1 + wanted):
            raise ValueError(f"{what} {num_tokens - 1} patch tokens, but the denoiser has {wanted}")
        for name in ("align_channels", "cls_channels"):
            if getattr(model, name) not in (0, width):
                raise ValueError(f"{what} {width} channels, but model.{name} is {getattr(model, name)}")


class REG(REPA):
    """REPA of all tokens, with the VFM's class token diffused too (REG, Wu et al. 2025, arXiv 2507.01467, section 3).

    Args:
        vfm: The VFM; null if its features are cached beside the latents.
        weight: Weight of the alignment error in the loss.
        cls_weight: Weight of the class token's squared error in the loss.
        spatial_norm: How much of the mean over patch tokens is subtracted from the VFM's, which are divided by their
            standard deviation then (iREPA); 1 subtracts all of it, null leaves the tokens as they are. The class token
            stays as it is.
    """

    has_class_token = True

    def __init__(
        self,
        vfm: VFM | None = None,
        weight: float = 0.5,
        cls_weight: float = 0.03,
        spatial_norm: float | None = None,
    ):
        super().__init__(vfm, weight, spatial_norm)
        at_least(0, cls_weight=cls_weight)
        self.cls_weight = cls_weight

    @property
    def weights(self) -> dict[str, float]:
        """Weights of the terms of the objective, by name."""
        return {"align": self.weight, "cls": self.cls_weight}
