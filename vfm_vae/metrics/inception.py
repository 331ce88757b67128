"""The Inception network of 2015, on whose features FID and related metrics are defined."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch_fidelity.feature_extractor_inceptionv3 import (
    URL_INCEPTION_V3,
    BasicConv2d,
    InceptionA,
    InceptionB,
    InceptionC,
    InceptionD,
    InceptionE_1,
    InceptionE_2,
)

from vfm_vae.checkpoints import misfit, read_published_weights
from vfm_vae.frozen import Frozen, sha256_of
from vfm_vae.metrics.features import float32_arithmetic

SIDE = 299
POOL_WIDTH, SPATIAL_WIDTH, NUM_CLASSES = 2048, 7 * 17 * 17, 1008


class InceptionFeatures(NamedTuple):
    """What Inception says of a batch of images, in float32.

    Attributes:
        pool: Averages of the last feature maps, for FID, precision and recall, `[B, 2048]`.
        spatial: The first 7 channels of a 17×17 map, for sFID, channels last, `[B, 2023]`.
        logits: Without the last layer's bias, for the Inception Score, `[B, 1008]`.
    """

    pool: Tensor
    spatial: Tensor | None
    logits: Tensor | None


class Inception(Frozen):
    """Inception V3 as the TensorFlow graph of 2015 has it, with the weights that torch-fidelity ships.

    Runs in full float32, with batch norms folded into the convolutions, which changes results by rounding alone.

    Args:
        weights: File with torch-fidelity's weights, to take instead of `$TORCH_HOME/hub/checkpoints`, where they are
            downloaded to if they are missing.

    Raises:
        ValueError: if the weights can't be had, or the file holds others.
    """

    network: "InceptionNetwork"

    def __init__(self, weights: str | None = None) -> None:
        network, fingerprint = _load(weights)
        network.eval().fold_norms()
        super().__init__(network.to(memory_format=torch.channels_last))
        self._fingerprint = fingerprint  # of the file: folded weights differ in the last digits between machines

    def forward(self, images: Tensor) -> InceptionFeatures:
        """Features of uint8 images `[B, 3, H, W]` in 0..255.

        Raises:
            ValueError: for images of another type or shape.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(
                f"images: Inception takes uint8 [B, 3, H, W] in 0..255, given {images.dtype} {tuple(images.shape)}"
            )
        with float32_arithmetic(images.device):
            return self.network((resize_tf1(images, SIDE) - 128) / 128)


class InceptionNetwork(nn.Module):
    """The layers, by the names that the weights have."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = BasicConv2d(3, 32, kernel_size=3, stride=2)
        self.Conv2d_2a_3x3 = BasicConv2d(32, 32, kernel_size=3)
        self.Conv2d_2b_3x3 = BasicConv2d(32, 64, kernel_size=3, padding=1)
        self.Conv2d_3b_1x1 = BasicConv2d(64, 80, kernel_size=1)
        self.Conv2d_4a_3x3 = BasicConv2d(80, 192, kernel_size=3)
        self.Mixed_5b = InceptionA(192, pool_features=32)
        self.Mixed_5c = InceptionA(256, pool_features=64)
        self.Mixed_5d = InceptionA(288, pool_features=64)
        self.Mixed_6a = InceptionB(288)
        self.Mixed_6b = InceptionC(768, channels_7x7=128)
        self.Mixed_6c = InceptionC(768, channels_7x7=160)
        self.Mixed_6d = InceptionC(768, channels_7x7=160)
        self.Mixed_6e = InceptionC(768, channels_7x7=192)
        self.Mixed_7a = InceptionD(768)
        self.Mixed_7b = InceptionE_1(1280)
        self.Mixed_7c = InceptionE_2(2048)
        self.fc = nn.Linear(POOL_WIDTH, NUM_CLASSES)

    def forward(self, x: Tensor) -> InceptionFeatures:
        """Maps images `[B, 3, 299, 299]` in [-1, 1)."""
        x = x.contiguous(memory_format=torch.channels_last)
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))  # [B, 64, 147, 147]
        x = F.max_pool2d(x, 3, stride=2)  # [B, 64, 73, 73]
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x))  # [B, 192, 71, 71]
        x = F.max_pool2d(x, 3, stride=2)  # [B, 192, 35, 35]
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))  # [B, 288, 35, 35]
        x = self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x))))  # [B, 768, 17, 17]
        spatial = x[:, :7]  # of its branch1x1, which comes first: TensorFlow's mixed_6/conv
        x = self.Mixed_7a(self.Mixed_6e(x))  # [B, 1280, 8, 8]
        x = self.Mixed_7c(self.Mixed_7b(x))  # [B, 2048, 8, 8]
        pool = x.mean(dim=(2, 3))
        return InceptionFeatures(pool, spatial.permute(0, 2, 3, 1).flatten(1), F.linear(pool, self.fc.weight))

    def fold_norms(self) -> None:
        """Folds the batch norms into the convolutions."""
        for layer in self.modules():
            if isinstance(layer, BasicConv2d):
                layer.conv, layer.bn = fuse_conv_bn_eval(layer.conv, layer.bn), nn.Identity()


def resize_tf1(images: Tensor, side: int) -> Tensor:
    """Resizes bilinearly as TensorFlow 1 does: corners aligned at the origin alone, no antialias.

    Output position i lies at `i * in / out` of the input, without the half-pixel shift of later conventions.

    Args:
        images: `[B, C, H, W]`, any type.
        side: Height and width of the result.

    Returns:
        float32 `[B, C, side, side]`.
    """
    low, high, weight = _positions(images.shape[3], side, images.device)
    left, right = images[..., low].float(), images[..., high].float()
    rows = left + (right - left) * weight  # [B, C, H, side]
    low, high, weight = _positions(images.shape[2], side, images.device)
    top, bottom = rows[:, :, low], rows[:, :, high]
    return top + (bottom - top) * weight[:, None]


def _positions(size: int, side: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Between which two pixels each output pixel lies, and how near to the second."""
    position = torch.arange(side, dtype=torch.float32, device=device) * torch.tensor(size / side, dtype=torch.float32)
    low = position.long()
    return low, (low + 1).clamp(max=size - 1), position - low


def _load(weights: str | None) -> tuple[InceptionNetwork, str]:
    """The network with weights from a file, or from torch-fidelity's usual place, and their fingerprint."""
    state, place = read_published_weights(weights, URL_INCEPTION_V3, "Inception, for FID and its kin")
    with torch.device("meta"):  # random weights would take longer than reading the right ones
        network = InceptionNetwork()
    if (difference := misfit(_without_counters(state), _without_counters(network.state_dict()))) is not None:
        raise ValueError(
            f"weights: {place!r} holds no Inception with torch-fidelity's names, give the file of {URL_INCEPTION_V3}: "
            f"{difference}"
        )
    network.load_state_dict(state, assign=True)
    return network.float(), sha256_of(state)


def _without_counters(state: Any) -> Any:
    """Weights without what batch norms count in training, which files may lack."""
    if not isinstance(state, Mapping):
        return state
    return {name: values for name, values in state.items() if not str(name).endswith("num_batches_tracked")}
