"""CLIP scores of a module's images: of captions in validation, of prompts in tests."""

import json

import pytest
import torch
from lightning.pytorch import LightningModule
from PIL import Image
from tiny_clip import write_clip

from callbacks.clip_score import CLIPScoreCallback
from callbacks.images import SampleImages
from callbacks.report import Report
from vfm_vae.data.datamodule import ImageNetDataModule
from vfm_vae.images import from_uint8, to_uint8
from vfm_vae.metrics.clip_score import CLIP
from vfm_vae.types import Samples

PROMPTS = ["a cat", "two dogs!", "A red bus", "snow", "a cat at night"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("models") / "clip")


def picture(number):
    generator = torch.Generator().manual_seed(number)
    return torch.randint(0, 256, (3, 40, 48), generator=generator).byte()


class Painter(LightningModule):
    """Paints noise that depends on a sample's number."""

    can_decode, num_classes, predict = True, None, "images"

    def __init__(self):
        super().__init__()
        self.bias = torch.nn.Parameter(torch.zeros(()))
        self.asked = []

    def evaluation_images(self, batch):
        return None, from_uint8(torch.stack([picture(number) for number in batch.index.tolist()]))

    def draw(self, index, condition=None, guidance_scale=None, decode=True):
        self.asked += zip(index.tolist(), condition, strict=True)
        return Samples(from_uint8(torch.stack([picture(number) for number in index.tolist()])), None, condition, index)

    def sample_condition(self, index):
        raise AssertionError

    def evaluation_settings(self):
        return {"seed": 0}

    def validation_step(self, batch, batch_idx):
        pass

    test_step = training_step = validation_step

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def prompted(**options):
    defaults = {"val_batch_size": 3, "num_workers": 0, "prompts": PROMPTS, "images_per_prompt": 2}
    return ImageNetDataModule("nowhere", **defaults | options)


def test_a_test_scores_samples_by_their_prompts(folder, trainer, tmp_path):
    run = trainer(callback := CLIPScoreCallback(folder), Report(str(tmp_path / "metrics.json")))
    run.test(Painter(), prompted(), verbose=False)
    images = torch.stack([picture(number) for number in range(10)])
    clip = CLIP(folder)
    expected = clip(images, [prompt for prompt in PROMPTS for _ in range(2)])
    assert expected.min() == 0 < expected.max()
    assert run.callback_metrics["test/clip_score"].item() == pytest.approx(expected.mean().item(), rel=1e-4)
    assert callback.settings() == {"num_images": 10, "clip": folder, "clip_weights": clip.fingerprint()}
    (entry,) = json.loads((tmp_path / "metrics.json").read_text()).values()
    assert entry["settings"]["data"]["images_per_prompt"] == 2 and len(entry["settings"]["data"]["prompts"]) == 64
    assert entry["settings"]["CLIPScoreCallback"] == callback.settings()


def test_some_samples_are_spread_over_the_prompts(folder, trainer):
    """They are numbered from 0 on, as elsewhere, and keep their prompts."""
    run = trainer(CLIPScoreCallback(folder, num_images=5))
    run.test(Painter(), prompted(), verbose=False)
    expected = CLIP(folder)(torch.stack([picture(number) for number in range(5)]), PROMPTS).mean()
    assert run.callback_metrics["test/clip_score"].item() == pytest.approx(expected.item(), rel=1e-4)


@pytest.fixture
def captioned(tmp_path):
    """Three images with a caption each."""
    for split in ("train", "val"):
        place = tmp_path / "data" / split / "all"
        place.mkdir(parents=True)
        for number in range(3):
            Image.new("RGB", (8, 8)).save(place / f"{number}.png")
        lines = [{"file_name": f"all/{number}.png", "text": PROMPTS[number]} for number in range(3)]
        (place.parent / "metadata.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return tmp_path / "data"


def images(root, **options):
    return ImageNetDataModule(root, image_size=8, batch_size=2, val_batch_size=2, num_workers=0, **options)


def test_a_validation_scores_by_captions(folder, trainer, captioned):
    callback = CLIPScoreCallback(folder)
    run = trainer(callback, precision="bf16-mixed")
    module = Painter()
    run.validate(module, images(captioned, captions="text"), verbose=False)
    expected = CLIP(folder)(torch.stack([picture(number) for number in range(3)]), PROMPTS[:3]).mean()
    assert run.callback_metrics["val/clip_score"].item() == pytest.approx(expected.item(), rel=1e-4)
    assert module.state_dict().keys() == {"bias"} and not callback.state_dict()


@pytest.mark.parametrize("evaluation", ["validate", "fit"])
def test_data_without_captions_is_refused_before_anything_is_drawn(folder, trainer, captioned, monkeypatch, evaluation):
    monkeypatch.setattr(Painter, "evaluation_images", None)
    monkeypatch.setattr(Painter, "training_step", lambda *_: pytest.fail("trained for nothing"))
    with pytest.raises(ValueError, match=r"neither captions \(data\.captions\) nor prompts") as error:
        getattr(trainer(CLIPScoreCallback(folder)), evaluation)(Painter(), images(captioned))
    assert "\n" not in str(error.value)


def test_what_can_not_be_scored_is_told_when_a_run_starts(folder, trainer, monkeypatch):
    with pytest.raises(ValueError, match="name: there is no folder 'nowhere'"):
        trainer(CLIPScoreCallback("nowhere")).test(Painter(), prompted())
    monkeypatch.setattr(Painter, "num_classes", 3)
    with pytest.raises(ValueError, match="draws samples of classes, not of captions"):
        trainer(CLIPScoreCallback(folder)).test(Painter(), prompted())


def test_a_grid_has_a_row_for_each_prompt(trainer, captioned, tmp_path):
    module = Painter()
    run = trainer(SampleImages(prompts=["a cat", "a dog"], num_images=3, batch_size=4))
    run.validate(module, images(captioned), verbose=False)
    assert module.asked == [(n, "a cat" if n < 3 else "a dog") for n in range(6)]
    grid = Image.open(next(tmp_path.rglob("samples_guidance_1.png")))
    assert grid.size == (3 * 50 + 2, 2 * 42 + 2)
    corner = torch.tensor(list(grid.crop((2, 44, 50, 84)).get_flattened_data())).reshape(40, 48, 3).permute(2, 0, 1)
    assert torch.equal(corner.byte(), to_uint8(from_uint8(picture(3))))
    module.num_classes = 3
    with pytest.raises(ValueError, match="prompts: the model draws samples of classes, and takes no prompts"):
        run.validate(module, images(captioned), verbose=False)
    for options in {"prompts": []}, {"prompts": ["a cat"], "classes": [0]}:
        with pytest.raises(ValueError, match="prompts: give at least one, and no classes"):
            SampleImages(**options)
