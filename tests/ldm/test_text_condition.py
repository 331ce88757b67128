"""Texts as conditions, where they come from, and what is refused before anything is computed."""

import copy
import json

import pytest
import torch
from captioned import LENGTH, WIDTH, Pooling, cached, captioner, words, write_captioned

from callbacks.probe import ClassAccuracyCallback
from ldm.condition import ClassLabels, Labels
from ldm.models.lightningdit import LightningDiT
from ldm.pipeline import LatentDiffusion
from ldm.text import Captions, Text, text_of
from vfm_vae.data.datamodule import ImageNetDataModule
from vfm_vae.data.latents import IDENTITY
from vfm_vae.data.sampling import IndexedNoise
from vfm_vae.text import HashedWords
from vfm_vae.types import Batch, LatentBatch, TextBatch
from vfm_vae.vfm import FrozenVFM

CAT, ROCKET, LONG = "a cat", "a rocket", "a cup of coffee on a small table"


def told(*prompts: str) -> Text:
    return Captions(words()).of_values(prompts)


def batch(text: TextBatch | None, size: int = 2) -> LatentBatch:
    return LatentBatch(torch.zeros(size, 4, 4, 4), torch.zeros(size).long(), torch.arange(size), None, text)


def same(a: Text, b: Text) -> bool:
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in ("embeddings", "mask", "empty"))


def test_rows_of_texts_move_together():
    condition = told(CAT, ROCKET, LONG)
    assert condition.embeddings.shape == (3, LENGTH, WIDTH) and condition.mask.sum(1).tolist() == [3, 3, LENGTH]
    assert condition.plain() == [CAT, ROCKET, LONG] and len(condition) == 3
    for rows in (torch.tensor([2, 0]), torch.tensor([True, False, True]), slice(1, 3)):
        picked = condition[rows]
        assert same(picked, told(*picked.plain()))
    doubled = condition.cat(condition.null())
    assert doubled.plain() == [CAT, ROCKET, LONG, "", "", ""] and same(doubled[:3], condition)
    moved = condition.to("meta")
    assert (
        moved.embeddings.is_meta and moved.mask.is_meta and moved.empty.is_meta and moved.plain() == condition.plain()
    )


def test_null_is_the_embedding_of_the_empty_text():
    assert same(told(CAT, LONG).null(), told("", ""))
    dropped = told(CAT, ROCKET, LONG).drop(torch.tensor([True, False, True]))
    assert same(dropped, told("", ROCKET, ""))
    assert dropped.plain() == [None] * 3  # to tell which, one would have to look
    assert Captions(words()).of_samples(torch.arange(2), IndexedNoise("sample", 0, torch.arange(2))).plain() == ["", ""]


def test_of_a_batch_it_is_the_captions_cached_or_not():
    conditioning, embedded = Captions(words()), words().encode([CAT, LONG])
    plain = conditioning.of_batch(batch(TextBatch((CAT, LONG))))
    assert same(plain, told(CAT, LONG)) and plain.embeddings.dtype == torch.float32
    conditioning.text_encoder.tokens = None  # which is not asked
    assert same(conditioning.of_batch(batch(embedded)), plain)
    assert same(conditioning.of_evaluation(batch(embedded)), plain)
    assert same(conditioning.null_of_batch(batch(embedded)), told("", ""))
    assert conditioning.of_evaluation(batch(None)) is None
    with pytest.raises(ValueError, match=r"^data\.captions: the denoiser is told captions, but the data has none"):
        conditioning.of_batch(batch(None))
    assert same(Captions(words()).null_of_batch(batch(None)), told("", ""))


def test_the_empty_text_is_embedded_once():
    conditioning = Captions(words())
    encoder, seen = conditioning.text_encoder, []
    tokens = encoder.tokens
    encoder.tokens = lambda captions, device: seen.extend(captions) or tokens(captions, device)
    with torch.inference_mode():  # what was made in it would not serve training
        conditioning.null_of_batch(batch(None))
    for _ in range(3):
        conditioning.of_batch(batch(TextBatch((CAT, ROCKET)))).null()
    assert seen == ["", *[CAT, ROCKET] * 3]
    assert not encoder.empty().is_inference()


