"""Frozen vision foundation models (VFMs): any timm vision transformer, by name."""

import inspect
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, ClassVar

import torch
from jsonargparse import ArgumentParser
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from vfm_vae.compilation import compile_regions
from vfm_vae.contracts import VFM
from vfm_vae.description import check_place, class_at, class_path, is_plain
from vfm_vae.frozen_vfm import FrozenTransformer, Precision
from vfm_vae.hooks import run_and_keep
from vfm_vae.images import Interpolation
from vfm_vae.positions import Positions, has_positions
from vfm_vae.pretrained import build
from vfm_vae.types import VFMShape
from vfm_vae.vit import create_vit, family_of

FORMERLY: Mapping[str, Any] = {
    "antialias_positions": True,
    "precision": "bfloat16",
    "interpolation": None,
    "target_interpolation": None,
}
"""What VFMs did before these arguments came: so mean checkpoints and caches that do not name them."""


class FrozenVFM(FrozenTransformer):
    """A frozen vision foundation model of timm's, which maps images to the tokens of some of its layers, in float32.

    Layers are counted as the tokens see them: 0 is what enters the first block (after patch and position embedding),
    k in 1..depth the output of block k, -1 the result of the final norm, -2 the output of the last block before that
    norm, -3 the one before, and so on. Families that norm after pooling (EVA, PE-spatial) have no final norm: there -1
    equals -2. Computes as `precision` says, whatever autocast is around it.

    Args:
        name: Name of a vision transformer in timm, for instance `vit_large_patch16_siglip_512.v2_webli`.
        layers: The layers whose tokens are wanted, in this order.
        input_scale: Factor by which images are resized before the model.
        weights: File with the weights to use instead of a download.
        pretrained: Whether to load weights; false leaves them random, for tests and for counting parameters.
        model_args: Further arguments of the timm model, for instance a smaller depth in tests.
        antialias: Whether resizing by `input_scale` is antialiased; the default is true if it shrinks.
        antialias_positions: Whether the table of learned positions is antialiased when it is resampled to another grid,
            as timm does it. The default is what the published network does: for most, not.
        precision: Precision of the network on CUDA; elsewhere it is always float32.
        interpolation: How images are resized before the model; the default is that of its family, see `vit.FAMILIES`.
        target_interpolation: How training targets are resized for it; the default is that of its family.

    Attributes:
        antialias_positions: Whether timm resamples the table; also true for networks without one.
        depth: Number of blocks.
        patch_size: Height and width of a patch in pixels of the resized image.

    Raises:
        ValueError: if the model is unknown or its weights can't be had, or it has no such layer or precision.
    """

    views: ClassVar[tuple[str, ...]] = ("input_scale", "antialias", "antialias_positions", "precision")

    def __init__(
        self,
        name: str,
        layers: Sequence[int] = (-1,),
        input_scale: float = 1.0,
        weights: str | None = None,
        pretrained: bool = True,
        model_args: dict[str, Any] | None = None,
        antialias: bool | None = None,
        antialias_positions: bool | None = None,
        precision: Precision = "bfloat16",
        interpolation: Interpolation | None = None,
        target_interpolation: Interpolation | None = None,
    ) -> None:
        self.check_options(precision, input_scale)
        network = create_vit(name, weights=weights, pretrained=pretrained, **(model_args or {}))
        family = family_of(name, network)
        super().__init__(
            network,
            name,
            layers,
            depth=len(network.blocks),
            patch_size=network.patch_embed.patch_size[0],
            mean=network.pretrained_cfg["mean"],
            std=network.pretrained_cfg["std"],
            interpolation=interpolation or family.interpolation,
            target_interpolation=target_interpolation or family.target_interpolation,
            input_scale=input_scale,
            antialias=antialias,
            precision=precision,
        )
        self._positions = Positions(network, family.positions) if has_positions(network) else None
        if antialias_positions is None:
            antialias_positions = family.antialias_positions
        self.antialias_positions = antialias_positions or self._positions is None
        self.width: int = network.embed_dim
        self.widths = (self.width,) * len(self.layers)

    @classmethod
    def arguments_of(cls, description: Mapping[str, Any]) -> dict[str, Any]:
        """All arguments of the VFM that a config or a checkpoint describes, by name."""
        given = FORMERLY | description["init_args"]
        parameters = list(inspect.signature(cls.__init__).parameters.values())[1:]
        return {p.name: given[p.name] if p.default is p.empty else given.get(p.name, p.default) for p in parameters}

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
        """What others derive their options from, without weights, and without drawing random numbers.

        Args:
            name: As for the class, like the others; arguments that change nothing here are passed over.
            layers: Layers whose tokens are wanted.
            input_scale: Factor by which images are resized.
            model_args: Further arguments of the timm model.
            target_interpolation: As for the class.
        """
        with torch.device("meta"):
            network = create_vit(name, pretrained=False, **(model_args or {}))
        return VFMShape(
            width=network.embed_dim,
            widths=(network.embed_dim,) * len(layers),
            stride=network.patch_embed.patch_size[0] / input_scale,
            target_interpolation=target_interpolation or family_of(name, network).target_interpolation,
        )

    def source(self) -> dict[str, Any]:
        """What it takes to have this VFM again: its arguments, and the `fingerprint` of its weights.

        A subclass names itself as well, under `class_path`. This class does not, and of arguments in `FORMERLY` it
        names those alone that differ, so that older caches say the same of the same VFM.
        """
        now: dict[str, Any] = {"name": self.name, "layers": list(self.layers)}
        if "antialias_positions" in self.arguments:
            now["antialias_positions"] = self.antialias_positions
        source = self.arguments | now
        if type(self) is FrozenVFM:
            source = {name: value for name, value in source.items() if name not in FORMERLY or value != FORMERLY[name]}
        else:
            source["class_path"] = class_path(type(self))
        return source | {"fingerprint": self.fingerprint()}

    @property
    def has_class_token(self) -> bool:
        """Whether the network has a class token."""
        return getattr(self.network, "cls_token", None) is not None

    @property
    def usual_interpolation(self) -> Interpolation:
        """How images are resized before networks of this family."""
        return family_of(self.name, self.network).interpolation

    def go_on_as(self, stored: Mapping[str, Any], option: str) -> None:
        """Resamples positions as the VFM did that a checkpoint names.

        Args:
            stored: What the checkpoint says of it, see `vfm_identity`.
            option: Sets this VFM; for a warning where that asked for the other way.

        Raises:
            ValueError: if the checkpoint says that images were resized in another way.
        """
        super().go_on_as(stored, option)
        former = stored.get("antialias_positions", FORMERLY["antialias_positions"])
        if self.antialias_positions == former or self._positions is None:
            return
        ways = {True: "with antialias", False: "without antialias"}
        rank_zero_warn(
            f"{option}: the checkpoint goes with positions resampled {ways[former]}, and goes on so; train anew to "
            f"have them {ways[self.antialias_positions]}. At the table's own grid, as of SigLIP2-512 on 256 px images "
            "at input_scale 2, there is no difference"
        )
        self.antialias_positions = former

    def compile_regions(self) -> None:
        """Compiles block by block, in place."""
        compile_regions(self.network.blocks, dynamic=True)

    def _run(self, inputs: Tensor, grid: tuple[int, int], layers: Iterable[int]) -> tuple[Tensor, Mapping[int, Tensor]]:
        with nullcontext() if self.antialias_positions or self._positions is None else self._positions.at(grid):
            return run_and_keep(partial(self.network.forward_features, inputs), self.network.blocks, layers)

    def _token_grid(self, height: int, width: int) -> tuple[int, int]:
        embed = self.network.patch_embed
        if embed.strict_img_size and embed.img_size is not None and (height, width) != tuple(embed.img_size):
            raise ValueError(
                f"images: {self.name} takes {embed.img_size[0]}x{embed.img_size[1]} pixels only, given "
                f"{height}x{width}{self._resized()}; change the image size or input_scale, or give model_args: img_size"
            )
        return super()._token_grid(height, width)


