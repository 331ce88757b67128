"""CLIP scores: as the library has them, whatever the batch, and in one line what is missing."""

import shutil

import pytest
import torch
from tiny_clip import MAX_TOKENS, write_clip
from torch import distributed, multiprocessing

from vfm_vae.metrics.clip_score import CLIP
from vfm_vae.metrics.reconstruction import MeanOverImages

CAPTIONS = ["a cat", "two dogs!", "", "A red bus", "a cat on a red bus, at night", "snow"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("models") / "clip")


@pytest.fixture
def clip(folder):
    return CLIP(folder)


@pytest.fixture(scope="module")
def images():
    return torch.randint(0, 256, (6, 3, 40, 48), generator=torch.Generator().manual_seed(0)).byte()


def test_scores_equal_the_librarys(clip, folder, images):
    from transformers import CLIPModel, CLIPProcessor

    inputs = CLIPProcessor.from_pretrained(folder)(
        text=CAPTIONS, images=images, return_tensors="pt", padding=True, truncation=True, max_length=MAX_TOKENS
    )
    model = CLIPModel.from_pretrained(folder)
    with torch.no_grad():
        cosines = model(**inputs).logits_per_image.diag() / model.logit_scale.exp()
    assert (cosines > 0.05).any() and (cosines < -0.05).any()
    torch.testing.assert_close(clip(images, CAPTIONS), 100 * cosines.clamp(min=0), rtol=1e-4, atol=1e-4)


def test_a_score_depends_on_its_image_and_caption_alone(clip, images):
    together = clip(images, CAPTIONS)
    alone = torch.cat([clip(images[i : i + 1], CAPTIONS[i : i + 1]) for i in range(6)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(clip(images, CAPTIONS), together)


def test_long_captions_are_cut_counted_and_told_of_once(clip, images):
    with pytest.warns(UserWarning, match=f"more than the {MAX_TOKENS} tokens that CLIP reads.*'a cat on a red") as told:
        clip(images, CAPTIONS)
        clip(images[:2], [f"{CAPTIONS[4]} and more"] * 2)
    assert clip.num_cut == 3 and len(told) == 1
    clip(images[:1], ["x" * (MAX_TOKENS - 2)])  # with the tokens that begin and end it, it just fits
    assert clip.num_cut == 3
    assert torch.equal(*clip(images[[0, 0]], [CAPTIONS[4], f"{CAPTIONS[4]} and more"]))


def test_it_is_frozen(clip):
    assert not clip.state_dict() and not list(clip.parameters())
    assert not any(weight.requires_grad for weight in clip.network.parameters())


def on_rank(rank, path, clip, images):
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{path}/store", rank=rank, world_size=2)
    mean = MeanOverImages()
    mean.update(clip(images[rank * 4 :][:4], CAPTIONS[rank * 4 :][:4]))
    torch.save(mean.compute(), f"{path}/{rank}.pt")
    distributed.destroy_process_group()


def test_two_processes_equal_one(clip, images, tmp_path):
    multiprocessing.start_processes(on_rank, (str(tmp_path), clip, images), nprocs=2, start_method="fork")
    one = MeanOverImages()
    one.update(clip(images, CAPTIONS))
    for rank in range(2):
        torch.testing.assert_close(torch.load(tmp_path / f"{rank}.pt"), one.compute(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("lacks", "reason"),
    [
        ("config.json", "Unrecognized model"),
        ("tokenizer.json", "its tokenizer is missing"),
        ("preprocessor_config.json", "Can't load image processor"),
        ("model.safetensors", "Error no file named model.safetensors"),
    ],
)
def test_what_a_folder_lacks_is_told_in_one_line(folder, tmp_path, lacks, reason):
    shutil.copytree(folder, tmp_path / "clip")
    (tmp_path / "clip" / lacks).unlink()
    with pytest.raises(ValueError, match=f"^name: '.*' can't be loaded as a CLIP of transformers: {reason}") as error:
        CLIP(str(tmp_path / "clip"))
    assert "\n" not in str(error.value)


def test_missing_weights_and_other_models_are_refused(folder, tmp_path):
    from safetensors.torch import load_file, save_file
    from transformers import BertConfig

    shutil.copytree(folder, tmp_path / "clip")
    tensors = load_file(tmp_path / "clip/model.safetensors")
    tensors.pop("logit_scale")
    save_file(tensors, tmp_path / "clip/model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"it lacks weights.*logit_scale"):
        CLIP(str(tmp_path / "clip"))
    BertConfig().save_pretrained(tmp_path / "bert")
    with pytest.raises(ValueError, match="can't be loaded as a CLIP of transformers: it is 'bert'"):
        CLIP(str(tmp_path / "bert"))
    with pytest.raises(ValueError, match="name: there is no folder 'nowhere'"):
        CLIP("nowhere")
