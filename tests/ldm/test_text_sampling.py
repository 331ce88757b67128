"""Samples of prompts: what they depend on, and what folders, checkpoints and partners of such models say."""

import json

import pytest
import torch
from captioned import WIDTH, Pooling, cached, captioner, words, write_captioned
from test_text_condition import CAT, LONG, ROCKET, Moved, told

from ldm.guidance import Autoguidance, Guidance
from ldm.models.lightningdit import LightningDiT
from ldm.models.text_lightningdit import TextLightningDiT
from ldm.pipeline import LatentDiffusion
from ldm.samplers import Euler
from ldm.text import Captions
from vfm_vae.data.latents import LatentStatistics
from vfm_vae.types import Batch, Samples, TextBatch

PROMPTS = [CAT, ROCKET, LONG, ""]


def trained(network) -> LatentDiffusion:
    """As after training: no weight is zero, and latents have statistics."""
    torch.manual_seed(0)
    conditioning = None if network.num_classes else Captions(words())
    model = LatentDiffusion(network, Euler(6), Guidance(2.0, start=0.3, end=0.8), conditioning).eval()
    for parameter in network.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.normalization.take(LatentStatistics(torch.randn(1, 4, 1, 1), 1 + torch.rand(1, 4, 1, 1)))
    return model


def transformer() -> TextLightningDiT:
    return TextLightningDiT(WIDTH, 4, 4, depth=2, width=32, num_heads=2)


@pytest.fixture
def model() -> LatentDiffusion:
    return trained(Pooling())


@pytest.mark.parametrize("network", [Pooling, transformer], ids=["pooling", "lightningdit"])
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_a_sample_depends_on_seed_number_and_prompt_alone(network, scale):
    model = trained(network())
    latents = model.sample(prompts=PROMPTS, seed=3, guidance_scale=scale).latents
    order = torch.tensor([2, 0, 3, 1])
    moved = model.sample(prompts=[PROMPTS[i] for i in order], seed=3, guidance_scale=scale, index=order).latents
    assert torch.allclose(moved, latents[order], atol=1e-5)
    alone = model.sample(prompts=[LONG], seed=3, guidance_scale=scale, index=torch.tensor([2])).latents
    assert torch.allclose(alone[0], latents[2], atol=1e-5)
    for options in ({"seed": 4}, {"index": torch.tensor([3])}, {"prompts": [CAT]}):
        given = {"prompts": [LONG], "seed": 3, "guidance_scale": scale, "index": torch.tensor([2])} | options
        assert (model.sample(**given).latents - alone).abs().max() > 1e-3


def test_guidance_leads_away_from_the_empty_prompt_inside_its_interval(model):
    seen, field = [], model.guidance.field(model.model, told(CAT, LONG))
    forward = model.model.forward
    model.model.forward = lambda *args, **kwargs: seen.append(args) or forward(*args, **kwargs)
    state = torch.randn(2, 4, 4, 4)
    for time, rows in ((0.2, 2), (0.3, 4), (0.8, 4), (0.9, 2)):
        seen.clear()
        velocity = field(state, torch.tensor(time))
        ((_, _, condition),) = seen
        assert len(condition) == rows and condition.plain() == [CAT, LONG, "", ""][:rows]
        given, none = (
            forward(state, torch.full((2,), time), told(*texts)).velocity for texts in ((CAT, LONG), ("", ""))
        )
        assert torch.allclose(velocity, none + 2.0 * (given - none) if rows == 4 else given, atol=1e-5)


def test_no_more_is_computed_than_guidance_takes(model):
    """Six points make five updates, of which three are guided."""
    sizes = []
    model.model.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    model.sample(prompts=[CAT, ROCKET, LONG])
    assert sorted(sizes) == [3, 3, 6, 6, 6]


def test_captions_that_are_embedded_already_are_drawn_without_the_encoder(model):
    """As in a validation on a cache."""
    expected = model.sample(prompts=[CAT, LONG]).latents
    model.conditioning.text_encoder.tokens = model.conditioning.text_encoder.empty = None
    assert torch.equal(model.sample(told(CAT, LONG)).latents, expected)


