"""Frozen vision foundation models (VFMs): any timm vision transformer, by name."""

import difflib
import hashlib
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any, Literal, get_args

import timm
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.nn import functional as F

from vfm_vae import embedded  # noqa: F401  importing it registers the embedded model with timm
from vfm_vae.description import Described
from vfm_vae.images import Interpolation
from vfm_vae.options import positive
from vfm_vae.positions import Positions, antialias_positions_of, has_positions
from vfm_vae.types import VFMFeatures
from vfm_vae.vit_weights import load_vit, load_vit_from_source

Precision = Literal["bfloat16", "float32"]

FORMERLY: Mapping[str, Any] = {"antialias_positions": True, "precision": "bfloat16"}
"""What VFMs did before these arguments came: so mean checkpoints and caches that do not name them."""


def interpolation_of(name: str) -> Interpolation:
    """How images are resized in front of the model: the choice of the VFM-VAE authors, not of timm's metadata."""
    return "bicubic" if "dino" in name.lower() else "bilinear"


def target_interpolation_of(name: str) -> Interpolation:
    """How training targets are resized beside the model: as its input, but for EVA, whose targets are bicubic."""
    return "bicubic" if re.search(r"\beva(02)?_", name.lower()) else interpolation_of(name)


def create_vit(name: str, *, weights: str | Path | None = None, pretrained: bool = True, **kwargs: Any) -> nn.Module:
    """Creates a timm vision transformer without its classifier, for images of any size where the family allows it.

    Args:
        name: timm name with or without its weights' tag, for instance `vit_large_patch16_siglip_512.v2_webli`; timm's
            `hf-hub:` and `local-dir:` sources work too.
        weights: file with the weights (safetensors or a torch checkpoint, in timm's or the family's published layout)
            to take instead of a download; it has to hold every tensor of the network.
        pretrained: False leaves the weights random.
        **kwargs: further arguments of the timm model.

    Raises:
        ValueError: if timm does not know the name, the network is no vision transformer, or its weights are neither
            where `weights` says, whole and in its shapes, nor downloadable.
    """
    _check_name(name)
    is_given, is_sourced = weights is not None, ":" in name  # timm's own sources, hf-hub: and local-dir:
    if pretrained and is_given and not Path(weights).is_file():
        raise ValueError(f"weights: no file at {str(weights)!r} for {name!r}; give the file's path or leave it out")
    by_timm = pretrained and not is_given and not is_sourced  # what timm publishes; other files may hold anything
    arguments = {"pretrained": by_timm, "num_classes": 0, **kwargs}
    try:
        try:
            network = timm.create_model(name, dynamic_img_size=True, **arguments)
        except TypeError as error:
            if "dynamic_img_size" not in str(error):
                raise
            network = timm.create_model(name, **arguments)
    except Exception as error:
        if not pretrained or isinstance(error, TypeError):
            raise
        raise ValueError(_no_weights_message(name, error)) from error
    if not all(hasattr(network, part) for part in ("patch_embed", "blocks", "norm")):
        raise ValueError(
            f"name: {name!r} ({type(network).__name__}) is no plain vision transformer; choose one with patch tokens "
            "and a sequence of blocks, for instance 'vit_large_patch16_siglip_512.v2_webli'"
        )
    if pretrained and is_given:
        load_vit(network, name, weights)
    elif pretrained and is_sourced:
        load_vit_from_source(network, name)
    return network


def _check_name(name: str) -> None:
    if ":" in name:  # of timm's own sources
        return
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        similar = difflib.get_close_matches(architecture, timm.list_models(), n=3, cutoff=0.5)
        hint = f"did you mean {', '.join(map(repr, similar))}?" if similar else "timm.list_models() lists them all"
        raise ValueError(f"name: timm knows no model {name!r}; {hint}")
    known = [known.partition(".")[2] for known in timm.list_pretrained(f"{architecture}.*")]
    if tag and tag not in known:
        raise ValueError(
            f"name: {architecture!r} has no weights called {tag!r}; there are {sorted(filter(None, known))}"
        )


def _no_weights_message(name: str, error: Exception) -> str:
    cause = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return (
        f"weights: those of {name!r} could not be had by download ({type(error).__name__}: {cause}); give a local file "
        "as `weights`, or download them once where there is a network, or ask for random ones with `pretrained: false`"
    )


