"""Public files of weights: what their tensors are called there.

Names are stated once, from ours to the published ones; importing looks each of ours up, exporting writes it back.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from vfm_vae.checkpoints import few
from vfm_vae.writing import write_text, write_torch

CHECKPOINT, OVERLAY = "training.ckpt", "model.yaml"

WRAPPERS = re.compile(r"^((module|_orig_mod)\.)+")  # of DistributedDataParallel and torch.compile

AVERAGED = re.compile(r"(^|_)ema(_|$)", re.IGNORECASE)

Names = Callable[[str], tuple[str, ...]]

# Ours → published, applied in this order.
TOKENIZER = [
    (r"^adapter\.layers\.(\d+)\.(\d+)\.", r"ldm_adapter.patch_quants.\1.0.blocks.\2."),
    (r"^adapter\.layers\.(\d+)\.", r"ldm_adapter.patch_quants.\1.0."),
    (r"^adapter\.(fuse|widen)\.(\d+)\.", r"adapter.\1.blocks.\2."),
    (r"^adapter\.fuse\.", "ldm_adapter.final_quant."),
    (r"^adapter\.widen\.", "ldm_adapter.post_quant."),
    (r"^adapter\.alignment\.", "ldm_adapter.linear_proj."),
    (r"^(ldm_adapter.*)\.norm_attention\.", r"\1.norm1."),
    (r"^(ldm_adapter.*)\.norm_mlp\.", r"\1.norm2."),
    (r"^(ldm_adapter.*)\.norm_proj\.", r"\1.norm3."),
    (r"^(ldm_adapter.*)\.attention\.", r"\1.attn."),
    (r"\.mlp\.gate\.", ".mlp.w0."),
    (r"\.mlp\.value\.", ".mlp.w1."),
    (r"\.mlp\.out\.", ".mlp.w2."),
    (r"^decoder\.mapping\.average$", "mapping.x_avg"),
    (r"^decoder\.mapping\.hidden\.", "mapping.mlp.fc0."),
    (r"^decoder\.mapping\.out\.", "mapping.mlp.fc1."),
    (r"^decoder\.blocks\.", "synthesis.blocks."),
    (r"\.layers\.0\.", ".conv0."),
    (r"\.layers\.(\d+)\.", lambda match: f".convs1.{int(match[1]) - 1}."),
    (r"\.upsample\.", ".seperate_upsample_conv."),
    (r"\.upsample_sum\.", ".last_upsample_conv."),
    (r"\.to_rgb\.style\.affine\.", ".torgb.affine.proj."),
    (r"\.to_rgb\.", ".torgb."),
    (r"\.style\.affine\.", ".affine_pw1.proj."),
    (r"^(synthesis.*\.conv.*)\.depthwise\.", r"\1.dwconv."),
    (r"\.expand$", ".pwconv1.weight"),
    (r"\.expand_bias$", ".pwconv1.bias"),
    (r"\.contract\.", ".pwconv2."),
    (r"\.layer_scale$", ".gamma"),
    (r"\.noise\.map$", ".noise_const"),
    (r"\.noise\.strength$", ".noise_strength"),
    (r"\.attention\.(\d+)\.feed_forward\.", r".self_attns.\1.ff."),
    (r"\.attention\.(\d+)\.out\.", r".self_attns.\1.attn.to_out."),
    (r"\.attention\.(\d+)\.", r".self_attns.\1.attn."),
    (r"\.gain$", ".gamma"),
]

# Dimensions of one before and after those that our tensor has, by published name.
DIMENSIONS = [
    (r"\.conv(0|s1\.\d+)\.gamma$", 1, 0),
    (r"\.(pwconv1|torgb)\.bias$", 1, 2),
    (r"\.(pwconv1|torgb|to_[qkv]|to_out|ff\.\d)\.weight$", 0, 2),
    (r"\.(attn\.norm|ff\.0)\.gamma$", 0, 2),
]


def tokenizer_names(ours: str, first_scale: int = -2) -> tuple[str, ...]:
    """Published names of a tensor of VFMVAE: one, or those of queries, keys and values, which are one matrix here.

    Args:
        ours: Its name here.
        first_scale: log2 of the sides that the decoder's first block takes over the latent's.
    """
    if route := re.fullmatch(r"decoder\.routes\.(\d+)\.(\d+)\.(\w+)", ours):
        block, layer = int(route[1]), int(route[2])
        # What shrinks the latent of coarse blocks is counted there, and stands first; so is a shuffle, which is amid.
        scale = first_scale + block
        first = 1 if scale < 0 else 0
        last = first + (2 if scale > 0 else 1)
        stage, layer = (first, layer - 1) if layer < 6 else (last, layer - 6)
        return (f"synthesis.z_convs.{block}.{stage}.{layer}.{route[3]}",)
    name = _renamed(ours, TOKENIZER)
    if name.startswith("synthesis.") and name.endswith(".qkv.weight"):
        return tuple(name.replace(".qkv.", f".to_{part}.") for part in "qkv")
    return (name,)


def discriminator_names(num_heads: int) -> Names:
    """Names of the projected discriminator; the head of the patch embedding comes last there, and first here."""

    def names(ours: str) -> tuple[str, ...]:
        return (re.sub(r"^heads\.(\d+)", lambda match: f"heads.{(int(match[1]) - 1) % num_heads}", ours),)

    return names


def patchgan_names(num_scales: int, features: bool) -> Names:
    """Names of the PatchGAN, whose scales count down from the full size.

    Args:
        num_scales: Number of its discriminator's scales.
        features: Whether it is the published variant that gives the features of its layers; the other's layers lie in
            one sequence, activations counted.
    """

    def names(ours: str) -> tuple[str, ...]:
        scale, layer, part, kind = re.fullmatch(r"scales\.(\d+)\.layers\.(\d+)\.(\w+)\.(\w+)", ours).groups()
        place, layer, norm = num_scales - 1 - int(scale), int(layer), part == "norm"
        if features:
            return (f"patchgan_discriminator.scale{place}_layer{layer}.{int(norm)}.{kind}",)
        position = 3 * layer - 1 if layer else 0  # convolution, activation; then convolution, norm, activation
        return (f"patchgan_discriminator.layer{place}.{position + norm}.{kind}",)

    return names


def from_published(
    ours: Mapping[str, Tensor], published: Mapping[str, Tensor], names: Names, constants: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Our tensors, taken from published ones.

    Args:
        ours: State of a model of ours, for its names and shapes.
        published: Tensors under published names.
        names: From our names to those.
        constants: Published tensors that our models make themselves.

    Returns:
        Values for all of `ours`.

    Raises:
        ValueError: if a tensor is missing, left over, or of another shape, or a constant is another.
    """
    wanted = {name: names(name) for name in ours}
    known = [*(part for parts in wanted.values() for part in parts), *constants]
    missing, left_over = set(known) - published.keys(), published.keys() - set(known)
    if missing or left_over:
        raise ValueError(f"the weights do not fit the config: missing {few(missing)}; left over {few(left_over)}")
    expected = to_published(ours, names, constants)
    shapes = {
        f"{name}: {tuple(published[name].shape)} instead of {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if published[name].shape != tensor.shape
    }
    if shapes:
        raise ValueError(f"the weights do not fit the config: of another shape are {few(shapes)}")
    other = [n for n, t in constants.items() if not (t.is_meta or published[n].is_meta) and not _close(published[n], t)]
    if other:
        raise ValueError(f"the weights were made with other constants than the published ones: {sorted(other)}")
    parts = {name: [published[part] for part in wanted[name]] for name in ours}
    joined = {name: torch.cat(tensors) if len(tensors) > 1 else tensors[0] for name, tensors in parts.items()}
    return {name: joined[name].reshape(tensor.shape).to(tensor.dtype) for name, tensor in ours.items()}


