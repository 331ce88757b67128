"""Autoguidance: what its partner computes, where it comes from, and what it must have in common with the denoiser."""

import copy
import shutil
from functools import partial

import pytest
import torch
from torch.nn.utils import parameters_to_vector

from callbacks.ema import EMA
from ldm.condition import Labels
from ldm.guidance import Autoguidance, Guidance
from ldm.models.lightningdit import LightningDiT
from ldm.models.sit import SiT
from ldm.pipeline import LatentDiffusion
from ldm.samplers import Dopri5, Euler, EulerMaruyama, Heun
from vfm_vae.compilation import is_compiled
from vfm_vae.data.latents import LatentStatistics

SOURCE = {"tokenizer": "MyVAE", "vfm": None, "channels": 4, "compression": 8, "fingerprint": "a" * 64}
SIZES = {"in_channels": 4, "input_size": 4, "depth": 1, "width": 32, "num_heads": 2, "num_classes": 3}


def denoiser(kind=LightningDiT, seed=0, **options):
    torch.manual_seed(seed)
    model = kind(**SIZES | options)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def diffusion_of(network, guidance=None, sampler=None, mean=0.0):
    model = LatentDiffusion(network, sampler or Euler(5), guidance).eval()
    shape = 1, network.in_channels, 1, 1
    model.normalization.take(LatentStatistics(torch.full(shape, mean), torch.ones(shape)))
    model.latent_source = dict(SOURCE)
    return model


@pytest.fixture
def weak(tmp_path):
    """Saves a weaker model; returns it, and its folder."""

    def save(network=None, name="weak", source=SOURCE, **options):
        model = diffusion_of(network or denoiser(width=16, seed=1), **options)
        model.latent_source = source
        model.save_pretrained(tmp_path / name)
        return model.model, str(tmp_path / name)

    return save


@pytest.fixture
def fitted(trainer, tmp_path):
    def fit(module, data):
        run = trainer(max_steps=2, limit_val_batches=0, callbacks=[EMA(decay=0.5)])
        run.fit(module, datamodule=data)
        run.save_checkpoint(tmp_path / "weak.ckpt")
        return tmp_path / "weak.ckpt"

    return fit


def rows_of(network):
    """A list that grows with the number of rows in each pass through a network."""
    rows = []
    network.register_forward_pre_hook(lambda module, given: rows.append(len(given[0])))
    return rows


@pytest.mark.parametrize(("t", "guided"), [(0.1, False), (0.2, True), (0.7, True), (0.75, False)])
def test_the_partner_is_asked_inside_the_interval_only(weak, t, guided):
    partner, folder = weak()
    strong, state = denoiser(), torch.randn(2, 4, 4, 4)
    guidance = Autoguidance(folder, 1.42, start=0.2, end=0.7)
    asked = rows_of(strong), rows_of(guidance.partner.on(state.device))
    condition, times = Labels(torch.tensor([0, 2]), 3), torch.full((2,), t)
    with torch.no_grad():
        velocity = guidance.field(strong, condition)(state, torch.tensor(t))
        assert asked == ([2], [2] if guided else [])
        f, g = (network(state, times, condition).velocity for network in (strong, partner))
    assert torch.allclose(velocity, g + 1.42 * (f - g) if guided else f, atol=1e-6)


@pytest.mark.parametrize("sampler", [Euler(5, shift=0.3), Heun(4), Dopri5(), EulerMaruyama(5)], ids=type)
def test_a_partner_of_the_same_weights_changes_nothing(weak, sampler):
    network, folder = weak(denoiser())
    guided = diffusion_of(network, Autoguidance(folder, 3.0), sampler).sample([0, 1, 2], seed=2).latents
    plain = diffusion_of(network, None, sampler).sample([0, 1, 2], seed=2).latents
    assert torch.allclose(guided, plain, atol=1e-5)


@pytest.mark.parametrize(
    "network",
    [
        partial(denoiser, width=16, num_heads=1),
        partial(denoiser, SiT, depth=2, cls_channels=0, align_channels=0, seed=1),
        partial(denoiser, predicts="data", base_depth=1, align_channels=8, align_depth=1, seed=1),
    ],
)
@pytest.mark.parametrize("sampler", [Euler(5), EulerMaruyama(4)], ids=type)
def test_a_partner_may_be_of_another_class_size_and_target(weak, network, sampler):
    _, folder = weak(network())
    model = diffusion_of(denoiser(), Autoguidance(folder, 2.0), sampler)
    latents = model.sample([0, 1]).latents
    assert not torch.allclose(latents, model.sample([0, 1], guidance_scale=1.0).latents, atol=1e-2)


