import json
from collections import Counter

import numpy as np
import pytest

from vfm_vae.data.captions import read_captions
from vfm_vae.data.prompts import read_prompts
from vfm_vae.embedded.captions import (
    ASKED,
    LEFT_OUT,
    METADATA,
    PLACES,
    SUBJECTS,
    Facts,
    brightness_of,
    colour_of,
    place_of,
    write_captions,
    write_prompts,
)
from vfm_vae.embedded.photos import MANIFEST, PHOTOS, Box, load_photo, write_photos
from vfm_vae.text import HashedWords


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = write_photos(tmp_path_factory.mktemp("data") / "photos", size=16, train_per_class=24, val_per_class=5)
    write_captions(root)
    return root


def lines_of(root, split):
    return [json.loads(line) for line in (root / split / METADATA).read_text().splitlines()]


def test_training_lacks_each_subject_at_one_place_and_validation_lacks_nothing(root):
    boxes = json.loads((root / MANIFEST).read_text())["boxes"]
    sizes = {name: load_photo(name).size for name in PHOTOS}
    places = {file: place_of(Box(*box), *sizes[file.split("/")[1]]) for file, box in boxes.items()}
    for split in ("train", "val"):
        files = {file.removeprefix(f"{split}/"): place for file, place in places.items() if file.startswith(split)}
        wanted = {file: p for file, p in files.items() if split == "val" or LEFT_OUT[file.split("/")[0]] != p}
        assert {line["file_name"]: line["place"] for line in lines_of(root, split)} == wanted
        assert all(line["subject"] == line["file_name"].split("/")[0] for line in lines_of(root, split))
    assert len(lines_of(root, "train")) < 13 * 24 and len(lines_of(root, "val")) == 13 * 5


def test_left_out_places_are_spread_over_all_that_are_asked_for():
    assert set(LEFT_OUT) == set(PHOTOS) == set(SUBJECTS)
    assert set(Counter(LEFT_OUT.values())) == set(ASKED) and max(Counter(LEFT_OUT.values()).values()) == 2


def test_data_sets_read_the_captions_and_the_text_encoder_cuts_none(root):
    names, captions = read_captions(root / "train", "text")
    by_name = {line["file_name"]: line for line in lines_of(root, "train")}
    encoder = HashedWords()
    for number, name in enumerate(names):
        line = by_name[name]
        assert captions[number] == line["text"] == Facts(*(line[field] for field in Facts._fields)).captions()
        assert len(set(line["text"])) == 4 and line["text"][0] == f"{SUBJECTS[line['subject']]}, {line['place']}"
        assert all(SUBJECTS[line["subject"]] in text and line["place"] in text for text in line["text"])
        assert max(encoder.count(line["text"])) <= encoder.max_tokens


def test_captions_are_written_once(root):
    file = root / "train" / METADATA
    written = file.read_bytes()
    file.write_text("mine\n")
    write_captions(root)
    assert file.read_text() == "mine\n"
    file.unlink()
    write_captions(root)
    assert file.read_bytes() == written


def test_places_are_the_ninths_of_a_photograph():
    centres = [(x, y) for y in (10, 50, 80) for x in (20, 100, 160)]
    boxes = [Box(x - 10, y - 10, x + 10, y + 10) for x, y in centres]
    assert [place_of(box, 180, 90) for box in boxes] == list(PLACES)


@pytest.mark.parametrize(
    ("pixel", "brightness", "colour"),
    [
        ((10, 10, 10), "dark", "black"),
        ((140, 140, 140), "mid-tone", "grey"),
        ((185, 185, 185), "bright", "white"),  # no grey is called pink
        ((200, 20, 40), "dark", "red"),
        ((240, 220, 80), "bright", "yellow"),
        ((40, 80, 190), "dark", "blue"),
        ((120, 80, 45), "mid-tone", "brown"),
    ],
)
def test_brightness_and_colour(pixel, brightness, colour):
    pixels = np.full((4, 4, 3), pixel, np.uint8)
    assert (brightness_of(pixels), colour_of(pixels)) == (brightness, colour)
    pixels[0] = 255  # a quarter of it
    assert colour_of(pixels) == colour


def test_prompts_ask_for_all_combinations_and_say_which_are_new(tmp_path):
    write_prompts(tmp_path / "prompts.jsonl")
    prompts = read_prompts(tmp_path / "prompts.jsonl")
    assert len(prompts) == len({prompt.text for prompt in prompts}) == 13 * 8
    for text, _, record in prompts:
        assert text == Facts(record["subject"], record["place"], "", "").captions()[0]
        assert record["seen"] == (LEFT_OUT[record["subject"]] != record["place"])
    assert sum(not prompt.record["seen"] for prompt in prompts) == 13
