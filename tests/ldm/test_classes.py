"""Classes of data, samples and probes are those that the denoiser knows; what is not is named before a first step."""

from pathlib import Path
from shutil import copytree

import pytest
import torch
from lightning.pytorch import Callback
from safetensors.torch import load_file, save_file

from callbacks.images import SampleImages
from callbacks.probe import ClassAccuracyCallback
from vfm_vae.vfm import FrozenVFM

NUM_CLASSES = 3  # of the cache, and of the denoiser


class Never(Callback):
    """Fails where a step or a validation begins."""

    def on_train_batch_start(self, *_):
        pytest.fail("a step began")

    def on_validation_start(self, *_):
        pytest.fail("a validation began")


def with_label(cache: Path, folder: Path, label: int) -> Path:
    """A copy of the cache, the first of whose images has another label."""
    copytree(cache, folder)
    shard = min((folder / "train").glob("*.safetensors"))
    tensors = load_file(shard)
    tensors["labels"][0] = label
    save_file(tensors, shard)
    return folder


@pytest.mark.parametrize("label", [NUM_CLASSES, 207, -1])
def test_a_class_to_show_that_is_none_is_refused(label, diffusion, latents, trainer):
    with pytest.raises(ValueError, match=r"^classes: must be "):
        trainer(callbacks=[SampleImages([0, label]), Never()], max_steps=1).fit(diffusion(), latents())


@pytest.mark.parametrize("label", [NUM_CLASSES, 207, -1])
def test_a_class_to_draw_that_is_none_is_refused(label, diffusion):
    with pytest.raises(ValueError, match=rf"^labels: the classes are 0 to 2, given \[{label}\]$"):
        diffusion().draw(torch.arange(2), torch.tensor([1, label]), decode=False)


def test_a_denoiser_of_more_classes_than_the_data_is_not_trained_anew(diffusion, latents, trainer):
    with pytest.raises(
        ValueError, match=r"^model\.num_classes: .* labels up to 2, but .* knows 13 classes.* give it 3"
    ):
        trainer(callbacks=[Never()], max_steps=1).fit(diffusion(model={"num_classes": 13}), latents())


@pytest.mark.parametrize("how", ["begun from", "gone on with"])
def test_weights_that_know_more_classes_than_the_data_may_be(how, diffusion, latents, trainer, cache, tmp_path):
    training = trainer(max_steps=1, limit_val_batches=0)
    training.fit(diffusion(model={"num_classes": 13}), latents(root=with_label(cache, tmp_path / "cache", 12)))
    training.save_checkpoint(path := str(tmp_path / "trained.ckpt"))
    module = diffusion(model={"num_classes": 13}, init_from=path if how == "begun from" else None)
    run = trainer(max_steps=2, limit_val_batches=0)
    with pytest.warns(UserWarning, match=r"model\.num_classes: .* labels up to 2, but the denoiser knows 13 classes"):
        run.fit(module, latents(), ckpt_path=path if how == "gone on with" else None, weights_only=True)


@pytest.mark.parametrize("label", [NUM_CLASSES, 207])
def test_a_cached_label_of_no_class_is_refused(label, diffusion, latents, trainer, cache, tmp_path):
    root = with_label(cache, tmp_path / "cache", label)
    with pytest.raises(ValueError, match=rf"^model\.num_classes: the data in '{root}' has labels up to {label}, but"):
        trainer(callbacks=[Never()], max_steps=1).fit(diffusion(), latents(root=root))


def test_a_negative_cached_label_names_its_shard(diffusion, latents, trainer, cache, tmp_path):
    root = with_label(cache, tmp_path / "cache", -1)
    with pytest.raises(ValueError, match=rf"^root: '{root}/train/.*safetensors' holds the label -1, but classes are"):
        trainer(callbacks=[Never()], max_steps=1).fit(diffusion(), latents(root=root))


def test_a_probe_of_other_classes_is_refused(diffusion, latents, trainer, photos):
    probe = ClassAccuracyCallback(str(photos / "train"), FrozenVFM("vit_photos_patch8_64"), image_size=64)
    with pytest.raises(ValueError, match=r"^images: '.*photos/train' has 13 classes, but samples are of 3; give"):
        trainer(callbacks=[probe, Never()], max_steps=1).fit(diffusion(), latents())
