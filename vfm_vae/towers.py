"""Makes the vision towers of Hugging Face's transformers, and knows how their families treat images.

The library takes seconds to import, so that is left until a tower or its config is asked for.
"""

import inspect
import math
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MethodType
from typing import Any, NamedTuple

import torch
from timm.data.constants import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    IMAGENET_INCEPTION_MEAN,
    IMAGENET_INCEPTION_STD,
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
)
from torch import Tensor, nn
from torch.nn import functional as F

from vfm_vae.checkpoints import read_json
from vfm_vae.hooks import run_and_keep
from vfm_vae.images import Interpolation
from vfm_vae.pretrained import CONFIG
from vfm_vae.tower_weights import PROCESSOR, files_of, load_tower, quiet


class Family(NamedTuple):
    """What the towers of a family want.

    Attributes:
        interpolation: How images are resized in front of the tower, and training targets beside it.
        mean: Mean of the images that it takes, for values in [0, 1], where no file says it.
        std: Their standard deviation, likewise.
        settings: Options of its config that differ from the published ones: here nothing is masked, and heads that
            pool the tokens are not built.
        final_norm: Name of the norm that the tower itself applies to the class token alone.
    """

    interpolation: Interpolation = "bilinear"
    mean: Sequence[float] = IMAGENET_DEFAULT_MEAN
    std: Sequence[float] = IMAGENET_DEFAULT_STD
    settings: Mapping[str, Any] = {}
    final_norm: str | None = None


FAMILIES: Mapping[str, Family] = {
    "siglip_vision_model": Family(
        mean=IMAGENET_INCEPTION_MEAN, std=IMAGENET_INCEPTION_STD, settings={"vision_use_head": False}
    ),
    "clip_vision_model": Family(mean=OPENAI_CLIP_MEAN, std=OPENAI_CLIP_STD, final_norm="post_layernorm"),
    "vit_mae": Family(settings={"mask_ratio": 0.0}),
    "dinov2": Family("bicubic"),
    "dinov2_with_registers": Family("bicubic"),
    "dinov3_vit": Family("bicubic"),
    "qwen2_5_vl_vision": Family("bicubic", OPENAI_CLIP_MEAN, OPENAI_CLIP_STD),
}
"""Families by the `model_type` of their config. Others are a plain `Family()`, and tried out before they are taken."""

REFUSED: Mapping[str, str] = {
    "siglip2_vision_model": "a NaFlex tower, which takes lists of patches instead of images; take SigLIP2 of a fixed "
    "resolution, such as 'google/siglip2-large-patch16-512'",
    "dinov3_convnext": "a convolutional network, which has no tokens; take DINOv3 as a vision transformer, such as "
    "'facebook/dinov3-vitl16-pretrain-lvd1689m'",
}

FINAL_NORMS = ("post_layernorm", "layernorm", "norm")


def family_of(config: Any) -> Family:
    """The family of a tower's config."""
    return FAMILIES.get(config.model_type, Family())


def config_of(name: str, model_args: Mapping[str, Any] | None = None) -> Any:
    """The config of a vision tower; of a model with several towers, that of the one for images.

    Args:
        name: Folder, or `owner/model` on the Hugging Face hub.
        model_args: Options of the config that take the place of those there. With `model_type` among them nothing is
            looked up, and the others are the library's defaults for that type.

    Raises:
        ValueError: if there is no such model, or it is no vision transformer that can be used here.
    """
    model_args = dict(model_args or {})
    place = "model_args" if "model_type" in model_args else "name"
    found = model_args if "model_type" in model_args else read_config(name)
    config = made_config(found, place, name)
    config = getattr(config, "vision_config", config)
    if unknown := sorted(option for option in model_args if not hasattr(config, option)):
        raise ValueError(
            f"model_args: a {config.model_type!r} has no options {unknown}; see its config in transformers"
        )
    config = made_config(config.to_dict() | model_args | {"model_type": config.model_type}, "model_args", name)
    for option, value in family_of(config).settings.items():
        setattr(config, option, value)
    if config.model_type in REFUSED:
        raise ValueError(f"{place}: {name!r} is {REFUSED[config.model_type]}")
    sizes = (getattr(config, "hidden_size", None), getattr(config, "patch_size", None), depth_of(config))
    if not all(isinstance(size, int) for size in sizes):
        raise ValueError(
            f"{place}: {name!r} is a {config.model_type!r}, and no plain vision transformer; choose one with square "
            "patches and blocks of one width, for instance 'facebook/dinov2-with-registers-large'"
        )
    return config


def depth_of(config: Any) -> int | None:
    """Number of a tower's blocks."""
    return getattr(config, "depth", None) or getattr(config, "num_hidden_layers", None)


def merged(config: Any) -> int:
    """How many patches become one token, along a side."""
    return int(getattr(config, "spatial_merge_size", 1))


