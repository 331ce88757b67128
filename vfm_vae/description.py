"""Objects that remember their arguments, so that a checkpoint or a folder can say how to make them again."""

import importlib
import inspect
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, Literal, Self, get_args, get_origin, get_type_hints

from lightning.pytorch.utilities import rank_zero_warn

PLAIN = (Any, object, str, int, float, complex, bool, bytes, type(None), list, tuple, dict, set)
"""Types of options that no class is given for."""


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


def class_at(path: str, place: str = "") -> type:
    """The class that `class_path` names; it may stand inside another class.

    Args:
        path: As `class_path` has it.
        place: Begins the message.

    Raises:
        ValueError: if there is none.
    """
    try:
        cls: type = _found(path)
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        missing = str(error.name) if isinstance(error, ModuleNotFoundError) else "."
        advice = f"put the folder of module {missing!r} on PYTHONPATH, or install its package"
        begin = place and place.removesuffix(":") + ": "
        raise ValueError(f"{begin}there is no class {path!r}: {error if '.' in missing else advice}") from error
    return cls


def _found(path: str) -> Any:
    owner, _, name = path.rpartition(".")
    try:
        found: Any = importlib.import_module(owner)
    except ModuleNotFoundError as error:
        if error.name != owner or "." not in owner:
            raise
        found = _found(owner)  # a class inside another class
        if not isinstance(found, type):
            raise
    return getattr(found, name)


def is_imported(path: str) -> bool:
    """Whether the module was imported that has a class, or the class around it."""
    owner = path.rpartition(".")[0]
    module, _, outer = owner.rpartition(".")
    return owner in sys.modules or isinstance(getattr(sys.modules.get(module), "__dict__", {}).get(outer), type)


def check_place(cls: type) -> None:
    """Checks that a class is found again by its `class_path`, as whoever reads a checkpoint will have to.

    Raises:
        ValueError: if it is not.
    """
    path = class_path(cls)
    if "<locals>" in path or cls.__qualname__.count(".") > 1:
        raise ValueError(
            f"{path}: a class that is defined inside a function, or deep inside others, can't be found again, so no "
            "checkpoint of it could be read: define it at the top level of a module"
        )
    if cls.__module__ == "__main__":
        _warn_of(path)
    elif class_at(path) is not cls:
        raise ValueError(
            f"{path}: there is another class of that name now, so no checkpoint of this one could be read: define a "
            "class once, under its own name"
        )


@cache
def _warn_of(path: str) -> None:
    rank_zero_warn(
        f"{path}: its checkpoints can be read only where this class is defined, as it is in a script or a notebook: "
        "move it to a module"
    )


def named_classes(part: Any, hint: Any = Any) -> Iterator[str]:
    """The paths of all classes that a description names, also those deep inside it.

    A class is imported only after its path was given and the next one is asked for, so the caller can refuse it first.

    Args:
        part: Plain data.
        hint: Type of the option that it is for. One that takes objects of a class takes the class's path alone, too.
    """
    owners = _classes(hint)
    if isinstance(part, str):
        # In a string the parser would find a description as well.
        if "class_path" in part or (owners and not part.isidentifier()):
            yield part
    elif isinstance(part, list):
        for item in part:
            yield from named_classes(item, hint)
    elif isinstance(part, Mapping):
        if "class_path" in part:
            yield str(part["class_path"])
            owners = [class_at(str(part["class_path"]))]
        hints = {name: of for owner in owners for name, of in _hints(owner).items()}
        for name, value in part.items():
            if name in ("init_args", "dict_kwargs") and isinstance(value, Mapping):
                for option, inner in value.items():
                    yield from named_classes(inner, hints.get(option, Any))
            elif name != "class_path":
                yield from named_classes(value, hints.get(name, Any))


def _classes(hint: Any) -> list[type]:
    """The classes whose objects an option takes."""
    if get_origin(hint) is Literal:
        return []
    if get_origin(hint) in (Callable, type):  # they take a path, too
        return [object]
    if get_args(hint):
        return [cls for inner in get_args(hint) for cls in _classes(inner)]
    return [hint] if inspect.isclass(hint) and hint not in PLAIN and not issubclass(hint, Path) else []


def _hints(cls: type) -> dict[str, Any]:
    """The types of a class's options, with those that it hands on to its bases."""
    hints: dict[str, Any] = {}
    for base in reversed(cls.__mro__):
        try:
            hints |= get_type_hints(vars(base).get("__init__"))
        except (NameError, TypeError):  # it has none, or some that can't be resolved, nor by the parser
            continue
    return hints


def is_plain(value: Any) -> bool:
    """Whether a value is as JSON has it; tuples are, too."""
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and is_plain(item) for key, item in value.items())
    if isinstance(value, list | tuple):
        return all(map(is_plain, value))
    return value is None or type(value) in (bool, int, float, str)


def describe(part: Any, without: Collection[str] = ()) -> dict[str, Any]:
    """An object as configs have it: `class_path` and `init_args`, in plain data.

    Args:
        part: The object; arguments that are `Described` themselves are described as well.
        without: Arguments that are left out, so they are None.

    Raises:
        ValueError: if the object, or one that it is made of, is neither `Described` nor plain data, or is of a class
            that could not be found again.
    """
    if not isinstance(part, Described):
        raise ValueError(
            f"{type(part).__name__} can't be described, so no checkpoint or folder could say how to make it again: "
            "derive its class from vfm_vae.description.Described"
        )
    check_place(part._made_as)
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
