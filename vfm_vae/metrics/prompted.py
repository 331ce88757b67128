"""Measures whether samples show what the prompts of the `photos` data set ask for: the subject, and its place.

Linear classifiers see samples by a network's pooled features. One tells subjects apart by the VFM's, as `make demo` has
it, and one by the judge's. For each subject, another tells the nine places of its photograph apart by the judge's. All
are fitted to real crops, which are drawn from anywhere in the photographs, and are measured on further ones, too: no
sample can be expected to do better than those.

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

from vfm_vae.contracts import VFM
from vfm_vae.data.prompts import read_prompts
from vfm_vae.embedded.captions import PLACES, SUBJECTS, place_of
from vfm_vae.embedded.judge import Judge
from vfm_vae.embedded.photos import SIDES, TILES, Box, crop, load_photo
from vfm_vae.images import from_uint8
from vfm_vae.metrics.probe import LinearProbe
from vfm_vae.metrics.summary import check_entries, json_numbers, versions, write_entry
from vfm_vae.vfm import FrozenVFM
from vfm_vae.writing import write_picture

SIZE = 64  # of crops and samples, in pixels
FITTED, REAL = 500, 100  # crops of each photograph that classifiers are fitted to, and measured on
SHUFFLES = 30  # of prompts, over which the control is averaged
PLACED = ("place", "place_nearby")  # what the control is of
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
        vfm: A network by whose features subjects are read.
        judge: One by whose features subjects and places are read.
        fitted: How many real crops of each photograph to fit to.
    """

    def __init__(self, vfm: VFM, judge: VFM, fitted: int = FITTED) -> None:
        self.networks = {"subject": vfm, "subject_by_judge": judge}
        crops = [crops_of(name, fitted, seed=0) for name in NAMES]
        subjects = torch.arange(len(NAMES)).repeat_interleave(fitted)
        features = self._features(torch.cat([images for images, _ in crops]))
        self._subjects = {name: LinearProbe(values, subjects) for name, values in features.items()}
        of_each = features["subject_by_judge"].split(fitted)
        self._places = [LinearProbe(values, places) for values, (_, places) in zip(of_each, crops, strict=True)]

    def read(self, images: Tensor, subjects: Tensor) -> dict[str, Tensor]:
        """What images show.

        Args:
            images: uint8 `[n, 3, H, W]`.
            subjects: Numbers of the photographs whose places are told apart, int64 `[n]`.

        Returns:
            Numbers of the `subject`, of the `subject_by_judge` and of the `place`, int64 `[n]` each.
        """
        features = self._features(images)
        places = torch.zeros_like(subjects)
        for subject in subjects.unique().tolist():
            rows = subjects == subject
            places[rows] = self._places[subject].predict(features["subject_by_judge"][rows])
        return {name: self._subjects[name].predict(values) for name, values in features.items()} | {"place": places}

    @torch.inference_mode()
    def _features(self, images: Tensor) -> dict[str, Tensor]:
        parts = [from_uint8(part) for part in images.split(100)]
        return {name: torch.cat([network(part).pooled for part in parts]) for name, network in self.networks.items()}


def compare(shown: Mapping[str, Tensor], asked: Asked) -> dict[str, Tensor]:
    """Whether samples show what they are to show, bool `[n]` by name.

    Besides the names of `Reader.read` there is `place_nearby`: there, or at a place that has a side in common with it.
    """
    right = {name: values == (asked.places if name == "place" else asked.subjects) for name, values in shown.items()}
    rows, columns = shown["place"] // 3 - asked.places // 3, shown["place"] % 3 - asked.places % 3  # in steps
    return right | {"place_nearby": rows.abs() + columns.abs() <= 1}