def width_of(config: Any, layer: int = -1) -> int:
    """Channels of a layer's tokens, as `run_tower` returns them."""
    side = merged(config)
    return int(config.out_hidden_size if side > 1 and layer == -1 else config.hidden_size * side**2)


def statistics_of(name: str, config: Any, is_local: bool) -> tuple[Sequence[float], Sequence[float]]:
    """Mean and standard deviation of the images that a tower takes: what its image processor's file says.

    Args:
        name: Folder, or `owner/model` on the Hugging Face hub.
        config: The tower's, as `config_of` returns it.
        is_local: Whether nothing is looked up, so that they are the family's.
    """
    file = None if is_local else files_of(name) / PROCESSOR
    said = read_json(file, "name") if file is not None and file.is_file() else {}
    family = family_of(config)
    return said.get("image_mean") or family.mean, said.get("image_std") or family.std


def create_tower(
    name: str, config: Any, *, weights: str | Path | None = None, pretrained: bool = True, norm_affine: bool = True
) -> Any:
    """Makes a vision tower in float32.

    Args:
        name: Folder, or `owner/model` on the Hugging Face hub, with its weights as safetensors.
        config: As `config_of` returns it.
        weights: File with the weights (safetensors or a torch checkpoint, in transformers' layout) to take instead. It
            has to hold every tensor of the tower, perhaps behind a prefix and beside other parts of a model.
        pretrained: False leaves the weights random.
        norm_affine: False takes gain and bias away from the final norm; the file may do without them.

    Raises:
        ValueError: if the network is no vision tower, or its weights can't be had, or are not whole.
    """
    from transformers import AutoModel

    with quiet():
        with torch.device("meta"):
            empty = AutoModel.from_config(config)
        if config.model_type not in FAMILIES:
            _try_out(empty, name, config)
        norm = [] if norm_affine else [f"{_final_norm(empty, name)}.{part}" for part in ("weight", "bias")]
        if pretrained:
            tower = load_tower(empty, name, weights, without=norm)
        else:
            tower = AutoModel.from_config(config, dtype=torch.float32)
    for value, parameter in zip((1.0, 0.0), norm, strict=False):
        nn.init.constant_(tower.get_parameter(parameter), value)
    if config.model_type == "qwen2_5_vl_vision":
        for block in tower.blocks:
            block.attn.forward = MethodType(_attend, block.attn)
    if hasattr(tower, "pooler"):
        tower.pooler = None
    return tower


def blocks_of(tower: Any) -> Sequence[nn.Module]:
    """The blocks of a vision tower, in order.

    Raises:
        ValueError: if it has no such sequence.
    """
    depth = depth_of(tower.config)
    lists = [module for module in tower.modules() if isinstance(module, nn.ModuleList) and len(module) == depth]
    if not lists:
        raise ValueError(f"name: a {tower.config.model_type!r} has no sequence of its {depth} blocks")
    return list(lists[0])


def run_tower(
    tower: Any, inputs: Tensor, grid: tuple[int, int], layers: Iterable[int]
) -> tuple[Tensor, dict[int, Tensor]]:
    """Runs a tower on images of one size.

    Args:
        tower: The tower.
        inputs: Normalised images `[B, 3, H, W]`.
        grid: Rows and columns of their final tokens.
        layers: Layers to keep: 0 is what enters the first block, k the output of block k.

    Returns:
        The tokens after the final norm, `[B, P + N, C]`, and those of each layer that is kept, by its number.
    """
    if tower.config.model_type == "qwen2_5_vl_vision":
        return _run_qwen(tower, inputs, grid, layers)
    takes = inspect.signature(tower.forward).parameters
    options: dict[str, Any] = {}
    if "interpolate_pos_encoding" in takes:
        options["interpolate_pos_encoding"] = True
    if "noise" in takes:  # by which MAE shuffles patches: so they stay in order
        options["noise"] = torch.arange(math.prod(grid), device=inputs.device).expand(len(inputs), -1)
    result, kept = run_and_keep(partial(tower, inputs, **options), blocks_of(tower), layers)
    norm = family_of(tower.config).final_norm
    return result.last_hidden_state if norm is None else tower.get_submodule(norm)(result.last_hidden_state), kept


