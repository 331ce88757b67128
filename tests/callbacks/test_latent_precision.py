"""In which precision cached latents are made, and what a half-finished cache is completed by."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from safetensors.torch import load_file

from callbacks.writers import LatentWriter
from vfm_vae.data.datamodule import ImageNetDataModule
from vfm_vae.data.latents import IDENTITY, STATISTICS, LatentDataset

ROOT = Path(__file__).parents[2]


@pytest.fixture
def predict(
    tiny_module: Callable[..., LightningModule], trainer: Callable[..., Trainer], photos: Path, tmp_path: Path
) -> Callable[[str], Path]:
    """Caches the moments of 26 photographs in a precision, in the same place each time."""

    def run(precision: str, **options: str) -> Path:
        writer = LatentWriter(str(tmp_path / "z"), shard_size=20)
        images = {"image_size": 64, "val_batch_size": 8, "num_workers": 0, "predict": ["val"]}
        trainer(writer, precision=precision).predict(
            tiny_module(predict="moments"), ImageNetDataModule(photos, **images, **options)
        )
        return tmp_path / "z/val"

    return run


def make_old(cache: Path) -> None:
    """What a version wrote that did not say how the adapter computes."""
    notes = json.loads((cache / IDENTITY).read_text())
    for name in ("adapter", "evaluation_crop"):
        notes.pop(name, None)
    (cache / IDENTITY).write_text(json.dumps(notes))


def halve(cache: Path) -> Path:
    """Takes a shard away, and the statistics that say that there is nothing to do."""
    shard = cache / "latents_shard00001.safetensors"
    for path in (shard, cache / STATISTICS):
        path.unlink()
    return shard


def test_an_older_half_of_a_cache_is_not_completed_by_other_latents(predict):
    cache = predict("bf16-mixed")
    before = load_file(halve(predict("bf16-mixed")).with_name("latents_shard00000.safetensors"))
    predict("bf16-mixed")  # as it was begun
    make_old(cache)
    dataset = LatentDataset(cache, train=False)  # finished, it is read as before
    assert len(dataset) == 26 and dataset.tokenizer is not None
    assert torch.equal(dataset[0][0], before["moments"][0].chunk(2)[0])
    missing = halve(cache)
    with pytest.raises(ValueError, match=r"adapter was 'as precision says', now 'float32'\. Choose another one$"):
        predict("bf16-mixed")
    with pytest.raises(ValueError, match=r"otherwise: precision was 'bf16-mixed', now '32-true'\. Choose another one$"):
        predict("32-true")
    assert not missing.exists()


def test_an_older_half_in_float32_is_completed(predict):
    cache = predict("32-true")
    make_old(cache)
    whole = load_file(cache / "latents_shard00001.safetensors")
    missing = halve(cache)
    predict("32-true")
    completed = load_file(missing)
    assert all(torch.equal(completed[name], tensor) for name, tensor in whole.items())
    missing.unlink()
    with pytest.raises(ValueError, match=r"precision was '32-true', now 'bf16-mixed'\."):
        predict("bf16-mixed")


def test_a_half_is_not_completed_by_other_crops(predict):
    halve(predict("32-true"))
    with pytest.raises(ValueError, match=r"evaluation_crop was 'adm', now 'resize'\. Choose another one$"):
        predict("32-true", evaluation_crop="resize")


@pytest.mark.parametrize("run", ["epochs64", "reg80"])
def test_make_caches_latents_in_float32(run):
    command = ["make", "-n", "latents", "GPUS=8", f"RUN={run}"]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    trainer_file, precision = printed.index("configs/trainer/ddp8.yaml"), printed.index("--trainer.precision=32-true")
    assert trainer_file < precision  # which says bf16-mixed
