"""Measures whether samples show what the prompts of the `photos` data set ask for: the subject, and its place.

Two kinds of linear classifiers see the judge's features of samples. One tells subjects apart. For each subject, another
tells the nine places of its photograph apart. Both are fitted to real crops, which are drawn from anywhere in the
photographs, and are measured on further ones, too: no sample can be expected to do better than those.

As a control, the same samples are measured against other prompts: the places of each subject's prompts are shuffled.

    python -m vfm_vae.metrics.prompted runs/demo/samples_text --prompts runs/demo/prompts.jsonl
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console
from rich.table import Table
from torch import Tensor

from vfm_vae.data.listing import list_images
from vfm_vae.data.prompts import read_prompts
from vfm_vae.embedded.captions import PLACES, SUBJECTS, place_of
from vfm_vae.embedded.judge import Judge
from vfm_vae.embedded.photos import SIDES, TILES, Box, crop, load_photo
from vfm_vae.images import from_uint8
from vfm_vae.metrics.probe import LinearProbe
from vfm_vae.metrics.summary import check_entries, json_numbers, versions, write_entry
from vfm_vae.writing import write_picture

SIZE = 64  # of crops and samples, in pixels
FITTED, REAL = 500, 100  # crops of each photograph that classifiers are fitted to, and measured on
SHUFFLES = 100
NAMES, PLACE_NUMBERS = list(SUBJECTS), {place: number for number, place in enumerate(PLACES)}


class Asked(NamedTuple):
    """What each of several samples is to show.

    Attributes:
        subjects: Numbers of the subjects, int64 `[n]`.
        places: Numbers of the places, int64 `[n]`.
        seen: Whether training has seen the two together, bool `[n]`.
    """

    subjects: Tensor
    places: Tensor
    seen: Tensor

    @classmethod
    def by(cls, records: Sequence[Mapping[str, Any]]) -> "Asked":
        """What lines of a file of prompts ask for."""
        subjects = torch.tensor([NAMES.index(record["subject"]) for record in records])
        places = torch.tensor([PLACE_NUMBERS[record["place"]] for record in records])
        return cls(subjects, places, torch.tensor([record["seen"] for record in records]))


class Crops(NamedTuple):
    """Real crops of a photograph.

    Attributes:
        images: uint8 `[n, 3, H, W]`.
        places: Numbers of their places, int64 `[n]`.
    """

    images: Tensor
    places: Tensor


def crops_of(name: str, count: int, seed: int) -> Crops:
    """Crops of the sizes of training, from anywhere in a photograph, what training never sees included."""
    photo = load_photo(name)
    generator = np.random.default_rng((seed, *name.encode()))
    images, places = [], []
    for _ in range(count):
        side = round(min(photo.size) // TILES * generator.uniform(*SIDES["train"]))
        left, top = (int(generator.integers(0, length - side, endpoint=True)) for length in photo.size)
        box = Box(left, top, left + side, top + side)
        images.append(np.asarray(crop(photo, box, SIZE)))
        places.append(PLACE_NUMBERS[place_of(box, *photo.size)])
    return Crops(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2), torch.tensor(places))


class Reader:
    """Reads subjects and places off images.

    Args:
        judge: The network whose features are read.
        fitted: How many real crops of each photograph to fit to.
    """

    def __init__(self, judge: Judge, fitted: int = FITTED) -> None:
        self.judge = judge
        crops = [crops_of(name, fitted, seed=0) for name in NAMES]
        features = [self.features(images) for images, _ in crops]
        subjects = torch.arange(len(NAMES)).repeat_interleave(fitted)
        self._subjects = LinearProbe(torch.cat(features), subjects)
        self._places = [LinearProbe(of_one, places) for of_one, (_, places) in zip(features, crops, strict=True)]

    @torch.inference_mode()
    def features(self, images: Tensor) -> Tensor:
        """The judge's features, `[n, 96]`, of uint8 images `[n, 3, H, W]`."""
        return torch.cat([self.judge(from_uint8(part)).pooled for part in images.split(100)])

    def read(self, images: Tensor, subjects: Tensor) -> tuple[Tensor, Tensor]:
        """What images show.

        Args:
            images: uint8 `[n, 3, H, W]`.
            subjects: Of which photographs the places are, int64 `[n]`.

        Returns:
            Numbers of the subjects and of the places, int64 `[n]` each.
        """
        features = self.features(images)
        places = torch.zeros_like(subjects)
        for subject in subjects.unique().tolist():
            rows = subjects == subject
            places[rows] = self._places[subject].predict(features[rows])
        return self._subjects.predict(features), places