def test_prompts_are_embedded_one_by_one_and_captions_together():
    conditioning, asked = Captions(encoder := words()), []
    tokens = encoder.tokens
    encoder.tokens = lambda captions, device: asked.append(list(captions)) or tokens(captions, device)
    batch = Batch(torch.zeros(2, 3, 0, 0), torch.zeros(2), torch.arange(2), TextBatch((CAT, "a dog")))
    found = [conditioning.of_batch(batch), conditioning.of_evaluation(batch), conditioning.of_values([CAT, "a dog"])]
    assert asked == [[""], [CAT, "a dog"], [CAT], ["a dog"], [CAT], ["a dog"]]
    assert all(torch.equal(text.embeddings, found[0].embeddings) for text in found)


def test_the_encoder_is_no_part_of_the_model_and_copies_share_it():
    module = captioner()
    assert not [name for name in module.state_dict() if "condition" in name]
    assert [*module.conditioning.parameters()] == [*module.conditioning.buffers()] == []
    twin = copy.deepcopy(module)
    assert twin.conditioning is not module.conditioning
    assert twin.conditioning.text_encoder is module.conditioning.text_encoder
    module.to("meta")  # the device that prompts are embedded on
    seen = []
    encode = module.conditioning.text_encoder.encode
    module.conditioning.text_encoder.encode = lambda prompts, device, together: seen.append(device) or encode(prompts)
    module.pipeline.condition([CAT])
    assert seen == [torch.device("meta")]


@pytest.mark.parametrize("values", [[], [0], torch.tensor([1]), [CAT, None], 3])
def test_what_is_no_prompt_is_refused(values):
    with pytest.raises(ValueError, match=r"^prompts: give at least one text, given ") as raised:
        Captions(words()).of_values(values)
    assert "\n" not in str(raised.value)
    assert Captions(words()).of_values(CAT).plain() == [CAT]


def test_a_denoiser_of_texts_takes_nothing_else():
    with pytest.raises(ValueError, match=r"model\.conditioning: gives Labels, but the denoiser takes texts"):
        text_of(Labels(torch.tensor([1]), 3))


CLASSES = {"in_channels": 4, "input_size": 4, "depth": 1, "width": 16, "num_heads": 2}


@pytest.mark.parametrize(
    ("model", "conditioning", "message"),
    [
        (
            lambda: Pooling(12),
            lambda: Captions(words()),
            "model.text_channels: Pooling takes texts of 12 channels, but the encoder of Captions gives 8; set it to 8",
        ),
        (
            lambda: LightningDiT(**CLASSES, num_classes=3),
            lambda: Captions(words()),
            "model.conditioning: Captions gives texts, but LightningDiT takes none; leave it null, or give another "
            "denoiser",
        ),
        (
            lambda: Pooling(),
            lambda: ClassLabels(3),
            "model.conditioning: Pooling takes texts, but ClassLabels gives none; give ldm.text.Captions with a text "
            "encoder",
        ),
        (
            lambda: Pooling(),
            lambda: None,
            "model.conditioning: Pooling knows no classes; give ldm.text.Captions with a text encoder, as it takes "
            "texts",
        ),
    ],
)
def test_a_denoiser_and_its_conditioning_that_do_not_fit_are_named(model, conditioning, message):
    with pytest.raises(ValueError) as raised:
        LatentDiffusion(model(), conditioning=conditioning())
    assert str(raised.value) == message


def test_label_mode_has_nothing_to_choose():
    with pytest.raises(ValueError, match=r"model\.label_mode: 'balanced' would change nothing"):
        captioner(label_mode="balanced")


def edit(root, **changes):
    """Changes what a cache says of its text encoder."""
    for split in ("train", "val"):
        file = root / split / IDENTITY
        source = json.loads(file.read_text())["text"]
        arguments = {name: changes.pop(name) for name in [*changes] if name in source["init_args"]}
        source["init_args"] |= arguments
        file.write_text(json.dumps({"text": source | changes}))
        changes |= arguments


@pytest.fixture
def root(tmp_path):
    return write_captioned(tmp_path / "cache", words(), (8, 5))