def test_a_class_token_is_guided_by_its_partner(weak):
    token = {"cls_channels": 6, "align_channels": 6, "align_depth": 1}
    _, folder = weak(denoiser(SiT, width=16, seed=1, **token))
    strong = denoiser(SiT, **token)
    drawn = [
        diffusion_of(strong, Autoguidance(folder, 1.5, cls_scale=scale), EulerMaruyama(4)).sample([0, 1]).latents
        for scale in (0.0, 3.0)
    ]
    assert not torch.allclose(*drawn, atol=1e-3)
    without = diffusion_of(strong, Autoguidance(weak(name="other")[1], 1.5))
    with pytest.raises(ValueError, match=r"other' predicts latents of \(4, 4, 4\) .* but the denoiser .* token of 6;"):
        without.sample([0])


def test_classifier_free_guidance_on_top_asks_the_partner_for_both_halves_in_its_own_interval(weak):
    _, folder = weak()
    strong, state = denoiser(), torch.randn(2, 4, 4, 4)
    inner = Autoguidance(folder, 1.42, start=0.3, end=0.7)
    field = Guidance(2.0, start=0.5, inner=inner).field(strong, Labels(torch.tensor([0, 2]), 3))
    asked = rows_of(strong), rows_of(inner.partner.on(state.device))
    for t in (0.2, 0.4, 0.6, 0.8):
        field(state, torch.tensor(t))
    assert asked == ([2, 2, 4, 4], [2, 4])


def test_at_scale_one_there_need_be_no_partner(tmp_path):
    model = diffusion_of(denoiser(), Autoguidance(str(tmp_path / "nowhere"), 1.5))
    plain = diffusion_of(denoiser()).sample([0, 1]).latents
    assert torch.equal(model.sample([0, 1], guidance_scale=1.0).latents, plain)
    model.guidance = model.guidance.with_scale(1.0)
    assert torch.equal(model.sample([0, 1]).latents, plain)
    assert model.settings()["guidance"]["partner"] is None


def test_a_folder_names_its_partner_and_misses_it_only_when_it_samples(weak, tmp_path):
    _, folder = weak()
    model = diffusion_of(denoiser(), Autoguidance(folder, 1.42, end=0.9))
    model.save_pretrained(tmp_path / "model")
    loaded = LatentDiffusion.from_pretrained(tmp_path / "model")
    assert torch.equal(loaded.sample([0, 1]).latents, model.sample([0, 1]).latents)
    shutil.rmtree(folder)
    loaded = LatentDiffusion.from_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=r"^guidance\.partner: there is no folder '.*weak'; on the Hugging Face hub"):
        loaded.sample([0, 1])


def test_a_checkpoint_of_guided_training_names_its_partner_and_holds_nothing_of_it(
    fitted, diffusion, latents, tmp_path
):
    weak = fitted(diffusion({"width": 16}), latents()).rename(tmp_path / "partner.ckpt")
    guided = diffusion(guidance=Autoguidance(str(weak), 1.42))
    stored, plain = (torch.load(fitted(module, latents()), weights_only=True) for module in (guided, diffusion()))
    guidance = stored["config"]["model"]["init_args"]["guidance"]
    assert guidance["class_path"] == "ldm.guidance.Autoguidance" and guidance["init_args"]["partner"] == str(weak)
    assert stored["state_dict"].keys() == plain["state_dict"].keys()
    assert all(torch.equal(tensor, plain["state_dict"][name]) for name, tensor in stored["state_dict"].items())
    assert stored["ema"]["weights"].keys() == plain["ema"]["weights"].keys()


def test_a_checkpoint_gives_its_averaged_weights(fitted, diffusion, latents):
    path = fitted(diffusion(), latents())
    partner = Autoguidance(str(path)).partner.on(torch.device("cpu"))
    averaged = LatentDiffusion.from_checkpoint(path).model
    assert torch.equal(parameters_to_vector(partner.parameters()), parameters_to_vector(averaged.parameters()))
    trained = torch.load(path, weights_only=True)["state_dict"]["model.final.out.weight"]
    assert not torch.equal(partner.final.out.weight, trained)


class Harmful:
    def __reduce__(self):
        return print, ("run",)


def test_nothing_is_unpickled_but_tensors_and_plain_data(tmp_path):
    torch.save({"state_dict": {}, "tokenizer": Harmful()}, tmp_path / "bad.ckpt")
    with pytest.raises(ValueError, match=r"^guidance\.partner: '.*bad\.ckpt' is refused: reading it would run code"):
        diffusion_of(denoiser(), Autoguidance(str(tmp_path / "bad.ckpt"), 1.5)).sample([0])


OTHER_VAE = SOURCE | {"fingerprint": "b" * 64}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"network": partial(denoiser, input_size=8)},
            r"predicts latents of \(4, 8, 8\) \(channels, rows, columns\), but",
        ),
        ({"network": partial(denoiser, num_classes=5)}, "is told one of 5 classes, but the denoiser one of 3 classes;"),
        ({"source": OTHER_VAE}, r"was trained on latents of another tokenizer \(MyVAE, b{12}…\) than was expected"),
        ({"mean": 2.0}, "was trained on latents with clearly different means or deviations"),
    ],
)
def test_a_partner_that_does_not_fit_is_refused(weak, options, message):
    _, folder = weak(**options | {"network": options.get("network", denoiser)()})
    for guidance in (Autoguidance(folder, 1.5), Guidance(2.0, inner=Autoguidance(folder, 1.5))):
        with pytest.raises(ValueError, match=rf"^guidance\.partner: .*{message}"):
            diffusion_of(denoiser(), guidance).sample([0])