def vfm_from(source: Mapping[str, Any], weights: str | None = None) -> VFM:
    """Makes the VFM that a cache, a folder or a checkpoint speaks of, of the class that it was.

    Args:
        source: As `VFM.source` has it.
        weights: File with its weights, to take instead of those that `source` names.

    Raises:
        ValueError: if its weights can't be had, or its arguments ask for a class that is no part of a model.
    """
    given = source if weights is None else {**source, "weights": weights}
    return build(VFM, description_from(given), f"the VFM {source.get('name')!r}")


def description_from(source: Mapping[str, Any]) -> dict[str, Any]:
    """The VFM that a cache, a folder or a checkpoint speaks of, as configs have it; `source` as for `vfm_from`."""
    path = source.get("class_path", class_path(FrozenVFM))
    given = source if "class_path" in source else {**FORMERLY, **source}
    names = _arguments_of(class_at(path, f"the VFM {source.get('name')!r}"))
    return {"class_path": path, "init_args": {name: value for name, value in given.items() if name in names}}


def _arguments_of(cls: type) -> set[str]:
    """The names of the arguments that a class takes, also of those that it hands on to its bases."""
    return set(ArgumentParser().add_class_arguments(cls, fail_untyped=False))


def check_frozen(vfm: VFM) -> None:
    """Checks that a VFM would not be trained or saved with the model that has it.

    Raises:
        ValueError: if it has parameters or buffers that a `state_dict` holds.
    """
    if isinstance(vfm, nn.Module) and vfm.state_dict():
        raise ValueError(
            f"{type(vfm).__name__} would be trained and saved with the model, as it has weights in its state_dict: "
            "derive it from vfm_vae.frozen.Frozen, which hides its network"
        )


