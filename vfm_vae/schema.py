"""The schema of checkpoints: the one place that writes and reads what they hold besides Lightning's own entries.

A checkpoint has, beside Lightning's own entries (`state_dict`, `optimizer_states`, `loops`, …):

- `format_version`: of these entries. Checkpoints of before they were counted are read, too.
- `kind`: of model, see `Kind`.
- `config`: how to make the model again, as its `config.json` says it.
- `images_seen`: images that it was trained on.
- `ema`: its averaged weights, where it has them: `{"weights": {name: tensor}, "images_seen": int}`, by the names of
  `state_dict`, which always holds the weights in training.
- Further facts of its kind: to which VFM or tokenizer it belongs, and where its training goes on.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning
from torch import Tensor

from vfm_vae.checkpoints import read_checkpoint

FORMAT_VERSION = 2
AVERAGE = "ema"


@dataclass(frozen=True)
class Kind:
    """A kind of checkpoint.

    Attributes:
        name: Name of the model.
        program: The program whose `fit` writes such checkpoints.
        parts: Where in the checkpoint the model's weights are, by the beginnings of their names, and how these names
            begin in the model.
        mark: An entry that every checkpoint of this kind has, also those of before kinds were noted.
        former: The `config` of a checkpoint of that time; None where it has none.
    """

    name: str
    program: str
    parts: Mapping[str, str]
    mark: str
    former: Callable[[Mapping[str, Any]], dict[str, Any] | None]

    def describes(self, content: Any) -> bool:
        """Whether what a file holds is a checkpoint of this kind."""
        if not isinstance(content, Mapping) or not isinstance(content.get("state_dict"), Mapping):
            return False
        return self._noted(content)

    def _noted(self, content: Mapping[str, Any]) -> bool:
        return content["kind"] == self.name if "kind" in content else self.mark in content


@dataclass(frozen=True)
class Stored:
    """A checkpoint that was read.

    Attributes:
        content: All that it says.
        kind: Kind of the model.
        place: Names the option that gave it, and perhaps the file, in messages.
    """

    content: Mapping[str, Any]
    kind: Kind
    place: str

    @property
    def images_seen(self) -> int:
        """Images that the model was trained on."""
        return int(self.content["images_seen"])

    @property
    def average(self) -> Mapping[str, Any] | None:
        """Averaged weights and the images that they have seen, see `write_average`; None where there are none."""
        return self.content.get(AVERAGE)

    def averaged(self) -> dict[str, Tensor]:
        """All weights; averaged ones in the place of those in training, where there are any."""
        return averaged(self.content)

    def model(self) -> dict[str, Tensor]:
        """The same, of the model alone, by its own names."""
        return {
            inner + name.removeprefix(outer): tensor
            for name, tensor in self.averaged().items()
            for outer, inner in self.kind.parts.items()
            if name.startswith(outer)
        }

    def config(self) -> dict[str, Any]:
        """How to make the model again, as its `config.json` says it.

        Raises:
            ValueError: if the checkpoint does not say that.
        """
        config = self.content["config"] if "config" in self.content else self.kind.former(self.content)
        if config is None:
            raise ValueError(
                f"{self.place} does not describe a {self.kind.name}: give a checkpoint that `{self.kind.program} fit` "
                "wrote"
            )
        return dict(config)


def read(path: str | Path, option: str, kind: Kind) -> Stored:
    """Reads a file of a kind.

    Args:
        path: The checkpoint.
        option: Names what gave it in messages.
        kind: Kind of model that is wanted.

    Raises:
        ValueError: if there is no such file, it can't be read, or it is of another kind or of a later version.
    """
    return take(read_checkpoint(path, option), kind, f"{option}: {str(path)!r}")


def take(content: Mapping[str, Any], kind: Kind, place: str) -> Stored:
    """Reads what Lightning has loaded.

    Args:
        content: All that the checkpoint says; where ranks share its weights, they are in the model already.
        kind: Kind of model that is wanted.
        place: Names the option that gave it in messages.

    Raises:
        ValueError: if it is of another kind or of a later version.
    """
    if not kind._noted(content):
        raise ValueError(f"{place} is not a {kind.name}'s: give a checkpoint that `{kind.program} fit` wrote")
    version = content.get("format_version", 1)
    if version > FORMAT_VERSION:
        raise ValueError(
            f"{place} is in format version {version}, but this version of vfm_vae reads up to {FORMAT_VERSION}: "
            "install a newer version of this project"
        )
    return Stored(content, kind, place)


def averaged(content: Mapping[str, Any]) -> dict[str, Tensor]:
    """The weights of a checkpoint; averaged ones in the place of those in training, where there are any."""
    return dict(content["state_dict"]) | dict(content.get(AVERAGE, {}).get("weights", {}))


def write(checkpoint: dict[str, Any], kind: Kind, config: Mapping[str, Any], *, images_seen: int, **facts: Any) -> None:
    """Adds to a checkpoint what it says beside Lightning's entries and averages.

    Args:
        checkpoint: Gets it.
        kind: Kind of the model.
        config: How to make the model again, in plain data.
        images_seen: Images that it was trained on.
        **facts: Further ones of this kind, in plain data and tensors.
    """
    checkpoint |= {"format_version": FORMAT_VERSION, "kind": kind.name, "config": dict(config)}
    checkpoint |= {"images_seen": images_seen, **facts}


def write_average(checkpoint: dict[str, Any], weights: Mapping[str, Tensor], images_seen: int) -> None:
    """Adds averaged weights to a checkpoint.

    Args:
        checkpoint: Gets them.
        weights: Some or all parameters, by their names in `state_dict`.
        images_seen: Images that the average has seen.
    """
    checkpoint[AVERAGE] = {"weights": dict(weights), "images_seen": images_seen}


def of_weights(state_dict: Mapping[str, Tensor]) -> dict[str, Any]:
    """A checkpoint as Lightning has it, of weights that come from elsewhere: without optimisers, before any step."""
    return {
        "state_dict": dict(state_dict),
        "callbacks": {},  # without which Lightning would not ask callbacks to read averages
        "pytorch-lightning_version": lightning.__version__,
        "epoch": 0,
        "global_step": 0,
    }


def _former_tokenizer(content: Mapping[str, Any]) -> dict[str, Any] | None:
    """From the hyper-parameters of the command line, where FrozenVFM was the only VFM."""
    model = content.get("hyper_parameters", {}).get("model")
    arguments = dict((model.get("init_args") if isinstance(model, Mapping) else None) or {})
    if "vfm" not in arguments:
        return None
    source = {"layers": [-1], "input_scale": 1.0} | arguments.pop("vfm")["init_args"] | content["vfm"]
    return {"model": {**model, "init_args": arguments}, "vfm": source}


TOKENIZER = Kind("tokenizer", "python -m vfm_vae", {"model.": ""}, "vfm", _former_tokenizer)