def test_the_module_draws_what_the_pipeline_samples(model):
    module = captioner(model.model, sampler=model.sampler, guidance=model.guidance)
    module.normalization.take(LatentStatistics(model.normalization.mean, model.normalization.std))
    index = torch.tensor([5, 7, 8])
    expected = model.sample(prompts=PROMPTS[:3], seed=1, index=index)
    assert expected.condition.plain() == PROMPTS[:3]
    assert torch.equal(module.draw(index, PROMPTS[:3], decode=False).latents, expected.latents)
    prompts = Batch(torch.empty(3, 3, 0, 0), torch.full((3,), -1), index, TextBatch(tuple(PROMPTS[:3])))
    predicted = module.predict_step(prompts, 0)
    assert torch.equal(predicted.latents, expected.latents) and predicted.condition.plain() == PROMPTS[:3]
    nothing = module.draw(index, decode=False)  # of whatever there is
    assert torch.equal(nothing.latents, model.sample(prompts=[""] * 3, seed=1, index=index).latents)


def test_equal_numbers_of_other_captions_are_other_samples():
    """As callbacks may ask for that look at different parts of a batch."""
    module, drawn = captioner(), []

    def draw(index, condition):
        drawn.append(condition.plain())
        return Samples(torch.zeros(len(index), 3, 4, 4), torch.zeros(len(index), 4, 4, 4), condition, index)

    module.draw = draw
    nothing, index = torch.empty(2, 3, 0, 0), torch.arange(2)
    for prompts in ((CAT, ROCKET), (CAT, LONG), (CAT, LONG)):
        module.evaluation_images(Batch(nothing, index, index, TextBatch(prompts)))
    assert drawn == [[CAT, ROCKET], [CAT, LONG]]


def test_either_labels_or_prompts_are_given(model):
    of_classes = trained(LightningDiT(4, 4, depth=1, width=32, num_heads=2, num_classes=3))
    for given in ({}, {"labels": [0], "prompts": [CAT]}):
        with pytest.raises(ValueError, match=r"^labels, prompts: give one of the two"):
            model.sample(**given)
    with pytest.raises(
        ValueError, match=r"^prompts: this model takes none, as it is conditioned on 3 classes; give la"
    ):
        of_classes.sample(prompts=[CAT])
    with pytest.raises(ValueError, match=r"^prompts: give at least one text, given \[0\]"):
        model.sample([0])
    assert torch.equal(model.sample([CAT]).latents, model.sample(prompts=[CAT]).latents)


@pytest.mark.parametrize("command", ["test", "predict"])
def test_prompts_are_not_for_models_of_classes(command, diffusion, latents, trainer):
    with pytest.raises(
        ValueError, match=r"data\.prompts \(--prompt\): the model draws samples of 3 classes, and takes no"
    ):
        getattr(trainer(), command)(diffusion(), datamodule=latents(prompts=[CAT]))


def test_a_folder_says_whose_texts_the_model_takes(model, tmp_path):
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["text"] == words().source() and config["text"]["fingerprint"]
    card = (tmp_path / "README.md").read_text()
    assert "conditioned on texts that hashed_words embeds." in card and 'sample(prompts=["a red fox' in card
    loaded = LatentDiffusion.from_pretrained(tmp_path)
    assert loaded.pretrained_config() == model.pretrained_config()
    assert torch.equal(loaded.sample(prompts=PROMPTS).latents, model.sample(prompts=PROMPTS).latents)
    config["text"]["fingerprint"] = "0" * 64
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        ValueError, match=r"name: the model was trained on texts of another text encoder than hashed_wo"
    ):
        LatentDiffusion.from_pretrained(tmp_path)


def test_models_of_classes_say_nothing_of_texts(tmp_path):
    of_classes = trained(LightningDiT(4, 4, depth=1, width=32, num_heads=2, num_classes=3))
    assert of_classes.described().keys() == {"model", "tokenizer"}
    assert of_classes.settings().keys() == {"sampler", "guidance", "label_mode", "tokenizer"}
    assert (
        "conditioned on 3 classes.\n" in of_classes.model_card() and "sample(labels=[0, 1])" in of_classes.model_card()
    )


