"""Predicted images, and caches with features, on disk."""

import json
import os
import runpy
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from callbacks.writers import LatentWriter, ReconstructionWriter
from vfm_vae.data.datamodule import ImageNetDataModule
from vfm_vae.data.latents import LatentDataset, LatentStatistics
from vfm_vae.images import from_uint8, to_uint8
from vfm_vae.vfm import FrozenVFM

VFM = "vit_photos_patch8_64"


def test_every_image_is_written_once_by_its_index(module, padded_data, trainer, tmp_path):
    run = trainer(ReconstructionWriter(str(tmp_path / "a" / "b")))
    assert not run.predict(module, padded_data)  # nothing is kept in memory
    files = sorted((tmp_path / "a" / "b").iterdir())
    assert [file.name for file in files] == [f"{index:08d}.png" for index in range(13)]
    batch = next(iter(padded_data.val_dataloader()))
    with torch.no_grad():
        expected = to_uint8(module.eval().reconstruct(batch).image)
    written = np.stack([np.asarray(Image.open(file)) for file in files[:5]])
    assert (np.abs(written.astype(int) - expected[:5].permute(0, 2, 3, 1).numpy()) <= 1).all()


def test_a_place_that_will_not_do_is_named_before_anything_is_computed(module, data, trainer, tmp_path):
    (tmp_path / "a").write_text("a file")
    with pytest.raises(ValueError, match=r"^directory: can't write '.*a/00000000.png' .*; give another place$"):
        trainer(ReconstructionWriter(str(tmp_path / "a"))).predict(module, data)
    assert not module.validated


@pytest.fixture
def predict(tiny_module, photos, trainer, tmp_path):
    """Writes a cache of the photographs, with features of a VFM that is given its arguments, or without."""

    def run(folder, features=None, dtype="float32", root=photos, **kwargs):
        vfm = None if features is None else FrozenVFM(VFM, **features)
        module = tiny_module(predict="moments", features=vfm, **kwargs)
        writer = LatentWriter(str(tmp_path / folder), shard_size=20, dtype=dtype)
        images = {"image_size": 64, "val_batch_size": 8, "num_workers": 0, "predict": ["train", "val"]}
        trainer(writer).predict(module, ImageNetDataModule(root, **images))
        return module

    return run


HALF = {"input_scale": 0.5, "antialias": False}


def test_a_cache_holds_features_of_the_plain_images(predict, photos, tmp_path):
    module = predict("z", HALF | {"antialias_positions": True}, dtype="float16")
    images = ImageNetDataModule(photos, image_size=64, num_workers=0)
    images.setup("validate")
    for split, size in (("train", 52), ("val", 26)):
        dataset = LatentDataset(tmp_path / "z" / split, train=False)
        assert len(dataset) == size and dataset.features_shape == (1 + 4 * 4, 128)
        shard = load_file(dataset._paths[0])
        assert (shard["features"].dtype, shard["moments"].dtype) == (torch.bfloat16, torch.float16)
    rows = [images.val_set[index] for index in (0, 25)]
    features = module.features(from_uint8(torch.stack([row[0] for row in rows])))
    expected = torch.cat([features.pooled[:, None], features.tokens], 1)
    found = torch.stack([dataset[index][3] for index in (0, 25)])
    torch.testing.assert_close(found.float(), expected, rtol=2**-8, atol=1e-4)
    assert json.loads((tmp_path / "z/val/latents.json").read_text())["features"] == dataset.features_source
    assert dataset.features_source == {
        "name": VFM,
        "layers": [-1],
        "input_scale": 0.5,
        "pretrained": True,
        "model_args": None,
        "antialias": False,
        "fingerprint": module.features.fingerprint(),
    }


def test_a_cache_goes_on_with_copies_of_its_images_and_with_no_others(predict, photos, tmp_path):
    predict("z")
    (tmp_path / "z/val/latents_shard00001.safetensors").unlink()
    shutil.copytree(photos, tmp_path / "copy", copy_function=shutil.copyfile)  # with times of their own
    predict("z", root=tmp_path / "copy")
    assert (tmp_path / "z/val/latents_shard00001.safetensors").is_file()
    file = sorted((tmp_path / "copy/val").glob("*/*"))[0]
    Image.new("RGB", (64, 64)).save(file)
    with pytest.raises(ValueError, match=r"'.*z/val' holds what was made otherwise: images was '\w{64}', now '\w{64}'"):
        predict("z", root=tmp_path / "copy")
    notes = tmp_path / "z/val/latents.json"
    former = {name: value for name, value in json.loads(notes.read_text()).items() if name != "images"}
    notes.write_text(json.dumps(former))
    predict("z", root=tmp_path / "copy")  # of former versions, which do not say it