def to_published(ours: Mapping[str, Tensor], names: Names, constants: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `from_published`: all tensors under published names, in published shapes."""
    published = dict(constants)
    for name, tensor in ours.items():
        parts = names(name)
        for part, values in zip(parts, tensor.chunk(len(parts)) if len(parts) > 1 else [tensor], strict=True):
            before, after = next((d[1:] for d in DIMENSIONS if re.search(d[0], part)), (0, 0))
            published[part] = values.reshape([*[1] * before, *values.shape, *[1] * after])
    return published


def read_yaml(path: str, option: str = "config") -> dict[str, Any]:
    """Reads a file of options.

    Raises:
        ValueError: if there is no such file, or it is none.
    """
    if not Path(path).is_file():
        raise ValueError(f"{option}: there is no file {path!r}")
    try:
        content = yaml.safe_load(Path(path).read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{option}: {path!r} is no YAML ({' '.join(str(error).split())})") from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{option}: {path!r} holds no options")
    return dict(content)


def write_training(folder: str | Path, checkpoint: Mapping[str, Any], overlay: Mapping[str, Any]) -> None:
    """Puts what the command lines go on from beside a model: a checkpoint, and what says what the model is.

    Args:
        folder: The model's folder.
        checkpoint: As Lightning reads it.
        overlay: A config that goes after others.
    """
    write_torch(Path(folder) / CHECKPOINT, dict(checkpoint))
    write_text(Path(folder) / OVERLAY, yaml.safe_dump(dict(overlay), sort_keys=False))


def remove_training(folder: str | Path) -> None:
    """Takes away what `write_training` put there for a former model."""
    for name in (CHECKPOINT, OVERLAY):
        (Path(folder) / name).unlink(missing_ok=True)


def state_dicts(content: Any, place: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], dict[str, Tensor]]]:
    """All groups of tensors by name in a file, each with its place; names without the prefixes of wrappers."""
    if not isinstance(content, Mapping):
        return
    tensors = {WRAPPERS.sub("", str(n)): value for n, value in content.items() if isinstance(value, Tensor)}
    if tensors:
        yield place, tensors
    for name, value in content.items():
        yield from state_dicts(value, (*place, str(name)))


def pick(content: Any, marker: str) -> tuple[dict[str, Tensor] | None, dict[str, Tensor] | None]:
    """Trained and averaged weights of the model, in a file of several, that has names beginning with `marker`.

    A place with the word "ema" in its name, such as `ema` or `G_ema`, holds averages.

    Returns:
        Trained and averaged weights, each None where the file lacks them.
    """
    found: dict[bool, dict[str, Tensor]] = {}
    for place, tensors in state_dicts(content):
        if any(name.startswith(marker) for name in tensors):
            found.setdefault(any(AVERAGED.search(part) for part in place), tensors)
    return found.get(False), found.get(True)


def _renamed(name: str, rules: list[tuple[str, Any]]) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def _close(actual: Tensor, expected: Tensor) -> bool:
    return torch.allclose(actual.float(), expected.float(), atol=1e-4 if actual.dtype == torch.float32 else 1e-2)
