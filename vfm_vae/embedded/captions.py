"""Captions of the `photos` data set, made of what is known of each crop: subject, place, brightness and colour.

They are in `<root>/{train,val}/metadata.jsonl`, as Hugging Face's ImageFolder has captions. Each subject has a place of
which training sees no crop at all, so that it can be seen what prompts give that combine a subject and a place anew.

    python -m vfm_vae.embedded.captions --prompts runs/demo/prompts.jsonl
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from lightning.pytorch.utilities import rank_zero_info
from PIL import Image

from vfm_vae.checkpoints import read_json
from vfm_vae.embedded.photos import MANIFEST, PHOTOS, Box, load_photo
from vfm_vae.writing import write_text

METADATA = "metadata.jsonl"
SUBJECTS: Mapping[str, str] = {
    "astronaut": "an astronaut",
    "brick": "a brick wall",
    "camera": "a cameraman",
    "cat": "a cat",
    "china": "a Chinese temple",
    "coffee": "a cup of coffee",
    "coins": "ancient coins",
    "flower": "a flower",
    "histology": "stained tissue",
    "hubble": "distant galaxies",
    "motorcycle": "a motorcycle",
    "retina": "a retina",
    "rocket": "a rocket",
}
PLACES = ("top left", "top", "top right", "left", "centre", "right", "bottom left", "bottom", "bottom right")
# The centre of every photograph is held out of training, so no caption there speaks of it.
ASKED = tuple(place for place in PLACES if place != "centre")
LEFT_OUT: Mapping[str, str] = {name: ASKED[3 * number % len(ASKED)] for number, name in enumerate(PHOTOS)}
BRIGHTNESS = ("dark", "mid-tone", "bright")
COLOURS: Mapping[str, tuple[int, int, int]] = {
    "black": (20, 20, 20),
    "grey": (128, 128, 128),
    "white": (240, 240, 240),
    "red": (190, 30, 30),
    "orange": (230, 130, 30),
    "brown": (110, 70, 40),
    "yellow": (230, 210, 60),
    "green": (60, 130, 50),
    "blue": (50, 90, 180),
    "purple": (120, 60, 140),
    "pink": (230, 150, 170),
}
# The first one is used in evaluation, and for prompts, of which neither brightness nor colour is known.
WORDINGS = (
    "{subject}, {place}",
    "{subject}, {place}, {brightness} and {colour}",
    "the {place} of a picture of {subject}",
    "a {brightness}, {colour} picture of {subject} from the {place}",
)


class Facts(NamedTuple):
    """What a caption says of a crop.

    Attributes:
        subject: Name of the photograph.
        place: Where in the photograph the crop's centre lies, one of `PLACES`.
        brightness: One of `BRIGHTNESS`.
        colour: The most frequent of `COLOURS`.
    """

    subject: str
    place: str
    brightness: str
    colour: str

    @property
    def is_seen(self) -> bool:
        """Whether training sees this subject at this place."""
        return LEFT_OUT[self.subject] != self.place

    def captions(self) -> list[str]:
        """The crop's captions, in several wordings."""
        said = self._asdict() | {"subject": SUBJECTS[self.subject]}
        return [wording.format(**said) for wording in WORDINGS]


def place_of(box: Box, width: int, height: int) -> str:
    """The ninth of a photograph, `width` × `height` pixels, that the centre of a crop lies in."""
    column, row = 3 * (box.left + box.right) // (2 * width), 3 * (box.top + box.bottom) // (2 * height)
    return PLACES[3 * row + column]


def brightness_of(pixels: np.ndarray) -> str:
    """Dark, mid-tone or bright: the third in which the mean luma of pixels lies, uint8 `[H, W, 3]`."""
    luma = pixels.reshape(-1, 3).mean(0) @ (0.299, 0.587, 0.114)
    return BRIGHTNESS[int(len(BRIGHTNESS) * luma / 256)]


def colour_of(pixels: np.ndarray) -> str:
    """The colour that most pixels are nearest to, uint8 `[H, W, 3]`."""
    named = np.array(list(COLOURS.values()))
    differences = pixels.reshape(-1, 1, 3) - named.astype(float)  # [H·W, colours, 3]
    hues = differences - differences.mean(-1, keepdims=True)  # count more: what is grey is not called pink
    distances = np.square(differences).sum(-1) + 4 * np.square(hues).sum(-1)
    return list(COLOURS)[np.bincount(distances.argmin(1)).argmax()]


def write_captions(root: Path | str) -> None:
    """Writes the captions of a `photos` data set where they are missing.

    Lines hold `file_name`, `text`, which is a list of captions, and the facts. The training split's leave crops out
    that show a subject where `LEFT_OUT` says.

    Args:
        root: The folder that `write_photos` wrote.
    """
    root = Path(root)
    if all((root / split / METADATA).is_file() for split in ("train", "val")):
        return
    sizes = {name: load_photo(name).size for name in PHOTOS}
    lines: dict[str, list[str]] = {"train": [], "val": []}
    num_left_out = 0
    for file, box in read_json(root / MANIFEST, "root")["boxes"].items():
        split, subject, _ = file.split("/")
        facts = _facts(root / file, subject, place_of(Box(*box), *sizes[subject]))
        if split == "train" and not facts.is_seen:
            num_left_out += 1
            continue
        line = {"file_name": file.removeprefix(f"{split}/"), "text": facts.captions(), **facts._asdict()}
        lines[split].append(json.dumps(line))
    for split, of_split in lines.items():
        write_text(root / split / METADATA, "\n".join(of_split) + "\n")
    combinations = ", ".join(f"{name} {place}" for name, place in LEFT_OUT.items())
    rank_zero_info(f"captions: training does without {num_left_out} crops, those of {combinations}")


def _facts(file: Path, subject: str, place: str) -> Facts:
    pixels = np.asarray(Image.open(file).convert("RGB").resize((16, 16), Image.Resampling.BOX))
    return Facts(subject, place, brightness_of(pixels), colour_of(pixels))


def write_prompts(file: Path) -> None:
    """Writes a prompt for each subject at each place as JSONL, and whether training has seen these two together."""
    lines = []
    for subject in SUBJECTS:
        for place in ASKED:
            facts = Facts(subject, place, "", "")
            line = {"prompt": facts.captions()[0], "subject": subject, "place": place, "seen": facts.is_seen}
            lines.append(json.dumps(line))
    write_text(file, "\n".join(lines) + "\n")


def main() -> None:
    """Command line: write the prompts."""
    parser = argparse.ArgumentParser(description="Write a prompt for each subject of the photos at each place.")
    parser.add_argument("--prompts", type=Path, default=Path("runs/demo/prompts.jsonl"), help="file (%(default)s)")
    write_prompts(parser.parse_args().prompts)


if __name__ == "__main__":
    main()
