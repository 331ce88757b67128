"""Pictures of reconstructions: what they show, when, and that training doesn't notice."""

import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from callbacks.images import ReconstructionImages, reconstruction_grid
from vfm_vae.types import Decoded


def test_grid_shows_input_reconstruction_and_scales():
    images = torch.stack([torch.full((3, 8, 8), level) for level in (-1.0, 1.0)])
    decoded = Decoded(torch.zeros(2, 3, 8, 8), (torch.full((2, 3, 2, 2), -0.5), torch.full((2, 3, 4, 4), 3.0)))
    grid = reconstruction_grid(images, decoded)
    assert grid.dtype == torch.uint8 and grid.shape == (3, 2 * 10 + 2, 4 * 10 + 2)
    centres = grid[0, 6::10, 6::10]
    assert centres.tolist() == [[0, 128, 255, 64], [255, 128, 255, 64]]  # the larger scale before the smaller


def events(directory):
    accumulator = EventAccumulator(str(directory), size_guidance={"images": 0}).Reload()
    return {tag: [event.step for event in accumulator.Images(tag)] for tag in accumulator.Tags()["images"]}


def test_drawn_at_start_end_every_so_many_images_and_after_validation(module, data, trainer, tmp_path):
    logger = TensorBoardLogger(tmp_path, name="", version="")
    callback = ReconstructionImages(num_images=3, every_n_images=10)
    trainer(callback, logger=logger, val_check_interval=3, num_sanity_val_steps=1).fit(module, data)
    # Batches of 4: 10 and 20 images are passed at steps 3 and 5, and shown at the images seen.
    assert events(tmp_path) == {"train/reconstructions": [0, 12, 20, 24], "val/reconstructions": [12, 24]}
    picture = np.asarray(Image.open(tmp_path / "images" / "val.png"))
    assert picture.shape == (3 * 10 + 2, 4 * 10 + 2, 3)
    for row, position in enumerate((0, 6, 12)):  # spread over the 13 validation images
        shown = picture[2 + 10 * row : 10 + 10 * row, 2:10]
        assert (shown == data.val_set.images[position].permute(1, 2, 0).numpy()).all()
    assert (tmp_path / "images" / "train.png").is_file()


def test_training_does_not_notice(new_module, data, trainer):
    def final_weights(*callbacks):
        module = new_module()
        module.model.frozen.eval()
        torch.manual_seed(3)
        run = trainer(*callbacks)
        run.fit(module, data)
        assert module.model.training
        return torch.cat([p.flatten() for p in module.parameters()] + [torch.rand(1), module.model.num_forwards[None]])

    assert torch.equal(final_weights(), final_weights(ReconstructionImages(every_n_images=4)))


def test_bad_options_are_named(module, data, trainer):
    with pytest.raises(ValueError, match="num_images"):
        ReconstructionImages(num_images=0)
    with pytest.raises(ValueError, match="every_n_images"):
        ReconstructionImages(every_n_images=0)
    del module.images_seen
    with pytest.raises(ValueError, match="no images_seen"):
        trainer(ReconstructionImages(every_n_images=4)).fit(module, data)