def measure(reader: Reader, images: Tensor, asked: Asked) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Compares what samples show with what was asked for.

    Args:
        reader: Reads the images.
        images: The samples, uint8 `[n, 3, H, W]`.
        asked: What they are to show.

    Returns:
        Fractions by name; and whether the `subject` and the `place` of each sample are right, bool `[n]`.
    """
    subjects, places = reader.read(images, asked.subjects)
    right = {"subject": subjects == asked.subjects, "place": places == asked.places}
    shuffled = torch.stack([places == _shuffled(asked, seed) for seed in range(SHUFFLES)]).float().mean(0)
    numbers: dict[str, Tensor] = {}
    for name, rows in {"": torch.ones_like(asked.seen), "_seen": asked.seen, "_unseen": ~asked.seen}.items():
        numbers |= {f"{what}_accuracy{name}": hits[rows].float().mean() for what, hits in right.items()}
        numbers |= {f"place_accuracy{name}_shuffled": shuffled[rows].mean()}
    return numbers, right


def _shuffled(asked: Asked, seed: int) -> Tensor:
    """The places that were asked for, dealt out anew among the samples of each subject."""
    stream = torch.Generator().manual_seed(seed)
    places = asked.places.clone()
    for subject in asked.subjects.unique():
        rows = (asked.subjects == subject).nonzero()[:, 0]
        places[rows] = asked.places[rows[torch.randperm(len(rows), generator=stream)]]
    return places


def measure_real(reader: Reader, count: int = REAL) -> tuple[Tensor, Tensor]:
    """How often subjects and places of real crops are read rightly, by subject, `[subjects]` each."""
    right = []
    for subject, name in enumerate(NAMES):
        images, places = crops_of(name, count, seed=1)
        found = reader.read(images, torch.full_like(places, subject))
        rows = places != PLACE_NUMBERS["centre"]  # which no prompt asks for
        right.append([(found[0] == subject)[rows].float().mean(), (found[1] == places)[rows].float().mean()])
    subjects, places = torch.tensor(right).unbind(1)
    return subjects, places


def table_of(right: Mapping[str, Tensor], asked: Asked, real: Tensor) -> Table:
    """The fractions by subject: of its own, of places seen and unseen, and of places of real crops."""
    table = Table("", "subject", "place, seen", "place, unseen", "place, real crops", title="right, by subject")
    for subject, name in enumerate(NAMES):
        rows = asked.subjects == subject
        parts = (right["subject"][rows], right["place"][rows & asked.seen], right["place"][rows & ~asked.seen])
        table.add_row(name, *(f"{float(part.float().mean()):.2f}" for part in parts), f"{float(real[subject]):.2f}")
    return table


def draw(images: Tensor, asked: Asked, columns: int = 4) -> np.ndarray:
    """Draws samples beside their prompts: of each subject a prompt that training has seen, and the one that it has not.

    Args:
        images: The samples, uint8 `[n, 3, H, W]`.
        asked: What they are to show; samples of a prompt follow each other.
        columns: Samples of each prompt that are shown, behind a real crop.

    Returns:
        uint8 `[height, width, 3]`.
    """
    gap, room = 2, 120
    panel = room + (columns + 1) * (SIZE + gap) + 10 * gap
    picture = Image.new("RGB", (2 * panel, 20 + len(NAMES) * (SIZE + gap)), "white")
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(12)
    for side, heading in enumerate(("seen together in training", "never seen together")):
        pen.text((side * panel + 4, 3), heading, "black", font)
        pen.text((side * panel + room + 4, 3), "a real crop, then samples", "black", font)
        for subject, name in enumerate(NAMES):
            of_subject = ((asked.subjects == subject) & (asked.seen == (side == 0))).nonzero()[:, 0]
            place = int(asked.places[of_subject[len(of_subject) * (subject % 7) // 7]])
            rows = of_subject[asked.places[of_subject] == place][:columns]
            crops = crops_of(name, REAL, seed=1)
            real = crops.images[crops.places == place][:1]
            left, top = side * panel, 20 + subject * (SIZE + gap)
            words = f"{SUBJECTS[name]},\n{PLACES[place]}"
            pen.text((left + 4, top + SIZE // 2), words, "black", font, anchor="lm")
            for column, image in enumerate(torch.cat([real, images[rows]])):
                space = 4 * gap * (column > 0)
                tile = Image.fromarray(image.permute(1, 2, 0).numpy())
                picture.paste(tile, (left + room + column * (SIZE + gap) + space, top))
    return np.asarray(picture)


def read_samples(folder: Path, prompts: Path) -> tuple[Tensor, Asked]:
    """Samples of a folder, and what its prompts ask for.

    Args:
        folder: Holds as many images of each prompt, in the order of the prompts.
        prompts: What `vfm_vae.embedded.captions` wrote.

    Raises:
        ValueError: there is no such folder or file, or the two do not fit.
    """
    records = [prompt.record for prompt in read_prompts(prompts)]
    names = sorted(list_images(folder, "samples"))
    each, rest = divmod(len(names), len(records))
    if rest or not each:
        raise ValueError(
            f"samples: {str(folder)!r} holds {len(names)} images, which {len(records)} prompts can't have equally many "
            "of; draw the samples again"
        )
    if any(record is None or not {"subject", "place", "seen"} <= record.keys() for record in records):
        raise ValueError(f"prompts: {str(prompts)!r} does not say subject, place and seen of each prompt")
    images = np.stack([np.asarray(Image.open(folder / name).convert("RGB")) for name in names])
    asked = Asked.by([record for record in records if record is not None for _ in range(each)])
    return torch.from_numpy(images).permute(0, 3, 1, 2), asked


def main() -> None:
    """Command line: measure samples, print the numbers and write them with a picture."""
    parser = argparse.ArgumentParser(description="Measure whether samples show the subjects and places asked for.")
    parser.add_argument("samples", type=Path, help="folder of samples")
    parser.add_argument("--prompts", type=Path, required=True, help="file of prompts that they were drawn for")
    parser.add_argument("--metrics", type=Path, help="JSON file of metrics to add an entry to")
    parser.add_argument("--entry", default="text", help="name of the entry (%(default)s)")
    parser.add_argument("--picture", type=Path, help="PNG file to write")
    given = parser.parse_args()
    if given.metrics is not None:
        check_entries(given.metrics, "metrics")
    images, asked = read_samples(given.samples, given.prompts)
    reader = Reader(Judge())
    numbers, right = measure(reader, images, asked)
    real_subjects, real_places = measure_real(reader)
    numbers |= {"subject_accuracy_real": real_subjects.mean(), "place_accuracy_real": real_places.mean()}
    Console().print(table_of(right, asked, real_places))
    for name, value in sorted(numbers.items()):
        print(f"{name:32s} {float(value):.3f}")
    print(f"chance: 1 / {len(NAMES)} of the subjects, 1 / {len(PLACES)} of the places")
    if given.metrics is not None:
        settings = {"samples": len(images), "judge": reader.judge.source(), "fitted": FITTED, "real": REAL}
        entry = {"metrics": json_numbers({f"val/{name}": value for name, value in numbers.items()})}
        write_entry(given.metrics, given.entry, entry | {"versions": versions(), "settings": settings})
    if given.picture is not None:
        write_picture(given.picture, draw(images, asked))
        print(f"samples beside their prompts: {given.picture}")


if __name__ == "__main__":
    main()
