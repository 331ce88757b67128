"""Which models a command line names, found without reading them: this imports nothing that takes long."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

DEFAULT = Path("runs/demo/pretrained")
CONFIG, CHECKPOINT = "config.json", Path("checkpoints", "last.ckpt")
NONE = (
    "FOLDER: no models are given, and there are none in runs/demo/pretrained; `make demo` trains some in 20 minutes, "
    "or give folders that save_pretrained wrote, checkpoints, or owner/model on the Hugging Face hub"
)


class Source(NamedTuple):
    """A model that is to be read.

    Attributes:
        name: What the page calls it.
        place: A folder, a checkpoint of training, or `owner/model` on the hub.
    """

    name: str
    place: str


def find(words: Sequence[str]) -> list[Source]:
    """The models that the words of a command line name.

    Args:
        words: Each a folder that `save_pretrained` wrote; a checkpoint; a run's folder, which stands for its last
            checkpoint; a folder that holds several of these; or `owner/model` on the Hugging Face hub. None at all
            stands for the demo's models.

    Raises:
        ValueError: if there are none.
    """
    if not words and not DEFAULT.is_dir():
        raise ValueError(NONE)
    places = [place for word in words or [str(DEFAULT)] for place in _places(word)]
    return _named(list(dict.fromkeys(places)))


def _places(word: str) -> list[str]:
    path = Path(word)
    if path.is_dir():
        found = _in_folder(path)
        if not found:
            raise ValueError(
                f"FOLDER: {word!r} holds no model: no {CONFIG}, no {CHECKPOINT}, nor folders that do; give a folder "
                "that save_pretrained wrote, or a run's"
            )
        return found
    if path.is_file() or re.fullmatch(r"[\w.-]*\w/[\w.-]*\w", word):
        return [word]
    raise ValueError(f"FOLDER: there is no folder {word!r}; on the Hugging Face hub it would be owner/model")


def _in_folder(folder: Path) -> list[str]:
    """The model that a folder is, or those that it holds; of a demo's folder, those that it has ready for use."""
    if (own := _model(folder)) is not None:
        return [own]
    if (folder / DEFAULT.name).is_dir():
        folder = folder / DEFAULT.name
    parts = [_model(part) for part in sorted(folder.iterdir()) if part.is_dir()]
    return [part for part in parts if part is not None]


def _model(folder: Path) -> str | None:
    if (folder / CONFIG).is_file():
        return str(folder)
    return str(folder / CHECKPOINT) if (folder / CHECKPOINT).is_file() else None


def _named(places: Sequence[str]) -> list[Source]:
    """Names them by their folders' names, with so many of the folders above as it takes to tell them apart."""
    parts = [_steps(place) for place in places]
    lengths = [1] * len(parts)
    while True:
        names = ["/".join(part[-length:]) for part, length in zip(parts, lengths, strict=True)]
        alike = [i for i, name in enumerate(names) if names.count(name) > 1 and lengths[i] < len(parts[i])]
        if not alike:
            return [Source(name, place) for name, place in zip(names, places, strict=True)]
        for number in alike:
            lengths[number] += 1


def _steps(place: str) -> tuple[str, ...]:
    path = Path(place)
    if not path.exists():
        return (place,)  # of the hub
    path = path.resolve()
    if path.is_file():
        path = path.parent.parent if path.parent.name == CHECKPOINT.parent.name else path.with_suffix("")
    return path.parts[1:]
