"""Compatibility: brings configs, folders and checkpoints of earlier versions into the form of this one.

Whoever moves a class that configs name, or renames an option of one, adds a line to a table here.
"""

import inspect
import re
from collections.abc import Mapping
from typing import Any

from vfm_vae.description import class_at

CLASSES = {
    "callbacks.fid.DistributionCallback": "callbacks.distribution.DistributionCallback",
    "ldm.models.reg.SiT": "ldm.models.sit.SiT",
}
"""Classes that have moved: where they were, and where they are."""

PLAIN = {
    "adapter": "vfm_vae.modules.adapter.Adapter",
    "decoder": "vfm_vae.modules.decoder.Decoder",
    "equivariance": "vfm_vae.modules.equivariance.EquivarianceRegularizer",
    "guard": "vfm_vae.losses.guard.NonFiniteGuard",
    "guidance": "ldm.guidance.Guidance",
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


def upgrade(description: Any) -> Any:
    """Brings a config, or a description of a model, into this version's form; one that has it stays as it is.

    Args:
        description: Plain data.
    """
    if isinstance(description, list):
        return [upgrade(part) for part in description]
    if isinstance(description, str):
        return CLASSES.get(description, description)
    if not isinstance(description, Mapping):
        return description
    parts = {option: upgrade(part) for option, part in description.items()}
    return {option: _plain(option, part) if option in PLAIN else part for option, part in parts.items()}


def upgrade_word(word: str) -> str:
    """The same for one word of a command line.

    Raises:
        ValueError: if it is an option that another command has.
    """
    option, equals, value = word.partition("=")
    if option in MOVED:
        raise ValueError(f"{option}: {MOVED[option]}")
    if not option.startswith("--"):
        return CLASSES.get(word, word)
    option = re.sub(rf"\.({'|'.join(PLAIN)})\.init_args\b", r".\1", option)
    for (part, former), name in RENAMED.items():
        option = re.sub(rf"\.{part}\.{former}$", f".{part}.{name}", option)
    return option + equals + CLASSES.get(value, value)


def _plain(option: str, part: Any) -> Any:
    """The options alone, without `class_path` and `init_args` around them, by the names that they have now."""
    if not isinstance(part, Mapping) or part.get("class_path", PLAIN[option]) != PLAIN[option]:
        return part
    options = part.get("init_args", {} if "class_path" in part else part) or {}
    renamed = {RENAMED.get((option, name), name): value for name, value in options.items()}
    # An addition to another class, which has an option of this name, names no class either.
    cls: Any = class_at(PLAIN[option])
    known = inspect.signature(cls.__init__).parameters
    return renamed if "class_path" in part or renamed.keys() <= known.keys() else part
