"""What prediction writes for prompts: images with a note of each, and the layouts of suites for text to image."""

import json

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from PIL import Image
from safetensors.torch import load_file

from callbacks.layouts import DPG
from callbacks.samples import SampleWriter
from ldm.text import Text
from vfm_vae.data.datamodule import ImageNetDataModule
from vfm_vae.data.prompts import Prompt, SamplePrompts, read_prompts
from vfm_vae.data.sampling import IndexedNoise
from vfm_vae.types import Samples

SIDE = 4
GENEVAL = [{"tag": "single_object", "include": [{"class": c, "count": 1}], "prompt": f"a photo of a {c}"} for c in "ab"]


class Painter(LightningModule):
    """Paints a sample's number and its prompt's length."""

    can_decode, num_classes = True, None

    def __init__(self, predict="images"):
        super().__init__()
        self.predict, self.drawn = predict, []

    def draw(self, index, condition=None, guidance_scale=None, decode=True):
        texts = condition
        self.drawn += index[index >= 0].tolist()
        colours = torch.stack([index, torch.tensor([len(text) for text in texts]), torch.zeros_like(index)], 1)
        images = (colours / 127.5 - 1)[:, :, None, None].expand(-1, -1, SIDE, SIDE)
        embedded = torch.zeros(len(index), 3, 2)
        latents = IndexedNoise("test", 0, index).normal(2, 3, 3)
        condition = Text(embedded, embedded[..., 0] > -1, embedded[0], tuple(texts))
        return Samples(images if self.predict == "images" else None, latents, condition, index)

    def sample_condition(self, index):
        raise AssertionError("prompts are known")

    def evaluation_settings(self):
        return {"seed": 0}

    def predict_step(self, batch, batch_idx, dataloader_idx=0):
        return self.draw(batch.index, batch.text.captions)


def predict(folder, prompts, images=1, module=None, **options):
    """Draws, and returns the numbers of what was drawn."""
    module = module or Painter()
    data = ImageNetDataModule("nowhere", val_batch_size=3, num_workers=0, prompts=prompts, images_per_prompt=images)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": folder}
    trainer = Trainer(accelerator="cpu", devices=1, callbacks=[SampleWriter(str(folder), **options)], **quiet)
    trainer.predict(module, datamodule=data)
    return module.drawn


def colour(file):
    picture = np.asarray(Image.open(file))
    assert picture.shape == (SIDE, SIDE, 3) and (picture == picture[0, 0]).all()
    return picture[0, 0, :2].tolist()


def lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture
def geneval(tmp_path):
    file = tmp_path / "evaluation_metadata.jsonl"
    file.write_text("".join(f"{json.dumps(line)}\n" for line in GENEVAL))
    return str(file)


@pytest.fixture
def dpg(tmp_path):
    folder = tmp_path / "prompts"
    folder.mkdir()
    for name, text in {"b1": "a large dog", "a7": "a cat", "c": "snow, and a fox"}.items():
        (folder / f"{name}.txt").write_text(text)
    return str(folder)


