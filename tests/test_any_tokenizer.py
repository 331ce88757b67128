"""Training of any tokenizer: noised latents, a late GAN, adaptive weights, one opponent, another, or none."""

from functools import partial

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from training import changed, repeat, weights

from callbacks.ema import EMA
from callbacks.evaluation import rows_of
from vfm_vae.conv_vae import ConvVAE
from vfm_vae.discriminators.patchgan import PatchGAN
from vfm_vae.discriminators.projected import ProjectedDiscriminator
from vfm_vae.gan_losses import GANLosses
from vfm_vae.losses.objective import Objective
from vfm_vae.module import TokenizerModule
from vfm_vae.modules.equivariance import EquivarianceRegularizer, Transform
from vfm_vae.modules.latent_noise import noised
from vfm_vae.vfm import FrozenVFM

VFM = "vit_photos_patch8_64"
LOSSES = {"multi_resolution": 0.0, "alignment": 0.0, "adversarial": 0.0}
GAN = {"adversarial": 0.1, "adversarial_patch": 0.1}
ORDERS = pytest.mark.parametrize("order", ["simultaneous", pytest.param("published", marks=pytest.mark.slow)])


def conv_vae(aligned: bool = False) -> ConvVAE:
    """A tokenizer for 64 px images with latents `[B, 4, 8, 8]`."""
    torch.manual_seed(0)
    vfm = FrozenVFM(VFM) if aligned else None
    return ConvVAE(4, [8, 8, 8, 8], num_res_blocks=1, middle_attention=False, norm_groups=4, vfm=vfm)


def patchgan(**options) -> PatchGAN:
    torch.manual_seed(1)
    return PatchGAN(num_scales=1, num_layers=2, base_channels=4, loss="hinge", **options)


def projected() -> ProjectedDiscriminator:
    torch.manual_seed(2)
    return ProjectedDiscriminator(VFM, size=64, layers=(1,))


def module(model: ConvVAE | None = None, objective: dict | None = None, **options) -> TokenizerModule:
    """Trains a small ConvVAE, without opponents unless they are given."""
    adam = partial(torch.optim.Adam, lr=2e-3, betas=(0.5, 0.9))
    given = {"discriminator": None, "discriminator_optimizer": adam, "optimizer": adam}
    return TokenizerModule(model or conv_vae(), objective=Objective(**LOSSES | (objective or {})), **given | options)


class Logged(Callback):
    """What each step logged."""

    def __init__(self):
        self.steps: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer, *_):
        self.steps.append({name: float(value) for name, value in trainer.callback_metrics.items()})
        trainer.callback_metrics.clear()


# Noise on the decoder's input


def test_noise_is_as_strong_as_its_closed_form():
    torch.manual_seed(0)
    noise = noised(torch.zeros(4000, 2, 8, 8), 0.6)
    sigma = noise.flatten(1).std(1)  # of each image
    assert noise.square().mean() == pytest.approx(0.6**2 / 3, rel=0.03)
    assert sigma.max() < 0.6 * 1.3 and (sigma < 0.3).float().mean() == pytest.approx(0.5, abs=0.03)
    assert noise.mean() == pytest.approx(0, abs=0.005)


def test_without_noise_nothing_is_drawn():
    z, before = torch.zeros(2, 4, 8, 8), torch.get_rng_state()
    assert noised(z, 0.0) is z and torch.equal(torch.get_rng_state(), before)


@ORDERS
def test_the_decoder_alone_sees_the_noise_and_in_training_alone(trainer, batch, order, monkeypatch):
    turn = Transform(scale=0.5, quarter_turns=1)

    class Turn(EquivarianceRegularizer):
        def draw(self, *_, **__):
            return turn

    tuned = module(latent_noise=0.8, order=order, equivariance=Turn(), objective={"adversarial": 0.1},
                   discriminator=projected())  # fmt: skip
    seen, clean, before = [], [], []
    monkeypatch.setattr("vfm_vae.module.noised", lambda z, tau: before.append(z.shape[2:]) or noised(z, tau))
    decode, latent = tuned.model.decode, tuned.objective.latent
    tuned.model.decode = lambda z: seen.append(z.detach()) or decode(z)
    tuned.objective.latent = lambda posterior, z, *rest: clean.append(z.detach()) or latent(posterior, z, *rest)
    trainer(max_steps=1).fit(tuned, repeat(batch))
    noise = seen[-1] - turn.latent(clean[0])
    assert len(seen) == (2 if order == "published" else 1) and seen[-1].shape[2:] == (4, 4)
    assert before[-1] == (4, 4)  # the noise comes when the latent is transformed
    assert noise.std() > 0.1 and noise.flatten(1).std(1).max() < 0.8 * 1.5  # of 64 numbers
    seen.clear()
    assert torch.equal(tuned.reconstruct(batch).image, decode(tuned.latents(batch)).image)
    assert torch.equal(seen[0], tuned.latents(batch))


