"""Weights of a part of a transformers model from files, such as its vision tower: every tensor of the part, or none.

Only the part's tensors are read, whatever else a model consists of, and nothing is unpickled. The library itself would
leave what a file lacks random.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vfm_vae.checkpoints import few, open_tensors, read_json, read_weights
from vfm_vae.pretrained import CONFIG, WEIGHTS, model_folder

PROCESSOR, INDEX = "preprocessor_config.json", f"{WEIGHTS}.index.json"

UNUSED = ("head.", "pooler.", "embeddings.position_ids")
"""Beginnings of tensors that files may have or lack: of heads on top of the tokens, and numbers of positions."""

DIFFERENCES = {"missing": "missing", "unexpected": "left over", "mismatched": "of another shape"}
"""How a file may differ from a tower, by the library's words for it."""


def files_of(name: str) -> Path:
    """A model's folder with all that says what it is; one of the Hugging Face hub is downloaded, without its weights.

    Raises:
        ValueError: if there is no such model.
    """
    return model_folder(name, {"allow_patterns": [CONFIG, PROCESSOR, INDEX]})


def load_tower(empty: Any, name: str, weights: str | Path | None, without: Iterable[str] = ()) -> Any:
    """A vision tower with its weights, in float32.

    Args:
        empty: The tower without weights.
        name: Folder, or `owner/model` on the Hugging Face hub.
        weights: File to read instead; see `towers.create_tower`.
        without: Tensors that need not be there, and are left without values.

    Raises:
        ValueError: if there are no weights, or they are not those of the tower.
    """
    anchor = next(tensor for tensor in empty.state_dict() if "patch_embed" in tensor and tensor.endswith("weight"))
    return load_part(empty, name, weights, Part("vision tower", [anchor], without=tuple(without)), torch.float32)


class Part(NamedTuple):
    """What a part of a model is known by in files.

    Attributes:
        kind: What it is called in messages.
        anchors: Tensors that every such part has; what stands before their names in a file tells where the part is.
        modules: The outermost modules that it consists of, where others stand beside them in a file.
        without: Tensors that need not be there, and are left without values.
    """

    kind: str
    anchors: Collection[str]
    modules: Collection[str] = ()
    without: Collection[str] = ()


def load_part(empty: Any, name: str, weights: str | Path | None, part: Part, dtype: torch.dtype) -> Any:
    """A part of a model with its weights; the library brings names of former versions to its own.

    Args:
        empty: The part without weights.
        name: Folder, or `owner/model` on the Hugging Face hub.
        weights: File to read instead.
        part: What it is known by.
        dtype: Precision of its weights.

    Raises:
        ValueError: if there are no weights, or they are not those of the part.
    """
    own = empty.state_dict()
    tensors = _read_folder(name, part) if weights is None else _read_file(weights, part)
    loaded, found = type(empty).from_pretrained(
        None,
        config=empty.config,
        state_dict=tensors | {tensor: torch.empty(own[tensor].shape) for tensor in part.without},
        dtype=dtype,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # they are named below, among others
    )
    found["mismatched_keys"] = {tensor for tensor, *_ in found["mismatched_keys"]}
    differ = {how: [name for name in found[f"{how}_keys"] if not name.startswith(UNUSED)] for how in DIFFERENCES}
    if any(differ.values()):
        told = ", ".join(f"{len(names)} {DIFFERENCES[how]} {few(names)}" for how, names in differ.items() if names)
        place = str(name if weights is None else weights)
        raise ValueError(f"weights: {place!r} does not hold the weights of {name!r}: of {len(own)} tensors {told}")
    return loaded


def _read_file(file: str | Path, part: Part) -> dict[str, Tensor]:
    content = read_weights(file, "weights")
    if not isinstance(content, Mapping):
        raise ValueError(f"weights: {str(file)!r} holds a {type(content).__name__}, and no tensors by name")
    return {ours: content[theirs] for theirs, ours in _names(content, part, f"weights: {str(file)!r}").items()}


def _read_folder(name: str, part: Part) -> dict[str, Tensor]:
    """The part's tensors, from those of the model's files that hold any."""
    index = files_of(name) / INDEX
    if index.is_file():
        files = read_json(index, "name")["weight_map"]
    else:
        with open_tensors(_weights_file(name, WEIGHTS), "name") as opened:
            files = dict.fromkeys(opened.keys(), WEIGHTS)
    names = _names(files, part, f"name: {name!r}")
    tensors: dict[str, Tensor] = {}
    for file in sorted({files[tensor] for tensor in names}):
        with open_tensors(_weights_file(name, file), "name") as opened:
            tensors |= {ours: opened.get_tensor(theirs) for theirs, ours in names.items() if files[theirs] == file}
    return tensors


def _weights_file(name: str, file: str) -> Path:
    found = model_folder(name, {"allow_patterns": [file]}) / file
    if not found.is_file():
        raise ValueError(f"name: {name!r} holds no {file}; give a file with its weights as `weights`")
    return found


def _names(names: Iterable[str], part: Part, place: str) -> dict[str, str]:
    """The names of the part's own tensors, by those in a file."""
    ends = [(name, anchor) for name in names for anchor in part.anchors if f".{name}".endswith(f".{anchor}")]
    prefixes = {name.removesuffix(anchor) for name, anchor in ends}
    if len(prefixes) != 1:
        several = f"several {part.kind}s {few(prefixes)}; save one alone"
        raise ValueError(f"{place} holds {several if prefixes else f'no tensor {min(part.anchors)!r}'}")
    (prefix,) = prefixes
    found = {name: name.removeprefix(prefix) for name in names if name.startswith(prefix)}
    return {name: own for name, own in found.items() if not part.modules or own.partition(".")[0] in part.modules}


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps the library from reporting what is checked here, and from drawing bars."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
