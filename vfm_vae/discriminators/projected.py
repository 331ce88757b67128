"""Projected discriminator: light heads on a frozen vision transformer (StyleGAN-T, arXiv 2301.09515, section 3.2)."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import spectral_norm

from vfm_vae.compilation import compile_regions
from vfm_vae.discriminators.augment import DifferentiableAugmentation
from vfm_vae.discriminators.layers import LocalBatchNorm
from vfm_vae.frozen import Frozen
from vfm_vae.hooks import run_and_keep
from vfm_vae.images import Interpolation, resize
from vfm_vae.options import at_least, named_as, within
from vfm_vae.positions import resample_positions
from vfm_vae.vit import create_vit


class Residual(nn.Module):
    """`(fn(x) + x) / √2`, which keeps the variance of independent summands."""

    def __init__(self, fn: nn.Module) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, x: Tensor) -> Tensor:
        """Applies `fn` to `x`, whose shape it keeps."""
        return (self.fn(x) + x) / math.sqrt(2)


class DiscriminatorHead(nn.Module):
    """One logit per token, from the tokens of one layer.

    Parameters are named as in the published discriminators. They use PyTorch's older spectral norm, and so does this:
    the newer parametrisation updates its two vectors in the other order.

    Args:
        width: Width of the tokens.
        kernel_size: Kernel of the circular convolution along the tokens in raster order.
        virtual_batch_size: Largest group of the local batch norm.
    """

    def __init__(self, width: int, kernel_size: int = 9, virtual_batch_size: int = 8) -> None:
        super().__init__()

        def block(size: int) -> nn.Sequential:
            convolution = nn.Conv1d(width, width, size, padding=size // 2, padding_mode="circular")
            norm = LocalBatchNorm(width, virtual_batch_size)
            return nn.Sequential(spectral_norm(convolution, eps=1e-12), norm, nn.LeakyReLU(0.2))

        self.main = nn.Sequential(block(1), Residual(block(kernel_size)))
        self.cls = spectral_norm(nn.Conv1d(width, 1, 1), eps=1e-12)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits `[B, 1, N]` of `tokens: [B, C, N]`."""
        return self.cls(self.main(tokens))


