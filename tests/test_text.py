"""Text encoders: the one that hashes words, and what all share."""

import copy
from collections.abc import Sequence

import pytest
import torch
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from vfm_vae.description import describe
from vfm_vae.pretrained import build
from vfm_vae.text import HashedWords, TextEncoder, words_of

CPU = torch.device("cpu")
FOX = [[0.996, 0.264, 2.531, 2.312], [1.016, 0.229, 2.062, -0.332]]  # of the token in front, and of the word


class Counting(TextEncoder):
    """Embeds captions by their length, and notes which it was asked for."""

    name, width, max_tokens = "counting", 2, 3

    def __init__(self) -> None:
        self.asked: list[list[str]] = []

    def tokens(self, captions: Sequence[str], device: torch.device) -> list[Tensor]:
        self.asked.append(list(captions))
        return [torch.full((1, 2), float(len(caption)), dtype=torch.bfloat16, device=device) for caption in captions]

    def count(self, captions: Sequence[str]) -> list[int]:
        return [1] * len(captions)

    def fingerprint(self) -> str:
        return "none"


def test_equal_captions_are_embedded_once_and_the_empty_one_once_and_for_all():
    encoder = Counting()
    batch = encoder.encode(["ab", "", "abc", "ab"])
    assert batch.captions == ("ab", "", "abc", "ab") and batch.embeddings[:, 0, 0].tolist() == [2, 0, 3, 2]
    assert encoder.asked == [[""], ["ab", "abc"]] and batch.mask.sum(1).tolist() == [1] * 4
    assert encoder.encode([""]).embeddings.shape == (1, 3, 2)
    alone = encoder.encode(["ab", "", "abc", "ab"], together=False)
    assert encoder.asked[2:] == [["ab"], ["abc"]] and torch.equal(alone.embeddings, batch.embeddings)
    assert torch.equal(encoder.empty(), batch.empty)


def test_what_is_made_in_inference_mode_can_be_trained_on():
    encoder, weight = HashedWords(), torch.ones(1, requires_grad=True)
    with torch.inference_mode():
        encoder.encode(["a fox"])
    (encoder.empty() * weight).sum().backward()
    assert not encoder.empty().is_inference() and weight.grad is not None


def test_equal_words_are_alike_wherever_they_stand_and_others_are_not():
    encoder = HashedWords(width=256)
    first, second, other = encoder.tokens(["A red fox.", "fox, a red!", "a blue fox"], CPU)
    assert encoder.count(["A red fox.", ""]) == [4, 1] and first.shape == (4, 256) and first.dtype == torch.bfloat16
    alike = torch.nn.functional.cosine_similarity(first[:, None].float(), second.float(), dim=2)
    assert alike.argmax(1).tolist() == [0, 2, 3, 1]
    assert torch.equal(first[0], other[0]) and torch.equal(first[3], other[3])
    assert not torch.equal(first[2], other[2]) and not torch.equal(first[3], second[1])  # by word, by position


def test_its_vectors_are_fixed():
    """Others than these would make caches and checkpoints of former versions useless."""
    (found,) = HashedWords(width=4).tokens(["fox"], CPU)
    torch.testing.assert_close(found.float(), torch.tensor(FOX), rtol=0, atol=0.01)
    state = torch.get_rng_state()
    assert torch.equal(HashedWords(width=4).tokens(["fox"], CPU)[0], found)
    assert torch.equal(torch.get_rng_state(), state)


def test_long_captions_are_cut_counted_and_told_of_once():
    encoder = HashedWords(max_tokens=3)
    with pytest.warns(
        UserWarning, match=r"^max_tokens: a caption has more than 3 tokens, .*: 'one two three'…"
    ) as told:
        batch = encoder.encode(["one two three", "one two", "one two four", "one"])
    assert len(told) == 1 and encoder.num_cut == 2 and batch.mask.sum(1).tolist() == [3, 3, 3, 2]
    assert torch.equal(batch.embeddings[0], batch.embeddings[1]) and not batch.embeddings[3, 2].any()
    assert encoder.count(["one two three"]) == [4]


def test_any_rank_tells_of_a_caption_that_is_cut(monkeypatch):
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    with pytest.warns(UserWarning, match=r"^max_tokens: a caption has more than 3 tokens"):
        HashedWords(max_tokens=3).tokens(["one two three"], CPU)


def test_copies_share_and_descriptions_make_it_again():
    encoder = HashedWords(width=8, max_tokens=5)
    assert copy.deepcopy(encoder) is encoder and encoder.is_loaded
    again = build(TextEncoder, describe(encoder))
    assert isinstance(again, HashedWords) and again.identity() == encoder.identity()
    assert HashedWords(width=10).fingerprint() != encoder.fingerprint()
    assert encoder.source() == {**describe(encoder), "fingerprint": encoder.fingerprint()}


def test_words():
    assert words_of("A Fox's tail, at 7: déjà-vu…") == ["a", "fox", "s", "tail", "at", "7", "déjà", "vu"]
    with pytest.raises(ValueError, match=r"^width: an even number, for sines and cosines, given 7$"):
        HashedWords(width=7)
