"""Weights of transformers' vision towers from files: every tensor of the tower, or none.

Only the tower's tensors are read, whatever else a model consists of, and nothing is unpickled. The library itself would
leave what a file lacks random.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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
    """A tower with its weights, in float32; the library brings names of former versions to its own.

    Args:
        empty: The tower without weights.
        name: Folder, or `owner/model` on the Hugging Face hub.
        weights: File to read instead; see `towers.create_tower`.
        without: Tensors that need not be there, and are left without values.

    Raises:
        ValueError: if there are no weights, or they are not those of the tower.
    """
    own = empty.state_dict()
    anchor = next(tensor for tensor in own if "patch_embed" in tensor and tensor.endswith("weight"))
    tensors = _read_folder(name, anchor) if weights is None else _read_file(weights, anchor)
    tower, found = type(empty).from_pretrained(
        None,
        config=empty.config,
        state_dict=tensors | {tensor: torch.empty(own[tensor].shape) for tensor in without},
        dtype=torch.float32,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # they are named below, among others
    )
    found["mismatched_keys"] = {tensor for tensor, *_ in found["mismatched_keys"]}
    differ = {how: [part for part in found[f"{how}_keys"] if not part.startswith(UNUSED)] for how in DIFFERENCES}
    if any(differ.values()):
        told = ", ".join(f"{len(parts)} {DIFFERENCES[how]} {few(parts)}" for how, parts in differ.items() if parts)
        place = str(name if weights is None else weights)
        raise ValueError(f"weights: {place!r} does not hold the weights of {name!r}: of {len(own)} tensors {told}")
    return tower


def _read_file(file: str | Path, anchor: str) -> dict[str, Tensor]:
    content = read_weights(file, "weights")
    if not isinstance(content, Mapping):
        raise ValueError(f"weights: {str(file)!r} holds a {type(content).__name__}, and no tensors by name")
    prefix = _prefix(content, anchor, f"weights: {str(file)!r}")
    return {name.removeprefix(prefix): tensor for name, tensor in content.items() if name.startswith(prefix)}


def _read_folder(name: str, anchor: str) -> dict[str, Tensor]:
    """The tower's tensors, from those of the model's files that hold any."""
    index = files_of(name) / INDEX
    if index.is_file():
        files = read_json(index, "name")["weight_map"]
    else:
        with open_tensors(_weights_file(name, WEIGHTS), "name") as opened:
            files = dict.fromkeys(opened.keys(), WEIGHTS)
    prefix = _prefix(files, anchor, f"name: {name!r}")
    tensors: dict[str, Tensor] = {}
    for file in sorted({file for tensor, file in files.items() if tensor.startswith(prefix)}):
        with open_tensors(_weights_file(name, file), "name") as opened:
            wanted = [tensor for tensor, place in files.items() if place == file and tensor.startswith(prefix)]
            tensors |= {tensor.removeprefix(prefix): opened.get_tensor(tensor) for tensor in wanted}
    return tensors


def _weights_file(name: str, file: str) -> Path:
    found = model_folder(name, {"allow_patterns": [file]}) / file
    if not found.is_file():
        raise ValueError(f"name: {name!r} holds no {file}; give a file with its weights as `weights`")
    return found


def _prefix(names: Iterable[str], anchor: str, place: str) -> str:
    """What stands before the names of the tower's tensors."""
    prefixes = {name.removesuffix(anchor) for name in names if name == anchor or name.endswith(f".{anchor}")}
    if len(prefixes) != 1:
        what = f"several vision towers {few(prefixes)}; save one alone" if prefixes else f"no tensor {anchor!r}"
        raise ValueError(f"{place} holds {what}")
    return prefixes.pop()


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