def measure(reader: Reader, images: Tensor, asked: Asked) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Compares what samples show with what was asked for.

    Args:
        reader: Reads the images.
        images: The samples, uint8 `[n, 3, H, W]`.
        asked: What they are to show.

    Returns:
        Fractions by name; and whether each sample is right, see `compare`.
    """
    shown = reader.read(images, asked.subjects)
    right = compare(shown, asked)
    others = [compare(shown, asked._replace(places=_shuffled(asked, seed))) for seed in range(SHUFFLES)]
    shuffled = {name: torch.stack([other[name] for other in others]).float().mean(0) for name in PLACED}
    numbers: dict[str, Tensor] = {}
    for part, rows in {"": torch.ones_like(asked.seen), "_seen": asked.seen, "_unseen": ~asked.seen}.items():
        numbers |= {f"{name}_accuracy{part}": hits[rows].float().mean() for name, hits in right.items()}
        numbers |= {f"{name}_accuracy{part}_shuffled": hits[rows].mean() for name, hits in shuffled.items()}
    return numbers, right


def _shuffled(asked: Asked, seed: int) -> Tensor:
    """The places that were asked for, dealt out anew among the samples of each subject."""
    stream = torch.Generator().manual_seed(seed)
    places = asked.places.clone()
    for subject in asked.subjects.unique():
        rows = (asked.subjects == subject).nonzero()[:, 0]
        places[rows] = asked.places[rows[torch.randperm(len(rows), generator=stream)]]
    return places


def measure_real(reader: Reader, count: int = REAL) -> dict[str, Tensor]:
    """How often real crops are read rightly, by subject, `[subjects]` for each of the names of `compare`."""
    by_subject = []
    for subject, name in enumerate(NAMES):
        images, places = crops_of(name, count, seed=1)
        rows = places != PLACE_NUMBERS["centre"]  # which no prompt asks for
        asked = Asked(torch.full_like(places, subject), places, torch.ones_like(rows))
        right = compare(reader.read(images, asked.subjects), asked)
        by_subject.append({name: hits[rows].float().mean() for name, hits in right.items()})
    return {name: torch.stack([right[name] for right in by_subject]) for name in by_subject[0]}


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
    for side, heading in enumerate(("subject and place seen together in training", "never seen together")):
        pen.text((side * panel + 4, 3), f"{heading}: a real crop, then samples", "black", font)
        for subject, name in enumerate(NAMES):
            of_subject = ((asked.subjects == subject) & (asked.seen == (side == 0))).nonzero()[:, 0]
            place = int(asked.places[of_subject[len(of_subject) * (subject % 7) // 7]])  # not the same for all
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
        ValueError: the two do not fit, or there is no such file of prompts.
    """
    records = [prompt.record for prompt in read_prompts(prompts)]
    files = sorted(folder.glob("*.png"))
    each, rest = divmod(len(files), len(records))
    if rest or not each:
        raise ValueError(
            f"samples: {str(folder)!r} holds {len(files)} images, which {len(records)} prompts can't have equally many "
            "of; draw the samples again"
        )
    if any(record is None or not {"subject", "place", "seen"} <= record.keys() for record in records):
        raise ValueError(f"prompts: {str(prompts)!r} does not say subject, place and seen of each prompt")
    images = np.stack([np.asarray(Image.open(file).convert("RGB")) for file in files])
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
    reader = Reader(FrozenVFM("vit_photos_patch8_64"), Judge())
    numbers, right = measure(reader, images, asked)
    real = measure_real(reader)
    numbers |= {f"{name}_accuracy_real": hits.mean() for name, hits in real.items()}
    Console().print(table_of(right, asked, real["place"]))
    for name, value in sorted(numbers.items()):
        print(f"{name:40s} {float(value):.3f}")
    print(f"chance: 1 / {len(NAMES)} of the subjects, 1 / {len(PLACES)} of the places")
    if given.metrics is not None:
        networks = {name: network.source() for name, network in reader.networks.items()}
        settings = {"num_images": len(images), "fitted": FITTED, "real": REAL, "networks": networks}
        entry = {"metrics": json_numbers({f"val/{name}": value for name, value in numbers.items()})}
        write_entry(given.metrics, given.entry, entry | {"versions": versions(), "settings": settings})
    if given.picture is not None:
        write_picture(given.picture, draw(images, asked))
        print(f"samples beside their prompts: {given.picture}")


if __name__ == "__main__":
    main()
