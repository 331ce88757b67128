"""Multi-scale PatchGAN (pix2pixHD, arXiv 1711.11585, section 3.2) with local batch norm."""

from collections import OrderedDict
from typing import Literal, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vfm_vae.discriminators.layers import LocalBatchNorm
from vfm_vae.modules.maps import in_fast_layout
from vfm_vae.options import at_least, one_of


class PatchDiscriminator(nn.Module):
    """One scale: strided convolutions that end in one logit per overlapping patch.

    The first `num_layers` layers halve the size, one more keeps it, and the last gives the logits. All but the last end
    in LeakyReLU(0.2); all but the first and the last have a local batch norm before it.

    Args:
        num_layers: Number of convolutions that halve the size.
        base_channels: Width of the first layer; each layer doubles it.
        max_channels: Largest width.
        kernel_size: Kernel of every convolution, padded by half of it: an even kernel makes each map larger by one.
        virtual_batch_size: Largest group of the local batch norm.
    """

    def __init__(
        self,
        num_layers: int = 3,
        base_channels: int = 64,
        max_channels: int = 512,
        kernel_size: int = 4,
        virtual_batch_size: int = 8,
    ) -> None:
        super().__init__()
        widths = [min(base_channels * 2**i, max_channels) for i in range(num_layers + 1)]
        self.layers = nn.ModuleList()
        for i, (width_in, width_out) in enumerate(zip([3, *widths], [*widths, 1], strict=True)):
            stride = 2 if i < num_layers else 1
            convolution = nn.Conv2d(width_in, width_out, kernel_size, stride, padding=kernel_size // 2)
            nn.init.normal_(convolution.weight, std=0.02)
            layer: OrderedDict[str, nn.Module] = OrderedDict(convolution=convolution)
            if 0 < i <= num_layers:
                layer["norm"] = LocalBatchNorm(width_out, virtual_batch_size)
            if i <= num_layers:
                layer["activation"] = nn.LeakyReLU(0.2)
            self.layers.append(nn.Sequential(layer))

    def forward(self, images: Tensor) -> list[Tensor]:
        """Computes every layer's output.

        Args:
            images: `[B, 3, H, W]`.

        Returns:
            `num_layers + 2` tensors `[B, C_i, h_i, w_i]`; the last has C = 1 and is the logits.
        """
        outputs = []
        x = images
        for layer in self.layers:
            x = layer(x)  # [B, C_i, h_i, w_i]
            outputs.append(x)
        return outputs


@final
class PatchGAN(nn.Module):
    """Judges patches of images at several scales, each with its own discriminator.

    It is the same in training and evaluation, and does not augment images. Everything is computed in float32, even
    under autocast. Weights of convolutions are initialised from N(0, 0.02²), their biases by PyTorch's default.

    Args:
        num_scales: Number of discriminators; each after the first sees images of half the size of the one before.
        num_layers: Number of convolutions of stride 2 in each discriminator; two of stride 1 follow.
        base_channels: Width of the first layer; each layer doubles it, up to `max_channels`.
        max_channels: Largest width.
        kernel_size: Kernel of every convolution.
        virtual_batch_size: Largest group of the local batch norm.
        loss: What it is trained by, and the generator against it: `least_squares`, or `hinge` as in latent diffusion.

    Raises:
        ValueError: if a number of scales, layers or channels is below 1, or the loss is unknown.
    """

    def __init__(
        self,
        num_scales: int = 3,
        num_layers: int = 3,
        base_channels: int = 64,
        max_channels: int = 512,
        kernel_size: int = 4,
        virtual_batch_size: int = 8,
        loss: Literal["least_squares", "hinge"] = "least_squares",
    ) -> None:
        super().__init__()
        one_of("loss", loss, "least_squares", "hinge")
        self.loss = loss
        options = {
            "num_layers": num_layers,
            "base_channels": base_channels,
            "max_channels": max_channels,
            "kernel_size": kernel_size,
            "virtual_batch_size": virtual_batch_size,
        }
        at_least(1, num_scales=num_scales, **options)
        self.scales = nn.ModuleList(PatchDiscriminator(**options) for _ in range(num_scales))

    def forward(self, images: Tensor) -> list[list[Tensor]]:
        """Computes every layer's output at every scale; each scale's last tensor is the logits, high for real images.

        Real and generated images must go through separately, because the local batch norm mixes samples of a batch.

        Args:
            images: `[B, 3, H, W]` in [-1, 1]; B is a multiple of the virtual batch size, or smaller.

        Returns:
            For each scale, full size first, the outputs of its `num_layers + 2` layers, float32 `[B, C_i, h_i, w_i]`.

        Raises:
            ValueError: if B doesn't divide into equal groups.
        """
        with torch.autocast(images.device.type, enabled=False):
            images = in_fast_layout(images.float())
            outputs = []
            for i, discriminator in enumerate(self.scales):
                if i > 0:
                    images = F.avg_pool2d(
                        images, 3, stride=2, padding=1, count_include_pad=False
                    )  # [B, 3, ⌈H/2⌉, ⌈W/2⌉]
                outputs.append(discriminator(images))
        return outputs
