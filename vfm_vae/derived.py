"""Options that follow from others, such as widths that a VFM knows: they are filled in before anything is built."""

from collections.abc import Mapping
from typing import Any

from vfm_vae.description import class_at


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