@pytest.mark.parametrize(
    ("changes", "encoder", "message"),
    [
        ({}, {"width": 12}, r"another text encoder than hashed_words at hand: its width is 8, here 12; give that one"),
        ({}, {"max_tokens": 7}, "its max_tokens is 6, here 7"),
        ({"class_path": "some.Other"}, {}, "its class_path is 'some.Other', here 'vfm_vae.text.HashedWords'"),
        ({"fingerprint": "0" * 64}, {}, "its fingerprint is '0000"),
    ],
)
def test_a_cache_of_another_text_encoder_is_refused(root, trainer, changes, encoder, message):
    edit(root, **changes)
    with pytest.raises(ValueError, match=message) as raised:
        trainer(max_steps=1).fit(captioner(encoder=words(**encoder)), datamodule=cached(root))
    assert str(raised.value).startswith(f"data.root: the latents in '{root}/train' have captions of another")
    assert "\n" not in str(raised.value)


def test_a_cache_that_does_not_say_whose_texts_it_holds_is_compared_by_sizes(root, trainer):
    for split in ("train", "val"):
        (root / split / IDENTITY).unlink()
    trainer(max_steps=1).fit(captioner(), datamodule=cached(root))
    with pytest.raises(ValueError, match=r"captions of \(6, 8\) \(tokens at most, channels\), but hashed_words gives"):
        trainer(max_steps=1).fit(captioner(encoder=words(width=12)), datamodule=cached(root))


def test_data_without_captions_is_refused(cache, photos, trainer):
    with pytest.raises(ValueError, match=r"data\.root: the latents in '.*train' come without captions, .*LatentWriter"):
        trainer(max_steps=1).fit(captioner(), datamodule=cached(cache))
    images = ImageNetDataModule(photos, image_size=64, batch_size=8, num_workers=0)
    with pytest.raises(ValueError, match=r"data\.captions: the denoiser is told captions, but the data comes without"):
        trainer(max_steps=1).fit(captioner(), datamodule=images)


def test_a_probe_of_classes_is_not_for_samples_of_texts(root, photos, trainer):
    probe = ClassAccuracyCallback(str(photos / "train"), FrozenVFM("vit_photos_patch8_64"), image_size=64)
    with pytest.raises(ValueError, match=r"has 13 classes, but samples are of none; leave ClassAccuracyCallback out$"):
        trainer(callbacks=[probe], max_steps=1).fit(captioner(), datamodule=cached(root))


def test_a_model_of_classes_trains_on_data_with_captions(root, diffusion, trainer):
    trainer(max_steps=1).fit(diffusion(), datamodule=cached(root))


class Moved(HashedWords):
    """Words whose weights lie somewhere, and are read when a caption is embedded."""

    def __init__(self, name: str = "here", weights: str = "a", width: int = WIDTH, max_tokens: int = LENGTH):
        super().__init__(width, max_tokens)
        self.name, self.weights, self.is_read = name, weights, False

    @property
    def is_loaded(self) -> bool:
        return self.is_read

    def fingerprint(self) -> str:
        self.is_read = True
        return self.weights * 64

    whereabouts = frozenset({"name", "weights"})


def test_an_encoder_from_elsewhere_goes_on_if_its_weights_are_the_same():
    known = {**Moved("here").source(), "fingerprint": "a" * 64}
    for encoder in (Moved("there"), Moved("there")):
        encoder.go_on_as(known, "x", "y")
        assert encoder.encode([CAT]).captions == (CAT,)
    other = Moved("there", "b")
    other.fingerprint()
    with pytest.raises(ValueError, match=r"^x another text encoder than there at hand: its fingerprint is 'aaaa.*; y$"):
        other.go_on_as(known, "x", "y")
    with pytest.raises(
        ValueError, match=r"^x another text encoder than there at hand: its name is 'here', here 'there"
    ):
        Moved("there").go_on_as(known | {"fingerprint": None}, "x", "y")  # there is nothing else to tell it by


def test_weights_are_compared_with_those_of_the_cache_when_they_are_read():
    source = {**Moved(weights="b").source(), "fingerprint": "a" * 64}
    encoder = Moved(weights="b")
    encoder.go_on_as(source, "x", "y")
    assert encoder.source() == source and not encoder.is_loaded  # it is known unread, and so can be noted
    for _ in range(2):
        with pytest.raises(
            ValueError, match=r"model\.conditioning\.encoder: the weights of here are others than those"
        ):
            encoder.encode([CAT])


def test_images_on_a_batch_of_prompts_are_told_of():
    prompts = Batch(torch.empty(2, 3, 0, 0), torch.full((2,), -1), torch.arange(2), TextBatch((CAT, LONG)))
    assert Captions(words()).of_evaluation(prompts).plain() == [CAT, LONG]
