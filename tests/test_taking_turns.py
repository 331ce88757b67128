"""The published order of a step: the discriminators from a forward of their own, then the generator against them."""

from functools import partial

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.optim import Adam
from training import changed, repeat, weights

from callbacks.evaluation import rows_of
from callbacks.throughput import Throughput
from vfm_vae.discriminators.patchgan import PatchGAN
from vfm_vae.modules.equivariance import EquivarianceRegularizer


class Events:
    """What happens in training, in order: decoder passes, with or without gradients, and steps of the two players."""

    def __init__(self, build, **kwargs):
        self.seen: list[str] = []
        optimizers = {name: self._optimizer(name) for name in ("optimizer", "discriminator_optimizer")}
        self.module = build(order="published", **optimizers, **kwargs)
        decoder = self.module.model.decoder
        decoder.register_forward_hook(lambda *_: self.seen.append("learn" if torch.is_grad_enabled() else "show"))

    def _optimizer(self, name):
        def make(parameters):
            optimizer = Adam(parameters, lr=1e-3)
            optimizer.register_step_post_hook(lambda *_: self.seen.append(name))
            return optimizer

        return make


@pytest.mark.parametrize("accumulate", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_the_discriminators_step_before_the_generator_runs_again(tiny_module, trainer, batch, accumulate):
    events = Events(tiny_module, accumulate_grad_batches=accumulate)
    run = trainer(max_steps=2)
    run.fit(events.module, repeat(batch))
    step = ["show"] * accumulate + ["discriminator_optimizer"] + ["learn"] * accumulate + ["optimizer"]
    assert events.seen == 2 * step
    assert run.global_step == 2
    assert events.module.images_seen == 2 * accumulate * len(batch.images)


def test_what_a_run_left_amid_a_step_is_not_learnt_by_the_next(tiny_module, trainer, batch):
    events = Events(tiny_module, accumulate_grad_batches=3, max_images=16)
    trainer(max_steps=1).fit(events.module, repeat(batch))
    events.module.max_images, events.seen = -1, []
    trainer(max_steps=1).fit(events.module, repeat(batch))
    assert events.seen == ["show"] * 3 + ["discriminator_optimizer"] + ["learn"] * 3 + ["optimizer"]


def test_both_players_learn_and_nothing_else(tiny_module, trainer, batch):
    module = tiny_module(order="published")
    before = weights(module)
    trainer(max_steps=4).fit(module, repeat(batch))
    trained = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    assert trained <= changed(before, module.state_dict())


def test_the_generator_learns_from_every_accumulated_batch(tiny_module, trainer, data):
    """The gradient of a step is the mean over its batches, whatever is done with the discriminators between."""
    plain = {"probability": 0.0, "prior_probability": 0.0}
    still = partial(torch.optim.SGD, lr=0.0)
    norms = {}
    for accumulate in (1, 2):
        objective = {"adversarial": 0.0, "alignment": 0.0, "kl": 0.0, "perceptual": 0.0}
        module = tiny_module(
            objective, order="published", accumulate_grad_batches=accumulate, optimizer=still,
            discriminator_optimizer=still, equivariance=EquivarianceRegularizer(**plain),
        )  # fmt: skip
        module.model.encode_features = partial(_mode, module.model.encode_features)
        gradients = []

        class Watch(Callback):
            def on_before_optimizer_step(self, trainer, pl_module, optimizer, gradients=gradients):
                gradients.append(pl_module.model.decoder.mapping.out.weight.grad.clone())

        steps = {"limit_train_batches": 2, "max_epochs": 1, "limit_val_batches": 0, "callbacks": [Watch()]}
        trainer(**steps).fit(module, datamodule=data())
        norms[accumulate] = gradients
    assert [len(gradients) for gradients in norms.values()] == [2, 1]
    torch.testing.assert_close(sum(norms[1]) / 2, norms[2][0], rtol=1e-4, atol=1e-7)


def _mode(encode, *args):
    posterior = encode(*args)
    posterior.sample = posterior.mode
    return posterior


def test_each_phase_draws_its_own_transform(tiny_module, trainer, batch):
    asked = []

    class Draws(EquivarianceRegularizer):
        def draw(self, images_seen, latent_grid, **kwargs):
            asked.append((images_seen, kwargs["phase"], kwargs["rank"]))
            return super().draw(images_seen, latent_grid, **kwargs)

    module = tiny_module(order="published", accumulate_grad_batches=2, equivariance=Draws())
    trainer(max_steps=1).fit(module, repeat(batch))
    discriminator, generator = ([(seen, phase, 0) for seen in (0, 8)] for phase in ("discriminator", "generator"))
    assert asked == discriminator + generator


def test_the_generator_s_turn_keeps_nothing_of_real_patches(tiny_module, trainer, batch):
    objective = {"adversarial_patch": 0.1, "feature_matching": 0.1}
    kept = {}
    for order in ("simultaneous", "published"):
        module, passes = tiny_module(objective, patchgan=PatchGAN(base_channels=4), order=order), []
        module.patchgan.register_forward_hook(lambda *args, seen=passes: seen.append(args[-1][0][0].requires_grad))
        trainer(max_steps=1).fit(module, repeat(batch))
        kept[order] = passes
    assert kept["simultaneous"] == [True] * 3  # real ones, for both; generated ones, for either
    assert kept["published"] == [True, True, False, True]  # the discriminators' turn, then the generator's


def test_operations_are_counted_over_whole_steps(tiny_module, trainer, batch):
    """The batches that make one cost differently: the generator learns from all of them at the last."""
    still = EquivarianceRegularizer(probability=0.0, prior_probability=0.0)
    counts = []
    for accumulate in (1, 2):
        module = tiny_module(order="published", accumulate_grad_batches=accumulate, equivariance=still)
        trainer(max_steps=2, callbacks=[Throughput(count_batches=1)]).fit(module, repeat(rows_of(batch, slice(2))))
        counts.append(module.flops_per_batch)
    assert counts[0] == counts[1] > 0


def test_a_refused_discriminator_keeps_the_generator_from_stepping(tiny_module, trainer, batch):
    class Poison(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            head = pl_module.discriminator.heads[0]
            self.handle = head.register_forward_hook(lambda *args: args[-1] * float("nan"))

        def on_train_batch_end(self, *_):
            self.handle.remove()

    module = tiny_module(order="published")
    before = weights(module)
    trainer(callbacks=[Poison()], limit_train_batches=1, max_epochs=1).fit(module, repeat(batch))
    learned = {name for name, _ in module.named_parameters()}
    assert not changed(before, module.state_dict()) & learned
    assert module.guard.num_skipped == 1


@pytest.mark.slow
def test_resumed_equals_uninterrupted_in_the_published_order(tiny_module, trainer, data, tmp_path):
    build = partial(tiny_module, order="published", accumulate_grad_batches=2)
    checkpoint = ModelCheckpoint(tmp_path, every_n_train_steps=2, save_last=True)
    trainer(max_steps=2, enable_checkpointing=True, callbacks=[checkpoint]).fit(build(), datamodule=data())
    whole, resumed, other = build(), build(), tiny_module(accumulate_grad_batches=2)
    trainer(max_steps=4).fit(whole, datamodule=data())
    trainer(max_steps=4).fit(resumed, datamodule=data(), ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    trainer(max_steps=4).fit(other, datamodule=data())
    assert not changed(whole.state_dict(), resumed.state_dict())
    assert changed(whole.state_dict(), other.state_dict())
    assert resumed.images_seen == whole.images_seen == 64