def _run_qwen(
    tower: Any, inputs: Tensor, grid: tuple[int, int], layers: Iterable[int]
) -> tuple[Tensor, dict[int, Tensor]]:
    """Runs Qwen2.5-VL's visual tower, which takes patches one after the other, those of one token together.

    Its merger makes one token of 2x2 patches, and these tokens are the grid. Blocks see the patches, four times as
    many, in an order of windows. Here the four patches of a token are put together along channels, as the merger does:
    so all layers have one grid, and none loses detail, as it would by averaging.
    """
    config, side = tower.config, merged(tower.config)
    rows, columns = grid
    frames, patch = config.temporal_patch_size, config.patch_size
    patches = inputs.unflatten(3, (columns, side, patch)).unflatten(2, (rows, side, patch))
    patches = patches.permute(0, 2, 5, 3, 6, 1, 4, 7)  # [B, rows, columns, side, side, 3, patch, patch]
    patches = patches.flatten(0, 4).unsqueeze(2).expand(-1, -1, frames, -1, -1)  # a still image, frame by frame
    sizes = torch.tensor([[1, rows * side, columns * side]] * len(inputs), device=inputs.device)
    tokens = torch.arange(rows * columns).view(grid)
    across = config.window_size // patch // side  # tokens in a window, along a side
    windows = [window.flatten() for band in tokens.split(across) for window in band.split(across, 1)]
    lengths = [len(window) * side**2 for window in windows]
    run = partial(tower, patches.flatten(1), grid_thw=sizes, window_lengths=lengths)
    result, kept = run_and_keep(run, tower.blocks, layers)
    in_raster = torch.cat(windows).argsort().to(inputs.device)
    each = (len(inputs), rows * columns, -1)
    return result.pooler_output.view(each), {k: tokens.view(each)[:, in_raster] for k, tokens in kept.items()}


def _attend(
    attention: Any,
    hidden_states: Tensor,
    cu_seqlens: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    window_lengths: Sequence[int],
    **_: Any,
) -> Tensor:
    """Takes the place of the attention of Qwen2.5-VL's blocks: window by window, for all images at once.

    The library's own way asks the device where each image's windows end, and attends to them one by one.

    Args:
        attention: The module whose `forward` this is.
        hidden_states: Patches of all images, one after the other, `[B · N, C]`.
        cu_seqlens: Where the windows end, or the images in blocks without windows.
        position_embeddings: Cosines and sines of rotary positions, each `[B · N, C / heads]`.
        window_lengths: Patches in each of an image's windows.
    """
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb_vision

    length = sum(window_lengths)
    num_images = len(hidden_states) // length
    has_windows = len(cu_seqlens) - 1 == num_images * len(window_lengths)
    query, key, value = attention.qkv(hidden_states).unflatten(1, (3, attention.num_heads, -1)).unbind(1)
    query, key = apply_rotary_pos_emb_vision(query, key, *position_embeddings)
    by_image = [part.unflatten(0, (num_images, length)).transpose(1, 2) for part in (query, key, value)]
    windows = zip(*(part.split(window_lengths if has_windows else [length], 2) for part in by_image), strict=True)
    attended = torch.cat([F.scaled_dot_product_attention(*parts) for parts in windows], 2)  # [B, heads, N, C / heads]
    return attention.proj(attended.transpose(1, 2).flatten(2).flatten(0, 1))


def read_config(name: str) -> dict[str, Any]:
    """What a model's config says.

    Args:
        name: Folder, or `owner/model` on the Hugging Face hub.

    Raises:
        ValueError: if there is no such model, or it is none of transformers'.
    """
    file = files_of(name) / CONFIG
    said = read_json(file, "name") if file.is_file() else None
    if not isinstance(said, dict) or "model_type" not in said:
        raise ValueError(f"name: {name!r} has no {CONFIG} of transformers', which names a model_type")
    return said


def made_config(options: Mapping[str, Any], place: str, name: str) -> Any:
    """A config of the library's.

    Args:
        options: Its options, `model_type` among them.
        place: Names what gave them in messages.
        name: Names the model.

    Raises:
        ValueError: if the library makes none of them.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.for_model(**options)
    except Exception as error:  # the library's checks raise many kinds
        cause = " ".join(str(error).split())
        raise ValueError(
            f"{place}: transformers makes no config of {options['model_type']!r} for {name!r} "
            f"({type(error).__name__}: {cause})"
        ) from error


def _try_out(empty: Any, name: str, config: Any) -> None:
    """Checks that a tower of a family that is not known here gives tokens of patches in all layers."""
    complaint = (
        f"name: {name!r} ({type(empty).__name__}) is no plain vision transformer; choose one with patch tokens and a "
        "sequence of blocks, for instance 'facebook/dinov2-with-registers-large'"
    )
    try:
        side = config.image_size // config.patch_size
        grid = (side, side)
        images = torch.empty(1, 3, *(side * config.patch_size for side in grid), device="meta")
        final, kept = run_tower(empty, images, grid, range(len(blocks_of(empty)) + 1))
        shapes = {tuple(tokens.shape) for tokens in (final, *kept.values())}
        ((_, length, width),) = shapes
        fits = length >= math.prod(grid) and width == config.hidden_size and len(kept) == len(blocks_of(empty)) + 1
    except Exception as error:  # third-party code fails in many ways at images that it does not take: said, not hidden
        cause = " ".join(str(error).split())
        raise ValueError(f"{complaint} (tried with an image: {type(error).__name__}: {cause})") from error
    if not fits:
        raise ValueError(complaint)


def _final_norm(tower: Any, name: str) -> str:
    norm = next((norm for norm in FINAL_NORMS if hasattr(tower, norm)), None)
    if norm is None:
        raise ValueError(f"norm_affine: {name!r} has no final norm to take gain and bias from")
    return norm
