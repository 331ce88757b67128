"""Folders that diffusers wrote of its autoencoders: what their files say, checked against what the class takes."""

import inspect
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from vfm_vae.checkpoints import few, read_json, read_weights
from vfm_vae.pretrained import CONFIG, model_folder

WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")

KINDS: Mapping[type, str] = {
    bool: "true or false",
    int: "a whole number above 0",
    float: "a number",
    str: "a word",
    tuple: "a list",
}
"""What options are, by the types of their defaults."""


def read_diffusers(
    name: str | Path, wanted: type, hub: Mapping[str, Any], unread: Collection[str] = ()
) -> tuple[dict[str, Any], dict[str, Tensor], Path]:
    """Reads a folder that `save_pretrained` of a class of diffusers wrote, or such a one of the Hugging Face hub.

    Args:
        name: The folder, or the hub's `owner/model`.
        wanted: The class.
        hub: Options of `huggingface_hub.snapshot_download`.
        unread: Options of the class that may be anything.

    Returns:
        What its `config.json` says, its tensors by name, and the file that holds them.

    Raises:
        TypeError: if an option is unknown.
        ValueError: if there is no such folder, it is another class's, or an option in it is of another type.
    """
    folder = model_folder(name, {"allow_patterns": [CONFIG, *WEIGHTS], **hub})
    place = f"name: {str(name)!r}"
    config = read_json(folder / CONFIG, "name") if (folder / CONFIG).is_file() else None
    if not isinstance(config, Mapping) or config.get("_class_name") != wanted.__name__:
        raise ValueError(f"{place} holds no {wanted.__name__} of diffusers")
    for option, usual in defaults_of(wanted).items():
        if option in config and option not in unread and not _is_like(usual, config[option]):
            of = f" such as {list(usual)}" if isinstance(usual, tuple) else ""
            raise ValueError(
                f"{place}: its {CONFIG} has {option}={config[option]!r}, but that is {KINDS[type(usual)]}{of}"
            )
    file = next((folder / weights for weights in WEIGHTS if (folder / weights).is_file()), None)
    if file is None:
        others = [path.name for path in folder.glob("diffusion_pytorch_model*")]
        raise ValueError(
            f"{place} has no {WEIGHTS[0]}{f' but {few(others)}' if others else ''}; load it with diffusers and save it "
            "without a variant and in one file: save_pretrained(folder, max_shard_size='1TB')"
        )
    tensors = read_weights(file, "name")
    if not isinstance(tensors, Mapping):
        raise ValueError(f"{place}: its {file.name} holds a {type(tensors).__name__}, and no tensors by name")
    return dict(config), dict(tensors), file


def defaults_of(wanted: type) -> dict[str, Any]:
    """The options of a class of diffusers, with the values that they have where a `config.json` leaves them out."""
    parameters = list(inspect.signature(wanted).parameters.values())
    return {parameter.name: parameter.default for parameter in parameters if parameter.default is not parameter.empty}


def _is_like(usual: Any, given: Any) -> bool:
    """Whether a value is of the type of an option's default; one that is null by default takes anything."""
    if usual is None:
        return True
    if isinstance(usual, tuple):
        return isinstance(given, list) and all(_is_like(usual[0], item) for item in given)
    if isinstance(usual, float):
        return given is None or (isinstance(given, int | float) and not isinstance(given, bool))
    if type(usual) is int:
        return type(given) is int and given > 0
    return type(given) is type(usual)
