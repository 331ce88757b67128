"""Text encoders of transformers: small random ones, against what the library itself computes."""

import copy
import json
import pickle
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_clip import MAX_TOKENS, write_clip
from tiny_readers import DEPTH, READERS, WIDTH, Readers, tokenizer
from tiny_towers import library

from vfm_vae import transformers_text
from vfm_vae.description import describe
from vfm_vae.pretrained import build
from vfm_vae.text import TextEncoder
from vfm_vae.transformers_text import TransformersText

slow = partial(pytest.param, marks=pytest.mark.slow)
CPU = torch.device("cpu")
CAPTIONS = ["a red fox in the snow", "", "the sun", "a blue fox in the snow, in the sun and in the snow"]
LENGTH = {"siglip": 24, "bert": 24}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return Readers(tmp_path_factory.mktemp("readers"))


@pytest.fixture(scope="module")
def qwen(folder):
    """A text encoder that has read its weights, in float32."""
    encoder = TransformersText(folder("qwen2_5_vl"), precision="float32")
    encoder.tokens(["a fox"], CPU)
    return encoder


def exact(name, **options):
    return TransformersText(name, **{"precision": "float32"} | options)


def conversation(name, caption):
    """The library's own tokens of a caption as a user's message."""
    from transformers import AutoTokenizer

    said, options = [{"role": "user", "content": caption}], {"add_generation_prompt": True, "return_tensors": "pt"}
    return AutoTokenizer.from_pretrained(name).apply_chat_template(said, return_dict=True, **options).input_ids


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_qwens_embeddings_are_those_of_the_whole_model(folder, precision):
    from transformers import AutoModel

    name, caption = folder("qwen2_5_vl"), CAPTIONS[0]
    network = AutoModel.from_pretrained(name, dtype=precision).eval()
    with torch.no_grad():
        found = network(input_ids=conversation(name, caption), output_hidden_states=True)
    for layer in (-1, 0, 1, -2):
        (tokens,) = TransformersText(name, layer=layer, precision=precision).tokens([caption], CPU)
        wanted = found.last_hidden_state if layer == -1 else found.hidden_states[layer]
        assert tokens.dtype == torch.bfloat16 and not tokens.requires_grad
        assert torch.equal(tokens, wanted[0].to(torch.bfloat16))


def own_text_part(kind, name):
    """The part that reads, as the library makes it."""
    import transformers

    if kind == "t5":
        return transformers.T5EncoderModel.from_pretrained(name).eval()
    network = library(name)
    return {"siglip": "text_model", "clip": "text_model", "gemma3": "language_model"}.get(kind, ""), network


@pytest.mark.parametrize("kind", ["t5", "llama", "clip", slow("bert"), slow("siglip"), slow("gemma3")])
def test_others_are_the_librarys_too(folder, kind, tmp_path):
    from transformers import AutoTokenizer

    name = write_clip(tmp_path / "clip") if kind == "clip" else folder(kind)
    made = own_text_part(kind, name)
    network = made if kind == "t5" else made[1].get_submodule(made[0])
    inputs = AutoTokenizer.from_pretrained(name)("a fox", return_tensors="pt").input_ids
    with torch.no_grad():
        found = network(input_ids=inputs, output_hidden_states=True)
    for layer, wanted in ((-1, found.last_hidden_state), (1, found.hidden_states[1])):
        encoder = exact(name, layer=layer, max_tokens=MAX_TOKENS)
        assert torch.equal(encoder.tokens(["a fox"], CPU)[0], wanted[0].to(torch.bfloat16))
    assert encoder.width == WIDTH and not any("vision" in part or "decoder" in part for part in weights_of(encoder))


def weights_of(encoder):
    return [name for name, _ in encoder._network.named_parameters()]


@pytest.mark.parametrize(
    "kind", ["qwen2_5_vl", "t5", *(slow(kind) for kind in READERS if kind not in ("qwen2_5_vl", "t5"))]
)
def test_captions_do_not_see_their_neighbours(folder, kind, monkeypatch):
    encoder = exact(folder(kind), max_tokens=LENGTH.get(kind, 64))
    together, one_by_one = encoder.encode(CAPTIONS), encoder.encode(CAPTIONS, together=False)
    monkeypatch.setattr(transformers_text, "TOGETHER", 2)
    in_parts = encoder.tokens(CAPTIONS, CPU)
    for row, caption in enumerate(CAPTIONS):
        (alone,) = encoder.tokens([caption], CPU)
        assert len(alone) == encoder.count([caption])[0] == together.mask[row].sum()
        torch.testing.assert_close(together.embeddings[row, : len(alone)], alone, rtol=0.01, atol=0.01)
        torch.testing.assert_close(in_parts[row], alone, rtol=0.01, atol=0.01)
        assert torch.equal(one_by_one.embeddings[row, : len(alone)], alone)
    assert not together.embeddings[~together.mask].any()
    assert torch.equal(together.empty, encoder.tokens([""], CPU)[0]) and len(together.empty) >= 1


