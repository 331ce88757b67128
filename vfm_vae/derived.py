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
    describe = None if vfm is None else getattr(class_at(vfm["class_path"]), "shape_of", None)
    if vfm is None or describe is None:
        return None
    shape: VFMShape = describe(**vfm.get("init_args") or {})
    return shape


def options_of(part: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """The options of a described part, which may stand there alone or in `init_args`."""
    part = part or {}
    return part.get("init_args") or {} if "class_path" in part else part


def fill(part: Mapping[str, Any] | None, **values: Any) -> dict[str, Any]:
    """A described part with values for those of its options that are left out or null."""
    options = options_of(part)
    filled = {**options, **{name: value for name, value in values.items() if options.get(name) is None}}
    return {**part, "init_args": filled} if part and "class_path" in part else filled