def check_source(vfm: VFM) -> None:
    """Checks that a VFM can be made again by what checkpoints will say of it.

    Raises:
        ValueError: if its `source` lacks something, or says what is no use.
    """
    cls, source, known = type(vfm), vfm.source(), {"name", "layers", "fingerprint"}
    check_place(cls)
    takes = list(inspect.signature(cls.__init__).parameters.values())[1:]
    needed = {p.name for p in takes if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    faults = {
        "lacks": (known | needed) - source.keys(),
        "has what its __init__ does not take:": source.keys() - _arguments_of(cls) - known - {"class_path"},
        "has what is no plain data:": {name for name, value in source.items() if not is_plain(value)},
        "needs the class_path": {class_path(cls)} - {str(source.get("class_path", class_path(FrozenVFM)))},
    }
    if found := [f"{fault} {sorted(names)}" for fault, names in faults.items() if names]:
        raise ValueError(
            f"{class_path(cls)}: no checkpoint could make it again, as what its source() returns {', '.join(found)}; "
            "see vfm_vae.contracts.VFM.source"
        )


def vfm_identity(vfm: VFM | None) -> dict[str, str | bool] | None:
    """What a checkpoint says of the VFM instead of holding its weights; None where there is none."""
    if vfm is None:
        return None
    identity = {"name": vfm.name, "fingerprint": vfm.fingerprint()}
    told = vfm.source() | vfm.view()
    noted = ("class_path", "antialias_positions", "interpolation")
    return identity | {name: told[name] for name in noted if told.get(name) is not None}


def check_vfm(vfm: VFM | None, checkpoint: Mapping[str, Any], option: str = "model.vfm") -> None:
    """Compares the VFM at hand with the one that the checkpoint was trained with, and has it go on as that did.

    A checkpoint of published weights may know the name alone.

    Args:
        vfm: At hand; None where there is none.
        checkpoint: Names the other, as `vfm_identity` does, under `vfm`.
        option: The option that sets the VFM at hand.

    Raises:
        ValueError: if it is another, by name, class or weights.
    """
    stored = checkpoint.get("vfm")
    if vfm is None and stored is None:
        return
    if stored is None:
        raise ValueError("the checkpoint names no VFM: it is no tokenizer's, or of another version")
    if vfm is None:
        raise ValueError(f"the checkpoint was trained with the VFM '{stored['name']}', but there is none at hand")
    if stored["name"] != vfm.name:
        raise ValueError(
            f"the checkpoint was trained on the VFM '{stored['name']}', but {option} is '{vfm.name}'; give that name"
        )
    trained_on, ours = stored.get("class_path"), class_path(type(vfm))
    # Former versions named no class, and published weights know none.
    named = checkpoint.get("format_version", 1) > 1 and stored["fingerprint"] is not None
    plain = type(vfm) is FrozenVFM if named else isinstance(vfm, FrozenVFM)
    if trained_on != ours and not (trained_on is None and plain):
        trained_on = trained_on or class_path(FrozenVFM)
        raise ValueError(f"the checkpoint was trained on a {trained_on}, but {option} is a {ours}; give that class")
    if stored["fingerprint"] not in (None, vfm.fingerprint()):
        raise ValueError(
            f"the checkpoint was trained on other weights of '{vfm.name}' (sha256 {stored['fingerprint'][:12]}…) than "
            f"those at hand ({vfm.fingerprint()[:12]}…); give the right file as the VFM's weights (vfm_weights of a "
            "frozen tokenizer)"
        )
    vfm.go_on_as(stored, option)