def sha256_of(tensors: Mapping[str, Tensor], *texts: str) -> str:
    """SHA-256, in hexadecimal, over the names, shapes and bytes of tensors, and over texts."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    for text in texts:
        digest.update(text.encode())
    return digest.hexdigest()


class Frozen(nn.Module):
    """Holds a network outside the module registry, so that nothing can train, save, average or count it.

    The network is in no `parameters()`, `state_dict()` or `children()`, stays in eval mode whatever `train()` says, and
    still follows `to()`, `cuda()` and copies.

    Args:
        network: what to freeze; switched to eval mode, its parameters to no gradient.
    """

    network: nn.Module

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self._fingerprint: str | None = None
        self.__dict__["network"] = network.eval().requires_grad_(False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Frozen":
        self.network._apply(fn, recurse)
        return super()._apply(fn, recurse)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the network; gradients may pass through it to its inputs."""
        return self.network(*args, **kwargs)

    def hold_products_in(self, dtype: torch.dtype) -> None:
        """Keeps the weights of linear layers and convolutions in the precision that autocast takes them in.

        Under it the outputs stay the same, bit for bit, and nothing is cast at each call. The fingerprint remains that
        of the weights as they were read.

        Args:
            dtype: Of autocast.
        """
        self.fingerprint()
        for layer in self.network.modules():
            if isinstance(layer, nn.Linear | nn.Conv2d):
                layer.to(dtype)

    def fingerprint(self) -> str:
        """SHA-256, in hexadecimal, over the names, shapes and bytes of the network's weights, as they were read."""
        if self._fingerprint is None:
            self._fingerprint = sha256_of(self.network.state_dict())
        return self._fingerprint


class FrozenVFM(Frozen, Described):
    """A vision foundation model as a frozen encoder: images in, tokens of the layers asked for out, in float32.

    Layers are counted as the tokens see them: 0 is what enters the first block (after patch and position embedding),
    k in 1..depth the output of block k, -1 the result of the final norm, -2 the output of the last block before that
    norm, -3 the one before, and so on. Families that norm after pooling (EVA, PE-spatial) have no final norm: there -1
    equals -2. Computes as `precision` says, whatever autocast is around it.

    Args:
        name: timm name of a vision transformer, for instance `vit_large_patch16_siglip_512.v2_webli`.
        layers: layers whose tokens are wanted, in the order wanted.
        input_scale: factor by which images are resized before the model sees them.
        weights: file with the weights, to take instead of a download.
        pretrained: False leaves the weights random: for tests, and to count parameters.
        model_args: further arguments of the timm model, for instance a smaller depth in tests.
        antialias: whether the resizing by `input_scale` is antialiased; by default where it shrinks.
        antialias_positions: whether the table of learned positions, where images give another grid than its own, is
            resampled with antialias, as timm does it; by default as the published network does it: most without.
        precision: in which the network computes on CUDA; elsewhere that is float32 in any case.

    Attributes:
        antialias_positions: whether that is left to timm; so it is, too, where the network has no such table.
        width: channels of the tokens.
        depth: number of blocks.
        patch_size: side of a patch in pixels of the resized image.
        interpolation: how images are resized before the model.
        target_interpolation: how training targets are to be resized beside it.

    Raises:
        ValueError: if the model is unknown or its weights can't be had, or it has no such layer or precision.
    """

    mean: Tensor
    std: Tensor

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
    ) -> None:
        if precision not in get_args(Precision):
            raise ValueError(f"precision: {' or '.join(get_args(Precision))}, given {precision!r}")
        positive(input_scale=input_scale)
        network = create_vit(name, weights=weights, pretrained=pretrained, **(model_args or {}))
        super().__init__(network)
        self.name = name
        self.layers = tuple(layers)
        self.input_scale = input_scale
        # Enlarging needs none: antialiasing would change nothing but the speed of a bilinear one.
        self.antialias = input_scale < 1 if antialias is None else antialias
        self._positions = Positions(network, name) if has_positions(network) else None
        if antialias_positions is None:
            antialias_positions = antialias_positions_of(name)
        self.antialias_positions = antialias_positions or self._positions is None
        self.precision = precision
        self.interpolation = interpolation_of(name)
        self.target_interpolation = target_interpolation_of(name)
        self.width: int = network.embed_dim
        self.depth = len(network.blocks)
        self.patch_size: int = network.patch_embed.patch_size[0]
        self._blocks_before = [self._num_blocks_before(layer) for layer in self.layers]
        for statistic in ("mean", "std"):
            values = torch.tensor(network.pretrained_cfg[statistic]).view(3, 1, 1)
            self.register_buffer(statistic, values, persistent=False)

    @classmethod
    def arguments_of(cls, description: Mapping[str, Any]) -> dict[str, Any]:
        """All arguments of the VFM that a config or a checkpoint describes, by name."""
        given = FORMERLY | description["init_args"]
        parameters = list(inspect.signature(cls).parameters.values())
        return {p.name: given[p.name] if p.default is p.empty else given.get(p.name, p.default) for p in parameters}

    def source(self) -> dict[str, Any]:
        """What it takes to have this VFM again: its arguments, and the `fingerprint` of its weights.

        Of arguments in `FORMERLY` it names those alone that differ, so that older caches say the same of the same VFM.
        """
        arguments = {**self.arguments, "layers": list(self.layers), "antialias_positions": self.antialias_positions}
        arguments["fingerprint"] = self.fingerprint()
        return {name: value for name, value in arguments.items() if name not in FORMERLY or value != FORMERLY[name]}

    def forward(self, images: Tensor) -> VFMFeatures:
        """Features of `images: [B, 3, H, W] in [-1, 1]`, without gradients."""
        with torch.no_grad():
            return self.differentiable(images)

    def differentiable(self, images: Tensor) -> VFMFeatures:
        """The same features, with gradients that reach the images (the weights take none)."""
        in_bfloat16 = self.precision == "bfloat16" and images.device.type == "cuda"
        with torch.autocast(images.device.type, torch.bfloat16, enabled=in_bfloat16):
            inputs = self.prepare(images)  # [B, 3, H·scale, W·scale]
            grid = self._token_grid(inputs)
            with nullcontext() if self.antialias_positions else self._positions.at(grid):
                final, before = self._run(inputs.to(next(self.network.parameters()).dtype))
        num_prefix = self.network.num_prefix_tokens
        final = final.float()  # [B, prefix + N, C]
        tokens = final[:, num_prefix:]  # [B, N, C]
        has_class_token = getattr(self.network, "cls_token", None) is not None
        return VFMFeatures(
            layers=tuple(tokens if k is None else before[k][:, num_prefix:].float() for k in self._blocks_before),
            tokens=tokens,
            pooled=final[:, 0] if has_class_token else tokens.mean(1),  # [B, C]
            grid=grid,
        )

    def hold_products_in(self, dtype: torch.dtype) -> None:
        """As `Frozen.hold_products_in`; what computes in float32 keeps its weights in it."""
        if self.precision != "float32":
            super().hold_products_in(dtype)

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

    def _run(self, inputs: Tensor) -> tuple[Tensor, dict[int, Tensor]]:
        """Final tokens, and tokens by the number of blocks passed; both with prefix tokens.

        Hooks serve every family alike, whatever its blocks take beside the tokens.
        """
        before: dict[int, Tensor] = {}

        def keep_input(block: nn.Module, args: tuple[Tensor, ...]) -> None:
            before[0] = args[0]

        def keep_output(num_blocks: int) -> Callable[[nn.Module, Any, Tensor], None]:
            return lambda block, args, output: before.__setitem__(num_blocks, output)

        with ExitStack() as hooks:
            for num_blocks in {k for k in self._blocks_before if k is not None}:
                if num_blocks == 0:
                    hook = self.network.blocks[0].register_forward_pre_hook(keep_input)
                else:
                    hook = self.network.blocks[num_blocks - 1].register_forward_hook(keep_output(num_blocks))
                hooks.callback(hook.remove)
            return self.network.forward_features(inputs), before

    def _token_grid(self, inputs: Tensor) -> tuple[int, int]:
        height, width = inputs.shape[-2:]
        embed = self.network.patch_embed
        resized = f" (images resized by input_scale = {self.input_scale})" if self.input_scale != 1 else ""
        if embed.strict_img_size and embed.img_size is not None and (height, width) != tuple(embed.img_size):
            raise ValueError(
                f"images: {self.name} takes {embed.img_size[0]}x{embed.img_size[1]} pixels only, given "
                f"{height}x{width}{resized}; change the image size or input_scale, or give model_args: img_size"
            )
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(
                f"images: {self.name} has patches of {self.patch_size} pixels, which don't divide {height}x{width}"
                f"{resized}; height and width times input_scale must be multiples of {self.patch_size}"
            )
        return height // self.patch_size, width // self.patch_size