def test_a_run_is_no_partner_but_its_checkpoint_is(tmp_path):
    with pytest.raises(ValueError, match=r"^guidance\.partner: '.*' holds no config.json; give a checkpoint, such as"):
        diffusion_of(denoiser(), Autoguidance(str(tmp_path), 1.5)).sample([0])


def test_a_tokenizer_is_no_partner(tiny_model, tmp_path):
    tiny_model().save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(
        ValueError, match=r"^guidance\.partner: '.*tokenizer' holds a .*VFMVAE, and no diffusion model$"
    ):
        diffusion_of(denoiser(), Autoguidance(str(tmp_path / "tokenizer"), 1.5)).sample([0])


def test_a_missing_partner_ends_training_before_it_begins(diffusion, latents, trainer, tmp_path):
    module = diffusion(guidance=Autoguidance(str(tmp_path / "weak.ckpt"), 1.5))
    with pytest.raises(ValueError, match=r"^guidance\.partner: there is no checkpoint '.*weak\.ckpt'"):
        trainer(max_steps=1).fit(module, datamodule=latents())
    assert module.images_seen == 0


def test_a_partner_of_other_latents_ends_training_before_it_begins(weak, diffusion, latents, trainer):
    """Which tokenizer's they are, only the data knows."""
    _, folder = weak(source=OTHER_VAE)
    module = diffusion(guidance=Autoguidance(folder, 1.5))
    with pytest.raises(ValueError, match=r"^guidance\.partner: .* was trained on latents"):
        trainer(max_steps=1).fit(module, datamodule=latents())
    assert module.images_seen == 0


def test_a_partner_is_no_part_of_the_module(weak, diffusion):
    _, folder = weak()
    plain, module = diffusion(), diffusion(guidance=Autoguidance(folder, 1.5))
    partner = module.pipeline.guidance.partner.on(torch.device("cpu"))
    assert module.state_dict().keys() == plain.state_dict().keys()
    assert len(list(module.modules())) == len(list(plain.modules()))
    assert not partner.training and not any(parameter.requires_grad for parameter in partner.parameters())
    module.train()
    assert not partner.training


def test_a_partner_is_read_once_for_all_copies_and_scales(weak):
    _, folder = weak()
    model = diffusion_of(denoiser(), Autoguidance(folder, 1.5))
    partner = model.guidance.partner.on(torch.device("cpu"))
    shutil.rmtree(folder)
    others = [copy.deepcopy(model).guidance, model.guidance.with_scale(3.0), model.guidance.with_interval(0.1, 0.2)]
    assert all(other.partner.on(torch.device("cpu")) is partner for other in others)
    assert [other.scale for other in others] == [1.5, 3.0, 1.5]


def test_reading_a_partner_draws_no_random_numbers(weak):
    _, folder = weak()
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    Autoguidance(folder).partner.on(torch.device("cpu"))
    assert torch.equal(torch.rand(4), expected)


def test_a_partner_that_was_read_while_predicting_serves_outside_of_it(weak):
    _, folder = weak()
    model = diffusion_of(denoiser(), Autoguidance(folder, 1.5))
    with torch.inference_mode():
        expected = model.sample([0, 1]).latents
    state = torch.randn(1, 4, 4, 4, requires_grad=True)
    field = model.guidance.field(model.model, Labels(torch.tensor([0]), 3))
    field(state, torch.tensor(0.5)).sum().backward()
    assert torch.equal(model.sample([0, 1]).latents, expected)


def test_settings_of_samples_know_a_partner_by_its_weights(weak, tmp_path):
    _, folder = weak()
    shutil.copytree(folder, tmp_path / "moved")
    _, other = weak(denoiser(width=16, seed=2), name="other")
    here, moved, another = (
        diffusion_of(denoiser(), Autoguidance(place, 1.5)).settings()
        for place in (folder, str(tmp_path / "moved"), other)
    )
    assert here == moved
    assert here != another and {**here, "guidance": None} == {**another, "guidance": None}
    assert here["guidance"]["class"] == "Autoguidance" and len(here["guidance"]["partner"]) == 64


@pytest.mark.parametrize("read_first", [False, True])
def test_a_partner_is_compiled_with_the_denoiser(weak, read_first):
    _, folder = weak()
    model = diffusion_of(denoiser(), Guidance(2.0, inner=Autoguidance(folder, 1.5)))
    partner = model.guidance.inner.partner
    if read_first:
        partner.on(torch.device("cpu"))
    model.compile_regions()
    assert all(is_compiled(block) for block in partner.on(torch.device("cpu")).blocks)