def test_only_the_files_with_the_part_that_reads_are_read(folder):
    place = Path(folder("qwen2_5_vl", "in_parts", shards="10KB"))
    files = json.loads((place / "model.safetensors.index.json").read_text())["weight_map"]
    wanted = {file for name, file in files.items() if "visual." not in name}
    assert len(wanted) > 1 and set(files.values()) - wanted
    for file in set(files.values()) - wanted:
        (place / file).write_bytes(b"")
    encoder, whole = exact(str(place)), exact(folder("qwen2_5_vl"))
    assert torch.equal(encoder.tokens(["a fox"], CPU)[0], whole.tokens(["a fox"], CPU)[0])
    assert not any("visual" in name for name in weights_of(encoder)) and encoder.fingerprint() == whole.fingerprint()


def test_published_names_and_configs_of_qwen_are_known(folder, qwen):
    place = folder.copy("qwen2_5_vl", "published")
    tensors = load_file(place / "model.safetensors")
    save_file(
        {name.replace("language_model.", "model."): x for name, x in tensors.items()}, place / "model.safetensors"
    )
    config = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps(config.pop("text_config") | config | {"model_type": "qwen2_5_vl"}))
    assert torch.equal(exact(str(place)).tokens(["a fox"], CPU)[0], qwen.tokens(["a fox"], CPU)[0])


def test_nothing_but_the_config_is_read_until_it_is_needed(folder, monkeypatch):
    place = folder.copy("qwen2_5_vl", "lazy")
    monkeypatch.setattr(transformers_text, "load_part", lambda *_: pytest.fail("read weights"))
    for file in place.iterdir():
        if file.name != "config.json":
            file.unlink()
    encoder = exact(str(place))
    assert encoder.width == WIDTH and encoder.source()["fingerprint"] is None and not encoder.is_loaded
    assert type(build(TextEncoder, describe(encoder))) is TransformersText
    tokenizer().save_pretrained(place)
    assert encoder.count(["a fox", ""]) == [2, 1] and not encoder.is_loaded


def test_copies_share_weights_and_other_processes_read_their_own(qwen):
    assert copy.deepcopy(torch.nn.ModuleDict({}).__dict__ | {"encoder": qwen})["encoder"] is qwen
    sent = pickle.dumps(qwen)
    other = pickle.loads(sent)
    assert len(sent) < 10_000 and not other.is_loaded and other.arguments == qwen.arguments
    assert torch.equal(other.tokens(CAPTIONS[:1], CPU)[0], qwen.tokens(CAPTIONS[:1], CPU)[0])


def test_what_is_around_does_not_matter_and_nothing_is_left_behind(folder, qwen):
    encoder, expected = exact(folder("qwen2_5_vl")), qwen.encode(CAPTIONS)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        encoder.tokens(CAPTIONS[:1], CPU)
        found = encoder.encode(CAPTIONS)
    assert torch.equal(found.embeddings, expected.embeddings) and not found.empty.is_inference()
    assert not any(weight.is_inference() or weight.requires_grad for weight in encoder._network.parameters())
    assert not any(module.training for module in encoder._network.modules())


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
def test_cuda_gives_the_same_in_the_precision_asked_for(qwen, precision):
    expected, place = qwen.encode(CAPTIONS), torch.device("cuda")
    encoder = TransformersText(qwen.name, precision=precision)
    with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16):
        found = encoder.encode(CAPTIONS, place)
    assert found.embeddings.device.type == found.empty.device.type == "cuda"
    assert {weight.dtype for weight in encoder._network.parameters()} == {getattr(torch, precision)}
    assert encoder.fingerprint() == TransformersText(qwen.name, precision=precision).fingerprint()
    error = (found.embeddings.cpu().float() - expected.embeddings.float()).norm() / expected.embeddings.float().norm()
    assert error < (0.005 if precision == "float32" else 0.1)
    (again,) = encoder.tokens(CAPTIONS[:1], CPU)  # weights move to where they are asked for
    torch.testing.assert_close(again, found.embeddings[0, : len(again)].cpu(), rtol=0.1, atol=0.1)


def test_what_is_not_used_may_lack_and_no_random_numbers_are_drawn_for_it(folder):
    place = folder.copy("bert", "without_pooler")
    tensors = load_file(place / "model.safetensors")
    save_file({name: x for name, x in tensors.items() if "pooler" not in name}, place / "model.safetensors")
    before = torch.get_rng_state()
    encoder, whole = exact(str(place), max_tokens=24), exact(folder("bert"), max_tokens=24)
    assert torch.equal(encoder.tokens(CAPTIONS[:1], CPU)[0], whole.tokens(CAPTIONS[:1], CPU)[0])
    assert torch.equal(torch.get_rng_state(), before) and encoder.fingerprint() == whole.fingerprint()


