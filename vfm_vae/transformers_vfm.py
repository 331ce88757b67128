"""Frozen vision foundation models of Hugging Face's transformers: any plain vision tower, by name or folder."""

import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vfm_vae.compilation import compile_regions
from vfm_vae.description import class_path
from vfm_vae.frozen import sha256_of
from vfm_vae.frozen_vfm import FrozenTransformer, Precision
from vfm_vae.images import Interpolation
from vfm_vae.options import positive, within
from vfm_vae.towers import (
    blocks_of,
    config_of,
    create_tower,
    family_of,
    merged,
    run_tower,
    statistics_of,
    width_of,
)
from vfm_vae.types import VFMShape


class TransformersVFM(FrozenTransformer):
    """A frozen vision tower of transformers', which maps images to the tokens of some of its layers, in float32.

    Such are SigLIP and SigLIP2 of a fixed resolution, CLIP, MAE (nothing is masked), DINOv2, DINOv3 and Qwen2.5-VL's
    visual tower; others that are plain vision transformers are taken, too. Of a model with several towers, such as
    SigLIP or Qwen2.5-VL, this is the one for images.

    Layers are counted as `FrozenVFM` counts them, and -1 is after the final norm for CLIP, too, where the library
    returns tokens before it. Of Qwen2.5-VL, -1 is what the merger makes of 2x2 patches. Other layers have those four
    patches side by side along channels, as the merger takes them: so all have one grid, and none loses detail, as it
    would by averaging.

    A folder that diffusers' `AutoencoderRAE.save_pretrained` wrote has the weights of its encoder, behind the prefix
    `encoder.`: give its file as `weights`, and `norm_affine: false`, as the final norm has neither gain nor bias there.

    Args:
        name: Folder, or `owner/model` on the Hugging Face hub, for instance `facebook/dinov3-vitl16-pretrain-lvd1689m`.
            Weights are read from safetensors.
        layers: The layers whose tokens are wanted, in this order.
        input_scale: Factor by which images are resized before the tower.
        weights: File with the weights to use instead (safetensors or a torch checkpoint, in the library's layout); the
            tower may be one of its parts.
        pretrained: Whether to load weights; false leaves them random, for tests and for counting parameters.
        model_args: Options of the tower's config that take the place of those of `name`, for instance a smaller depth
            in tests. With `model_type` among them, nothing of `name` is looked up.
        antialias: Whether resizing by `input_scale` is antialiased; the default is true if it shrinks.
        precision: Precision of the network on CUDA; elsewhere it is always float32.
        interpolation: How images are resized before the tower; the default is that of its family, see
            `towers.FAMILIES`.
        target_interpolation: How training targets are resized for it; the default is that of its family.
        norm_affine: Whether the final norm has gain and bias.
        mean: Mean of the images that the tower takes, by channel, for values in [0, 1]; the default is what its image
            processor's file says, or else the family's.
        std: Their standard deviation; the default is likewise.

    Attributes:
        depth: Number of blocks.
        patch_size: Height and width of what becomes one token, in pixels of the resized image.

    Raises:
        ValueError: if there is no such model or its weights can't be had, it is no plain vision transformer, or it has
            no such layer or precision.
    """

    def __init__(
        self,
        name: str,
        layers: Sequence[int] = (-1,),
        input_scale: float = 1.0,
        weights: str | None = None,
        pretrained: bool = True,
        model_args: dict[str, Any] | None = None,
        antialias: bool | None = None,
        precision: Precision = "bfloat16",
        interpolation: Interpolation | None = None,
        target_interpolation: Interpolation | None = None,
        norm_affine: bool = True,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        self.check_options(precision, input_scale)
        within(0, 1, mean=mean)
        positive(std=std)
        for option, values in {"mean": mean, "std": std}.items():
            if values is not None and len(values) != 3:
                raise ValueError(f"{option}: must be three numbers, for red, green and blue, given {list(values)}")
        config = config_of(name, model_args)
        family = family_of(config)
        usual_mean, usual_std = statistics_of(name, config, is_local="model_type" in (model_args or {}))
        tower = create_tower(name, config, weights=weights, pretrained=pretrained, norm_affine=norm_affine)
        super().__init__(
            tower,
            name,
            layers,
            depth=len(blocks_of(tower)),
            patch_size=config.patch_size * merged(config),
            mean=mean or usual_mean,
            std=std or usual_std,
            interpolation=interpolation or family.interpolation,
            target_interpolation=target_interpolation or family.interpolation,
            input_scale=input_scale,
            antialias=antialias,
            precision=precision,
        )
        self.width = width_of(config)
        self.widths = tuple(width_of(config, layer) for layer in self.layers)

    @classmethod
    def shape_of(
        cls,
        name: str,
        layers: Sequence[int] = (-1,),
        input_scale: float = 1.0,
        model_args: Mapping[str, Any] | None = None,
        target_interpolation: Interpolation | None = None,
        **_: Any,
    ) -> VFMShape:
        """What others derive their options from, by its config alone.

        Args:
            name: As for the class, like the others; arguments that change nothing here are passed over.
            layers: Layers whose tokens are wanted.
            input_scale: Factor by which images are resized.
            model_args: Options of the config.
            target_interpolation: As for the class.
        """
        config = config_of(name, model_args)
        return VFMShape(
            width=width_of(config),
            widths=tuple(width_of(config, layer) for layer in layers),
            stride=config.patch_size * merged(config) / input_scale,
            target_interpolation=target_interpolation or family_of(config).interpolation,
        )

    def source(self) -> dict[str, Any]:
        """What it takes to have this VFM again: its arguments, and the `fingerprint` of its weights.

        Defaults are left out, but not mean and standard deviation, which may come from a file.
        """
        takes = inspect.signature(type(self).__init__).parameters
        given = {name: value for name, value in self.arguments.items() if value != takes[name].default}
        statistics = {name: getattr(self, name).flatten().tolist() for name in ("mean", "std") if name in takes}
        named = {"class_path": class_path(type(self)), "name": self.name, "layers": list(self.layers)}
        return given | statistics | named | {"fingerprint": self.fingerprint()}

    def fingerprint(self) -> str:
        """SHA-256, in hexadecimal, over the shapes and bytes of the weights, as they were read.

        Their names are left out: versions of transformers call them differently.
        """
        if self._fingerprint is None:
            each = sorted(sha256_of({"": tensor}) for tensor in self.network.state_dict().values())
            self._fingerprint = sha256_of({}, *each)
        return self._fingerprint

    @property
    def has_class_token(self) -> bool:
        """Whether the tower has a class token."""
        return any(name.endswith(("cls_token", "class_embedding")) for name, _ in self.network.named_parameters())

    @property
    def usual_interpolation(self) -> Interpolation:
        """How images are resized before towers of this family."""
        return family_of(self.network.config).interpolation

    def compile_regions(self) -> None:
        """Compiles block by block, in place."""
        compile_regions(blocks_of(self.network), dynamic=True)

    def hold_products_in(self, dtype: torch.dtype) -> None:
        """Keeps weights of linear layers in the precision of autocast, unless the VFM computes in float32.

        Those of convolutions stay: some towers cast images and positions to the precision that they find there.
        """
        if self.precision != "float32":
            self.fingerprint()
            for layer in self.network.modules():
                if isinstance(layer, nn.Linear):
                    layer.to(dtype)

    def _run(self, inputs: Tensor, grid: tuple[int, int], layers: Iterable[int]) -> tuple[Tensor, Mapping[int, Tensor]]:
        return run_tower(self.network, inputs, grid, layers)
