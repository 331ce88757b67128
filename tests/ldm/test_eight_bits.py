"""Samples become 8 bits once, rounded or truncated as asked for, wherever they go; and folders know which."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from callbacks.samples import SampleWriter
from vfm_vae.data.latents import LatentStatistics
from vfm_vae.frozen import Frozen
from vfm_vae.images import from_uint8, to_uint8
from vfm_vae.types import Batch

LEVELS = torch.arange(255).repeat(3, 1).reshape(3, 15, 17)  # the largest one would leave the range


class Decoder(Frozen):
    """Decodes every latent to all levels, 0.7 above each."""

    def __init__(self):
        super().__init__(torch.nn.Identity())
        self.identity = {"channels": 4, "compression": 4, "vfm": "none", "fingerprint": "none"}

    def decode(self, z):
        return ((LEVELS + 0.7) / 127.5 - 1).expand(len(z), -1, -1, -1)


@pytest.fixture
def drawing(diffusion):
    """Builds a module that draws such samples."""

    def build(**kwargs):
        module = diffusion(tokenizer=Decoder(), **{"predict": "images"} | kwargs)
        module.normalization.take(LatentStatistics(torch.zeros(1, 4, 1, 1), torch.ones(1, 4, 1, 1)))
        return module

    return build


@pytest.fixture
def draw(drawing, latents, trainer, tmp_path):
    """Predicts six samples into a folder."""

    def run(**kwargs):
        writer = SampleWriter(str(tmp_path / "samples"), npz=True)
        trainer(callbacks=[writer]).predict(drawing(**kwargs), datamodule=latents(num_samples=6))

    return run


SHIFT = {"round": 1, "truncate": 0}


@pytest.mark.parametrize("rounding", SHIFT)
def test_levels_are_those_of_the_rounding_however_often_they_are_asked_for(drawing, rounding):
    module, expected = drawing(rounding=rounding), LEVELS + SHIFT[rounding]
    nothing, index = torch.zeros(2, 3, 0, 0, dtype=torch.uint8), torch.arange(2)
    _, images = module.evaluation_images(Batch(nothing, index, index))
    assert all(torch.equal(to_uint8(image[None])[0], expected) for image in images)
    predicted = module.predict_step(Batch(nothing[:1], index[:1], index[:1]), 0).images
    assert torch.equal(to_uint8(predicted)[0], expected)
    assert torch.equal(to_uint8(from_uint8(to_uint8(predicted))), to_uint8(predicted))


@pytest.mark.parametrize("rounding", [None, *SHIFT])
def test_files_hold_the_same_levels_and_say_how(draw, tmp_path, rounding):
    draw(**({} if rounding is None else {"rounding": rounding}))
    expected = (LEVELS + SHIFT[rounding or "round"]).permute(1, 2, 0).numpy()
    assert np.array_equal(np.asarray(Image.open(tmp_path / "samples/00000005.png")), expected)
    with np.load(tmp_path / "samples.npz") as arrays:
        assert (arrays["arr_0"] == expected).all() and len(arrays["arr_0"]) == 6
    assert json.loads((tmp_path / "samples/samples.json").read_text())["rounding"] == (rounding or "round")


def test_a_folder_from_before_there_was_a_choice_was_rounded(draw, tmp_path):
    draw(rounding="round")
    notes = tmp_path / "samples/samples.json"
    notes.write_text(json.dumps({k: v for k, v in json.loads(notes.read_text()).items() if k != "rounding"}))
    (tmp_path / "samples/00000003.png").unlink()
    with pytest.raises(ValueError, match=r"holds what was made otherwise: rounding was 'round', now 'truncate'\. Choo"):
        draw(rounding="truncate")
    assert not (tmp_path / "samples/00000003.png").exists()
    draw(rounding="round")
    assert (tmp_path / "samples/00000003.png").is_file()


def test_a_folder_is_completed_by_its_own_rounding(draw, tmp_path):
    draw(rounding="truncate")
    with pytest.raises(ValueError, match="rounding was 'truncate', now 'round'"):
        draw(rounding="round")
    draw(rounding="truncate")
