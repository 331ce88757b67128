"""Options that follow from others, such as widths that a VFM knows: they are filled in before anything is built."""

from collections.abc import Mapping
from typing import Any

from vfm_vae.description import class_at
from vfm_vae.types import VFMShape


def complete(description: Any) -> Any:
    """Fills in what classes know of their options.

    A class that does so has a classmethod `complete(init_args) -> init_args`. It works on plain data, draws no random
    numbers, and leaves options that are given as they are.

    Args:
        description: Plain data, such as a whole config: classes are found by their `class_path`.
    """
    if isinstance(description, list):
        return [complete(part) for part in description]
    if not isinstance(description, Mapping):
        return description
    parts = {option: complete(part) for option, part in description.items()}
    if "class_path" in parts:
        cls = class_at(parts["class_path"])
        if hasattr(cls, "complete"):
            parts["init_args"] = cls.complete(parts.get("init_args") or {})
    return parts


def shape_of(vfm: Mapping[str, Any] | None) -> VFMShape | None:
    """What is known of a described VFM before it is built; None where there is none, or its class does not say."""
    if vfm is None or not hasattr(class_at(vfm["class_path"]), "shape_of"):
        return None
    shape: VFMShape = class_at(vfm["class_path"]).shape_of(**vfm.get("init_args") or {})
    return shape


def fill(options: Mapping[str, Any], **values: Any) -> dict[str, Any]:
    """Options with values for those that are left out or null."""
    return {**options, **{name: value for name, value in values.items() if options.get(name) is None}}
