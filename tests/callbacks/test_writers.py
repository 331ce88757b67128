"""Predicted images on disk."""

import numpy as np
import torch
from PIL import Image

from callbacks.writers import ReconstructionWriter
from vfm_vae.metrics.reconstruction import to_uint8


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