def test_images_lie_beside_a_note_of_their_prompts(tmp_path):
    folder = tmp_path / "s"
    assert predict(folder, ["a cat", "zwei Füchse"], 2) == [0, 1, 2, 3]
    assert [colour(folder / f"{n:08d}.png") for n in range(4)] == [[0, 5], [1, 5], [2, 11], [3, 11]]
    expected = [{"number": n, "file": f"{n:08d}.png", "prompt": ["a cat", "zwei Füchse"][n // 2]} for n in range(4)]
    assert lines(folder / "prompts.jsonl") == expected
    settings = json.loads((folder / "samples.json").read_text())
    assert settings.keys() == {"seed", "prompts", "images_per_prompt"} and settings["images_per_prompt"] == 2


def test_interrupted_runs_go_on_with_the_same_prompts_alone(tmp_path):
    folder = tmp_path / "s"
    predict(folder, ["a cat", "a dog"], 2)
    before = {file: file.read_bytes() for file in folder.iterdir()}
    for number in (1, 2):
        (folder / f"{number:08d}.png").unlink()
    assert predict(folder, ["a cat", "a dog"], 2) == [1, 2]
    assert {file: file.read_bytes() for file in folder.iterdir()} == before
    for prompts, images, changed in (["a cat", "a fox"], 2, "prompts"), (["a cat", "a dog"], 3, "images_per_prompt"):
        with pytest.raises(ValueError, match=f"holds what was made otherwise: {changed} was"):
            predict(folder, prompts, images)
    assert {file: file.read_bytes() for file in folder.iterdir()} == before


def test_an_archive_holds_the_prompts(tmp_path):
    predict(tmp_path / "s", ["a cat", "two dogs"], npz=True)
    with np.load(tmp_path / "s.npz") as arrays:
        assert arrays["arr_1"].tolist() == ["a cat", "two dogs"] and arrays["arr_1"].dtype.kind == "U"
        assert arrays["arr_0"][:, 0, 0, :2].tolist() == [[0, 5], [1, 8]]


def test_latents_lie_without_embeddings(tmp_path):
    predict(tmp_path / "z", ["a cat", "a dog"], 2, Painter("latents"))
    stored = [load_file(file) for file in sorted((tmp_path / "z").glob("*.safetensors"))]
    assert all(part.keys() == {"latents", "index"} for part in stored)
    assert torch.cat([part["index"] for part in stored]).tolist() == [0, 1, 2, 3]
    notes = lines(tmp_path / "z/prompts.jsonl")
    assert notes[3] == {"number": 3, "prompt": "a dog"}
    for options in {"npz": True}, {"layout": "dpg"}:
        with pytest.raises(ValueError, match=r"images, but model\.predict is 'latents'"):
            predict(tmp_path / "y", ["a cat"], module=Painter("latents"), **options)


def test_geneval_finds_images_and_what_they_are_to_show(tmp_path, geneval):
    folder = tmp_path / "s"
    predict(folder, geneval, 3, layout="geneval")
    for prompt in range(2):
        place = folder / f"{prompt:05d}"
        assert json.loads((place / "metadata.jsonl").read_text()) == GENEVAL[prompt]
        assert sorted(file.name for file in (place / "samples").iterdir()) == [f"{n:05d}.png" for n in range(3)]
        assert [colour(place / f"samples/{n:05d}.png") for n in range(3)] == [[prompt * 3 + n, 14] for n in range(3)]
    expected = {"number": 4, "file": "00001/samples/00001.png", "prompt": "a photo of a b", "record": GENEVAL[1]}
    assert lines(folder / "prompts.jsonl")[4] == expected
    (folder / "00001/samples/00001.png").unlink()
    assert predict(folder, geneval, 3, layout="geneval") == [4]


def test_dpg_finds_four_images_in_a_grid_by_name(tmp_path, dpg):
    folder = tmp_path / "s"
    predict(folder, dpg, 4, layout="dpg")
    assert sorted(file.name for file in (folder / "grids").iterdir()) == ["a7.png", "b1.png", "c.png"]
    grid = np.asarray(Image.open(folder / "grids/b1.png"))  # the second prompt, by name
    assert grid.shape == (2 * SIDE, 2 * SIDE, 3)
    corners = [grid[y : y + SIDE, x : x + SIDE] for y in (0, SIDE) for x in (0, SIDE)]
    assert [corner[0, 0].tolist() for corner in corners] == [[number, 11, 0] for number in range(4, 8)]
    assert all((corner == corner[0, 0]).all() for corner in corners)
    assert lines(folder / "prompts.jsonl")[5]["name"] == "b1"


def test_grids_are_made_when_all_of_their_images_are_there(tmp_path, dpg):
    """Whoever drew them: two ranks share the work."""
    layout = DPG(SamplePrompts(read_prompts(dpg), 4))
    for number in [*range(8), 8, 9, 10]:
        Image.new("RGB", (SIDE, SIDE), (number, 0, 0)).save(tmp_path / layout.file(number))
    layout.finish(tmp_path, slice(1, None, 2))
    assert [file.name for file in (tmp_path / "grids").iterdir()] == ["b1.png"]
    layout.finish(tmp_path, slice(0, None, 2))
    assert sorted(file.name for file in (tmp_path / "grids").iterdir()) == ["a7.png", "b1.png"]


def test_layouts_name_what_they_lack(tmp_path, geneval, dpg):
    for layout, prompts, images, message in (
        ("geneval", ["a cat"], 4, "'geneval' takes prompts with what is to be found"),
        ("geneval", dpg, 4, "'geneval' takes prompts with what is to be found"),
        ("dpg", geneval, 4, "'dpg' names images after the files of their prompts"),
        ("dpg", dpg, 1, "'dpg' takes 4 images of each prompt; data.images_per_prompt is 1"),
    ):
        with pytest.raises(ValueError, match=f"^layout: {message}"):
            predict(tmp_path / "s", prompts, images, layout=layout)
    with pytest.raises(ValueError, match="layout"):
        SampleWriter("s", layout="coco")
    assert not (tmp_path / "s").exists()


def test_layouts_are_for_prompts(tmp_path):
    module, data = Painter(), ImageNetDataModule("nowhere", val_batch_size=2, num_workers=0, num_samples=4)
    trainer = Trainer(accelerator="cpu", callbacks=[SampleWriter(str(tmp_path / "s"), layout="dpg")], logger=False)
    with pytest.raises(ValueError, match=r"layout: 'dpg' is for images of prompts; give data\.prompts"):
        trainer.predict(module, datamodule=data)


def test_the_note_depends_on_texts_and_their_number_alone():
    one, other = (SamplePrompts([Prompt(text) for text in texts]).settings() for texts in (["ab"], ["a", "b"]))
    assert one["prompts"] != other["prompts"]
    assert SamplePrompts([Prompt("ab", "name", {"prompt": "ab"})]).settings() == one