def test_settings_tell_the_text_encoder_by_its_weights_and_not_by_its_place(model):
    settings = model.settings()
    assert settings["text_encoder"] == {**words().source(), "init_args": {"width": WIDTH, "max_tokens": 6}}
    here, there, other = (LatentDiffusion(Pooling(), conditioning=Captions(Moved(*args))).settings() for args in (
        ("here", "a"), ("there", "a"), ("here", "b")))  # fmt: skip
    assert here == there != other
    unread = Moved("anywhere")
    unread.go_on_as({**Moved("here").source(), "fingerprint": "a" * 64}, "x", "y")
    assert LatentDiffusion(Pooling(), conditioning=Captions(unread)).settings() == here and not unread.is_loaded


def test_a_checkpoint_knows_the_text_encoder_though_its_weights_were_never_read(tmp_path, trainer):
    encoder = Moved("here")
    source = {**encoder.source(), "fingerprint": "a" * 64}
    root = write_captioned(tmp_path / "cache", words(), (8, 5))
    for split in ("train", "val"):
        (root / split / "latents.json").write_text(json.dumps({"text": source}))
    run = trainer(max_steps=1)
    run.fit(captioner(encoder=encoder), datamodule=cached(root))
    assert not encoder.is_loaded
    run.save_checkpoint(tmp_path / "last.ckpt")
    stored = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert stored["config"]["text"] == source and not [name for name in stored["state_dict"] if "cond" in name]

    def go_on(encoder, **options):
        arguments = {"datamodule": cached(root), "ckpt_path": tmp_path / "last.ckpt", "weights_only": True}
        trainer(max_steps=2).fit(captioner(encoder=encoder), **arguments | options)

    for split in ("train", "val"):  # a cache that does not say whose
        (root / split / "latents.json").unlink()
    go_on(Moved("here"))
    other = Moved("there", "b")
    other.fingerprint()
    with pytest.raises(
        ValueError, match=r"^ckpt_path: the checkpoint was trained on texts of another text encoder than"
    ):
        go_on(other)
    begin = captioner(encoder=other, init_from=str(tmp_path / "last.ckpt"))
    with pytest.raises(ValueError, match=r"^init_from: the checkpoint was trained on texts of another .*fingerprint"):
        trainer(max_steps=1).fit(begin, datamodule=cached(root))
    late = Moved("here", "b")
    loaded = captioner(encoder=late)
    trainer().validate(loaded, datamodule=cached(root), ckpt_path=tmp_path / "last.ckpt", verbose=False)
    with pytest.raises(ValueError, match=r"the weights of here are others than those that the cache or the checkpoint"):
        loaded.draw(torch.arange(1), [CAT], decode=False)


def test_a_partner_has_read_the_same_texts(model, tmp_path):
    model.save_pretrained(tmp_path / "weak")
    strong = trained(transformer())
    strong.normalization.take(LatentStatistics(model.normalization.mean, model.normalization.std))
    strong.guidance = Autoguidance(str(tmp_path / "weak"), 1.5)
    guided = strong.sample(prompts=PROMPTS).latents
    assert (guided - strong.sample(prompts=PROMPTS, guidance_scale=1.0).latents).abs().max() > 1e-3
    config = json.loads((tmp_path / "weak/config.json").read_text())
    config["text"]["init_args"]["max_tokens"] = 7
    (tmp_path / "weak/config.json").write_text(json.dumps(config))
    strong.guidance = Autoguidance(str(tmp_path / "weak"), 1.5)
    with pytest.raises(
        ValueError, match=r"weak' was trained on texts of another .* its max_tokens is 7, here 6; give one"
    ):
        strong.sample(prompts=PROMPTS)
    trained(LightningDiT(4, 4, depth=1, width=32, num_heads=2, num_classes=3)).save_pretrained(tmp_path / "classes")
    strong.guidance = Autoguidance(str(tmp_path / "classes"), 1.5)
    with pytest.raises(ValueError, match=r"is told one of 3 classes, but the denoiser ldm\.text\.Captions values"):
        strong.sample(prompts=PROMPTS)
