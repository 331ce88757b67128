"""The training step: what it changes, and what it leaves alone."""

import shutil
from functools import partial

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from training import changed, repeat, weights

from callbacks.evaluation import rows_of
from vfm_vae.discriminators.augment import DifferentiableAugmentation
from vfm_vae.modules.posterior import DiagonalGaussian

ORDERS = pytest.mark.parametrize("order", ["simultaneous", pytest.param("published", marks=pytest.mark.slow)])


def test_one_batch_overfits(tiny_module, trainer, batch):
    batch = rows_of(batch, slice(2))
    fast = partial(torch.optim.Adam, lr=6e-3, betas=(0.0, 0.99))
    module = tiny_module(objective={"adversarial": 0.01, "alignment": 1.0}, optimizer=fast)

    def error() -> float:
        return module.reconstruct(batch).image.sub(batch.images / 127.5 - 1).abs().mean().item()

    before = error()
    trainer(max_steps=30).fit(module, repeat(batch))  # fewer would do, but for how threads round
    assert error() < 0.6 * before


def test_a_step_trains_both_players_and_no_frozen_network(tiny_module, trainer, batch):
    module = tiny_module()
    frozen = [module.model.vfm, module.discriminator.backbone, module.objective.perceptual_loss.vfm]
    before = weights(module)
    before_frozen = [weights(network.network) for network in frozen]
    trainer(max_steps=2).fit(module, repeat(batch))
    moved = changed(before, module.state_dict())
    assert not any(
        changed(old, network.network.state_dict()) for old, network in zip(before_frozen, frozen, strict=True)
    )
    assert not any(network.network.training for network in frozen)
    trained = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    assert trained <= moved
    assert not any("vfm" in name or "backbone" in name for name in before)


def test_the_generator_runs_once_per_step(tiny_module, trainer, batch):
    module = tiny_module()
    calls = []
    module.model.decoder.register_forward_hook(lambda *_: calls.append("decoder"))
    module.model.vfm.register_forward_hook(lambda *_: calls.append("vfm"))
    trainer(max_steps=3).fit(module, repeat(batch))
    assert sorted(calls) == ["decoder"] * 3 + ["vfm"] * 3


def test_global_step_and_images_count_batches_once(tiny_module, trainer, batch):
    module = tiny_module()
    run = trainer(max_steps=3)
    run.fit(module, repeat(batch))
    assert run.global_step == 3
    assert module.images_seen == 24


def test_a_stage_ends_by_images_seen(tiny_module, trainer, batch):
    module = tiny_module(max_images=24)
    run = trainer()
    run.fit(module, repeat(batch))
    assert run.global_step == 3


def test_accumulation_steps_at_the_end_of_a_group(tiny_module, trainer, batch):
    module = tiny_module(accumulate_grad_batches=2)
    history = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            history.append((trainer.global_step, pl_module.model.adapter.last_encoding_weight.detach().clone()))

    trainer(max_steps=2, callbacks=[Watch()]).fit(module, repeat(batch))
    assert [step for step, _ in history] == [0, 1, 1, 2]
    assert torch.equal(history[1][1], history[2][1])
    assert not torch.equal(history[0][1], history[1][1])


@ORDERS
def test_an_epoch_ends_with_a_step_of_what_is_left(tiny_module, trainer, batch, order):
    module = tiny_module(accumulate_grad_batches=2, order=order)
    run = trainer(max_epochs=1, limit_train_batches=3)
    run.fit(module, repeat(batch))
    assert run.global_step == 2 and module.images_seen == 3 * len(batch.images)


@ORDERS
def test_a_step_is_the_mean_over_its_batches(tiny_module, trainer, batch, monkeypatch, order):
    """A step of two batches alike goes as far as one of either; SGD's, which does not forgive a factor as Adam does."""
    sgd = partial(torch.optim.SGD, lr=1e-4)
    lengths = {}
    for count in (1, 2):
        module = tiny_module(
            {"alignment": 0.0}, order=order, accumulate_grad_batches=count, optimizer=sgd, discriminator_optimizer=sgd,
            equivariance=None,
        )  # fmt: skip
        module.discriminator.augmentation = DifferentiableAugmentation(0, 0, 0, 0, 0)
        monkeypatch.setattr(DiagonalGaussian, "sample", lambda posterior, noise=None: posterior.mode())
        before = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
        trainer(max_steps=1).fit(module, repeat(batch))
        moved = {name: (parameter - before[name]).norm() for name, parameter in module.named_parameters()}
        for player in ("model.", "discriminator."):
            lengths[player, count] = sum(length**2 for name, length in moved.items() if name.startswith(player)) ** 0.5
    for player in ("model.", "discriminator."):
        assert lengths[player, 1] > 0 and 0.9 < lengths[player, 2] / lengths[player, 1] < 1.1


