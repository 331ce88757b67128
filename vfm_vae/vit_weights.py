"""Weights of timm's vision transformers from files: every tensor of the network, or none.

timm itself loads several families leniently (CLIP, SigLIP, DeiT and others), and leaves what a file lacks random. Here
its conversions of published layouts are taken, and their result has to fit.
"""

import inspect
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
from timm.models import load_state_dict_from_hf
from torch import Tensor, nn

from vfm_vae.checkpoints import fill, read_weights

# Where files of training keep the network's tensors, averaged ones first; as timm has it, and a teacher.
NESTS = ("state_dict_ema", "model_ema", "state_dict", "model", "module", "teacher", "encoder")

WRAPPERS = re.compile(r"^((module|_orig_mod|model)\.)+")

ANCHOR = "patch_embed.proj.weight"  # every such network has one: what stands before it is a prefix

AVERAGED = re.compile(r"teacher|ema\b")

# Parts that change what a network computes, whether this one has them or not.
PARTS = {"blocks", "patch_embed", "pos_embed", "cls_token", "reg_token", "dist_token", "norm_pre", "norm"}

FILES = ("model.safetensors", "pytorch_model.bin", "*.safetensors", "*.bin", "*.pth", "*.pt")

# How timm resamples positions and patches of some architectures, by name; others bicubic with antialias.
RESAMPLING: tuple[tuple[str, dict[str, Any]], ...] = (
    (r"(base|huge)_patch16_radio_v3", {"interpolation": "bilinear", "antialias": False, "align_corners": True}),
    (r"flexi|radio", {"interpolation": "bilinear", "antialias": False}),
)

UNCONVERTIBLE = (LookupError, RuntimeError, ValueError, AttributeError, TypeError, AssertionError)


def load_vit(network: nn.Module, name: str, weights: str | Path) -> None:
    """Loads all of a network's weights from a file.

    Args:
        network: A network of timm's, without its classifier.
        name: What it is called in messages.
        weights: Safetensors or a checkpoint of torch, in timm's or the family's published layout; within a checkpoint
            of training and behind common prefixes, too. Classifiers, text towers and the like are passed over.

    Raises:
        ValueError: if the file can't be read, a tensor of the network is not in it or has another shape, or the file's
            network has further blocks or tokens.
    """
    _load(network, name, read_weights(weights, "weights"), repr(str(weights)))


def load_vit_from_source(network: Any, name: str) -> None:
    """The same for a network of timm's own sources: `local-dir:` and `hf-hub:`."""
    config = network.pretrained_cfg
    if config["source"] == "hf-hub":
        filename = {"filename": config["hf_hub_filename"]} if config.get("hf_hub_filename") else {}
        _load(network, name, load_state_dict_from_hf(config["hf_hub_id"], **filename), repr(name))
        return
    folder = Path(config["file"])
    file = next((file for pattern in FILES for file in sorted(folder.glob(pattern))), None)
    if file is None:
        raise ValueError(f"name: {str(folder)!r} holds no weights ({', '.join(FILES)})")
    load_vit(network, name, file)


def _load(network: nn.Module, name: str, content: Any, place: str) -> None:
    message = (
        f"weights: {place} does not hold the weights of {name!r}; give the file of these very weights, in timm's "
        "layout or the family's published one"
    )
    tensors = _tensors_of(content, place)
    try:
        converted = _conversion(network)(tensors, network)
    except UNCONVERTIBLE as error:
        raise ValueError(f"{message}: it can't be converted ({type(error).__name__}: {error})") from error
    own = network.state_dict()
    parts = PARTS | {name.partition(".")[0] for name in own}
    fitting = {name: tensor for name, tensor in converted.items() if name.partition(".")[0] in parts}
    fill(network, fitting, message)


def _tensors_of(content: Any, place: str) -> dict[str, Tensor]:
    """The network's tensors in a file, without nests and prefixes around them."""
    while isinstance(content, Mapping):
        nest = next((content[name] for name in NESTS if isinstance(content.get(name), Mapping)), None)
        if nest is None:
            break
        content = nest
    if not isinstance(content, Mapping):
        raise ValueError(f"weights: {place} holds a {type(content).__name__}, and no tensors by name")
    tensors = {WRAPPERS.sub("", str(name)): value for name, value in content.items() if isinstance(value, Tensor)}
    prefixes = {name.removesuffix(ANCHOR) for name in tensors if name.endswith(ANCHOR)}
    if "" in prefixes or not prefixes:
        return tensors
    if len(prefixes) > 1:
        prefixes = {prefix for prefix in prefixes if AVERAGED.search(prefix)} or prefixes
    if len(prefixes) > 1:
        raise ValueError(f"weights: {place} holds several networks ({', '.join(sorted(prefixes))}); save one alone")
    (prefix,) = prefixes
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _conversion(network: Any) -> Any:
    """The function by which timm brings published layouts of the network's family to its own."""
    architecture = network.pretrained_cfg["architecture"]
    family = sys.modules[timm.model_entrypoint(architecture).__module__]
    convert = getattr(family, "checkpoint_filter_fn", None)
    if convert is None:
        return lambda tensors, _: tensors
    options = next((options for pattern, options in RESAMPLING if re.search(pattern, architecture)), {})
    takes = inspect.signature(convert).parameters
    if "adapt_layer_scale" in takes and hasattr(network.blocks[0], "ls1"):
        options = options | {"adapt_layer_scale": True}
    return lambda tensors, network: convert(tensors, network, **options)
