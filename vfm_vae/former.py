"""Compatibility: brings configs, folders and checkpoints of earlier versions into the form of this one.

Whoever moves a class that configs name, or renames an option of one, adds a line to a table here.
"""

import inspect
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from vfm_vae.description import class_at

CLASSES = {
    "callbacks.fid.DistributionCallback": "callbacks.distribution.DistributionCallback",
    "callbacks.writers.SampleWriter": "callbacks.samples.SampleWriter",
    "ldm.models.reg.SiT": "ldm.models.sit.SiT",
}
"""Classes that have moved: where they were, and where they are."""

PLAIN = {
    "adapter": "vfm_vae.modules.adapter.Adapter",
    "decoder": "vfm_vae.modules.decoder.Decoder",
    "equivariance": "vfm_vae.modules.equivariance.EquivarianceRegularizer",
    "guard": "vfm_vae.losses.guard.NonFiniteGuard",
    "objective": "vfm_vae.losses.objective.Objective",
    "patchgan": "vfm_vae.discriminators.patchgan.PatchGAN",
    "quantizer": "vfm_vae.modules.quantizer.VectorQuantizer",
    "tokenizer": "vfm_vae.tokenizer.FrozenTokenizer",
}
"""Options that named their class although there is but one; now they hold that class's options directly.

The classes of options that a config may leave out are `final`, so that no class can be named. Those of required options
are not: the parser would then build the parts inside them before the parts beside them, and draw initial weights in
another order.
"""

RENAMED = {("decoder", "latent_channels"): "in_channels"}
"""Options of those that have another name."""


MOVED = {"--samples": "samples in files are measured by `python -m vfm_vae.evaluate --samples FILE --reference FILE`"}
"""Options that another command has."""


PACKAGES = ("vfm_vae", "ldm", "callbacks")


def upgrade(description: Any, is_ours: bool = True) -> Any:
    """Brings a config, or a description of a model, into this version's form; one that has it stays as it is.

    Options of other people's classes may have the same names: they stay as they are.

    Args:
        description: Plain data.
        is_ours: Whether it belongs to a class of this project, if it names none.
    """
    if isinstance(description, list):
        return [upgrade(part, is_ours) for part in description]
    if isinstance(description, str):
        return CLASSES.get(description, description)
    if not isinstance(description, Mapping):
        return description
    if "class_path" in description:
        is_ours = not _is_others(str(description["class_path"]))
    parts = {option: upgrade(part, is_ours) for option, part in description.items()}
    return {option: _plain(option, part, is_ours) if option in PLAIN else part for option, part in parts.items()}


def upgrade_words(words: Sequence[str]) -> list[str]:
    """The same for a command line, which is known to set options of other people's classes if it names these itself.

    Raises:
        ValueError: if there is an option that another command has.
    """
    given = [(option, value) for option, _, value in (word.partition("=") for word in words)] + list(pairwise(words))
    others = {option.removesuffix(".class_path") + "." for option, value in given if _is_others(value)}
    return [upgrade_word(word, tuple(others)) for word in words]


def upgrade_word(word: str, others: tuple[str, ...] = ()) -> str:
    """The same for one word.

    Args:
        word: An option, its value, or both with `=` between them.
        others: How options of other people's classes begin.

    Raises:
        ValueError: if it is an option that another command has.
    """
    option, equals, value = word.partition("=")
    if option in MOVED:
        raise ValueError(f"{option}: {MOVED[option]}")
    if not option.startswith("--"):
        return CLASSES.get(word, word)
    if option.startswith(others):
        return option + equals + CLASSES.get(value, value)
    option = re.sub(rf"\.({'|'.join(PLAIN)})\.init_args\b", r".\1", option)
    for (part, former), name in RENAMED.items():
        option = re.sub(rf"\.{part}\.{former}$", f".{part}.{name}", option)
    return option + equals + CLASSES.get(value, value)


def _is_others(path: str) -> bool:
    """Whether a class of others has this path; a name alone, without a module, is of this project or of Lightning."""
    package, *names = path.split(".")
    return bool(names) and all(name.isidentifier() for name in (package, *names)) and package not in PACKAGES


def _plain(option: str, part: Any, is_ours: bool) -> Any:
    """The options alone, without `class_path` and `init_args` around them, by the names that they have now.

    In a class of others, what names our class gets today's names of options, and goes on naming it where another class
    could be named.
    """
    names_ours = isinstance(part, Mapping) and part.get("class_path") == PLAIN[option]
    if not isinstance(part, Mapping) or not (names_ours or (is_ours and "class_path" not in part)):
        return part
    options = part.get("init_args", {} if "class_path" in part else part) or {}
    renamed = {RENAMED.get((option, name), name): value for name, value in options.items()}
    cls: Any = class_at(PLAIN[option])
    if not is_ours and not getattr(cls, "__final__", False):
        return {**part, "init_args": renamed}
    # An addition to another class, which has an option of this name, names no class either.
    known = inspect.signature(cls.__init__).parameters
    return renamed if "class_path" in part or renamed.keys() <= known.keys() else part