class ProjectedDiscriminator(nn.Module):
    """Judges images by the features of a frozen vision transformer, with one trained head per layer.

    In training mode the images are first augmented and, where they are larger than the backbone's input, sometimes
    cropped to it instead of resized. Gradients pass through the backbone to the images but never into its weights,
    which are no parameters here and in no `state_dict`. The heads compute in float32 whatever autocast says.

    Args:
        backbone: Name of a vision transformer in timm.
        weights: File with the backbone's weights to use instead of a download.
        pretrained: Whether to load weights; false leaves them random, for tests.
        size: Height and width in pixels of the backbone's input.
        layers: The backbone's layers that have a head: 0 for the tokens that enter the first block, k for the output of
            block k. If the backbone has a class token, it is added to every patch token.
        kernel_size: Kernel of the heads' circular convolution.
        virtual_batch_size: Largest group of the heads' local batch norm.
        crop_probability: How often a batch of images that are larger than `size` is cropped at a random place instead
            of resized, 0 to 1.
        interpolation: How images are resized; null for bilinear or, in a config, for that of the tokenizer's VFM.
        augmentation: Augments images in training; null for the default strengths.

    Raises:
        ValueError: if a number lies outside its range, the backbone is unknown or its weights can't be had, it has no
            such layer, or it does not take the size.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        backbone: str = "vit_small_patch16_224.dino",
        weights: str | None = None,
        pretrained: bool = True,
        size: int = 224,
        layers: Sequence[int] = (0, 3, 6, 9, 12),
        kernel_size: int = 9,
        virtual_batch_size: int = 8,
        crop_probability: float = 0.5,
        interpolation: Interpolation | None = None,
        augmentation: DifferentiableAugmentation | None = None,
    ) -> None:
        super().__init__()
        at_least(1, size=size, kernel_size=kernel_size, virtual_batch_size=virtual_batch_size)
        at_least(0, layers=layers)
        within(0, 1, crop_probability=crop_probability)
        with named_as(name="backbone"):
            vit = create_vit(backbone, weights=weights, pretrained=pretrained)
        _check(vit, backbone, size, layers, kernel_size)
        set_input_size(vit, size)
        self.backbone = Frozen(vit)
        self.size = size
        self.layers = tuple(layers)
        self.crop_probability = crop_probability
        self.interpolation: Interpolation = interpolation or "bilinear"
        self.augmentation = augmentation or DifferentiableAugmentation()
        self.heads = nn.ModuleList(
            DiscriminatorHead(vit.embed_dim, kernel_size, virtual_batch_size) for _ in self.layers
        )
        for statistic in ("mean", "std"):
            values = torch.tensor(vit.pretrained_cfg[statistic]).view(3, 1, 1)
            self.register_buffer(statistic, values, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of images, high for real ones.

        Args:
            images: `[B, 3, H, W]` in [-1, 1]; B divides by the virtual batch size or is smaller.

        Returns:
            float32 `[B, L * N]`: the N tokens of each of the L layers, layer after layer.
        """
        images = images.float()
        if self.training:
            images = self._crop(self.augmentation(images))
        features = layer_tokens(self.backbone.network, self.prepare(images), self.layers)  # L times [B, C, N]
        with torch.autocast(images.device.type, enabled=False):
            logits = [head(tokens.float()) for head, tokens in zip(self.heads, features, strict=True)]  # [B, 1, N]
        return torch.cat(logits, 2).squeeze(1)  # [B, L·N]

    def compile_regions(self) -> None:
        """Compiles the backbone block by block, where it is first called."""
        compile_regions(self.backbone.network.blocks, dynamic=True)

    def prepare(self, images: Tensor) -> Tensor:
        """Brings images to the backbone's input: resize, [-1, 1] → [0, 1], the backbone's mean and std.

        Args:
            images: Float `[B, 3, H, W]` in [-1, 1].

        Returns:
            `[B, 3, size, size]`.
        """
        images = resize(images, (self.size, self.size), self.interpolation)
        return ((images + 1) / 2 - self.mean) / self.std

    def extra_repr(self) -> str:
        """What the printed model says of it."""
        return f"size={self.size}, layers={list(self.layers)}, interpolation={self.interpolation}"

    def _crop(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        # Drawn on the CPU, so that a GPU is not waited for.
        if min(height, width) <= self.size or torch.rand(()) >= self.crop_probability:
            return images
        top = int(torch.randint(height - self.size + 1, ()))
        left = int(torch.randint(width - self.size + 1, ()))
        return images[..., top : top + self.size, left : left + self.size]


def layer_tokens(vit: Any, inputs: Tensor, layers: Sequence[int]) -> list[Tensor]:
    """Patch tokens of several layers, the class token (if there is one) added to each.

    Args:
        vit: A timm vision transformer.
        inputs: Normalised images `[B, 3, H, W]` of the model's size.
        layers: 0 is the tokens that enter the first block, k the output of block k.

    Returns:
        One `[B, C, N]` per layer, in the order asked for.
    """
    _, tokens = run_and_keep(partial(vit.forward_features, inputs), vit.blocks, layers)

    def read_out(x: Tensor) -> Tensor:
        patches = x[:, vit.num_prefix_tokens :]  # [B, N, C]
        # The class token stands first, registers after it.
        return (patches if getattr(vit, "cls_token", None) is None else patches + x[:, :1]).mT

    return [read_out(tokens[layer]) for layer in layers]


def set_input_size(vit: Any, size: int) -> None:
    """Makes a timm vision transformer take `size`, its position embedding resized bilinearly without antialias.

    As the published discriminators do it; timm's own resizing, which is bicubic with antialias, differs by 3e-2.
    """
    old_grid = tuple(vit.patch_embed.grid_size)
    embedding = getattr(vit, "pos_embed", None)
    if tuple(vit.patch_embed.img_size) == (size, size):
        return
    if not hasattr(vit, "set_input_size"):
        raise ValueError(f"size: {type(vit).__name__} takes {vit.patch_embed.img_size} pixels only, given {size}")
    vit.set_input_size(img_size=(size, size))
    if embedding is None:  # rotary embeddings only
        return
    table = resample_positions(embedding.detach(), old_grid, vit.patch_embed.grid_size, "bilinear")
    vit.pos_embed = nn.Parameter(table, requires_grad=embedding.requires_grad)


def _check(vit: Any, name: str, size: int, layers: Sequence[int], kernel_size: int) -> None:
    depth, patch_size = len(vit.blocks), vit.patch_embed.patch_size[0]
    if not layers or any(not 0 <= layer <= depth for layer in layers):
        raise ValueError(f"layers: {name} has layers 0 to {depth}, given {list(layers)}")
    if size % patch_size:
        raise ValueError(f"size: must be a multiple of the {patch_size}-pixel patches of {name}, given {size}")
    if kernel_size % 2 == 0:
        raise ValueError(f"kernel_size: must be odd, so that tokens stay as many, given {kernel_size}")
    if (size // patch_size) ** 2 < kernel_size // 2:
        raise ValueError(
            f"size: {size} gives {(size // patch_size) ** 2} tokens with {name}, too few for the circular convolution "
            f"with kernel_size {kernel_size}; take a larger size or a smaller kernel"
        )
