"""Published files of weights, for both programs: reading, converting names, and writing what training resumes from.

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

# Dimensions of one before and after those that our tensor has, by published name.
DIMENSIONS = [
    (r"\.conv(0|s1\.\d+)\.gamma$", 1, 0),
    (r"\.(pwconv1|torgb)\.bias$", 1, 2),
    (r"\.(pwconv1|torgb|to_[qkv]|to_out|ff\.\d)\.weight$", 0, 2),
    (r"\.(attn\.norm|ff\.0)\.gamma$", 0, 2),
    (r"\.attn(_1|\.\d+)\.(q|k|v|proj_out)\.weight$", 0, 2),
]


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
    """Removes what `write_training` wrote for an earlier model."""
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


def _close(actual: Tensor, expected: Tensor) -> bool:
    return torch.allclose(actual.float(), expected.float(), atol=1e-4 if actual.dtype == torch.float32 else 1e-2)