def test_features_leave_latents_and_statistics_alone(predict, tmp_path):
    predict("with", HALF)
    predict("without")
    assert "features" not in json.loads((tmp_path / "without/train/latents.json").read_text())
    for split in ("train", "val"):
        shards = [load_file(tmp_path / name / split / "latents_shard00001.safetensors") for name in ("with", "without")]
        assert shards[0].keys() - shards[1].keys() == {"features"}
        assert all(torch.equal(shards[0][name], tensor) for name, tensor in shards[1].items())
        mine, plain = (LatentStatistics.read(tmp_path / name / split) for name in ("with", "without"))
        assert torch.equal(mine.mean, plain.mean) and torch.equal(mine.std, plain.std)


def test_a_cache_with_features_goes_on_as_it_was_begun(predict, tmp_path):
    predict("z", HALF)
    before = {path: path.read_bytes() for path in (tmp_path / "z").glob("*/*")}
    for name in ("train/latents_shard00001.safetensors", "train/latents_stats.pt"):
        (tmp_path / "z" / name).unlink()
    for other in (None, {"input_scale": 0.5}):
        with pytest.raises(ValueError, match=r"holds what was made otherwise: features was \{'name'"):
            predict("z", other)
    predict("z", HALF)
    assert {path: path.read_bytes() for path in (tmp_path / "z").glob("*/*")} == before
    predict("plain")
    with pytest.raises(ValueError, match=r"holds what was made otherwise: features was None, now \{'name'"):
        predict("plain", HALF)


def test_a_cache_does_not_depend_on_where_the_weights_lie(predict, tmp_path):
    torch.save(FrozenVFM(VFM).network.state_dict(), tmp_path / "vit.pth")
    predict("z", HALF)
    predict("z", HALF | {"weights": str(tmp_path / "vit.pth")})


@pytest.mark.parametrize("content", ["latents", "reconstructions"])
def test_features_go_with_moments_alone(tiny_module, content):
    with pytest.raises(ValueError, match=rf"features are cached only with 'moments', given '{content}'"):
        tiny_module(predict=content, features=FrozenVFM(VFM))


RANKS = """
import sys
from functools import partial
import torch
from lightning.pytorch import Trainer
from callbacks.writers import LatentWriter
from vfm_vae.data.datamodule import ImageNetDataModule
from vfm_vae.discriminators.projected import ProjectedDiscriminator
from vfm_vae.losses.objective import Objective
from vfm_vae.module import TokenizerModule
from vfm_vae.modules.adapter import Adapter
from vfm_vae.modules.decoder import Decoder
from vfm_vae.tokenizer import VFMVAE
from vfm_vae.vfm import FrozenVFM

devices, photos, folder, name = int(sys.argv[1]), sys.argv[2], sys.argv[3], "vit_photos_patch8_64"
torch.manual_seed(0)
model = VFMVAE(Adapter([128], [8], 4, 1, 16, 128), Decoder(16, [16, 16, 16, 16, 8], [16], [], 0, w_channels=16),
               FrozenVFM(name))
optimizer = partial(torch.optim.AdamW, lr=1e-3)
module = TokenizerModule(model, ProjectedDiscriminator(name, size=64, layers=(1,)), Objective(), optimizer, optimizer,
                         predict="moments", features=FrozenVFM(name, input_scale=0.5, antialias=False))
run = Trainer(accelerator="cpu", devices=devices, strategy="ddp" if devices > 1 else "auto", logger=False,
              enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
              callbacks=[LatentWriter(f"{folder}/z{devices}", shard_size=8)])
run.predict(module, datamodule=ImageNetDataModule(photos, image_size=64, val_batch_size=8, num_workers=0))
"""


@pytest.mark.slow
def test_two_ranks_write_the_features_that_one_writes(photos, tmp_path, monkeypatch):
    script = tmp_path / "script.py"
    script.write_text(RANKS)
    monkeypatch.setattr(sys, "argv", [str(script), "1", str(photos), str(tmp_path)])
    runpy.run_path(str(script))
    command = [sys.executable, str(script), "2", str(photos), str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1"}
    streams = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True}
    process = subprocess.run(command, env=environment, timeout=180, check=False, **streams)
    assert (tmp_path / "z2/val/latents_stats.pt").is_file(), process.stderr[-3000:]
    ours, theirs = (LatentDataset(tmp_path / f"z{number}/val", train=False) for number in (1, 2))
    assert len(ours) == len(theirs) == 26 and (ours.labels == theirs.labels).all()
    assert ours.features_source == theirs.features_source and ours.features_source["input_scale"] == 0.5
    for index in range(26):
        for one, two in zip(ours[index][::3], theirs[index][::3], strict=True):
            torch.testing.assert_close(one, two, rtol=2**-7, atol=1e-4)


def test_a_command_waits_for_the_rank_that_failed():
    waited = []
    trainer = SimpleNamespace(strategy=SimpleNamespace(barrier=lambda: waited.append(True)))
    ReconstructionWriter("nowhere").on_predict_end(trainer, None)
    assert waited