# When the game begins


@ORDERS
def test_discriminators_learn_from_one_image_on_and_the_tokenizer_hears_them_from_another(trainer, batch, order):
    late = module(objective=GAN | {"adversarial_from": 16}, discriminate_from=8, order=order,
                  discriminator=projected(), patchgan=patchgan())  # fmt: skip
    moved, logged = [], Logged()

    class Watch(Callback):
        def on_train_batch_start(self, *_):
            self.before = weights(late)

        def on_train_batch_end(self, *_):
            names = changed(self.before, late.state_dict())
            moved.append({name.split(".")[0] for name in names})

    trainer(max_steps=3, callbacks=[Watch(), logged]).fit(late, repeat(batch))
    assert moved == [{"model"}, {"model", "discriminator", "patchgan"}, {"model", "discriminator", "patchgan"}]
    own, theirs = {"train/loss_adversarial", "train/loss_adversarial_patch"}, {"train/loss_patchgan_real"}
    assert [own <= step.keys() for step in logged.steps] == [False, False, True]
    assert [theirs <= step.keys() for step in logged.steps] == [False, True, True]


@ORDERS
def test_until_then_the_tokenizer_learns_as_if_there_were_none(trainer, batch, order):
    common = {"order": order, "latent_noise": 0.3, "equivariance": EquivarianceRegularizer()}
    alone = module(**common)
    late = module(objective={"adversarial": 0.1, "adversarial_from": 100}, discriminator=projected(), **common)
    soon = module(objective={"adversarial": 0.1, "adversarial_from": 16}, discriminator=projected(), **common)
    for each in (alone, late, soon):
        trainer(max_steps=3).fit(each, repeat(batch))
    assert not changed(weights(alone.model), late.model.state_dict())
    assert changed(weights(alone.model), soon.model.state_dict())


@ORDERS
def test_resumed_equals_uninterrupted_across_both_beginnings(trainer, batch, order, tmp_path):
    def build():
        return module(
            objective=GAN | {"adversarial_from": 24, "adaptive_adversarial": True}, discriminate_from=16,
            latent_noise=0.5, order=order, discriminator=projected(), patchgan=patchgan(),
        )  # fmt: skip

    checkpoint = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    whole = build()
    trainer(max_steps=4, enable_checkpointing=True, callbacks=[checkpoint]).fit(whole, repeat(batch))
    for step in (1, 3):  # before the discriminators learn, and before the tokenizer hears them
        resumed = build()
        path = tmp_path / f"step={step}.ckpt"
        trainer(max_steps=4).fit(resumed, repeat(batch), ckpt_path=path, weights_only=True)
        assert not changed(weights(whole), resumed.state_dict()) and resumed.images_seen == 32


# Adaptive weights