def vfm_identity(vfm: FrozenVFM) -> dict[str, str | bool]:
    """What a checkpoint says of the VFM instead of holding its weights."""
    return {"name": vfm.name, "fingerprint": vfm.fingerprint(), "antialias_positions": vfm.antialias_positions}


def check_vfm(vfm: FrozenVFM, checkpoint: Mapping[str, Any], option: str = "model.vfm") -> None:
    """Compares the VFM at hand with the one that the checkpoint was trained with, and has it resample positions alike.

    A checkpoint of published weights may know the name alone.

    Args:
        vfm: At hand.
        checkpoint: Names the other, as `vfm_identity` does, under `vfm`.
        option: That sets the VFM at hand.

    Raises:
        ValueError: if it is another, by name or by weights.
    """
    stored = checkpoint.get("vfm")
    if stored is None:
        raise ValueError("the checkpoint names no VFM: it is no tokenizer's, or of another version")
    if stored["name"] != vfm.name:
        raise ValueError(
            f"the checkpoint was trained on the VFM '{stored['name']}', but {option} is '{vfm.name}'; give that name"
        )
    if stored["fingerprint"] not in (None, vfm.fingerprint()):
        raise ValueError(
            f"the checkpoint was trained on other weights of '{vfm.name}' (sha256 {stored['fingerprint'][:12]}…) than "
            f"those at hand ({vfm.fingerprint()[:12]}…); give the right file as the "
            "VFM's `weights` (a frozen tokenizer's `vfm_weights`)"
        )
    former = stored.get("antialias_positions", FORMERLY["antialias_positions"])
    if vfm.antialias_positions != former and vfm._positions is not None:
        ways = {True: "with antialias", False: "without antialias"}
        rank_zero_warn(
            f"{option}: the checkpoint goes with positions resampled {ways[former]}, and goes on so; train anew to "
            f"have them {ways[vfm.antialias_positions]}. At the table's own grid, as of SigLIP2-512 on 256 px images "
            "at input_scale 2, there is no difference"
        )
        vfm.antialias_positions = former
