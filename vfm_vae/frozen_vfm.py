"""What frozen vision transformers share, whichever library they come from: images, layers, precision and grids."""

import math
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vfm_vae.contracts import VFM
from vfm_vae.description import Described
from vfm_vae.frozen import Frozen
from vfm_vae.images import Interpolation
from vfm_vae.options import one_of, positive
from vfm_vae.types import VFMFeatures

Precision = Literal["bfloat16", "float32"]


class FrozenTransformer(Frozen, Described, VFM):
    """A frozen vision transformer, which maps images to the tokens of some of its layers, in float32.

    Layers are counted as the tokens see them: 0 is what enters the first block (after patch and position embedding),
    k in 1..depth the output of block k, -1 the result of the final norm, -2 the output of the last block before that
    norm, -3 the one before, and so on. Computes as `precision` says, whatever autocast is around it.

    A subclass sets `width` and `widths`, and has `_run`.

    Args:
        network: The network.
        name: As the subclass takes it, like all further arguments.
        layers: The layers whose tokens are wanted, in this order.
        depth: Number of blocks.
        patch_size: Height and width of what becomes one token, in pixels of the resized image.
        mean: Mean of the images that the network takes, by channel, for values in [0, 1].
        std: Their standard deviation, likewise.
        interpolation: How images are resized before the network.
        target_interpolation: How training targets are resized for it.
        input_scale: Factor by which images are resized before the network.
        antialias: Whether that is antialiased; None stands for true if it shrinks.
        precision: Precision of the network on CUDA; elsewhere it is always float32.

    Raises:
        ValueError: if the network has no such layer.
    """

    mean: Tensor
    std: Tensor
    views: ClassVar[tuple[str, ...]] = ("input_scale", "antialias", "precision")

    def __init__(
        self,
        network: nn.Module,
        name: str,
        layers: Sequence[int],
        *,
        depth: int,
        patch_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        interpolation: Interpolation,
        target_interpolation: Interpolation,
        input_scale: float,
        antialias: bool | None,
        precision: Precision,
    ) -> None:
        super().__init__(network)
        self.name = name
        self.layers = tuple(layers)
        self.input_scale = input_scale
        # Enlarging needs none: antialiasing would change nothing but the speed of a bilinear one.
        self.antialias = input_scale < 1 if antialias is None else antialias
        self.precision = precision
        self.interpolation = interpolation
        self.target_interpolation = target_interpolation
        self.depth = depth
        self.patch_size = patch_size
        self.stride = patch_size / input_scale
        self._blocks_before = [self._num_blocks_before(layer) for layer in self.layers]
        for statistic, values in {"mean": mean, "std": std}.items():
            self.register_buffer(statistic, torch.tensor(values).view(3, 1, 1), persistent=False)

    @staticmethod
    def check_options(precision: str, input_scale: float) -> None:
        """Checks options that are wrong whatever the network is, before one is made.

        Raises:
            ValueError: if there is no such precision, or the scale is not above 0.
        """
        one_of("precision", precision, *get_args(Precision))
        positive(input_scale=input_scale)

    @abstractmethod
    def _run(self, inputs: Tensor, grid: tuple[int, int], layers: Iterable[int]) -> tuple[Tensor, Mapping[int, Tensor]]:
        """Runs the network.

        Args:
            inputs: `[B, 3, H, W]`, as `prepare` returns them.
            grid: Rows and columns of their tokens.
            layers: Layers to keep, from 0 to `depth`.

        Returns:
            The final tokens `[B, P + N, C]`, and those of each layer that is kept, by its number. The P first are no
            patches.
        """

    @property
    @abstractmethod
    def has_class_token(self) -> bool:
        """Whether the first of the final tokens speaks for the whole image."""

    @property
    @abstractmethod
    def usual_interpolation(self) -> Interpolation:
        """How images are resized before networks of this family."""

    def forward(self, images: Tensor) -> VFMFeatures:
        """Features of `images: [B, 3, H, W] in [-1, 1]`, without gradients."""
        with torch.no_grad():
            return self.differentiable(images)

    def differentiable(self, images: Tensor) -> VFMFeatures:
        """The same features, with gradients that reach the images (the weights take none)."""
        in_bfloat16 = self.precision == "bfloat16" and images.device.type == "cuda"
        with torch.autocast(images.device.type, torch.bfloat16, enabled=in_bfloat16):
            inputs = self.prepare(images)  # [B, 3, H·scale, W·scale]
            grid = self._token_grid(*inputs.shape[-2:])
            wanted = [number for number in self._blocks_before if number is not None]
            final, before = self._run(inputs.to(next(self.network.parameters()).dtype), grid, wanted)
        final = final.float()  # [B, P + N, C]
        num_prefix = final.shape[1] - math.prod(grid)  # class token and registers
        tokens = final[:, num_prefix:]  # [B, N, C]
        return VFMFeatures(
            layers=tuple(tokens if k is None else before[k][:, num_prefix:].float() for k in self._blocks_before),
            tokens=tokens,
            pooled=final[:, 0] if self.has_class_token else tokens.mean(1),  # [B, C]
            grid=grid,
        )

    def hold_products_in(self, dtype: torch.dtype) -> None:
        """As `Frozen.hold_products_in`, but a VFM that computes in float32 keeps its weights in float32."""
        if self.precision != "float32":
            super().hold_products_in(dtype)

    def view(self) -> dict[str, Any]:
        """How it sees images and computes; an interpolation only where it is not the family's."""
        view = {name: getattr(self, name) for name in self.views}
        usual = self.interpolation == self.usual_interpolation
        return view if usual else view | {"interpolation": self.interpolation}

    def go_on_as(self, stored: Mapping[str, Any], option: str) -> None:
        """Checks that it sees images as the VFM did that a checkpoint names.

        Args:
            stored: What the checkpoint says of it, see `vfm_vae.vfm.vfm_identity`.
            option: Sets this VFM, for messages.

        Raises:
            ValueError: if the checkpoint says that images were resized in another way.
        """
        resized = stored.get("interpolation")
        if resized not in (None, self.interpolation):
            raise ValueError(
                f"{option}.interpolation: the checkpoint was trained with {resized!r}, but it is "
                f"{self.interpolation!r}; give {resized!r}"
            )

    def prepare(self, images: Tensor) -> Tensor:
        """Brings images to the model's input: [-1, 1] → [0, 1], resize by `input_scale`, the model's mean and std.

        Args:
            images: `[B, 3, H, W]` in [-1, 1].

        Returns:
            float32 `[B, 3, H * input_scale, W * input_scale]`.
        """
        if not images.is_floating_point():
            raise ValueError(f"images: {self.name} takes float images in [-1, 1], given {images.dtype}")
        images = (images.float() + 1) / 2
        if self.input_scale != 1:
            size = [round(side * self.input_scale) for side in images.shape[-2:]]
            images = F.interpolate(images, size=size, mode=self.interpolation, antialias=self.antialias)
        return (images - self.mean.float()) / self.std.float()

    def extra_repr(self) -> str:
        """What the printed model says of it."""
        return f"{self.name}, layers={list(self.layers)}, input_scale={self.input_scale}"

    def _num_blocks_before(self, layer: int) -> int | None:
        """How many blocks a layer's tokens have passed; None for the result of the final norm."""
        if layer == -1:
            return None
        num_blocks = layer if layer >= 0 else self.depth + 2 + layer
        if not 0 <= num_blocks <= self.depth:
            raise ValueError(
                f"layers: {self.name} has no layer {layer}; its {self.depth} blocks give layers 0 to {self.depth} and "
                f"{-self.depth - 2} to -1"
            )
        return num_blocks

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the tokens of images `[B, 3, height, width]`.

        Raises:
            ValueError: if the model takes no images of this size.
        """
        return self._token_grid(*(round(side * self.input_scale) for side in (height, width)))

    def _token_grid(self, height: int, width: int) -> tuple[int, int]:
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(
                f"images: {self.name} has patches of {self.patch_size} pixels, which don't divide {height}x{width}"
                f"{self._resized()}; height and width times input_scale must be multiples of {self.patch_size}"
            )
        return height // self.patch_size, width // self.patch_size

    def _resized(self) -> str:
        """Says, behind a size, that it is the one after resizing."""
        return f" (images resized by input_scale = {self.input_scale})" if self.input_scale != 1 else ""