class Toy(nn.Module):
    """Two convolutions, of which the last one's weight balances the losses."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 3, 3, padding=1)

    @property
    def last_decoding_weight(self):
        return self.last.weight

    def forward(self, z):
        return self.last(self.first(z))


def test_the_adaptive_weight_is_the_ratio_of_gradients_at_the_last_weight():
    toy, opponent = Toy(), nn.Conv2d(3, 1, 3)
    image = toy(torch.randn(2, 4, 8, 8))
    rec, adversarial = (image - 1).abs().mean(), -opponent(image).mean()
    expected = [torch.autograd.grad(loss, toy.last.weight, retain_graph=True)[0] for loss in (rec, adversarial)]
    ratio = expected[0].norm() / (expected[1].norm() + 1e-4)

    objective, passed = Objective(adversarial=0.5, adaptive_adversarial=True), []
    toy.first.weight.register_hook(lambda _: passed.append("first"))
    balanced, ratios = objective.balanced({"adversarial": adversarial}, image, toy, rec)
    assert not passed  # the gradients end at the last weight
    assert ratios["adversarial_weight"] == pytest.approx(ratio.item(), rel=1e-5)
    assert balanced["adversarial"].item() == pytest.approx((ratio * adversarial).item(), rel=1e-5)
    (rec + objective.total(balanced)).backward()
    torch.testing.assert_close(toy.last.weight.grad, expected[0] + 0.5 * ratio * expected[1])


@pytest.mark.parametrize(("factor", "expected"), [(0.0, 1e4), (1e9, 0.0)])
def test_the_adaptive_weight_is_limited(factor, expected):
    toy = Toy()
    image = toy(torch.randn(2, 4, 8, 8))
    objective = Objective(adaptive_adversarial=True)
    _, ratios = objective.balanced({"adversarial": factor * image.mean()}, image, toy, 100 * image.square().mean())
    assert ratios["adversarial_weight"] == pytest.approx(expected, abs=1e-3)


def test_features_are_matched_beside_an_adaptive_weight_and_plain_weights_stay():
    toy, opponent = Toy(), patchgan()
    real, image = torch.randn(2, 3, 16, 16), toy(torch.randn(2, 4, 16, 16))
    terms = GANLosses(None, opponent, real).generator_terms(image)
    objective = Objective(adversarial_patch=1.0, feature_matching=1.0, adaptive_adversarial=True)
    balanced, ratios = objective.balanced(terms, image, toy, image.square().mean())
    assert ratios.keys() == {"adversarial_patch_weight"} and balanced["feature_matching"] is terms["feature_matching"]
    objective.total(balanced).backward()
    same, none = Objective(adversarial_patch=1.0).balanced(terms, image, toy, image.mean())
    assert not none and same == terms


def test_the_tokenizer_learns_by_the_adaptive_weight(trainer, batch):
    sgd = partial(torch.optim.SGD, lr=1e-3)
    plain, adaptive = (
        module(objective={"adversarial_patch": 0.1, "adaptive_adversarial": wanted}, patchgan=patchgan(), optimizer=sgd)
        for wanted in (False, True)
    )
    for each in (plain, adaptive):
        trainer(max_steps=1).fit(each, repeat(batch))
    assert "model.decoder.conv_out.weight" in changed(weights(plain), adaptive.state_dict())


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_vfm_vae_takes_an_adaptive_weight(tiny_module, trainer, batch, precision):
    logged = Logged()
    adaptive = tiny_module({"adaptive_adversarial": True})
    trainer(max_steps=1, precision=precision, callbacks=[logged]).fit(adaptive, repeat(batch))
    assert 0 < logged.steps[0]["train/adversarial_weight"] < 1e4 and adaptive.guard.num_skipped == 0


# One opponent, another, or none


def test_a_patchgan_alone_plays_by_hinge_losses():
    opponent, real, generated = patchgan(), torch.randn(2, 3, 32, 32), torch.randn(2, 3, 32, 32)
    losses = GANLosses(None, opponent, real)
    own, theirs = losses.generator_terms(generated), losses.discriminator_terms(generated)
    logits_real, logits_generated = (opponent(images)[0][-1] for images in (real, generated))
    assert own.keys() == {"adversarial_patch", "feature_matching"}
    assert theirs.keys() == {"patchgan_real", "patchgan_generated"}
    assert own["adversarial_patch"].item() == pytest.approx(-logits_generated.mean().item(), abs=1e-6)
    assert theirs["patchgan_real"].item() == pytest.approx((1 - logits_real).relu().mean().item(), abs=1e-6)
    assert theirs["patchgan_generated"].item() == pytest.approx((1 + logits_generated).relu().mean().item(), abs=1e-6)


@ORDERS
@pytest.mark.parametrize("opponent", [None, "patchgan"])
def test_it_trains_against_a_patchgan_alone_or_against_none(trainer, batch, order, opponent, tmp_path):
    def build():
        if opponent is None:
            return module(discriminator_optimizer=None, order=order)
        return module(objective={"adversarial_patch": 0.1}, patchgan=patchgan(), order=order)

    alone, before = build(), weights(build())
    run = trainer(max_steps=2, callbacks=[logged := Logged()])
    run.fit(alone, repeat(batch))
    run.save_checkpoint(path := tmp_path / "two.ckpt")
    assert {name.split(".")[0] for name in changed(before, alone.state_dict())} == {"model", opponent} - {None}
    assert len(run.optimizers) == (1 if opponent is None else 2)
    assert [name for name in logged.steps[0] if "adversarial" in name] == (
        [] if opponent is None else ["train/loss_adversarial_patch"]
    )
    whole, resumed = build(), build()
    trainer(max_steps=3).fit(whole, repeat(batch))
    trainer(max_steps=3).fit(resumed, repeat(batch), ckpt_path=path, weights_only=True)
    assert not changed(weights(whole), resumed.state_dict())


# Alignment of a tokenizer that does not encode with its VFM


def test_a_conv_vae_is_drawn_to_its_vfm(trainer, batch):
    losses = {"alignment": 0.5, "distmat_margin": 0.25, "cos_margin": 0.5}
    aligned, logged = module(conv_vae(aligned=True), losses, optimizer=partial(torch.optim.Adam, lr=1e-2)), Logged()
    trainer(max_steps=20, callbacks=[logged]).fit(aligned, repeat(rows_of(batch, slice(4))))
    first, *_, last = logged.steps
    assert last["train/alignment"] < 0.7 * first["train/alignment"] and last["train/loss_l1"] < first["train/loss_l1"]


def test_a_stage_may_leave_alignment_and_opponents_behind_and_have_them_again(trainer, batch, tmp_path):
    def aligned(**options):
        return module(conv_vae(aligned=True), {"alignment": 0.5, "adversarial": 0.1}, discriminator=projected(),
                      **options)  # fmt: skip

    def stage(start, **options) -> tuple[TokenizerModule, EMA, str]:
        tokenizer, average = start(**options), EMA()
        run = trainer(max_steps=1, callbacks=[average])
        run.fit(tokenizer, repeat(batch))
        run.save_checkpoint(path := tmp_path / f"{tokenizer.images_seen}.ckpt")
        return tokenizer, average, str(path)

    _, _, first = stage(aligned)
    plain, average, second = stage(module, init_from=first)
    assert plain.images_seen == 16 and "model.alignment.weight" not in average.weights
    again, average, _ = stage(aligned, init_from=second)
    assert again.images_seen == 24 and "model.alignment.weight" in average.weights


# Mistakes

MISTAKES = [
    ({"objective": {"adversarial": 1}}, "objective.adversarial: 1 needs a discriminator; give model.discriminator, or"),
    ({"patchgan": PatchGAN(base_channels=4), "discriminator_optimizer": None}, "discriminator_optimizer: discrim"),
    ({"discriminate_from": 8}, "discriminate_from: must be at most objective.adversarial_from=0, .* given 8"),
    ({"latent_noise": -0.1}, "latent_noise: must be at least 0, given -0.1"),
    ({"objective": {"adaptive_adversarial": True}, "train_only": ["encoder"]}, "adaptive_adversarial: .*train_only"),
    ({"objective": {"alignment": 1}}, "objective.alignment: 1 aligns latents to a VFM, but this ConvVAE has none; set"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "message"), MISTAKES)
def test_mistakes_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        module(**options)


def test_mistakes_of_parts_are_named():
    with pytest.raises(ValueError, match="loss: one of 'least_squares', 'hinge', given 'wasserstein'"):
        PatchGAN(loss="wasserstein")
    with pytest.raises(ValueError, match="adaptive_adversarial: there is no reconstruction loss to compare with"):
        Objective(l1=0, adaptive_adversarial=True)
    with pytest.raises(ValueError, match="this Linear has no last_decoding_weight; set it to false"):
        Objective(alignment=0, adaptive_adversarial=True).check_tokenizer(nn.Linear(1, 1))


def test_a_run_that_loses_its_opponents_is_refused(trainer, batch, tmp_path):
    run = trainer(max_steps=1)
    run.fit(module(objective={"adversarial_patch": 0.1}, patchgan=patchgan()), repeat(batch))
    run.save_checkpoint(path := tmp_path / "one.ckpt")
    with pytest.raises(ValueError, match=r"tensors of the generator and \d+ of discriminators .* and 0 from now on"):
        trainer(max_steps=2).fit(module(), repeat(batch), ckpt_path=path, weights_only=True)
