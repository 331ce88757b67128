"""Prompts that images are to be drawn for: from files as evaluation suites have them, or given one by one."""

import json
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

from lightning.pytorch.utilities import rank_zero_warn

from vfm_vae.data.captions import decoded, parse_object, read_lines, whole
from vfm_vae.data.listing import is_hidden
from vfm_vae.data.samples import SampleNumbers
from vfm_vae.data.sampling import Draw
from vfm_vae.types import Caption

FIELDS = ("prompt", "text", "caption")  # of a line of JSON; the first that it has is the prompt


class Prompt(NamedTuple):
    """What an image is to show.

    Attributes:
        text: The prompt.
        name: Name of the file that it is from, without its ending, where each prompt has its own; else None.
        record: The line of JSON that it is from; else None.
    """

    text: str
    name: str | None = None
    record: dict[str, Any] | None = None


class SamplePrompts(SampleNumbers):
    """Samples that are to be drawn for prompts, as batches that hold no images.

    Args:
        prompts: The prompts.
        images_per_prompt: Samples of each prompt; they follow each other.
    """

    def __init__(self, prompts: Sequence[Prompt], images_per_prompt: int = 1) -> None:
        super().__init__(len(prompts) * images_per_prompt)
        self.prompts, self.images_per_prompt = list(prompts), images_per_prompt

    def settings(self) -> dict[str, Any]:
        """SHA-256, in hexadecimal, over the prompts, and how many images each has."""
        texts = json.dumps([prompt.text for prompt in self.prompts])
        return {"prompts": sha256(texts.encode()).hexdigest(), "images_per_prompt": self.images_per_prompt}

    def __getitem__(self, draw: Draw | int) -> tuple[Any, ...]:
        """Returns an empty image, label -1, the number, which is -1 for padding, and the prompt as the caption."""
        number = draw if isinstance(draw, int) else draw.index
        return *super().__getitem__(draw), Caption(self.prompt_of(number).text)

    def prompt_of(self, number: int) -> Prompt:
        """The prompt of a sample, by its number."""
        return self.prompts[number // self.images_per_prompt]


def read_prompts(given: str | Path | Sequence[str]) -> list[Prompt]:
    """Reads prompts.

    Args:
        given: The prompts themselves; or a file `.txt` with a prompt in each line, a file `.jsonl` with the field
            `prompt`, `text` or `caption` in each line, or a folder of files `<name>.txt`.

    Raises:
        ValueError: there is no such file, it is not UTF-8, a line is not as expected, or there are no prompts.
    """
    if not isinstance(given, str | Path):
        prompts = [Prompt(whole(text).strip()) for text in given]
        return _checked(prompts, "the list")
    path = Path(given)
    if given and path.is_dir():
        return _checked(_of_folder(path), repr(str(path)))
    if path.suffix not in (".txt", ".jsonl") or not path.is_file():
        raise ValueError(
            f"prompts: {str(given)!r} is no file .txt or .jsonl, and no folder; give one, or prompts as a list"
        )
    return _checked(_of_lines(path) if path.suffix == ".txt" else _of_objects(path), repr(str(path)))


def _of_lines(file: Path) -> list[Prompt]:
    lines = list(read_lines(file, "prompts"))
    while lines and not lines[-1]:
        lines.pop()
    if skipped := lines.count(""):
        rank_zero_warn(f"prompts: {skipped} empty lines of {str(file)!r} are skipped")
    return [Prompt(line) for line in lines if line]


def _of_objects(file: Path) -> list[Prompt]:
    prompts = []
    for number, line in enumerate(read_lines(file, "prompts"), 1):
        if line:
            place = f"prompts: {str(file)!r}, line {number}"
            record = parse_object(line, place)
            text = next((record[field] for field in FIELDS if field in record), None)
            if not isinstance(text, str):
                raise ValueError(f"{place} has no text named {' or '.join(FIELDS)}")
            prompts.append(Prompt(whole(text).strip(), record=record))
    return prompts


def _of_folder(folder: Path) -> list[Prompt]:
    files = sorted(file for file in folder.glob("*.txt") if file.is_file() and not is_hidden(file.name))
    return [Prompt(decoded(file.read_bytes(), f"prompts: {str(file)!r}"), name=file.stem) for file in files]


def _checked(prompts: list[Prompt], place: str) -> list[Prompt]:
    if not prompts:
        raise ValueError(f"prompts: {place} holds none; give at least one")
    if empty := sum(not prompt.text for prompt in prompts):
        rank_zero_warn(f"prompts: {empty} of the {len(prompts)} in {place} are empty; their images may show anything")
    return prompts