def test_long_captions_are_cut_within_and_told_of_once(folder):
    name, fits, longer = folder("qwen2_5_vl"), "snow snow", "snow snow snow snow"
    length, more = exact(name).count([fits, longer])
    encoder = exact(name, max_tokens=length)
    assert encoder.count([fits, longer]) == [length, more] and more > length
    with pytest.warns(UserWarning, match=rf"^max_tokens: a caption has more than {length} tokens, .* 'snow sn") as told:
        batch = encoder.encode([longer, fits, f"{longer} snow"])
    assert len(told) == 1 and encoder.num_cut == 2
    assert all(torch.equal(batch.embeddings[row], batch.embeddings[1]) for row in (0, 2))
    with_end = exact(folder("t5"))
    length = with_end.count([fits])[0]
    with pytest.warns(UserWarning, match="max_tokens"):
        cut, whole = exact(with_end.name, max_tokens=length).tokens([longer, fits], CPU)
    assert torch.equal(cut, whole) and torch.equal(whole, with_end.tokens([fits], CPU)[0])


def test_the_template_is_an_option(folder, qwen):
    plain = exact(folder("qwen2_5_vl"), template=False)
    assert plain.count(["a fox"]) == [2] and qwen.count(["a fox"])[0] > 12
    with pytest.raises(ValueError, match=r"^template: the tokenizer of '.*llama' has no chat template; leave the"):
        exact(folder("llama"), template=True).count(["a"])
    listing = folder.copy("qwen2_5_vl", "listing")
    parts = "Help.{% for part in messages[0].content if part.type == 'text' %}<s>{{ part.text }}{% endfor %}"
    tokenizer(parts).save_pretrained(listing)
    counted = exact(str(listing)).count(["", "a fox", "Help."])  # the template's own word, too
    assert counted == [counted[0], counted[0] + 2, 2 * counted[0] - 1]  # its text but for <s>
    assert exact(str(listing)).fingerprint() != qwen.fingerprint()  # although the weights are the same


def test_identity_is_of_weights_and_tokens(folder, qwen):
    source = json.loads(json.dumps(qwen.source()))
    assert source["class_path"] == "vfm_vae.transformers_text.TransformersText"
    same = exact(str(folder.copy("qwen2_5_vl", "same")))
    assert same.fingerprint() == qwen.fingerprint() == source["fingerprint"] and same.is_loaded
    assert same.identity() == qwen.identity()
    other = exact(folder("qwen2_5_vl", "other", seed=1))
    assert other.fingerprint() != qwen.fingerprint()
    assert TransformersText(qwen.name).fingerprint() != qwen.fingerprint()  # whose weights are rounded
    weights = exact(qwen.name, weights=f"{other.name}/model.safetensors")
    assert weights.identity() == other.identity()


def test_mistakes_are_told_in_a_line(folder, tmp_path):
    def refused(message, name=None, **options):
        with pytest.raises(ValueError, match=message) as told:
            exact(name or folder("qwen2_5_vl"), **options).tokens(["a fox"], CPU)
        assert "\n" not in str(told.value)

    refused(r"^name: there is no folder 'qwen'; on the Hugging Face hub it would be owner/model$", "qwen")
    refused(r"^name: '.*' has no config.json of transformers'", str(tmp_path))
    refused(r"^layer: .*qwen2_5_vl has no layer 3; its 2 blocks give layers 0 to 2 and -3 to -1$", layer=DEPTH + 1)
    refused(r"^max_tokens: must be at least 1, given 0$", max_tokens=0)
    refused(
        r"^max_tokens: 9 leave no room for captions: .* has \d+ tokens .* give at least \d+, or template: f",
        max_tokens=9,
    )
    refused(r"^precision: one of 'bfloat16', 'float32', given 'half'$", precision="half")
    refused(r"^max_tokens: .*bert reads at most 24 tokens, given 256$", folder("bert"))
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    refused(r"^name: '.*' is a 'vit', of which transformers makes no text encoder; choose another, for", str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "bart"}')
    refused(r"^name: '.*' is a 'bart', of which", str(tmp_path))
    place = folder.copy("llama", "without_weights")
    (place / "model.safetensors").unlink()
    refused(r"^name: '.*without_weights' holds no model.safetensors; give a file with its weights as `w", str(place))
    (place / "tokenizer.json").write_text("{}")
    refused(r"^name: '.*' holds no tokenizer that transformers can read \(\w+: ", str(place))
    (place / "tokenizer.json").unlink()
    refused(r"^name: '.*without_weights' holds no tokenizer; save one there with its save_pretrained$", str(place))
    tensors = load_file(f"{folder('llama')}/model.safetensors")
    save_file({name: x for name, x in tensors.items() if name != "norm.weight"}, tmp_path / "lacking.safetensors")
    lacks = r"^weights: '.*' does not hold the weights of '.*llama': of 20 tensors 1 missing \['norm.weight'\]$"
    refused(lacks, folder("llama"), weights=str(tmp_path / "lacking.safetensors"))