def test_gradients_are_clipped(tiny_module, trainer, batch):
    module = tiny_module(gradient_clip_val=1e-3)
    norms = []

    class Watch(Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            norms.append(torch.nn.utils.get_total_norm(gradients).item())

    trainer(max_steps=2, callbacks=[Watch()]).fit(module, repeat(batch))
    assert norms and all(norm <= 1.001e-3 for norm in norms)


@pytest.mark.gpu
@pytest.mark.timeout(900)  # compilers take minutes
def test_compiled_training_in_bfloat16_follows_eager_training(tiny_module, data, tmp_path):
    class Watch(Callback):
        def __init__(self):
            self.losses = []

        def on_train_batch_end(self, trainer, *_):
            self.losses.append(trainer.callback_metrics["train/loss_l1"].item())

    means = []
    for compiled in (False, True):
        torch.manual_seed(0)
        module, watch = tiny_module(torch_compile=compiled, objective={"adversarial": 0.0}), Watch()
        Trainer(
            accelerator="gpu", devices=1, precision="bf16-mixed", max_steps=200, log_every_n_steps=1, logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, callbacks=[watch],
            default_root_dir=tmp_path, limit_val_batches=0,
        ).fit(module, datamodule=data())  # fmt: skip
        means.append(sum(watch.losses) / len(watch.losses))
    assert len(watch.losses) == 200 and means[1] == pytest.approx(means[0], rel=0.01)


@ORDERS
def test_backward_passes_know_no_autocast(tiny_module, trainer, batch, order):
    """Or gradients of what was computed in float32 would be products in bfloat16."""
    module, seen = tiny_module(order=order, objective={"perceptual": 0.1, "alignment": 1.0}), set()

    def watch(place):
        return lambda gradient: seen.add((place, torch.is_autocast_enabled("cpu")))

    class Watch(Callback):
        def on_train_start(self, trainer, pl_module):
            pl_module.model.adapter.last_encoding_weight.register_hook(watch("adapter"))
            pl_module.discriminator.heads[0].cls.weight_orig.register_hook(watch("discriminator"))
            pl_module.model.decoder.blocks[0].to_rgb.register_full_backward_hook(lambda *_: watch("decoder")(None))

    perceptual = module.objective.perceptual_loss.forward

    def watched(images, target):
        images.register_hook(watch("perceptual"))
        return perceptual(images, target)

    module.objective.perceptual_loss.forward = watched
    trainer(max_steps=1, precision="bf16-mixed", callbacks=[Watch()]).fit(module, repeat(batch))
    assert seen == {(place, False) for place in ("adapter", "discriminator", "decoder", "perceptual")}


def test_an_unknown_order_is_refused(tiny_module):
    with pytest.raises(ValueError, match="order: 'simultaneous' or 'published', given 'Published'"):
        tiny_module(order="Published")


def test_bf16_mixed_keeps_losses_and_weights_finite(tiny_module, trainer, batch):
    module = tiny_module()
    trainer(max_steps=3, precision="bf16-mixed").fit(module, repeat(batch))
    assert module.guard.num_skipped == 0
    assert all(parameter.dtype == torch.float32 and parameter.isfinite().all() for parameter in module.parameters())


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="on the CPU, torch.compile needs a C++ compiler")
def test_a_compiled_decoder_gives_the_same_gradients_under_the_same_names(tiny_module, trainer, batch):
    plain, compiled = tiny_module(), tiny_module(torch_compile=True)
    names = list(compiled.state_dict())
    trainer(max_steps=2).fit(compiled, repeat(batch))
    assert all(layer.compiled for block in compiled.model.decoder.blocks for layer in block.layers)
    assert list(compiled.state_dict()) == names and compiled.guard.num_skipped == 0

    plain.load_state_dict(compiled.state_dict())
    latent = torch.randn(2, 16, 8, 8)
    for module in (plain, compiled):
        module.zero_grad()
        decoded = module.model.decoder(latent)
        sum(image.square().mean() for image in (decoded.image, *decoded.multiscale)).backward()
    expected = dict(plain.model.decoder.named_parameters())
    for name, parameter in compiled.model.decoder.named_parameters():
        scale = expected[name].grad.abs().max()
        assert torch.allclose(parameter.grad, expected[name].grad, atol=1e-4 * scale), name
