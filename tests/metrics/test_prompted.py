import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from vfm_vae.embedded.captions import ASKED, PLACES, write_prompts
from vfm_vae.embedded.judge import Judge
from vfm_vae.metrics import prompted
from vfm_vae.metrics.prompted import (
    NAMES,
    PLACE_NUMBERS,
    Asked,
    Reader,
    compare,
    crops_of,
    measure,
    measure_real,
    read_samples,
)
from vfm_vae.vfm import FrozenVFM

FEW = ["cat", "coffee", "rocket"]


@pytest.fixture(scope="module")
def reader():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prompted, "NAMES", FEW)
        return Reader(FrozenVFM("vit_photos_patch8_64"), Judge(), fitted=120)


@pytest.fixture(scope="module")
def samples(reader):
    """Real crops, four of each place and subject, which stand for perfect samples."""
    images, subjects, places = [], [], []
    for subject, name in enumerate(FEW):
        crops = crops_of(name, 150, seed=7)
        for place in ASKED:
            rows = (crops.places == PLACE_NUMBERS[place]).nonzero()[:4, 0]
            images.append(crops.images[rows])
            subjects += [subject] * len(rows)
            places += [PLACE_NUMBERS[place]] * len(rows)
    seen = torch.arange(len(places)) % 5 > 0
    return torch.cat(images), Asked(torch.tensor(subjects), torch.tensor(places), seen)


def test_real_crops_are_read_rightly_and_by_chance_under_shuffled_prompts(reader, samples):
    images, asked = samples
    numbers, right = measure(reader, images, asked)
    assert numbers["subject_accuracy"] > 0.97 and numbers["subject_by_judge_accuracy"] > 0.97
    assert numbers["place_nearby_accuracy"] > 0.9 > numbers["place_accuracy"] > 0.7
    assert numbers["place_accuracy_shuffled"] == pytest.approx(1 / 8, abs=0.05)
    assert right["place"].float().mean() == numbers["place_accuracy"]


def test_unseen_combinations_are_counted_apart(reader, samples):
    images, asked = samples
    wrong = images.clone()
    wrong[~asked.seen] = 255  # nothing at all
    numbers, _ = measure(reader, wrong, asked)
    plain, _ = measure(reader, images, asked)
    assert numbers["subject_accuracy_seen"] == plain["subject_accuracy_seen"]
    assert numbers["place_accuracy_seen"] == plain["place_accuracy_seen"]
    assert numbers["place_accuracy_unseen"] < 0.3 < plain["place_accuracy_unseen"]
    shares = asked.seen.float().mean()
    mean = shares * numbers["place_accuracy_seen"] + (1 - shares) * numbers["place_accuracy_unseen"]
    torch.testing.assert_close(numbers["place_accuracy"], mean)


def test_places_are_those_of_the_photograph_that_was_asked_for(reader, samples):
    images, asked = samples
    others = asked._replace(subjects=(asked.subjects + 1) % 3)
    numbers, _ = measure(reader, images, others)
    assert numbers["subject_accuracy"] < 0.03 and numbers["place_accuracy"] < 0.3


def test_what_real_crops_reach_is_measured_by_photograph(reader, monkeypatch):
    monkeypatch.setattr(prompted, "NAMES", FEW)
    real = measure_real(reader, 40)
    assert all(accuracies.shape == (3,) for accuracies in real.values())
    assert (real["subject"] > 0.9).all() and (real["place"] > 0.5).all()


def test_nearby_are_places_that_have_a_side_in_common():
    asked = Asked(torch.zeros(9, dtype=torch.int64), torch.full((9,), PLACE_NUMBERS["top"]), torch.ones(9).bool())
    right = compare({"place": torch.arange(9)}, asked)
    assert [place for place, near in zip(PLACES, right["place_nearby"], strict=True) if near] == [
        "top left",
        "top",
        "top right",
        "centre",
    ]
    assert right["place"].nonzero().tolist() == [[PLACE_NUMBERS["top"]]]


@pytest.fixture
def folder(tmp_path):
    """A sample for each prompt, of flat colours."""
    write_prompts(tmp_path / "prompts.jsonl")
    (tmp_path / "samples").mkdir()
    for number in range(13 * 8):
        image = Image.fromarray(np.full((64, 64, 3), number, np.uint8))
        image.save(tmp_path / f"samples/{number:08d}.png")
    return tmp_path


def test_samples_belong_to_prompts_in_order(folder):
    images, asked = read_samples(folder / "samples", folder / "prompts.jsonl")
    assert images[:, 0, 0, 0].tolist() == list(range(13 * 8))
    lines = [json.loads(line) for line in (folder / "prompts.jsonl").read_text().splitlines()]
    assert [NAMES[subject] for subject in asked.subjects] == [line["subject"] for line in lines]
    assert asked.seen.tolist() == [line["seen"] for line in lines]


def test_samples_that_do_not_fit_the_prompts_are_told(folder):
    (folder / "samples/00000103.png").unlink()
    with pytest.raises(ValueError, match=r"samples: .* holds 103 images, which 104 prompts"):
        read_samples(folder / "samples", folder / "prompts.jsonl")
    (folder / "others.jsonl").write_text('{"prompt": "a cat"}\n')
    with pytest.raises(ValueError, match=r"prompts: .* does not say subject, place and seen"):
        read_samples(folder / "samples", folder / "others.jsonl")


@pytest.mark.slow
def test_command_line_writes_an_entry_and_a_picture(folder, reader, samples, monkeypatch, capsys):
    class Fitted(Reader):
        def __init__(self, vfm, judge):
            self.networks = {"subject": vfm, "subject_by_judge": judge}
            self._subjects, self._places = reader._subjects, reader._places * 5

    monkeypatch.setattr(prompted, "Reader", Fitted)
    monkeypatch.setattr(prompted, "REAL", 40)
    (folder / "metrics.json").write_text('{"weak": {"metrics": {}}}')
    options = ["--prompts", folder / "prompts.jsonl", "--metrics", folder / "metrics.json"]
    options += ["--picture", folder / "grid.png"]
    monkeypatch.setattr(sys, "argv", ["prompted", *map(str, [folder / "samples", *options])])
    prompted.main()
    entries = json.loads((folder / "metrics.json").read_text())
    assert list(entries) == ["weak", "text"]
    assert {f"val/{name}_accuracy" for name in ("subject", "place")} < entries["text"]["metrics"].keys()
    assert f"{entries['text']['metrics']['val/place_accuracy_unseen_shuffled']:.3f}" in capsys.readouterr().out
    picture = np.asarray(Image.open(folder / "grid.png"))
    assert picture.shape[2] == 3 and picture.shape[0] == 20 + 13 * 66
    assert (picture == 0).all(-1).any()  # words
