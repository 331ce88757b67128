"""Objects that remember their arguments, so that a checkpoint or a folder can say how to make them again."""

import importlib
import inspect
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Self


class Described:
    """Base class of whatever a model is built of: it remembers the arguments that it is made with.

    A subclass needs to do nothing for it. Plain data and other `Described` objects can be described, see `describe`.

    Attributes:
        arguments: What `__init__` was given, by name, defaults included.
    """

    arguments: dict[str, Any]
    _made_as: type  # the class, which a wrapper such as FSDP's may change afterwards

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Remembers the arguments before `__init__` runs."""
        made = super().__new__(cls)
        signature = inspect.signature(cls.__init__)
        try:
            bound = signature.bind(made, *args, **kwargs)
        except TypeError:  # `__init__` is about to raise the same; and copies are made without arguments
            return made
        bound.apply_defaults()
        values = dict(list(bound.arguments.items())[1:])
        for name, parameter in signature.parameters.items():
            if parameter.kind is parameter.VAR_KEYWORD:
                values |= values.pop(name)
        vars(made).update(arguments=values, _made_as=cls)
        return made


def class_path(cls: type) -> str:
    """Where a class is imported from, as configs name it."""
    return f"{cls.__module__}.{cls.__qualname__}"


def class_at(path: str) -> type:
    """The class that `class_path` names."""
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def describe(part: Any, without: Collection[str] = ()) -> dict[str, Any]:
    """An object as configs have it: `class_path` and `init_args`, in plain data.

    Args:
        part: The object; arguments that are `Described` themselves are described as well.
        without: Arguments that are left out, so they are None.

    Raises:
        ValueError: if the object, or one that it is made of, is neither `Described` nor plain data.
    """
    if not isinstance(part, Described):
        raise ValueError(
            f"{type(part).__name__} can't be described, so no checkpoint or folder could say how to make it again: "
            "derive its class from vfm_vae.description.Described"
        )
    arguments = {
        name: None if name in without else _plain(value, f"{part._made_as.__name__}.{name}")
        for name, value in part.arguments.items()
    }
    return {"class_path": class_path(part._made_as), "init_args": arguments}


def _plain(value: Any, name: str) -> Any:
    """A value as JSON has it."""
    if isinstance(value, Described):
        return describe(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item, f"{name}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, name) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Path):
        return str(value)
    raise ValueError(
        f"{name}: a {type(value).__name__} can't be described, so no checkpoint or folder could say how to make it "
        "again: give plain data, or derive its class from vfm_vae.description.Described"
    )
