"""The training step: what it changes, what it leaves alone, and that it goes on where it was."""

import copy
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.optim import Adam
from torch.utils._python_dispatch import TorchDispatchMode
from training import changed, repeat, weights

from callbacks.ema import EMA
from vfm_vae.discriminators.augment import DifferentiableAugmentation
from vfm_vae.losses.guard import NonFiniteGuard
from vfm_vae.modules.posterior import DiagonalGaussian
from vfm_vae.types import Batch


def test_one_batch_overfits(tiny_module, trainer, batch):
    batch = Batch(*(part[:2] for part in batch))
    module = tiny_module(objective={"adversarial": 0.01, "alignment": 1.0})

    def error() -> float:
        return module.reconstruct(batch).image.sub(batch.images / 127.5 - 1).abs().mean().item()

    before = error()
    trainer(max_steps=70).fit(module, repeat(batch))  # fewer would do, but for how threads round
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


@pytest.mark.parametrize("order", ["simultaneous", "published"])
def test_an_epoch_ends_with_a_step_of_what_is_left(tiny_module, trainer, batch, order):
    module = tiny_module(accumulate_grad_batches=2, order=order)
    run = trainer(max_epochs=1, limit_train_batches=3)
    run.fit(module, repeat(batch))
    assert run.global_step == 2 and module.images_seen == 3 * len(batch.images)


@pytest.mark.parametrize("order", ["simultaneous", "published"])
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


class Poison(Callback):
    """Makes the adapter's output not finite in given steps."""

    def __init__(self, batches: set[int]):
        self.batches = batches

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.handle = None
        if batch_idx in self.batches:
            self.handle = pl_module.model.adapter.widen.register_forward_hook(lambda *args: args[-1] * float("nan"))

    def on_train_batch_end(self, *_):
        if self.handle is not None:
            self.handle.remove()


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(tiny_module, trainer, batch, accumulate):
    module = tiny_module(accumulate_grad_batches=accumulate)
    before = weights(module)
    run = trainer(callbacks=[Poison({0})], limit_train_batches=accumulate, max_epochs=1)
    run.fit(module, repeat(batch))
    learned = {name for name, _ in module.named_parameters()}
    assert not changed(before, module.state_dict()) & learned
    assert all(tensor.isfinite().all() for tensor in module.state_dict().values())
    assert module.guard.num_skipped == 1
    assert run.global_step == 0
    assert module.images_seen == 8 * accumulate


def test_gradients_that_are_not_finite_are_not_applied(tiny_module, trainer, batch):
    module = tiny_module()
    before = weights(module)
    module.model.decoder.mapping.out.weight.register_hook(lambda gradient: gradient / 0)
    trainer(max_steps=-1, limit_train_batches=2, max_epochs=1).fit(module, repeat(batch))
    learned = {name for name, _ in module.model.named_parameters(prefix="model")}
    assert not changed(before, module.state_dict()) & learned
    assert module.guard.num_skipped == 2


@pytest.mark.parametrize("accumulate", [1, 2])
def test_training_that_can_not_go_on_stops_where_it_logs(tiny_module, trainer, batch, accumulate):
    module = tiny_module(accumulate_grad_batches=accumulate, guard=NonFiniteGuard(max_in_a_row=3))
    with pytest.raises(ValueError, match="the last 4 steps were refused"):
        trainer(callbacks=[Poison(set(range(20)))], log_every_n_steps=2 * accumulate).fit(module, repeat(batch))
    assert module.guard.num_skipped == 4


@pytest.mark.parametrize("fused", [True, False])
def test_a_refused_step_leaves_the_optimisers_states_too(tiny_module, trainer, batch, fused):
    module = tiny_module(**dict.fromkeys(("optimizer", "discriminator_optimizer"), partial(Adam, lr=1e-3, fused=fused)))
    states = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            states.append([copy.deepcopy(optimizer.state_dict()["state"]) for optimizer in trainer.optimizers])

    trainer(callbacks=[Poison({1}), Watch()], limit_train_batches=3, max_epochs=1).fit(module, repeat(batch))
    assert module.guard.num_skipped == 1
    for before, refused, after in zip(*states, strict=True):
        torch.testing.assert_close(refused, before, rtol=0, atol=0)
        assert all(after[name]["step"] == before[name]["step"] + 1 for name in before)


class Waits(TorchDispatchMode):
    """Counts what would make the host wait for a GPU."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return func(*args, **(kwargs or {}))


def test_nothing_in_a_step_waits_for_the_device_but_where_it_logs(tiny_module, trainer, batch, monkeypatch):
    fused = partial(Adam, lr=1e-3, fused=True)
    module = tiny_module(optimizer=fused, discriminator_optimizer=fused, gradient_clip_val=1.0)
    waits, read = [], torch.Tensor.tolist

    def tolist(tensor):  # which a dispatch mode does not see
        watch.mode.count += 1
        return read(tensor)

    class Watch(Callback):
        def on_train_batch_start(self, *_):
            self.mode = Waits()
            self.mode.__enter__()

        def on_train_batch_end(self, *_):
            self.mode.__exit__(None, None, None)
            waits.append(self.mode.count)

    watch = Watch()
    monkeypatch.setattr(torch.Tensor, "tolist", tolist)
    callbacks = [watch, EMA()]
    trainer(callbacks=callbacks, max_steps=6, log_every_n_steps=3).fit(module, repeat(batch))
    assert waits[0] == waits[1] == waits[3] == waits[4] == 0 < waits[2], waits


@pytest.mark.gpu
def test_a_gpu_is_not_waited_for_within_a_step(tiny_module, batch, tmp_path):
    fused = partial(Adam, lr=1e-3, fused=True)
    module = tiny_module(optimizer=fused, discriminator_optimizer=fused)

    class Watch(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            torch.cuda.set_sync_debug_mode("error" if batch_idx in (2, 3) else "default")

        def on_train_batch_end(self, *_):
            torch.cuda.set_sync_debug_mode("default")

    Trainer(
        accelerator="gpu", devices=1, precision="bf16-mixed", max_steps=5, log_every_n_steps=5, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
        callbacks=[Watch(), EMA()],
    ).fit(module, repeat(batch))  # fmt: skip
    assert module.guard.num_skipped == 0


@pytest.mark.gpu
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


def test_training_goes_on_after_a_skipped_step(tiny_module, trainer, batch):
    module = tiny_module(guard=NonFiniteGuard())
    trainer(callbacks=[Poison({1})], limit_train_batches=3, max_epochs=1).fit(module, repeat(batch))
    assert module.guard.num_skipped == 1
    assert all(parameter.isfinite().all() for parameter in module.parameters())


@pytest.fixture
def interrupted(tiny_module, trainer, data, tmp_path) -> Iterator[Path]:
    """Checkpoint of the fourth of six batches of an epoch."""
    checkpoint = ModelCheckpoint(tmp_path / "checkpoints", every_n_train_steps=4, filename="{step}", save_last=True)
    trainer(max_steps=4, enable_checkpointing=True, callbacks=[checkpoint, EMA()]).fit(tiny_module(), datamodule=data())
    yield tmp_path / "checkpoints" / "last.ckpt"


def test_resumed_equals_uninterrupted(tiny_module, trainer, data, interrupted):
    whole, resumed = tiny_module(), tiny_module()
    whole_average, resumed_average = EMA(), EMA()
    trainer(max_steps=8, callbacks=[whole_average]).fit(whole, datamodule=data())
    trainer(max_steps=8, callbacks=[resumed_average]).fit(
        resumed, datamodule=data(), ckpt_path=interrupted, weights_only=True
    )
    assert not changed(whole.state_dict(), resumed.state_dict())
    assert not changed(whole_average.weights, resumed_average.weights)
    assert resumed.images_seen == whole.images_seen == 64


def test_a_kept_alignment_weight_goes_on_where_it_was(tiny_module, trainer, data, tmp_path):
    every = {"objective": {"alignment_every": 3}}
    checkpoint = ModelCheckpoint(tmp_path, every_n_train_steps=4, save_last=True)
    callbacks = {"enable_checkpointing": True, "callbacks": [checkpoint]}
    trainer(max_steps=4, **callbacks).fit(tiny_module(**every), datamodule=data())
    whole, resumed, anew = tiny_module(**every), tiny_module(**every), tiny_module()
    trainer(max_steps=6).fit(whole, datamodule=data())
    trainer(max_steps=6).fit(resumed, datamodule=data(), ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    trainer(max_steps=6).fit(anew, datamodule=data())
    assert not changed(whole.state_dict(), resumed.state_dict())
    assert changed(whole.state_dict(), anew.state_dict())


def test_a_stage_starts_from_the_former_one(tiny_module, trainer, data, interrupted):
    former = torch.load(interrupted, weights_only=True)
    module, average = tiny_module(init_from=str(interrupted)), EMA()
    seen = {}

    class Watch(Callback):
        def on_train_start(self, trainer, pl_module):
            seen["weights"] = weights(pl_module)
            seen["average"] = {name: tensor.clone() for name, tensor in average.weights.items()}
            seen["images"] = pl_module.images_seen
            seen["optimizers"] = [optimizer.state_dict()["state"] for optimizer in trainer.optimizers]

    trainer(max_steps=1, callbacks=[average, Watch()]).fit(module, datamodule=data())
    assert not changed(former["state_dict"], seen["weights"])
    assert not changed(former["ema"]["weights"], seen["average"])
    assert changed(former["ema"]["weights"], former["state_dict"])
    assert seen["images"] == 32
    assert seen["optimizers"] == [{}, {}]
    assert module.images_seen == 40


def test_the_checkpoint_names_the_vfm_and_lacks_its_weights(interrupted, tiny_module):
    checkpoint = torch.load(interrupted, weights_only=True)
    vfm = tiny_module().model.vfm
    identity = {"name": vfm.name, "fingerprint": vfm.fingerprint(), "antialias_positions": False}
    assert checkpoint["vfm"] == identity
    stored = sum(tensor.numel() for tensor in checkpoint["state_dict"].values())
    assert stored < sum(parameter.numel() for parameter in vfm.network.parameters())


def test_another_vfm_is_refused(interrupted, tiny_module, trainer, data):
    other_weights = tiny_module(vfm={"pretrained": False})
    with pytest.raises(ValueError, match="other weights of 'vit_photos_patch8_64'"):
        trainer().validate(other_weights, datamodule=data(), ckpt_path=interrupted, weights_only=True)
    other_name = tiny_module(init_from=str(interrupted))
    other_name.model.vfm.name = "vit_other"
    with pytest.raises(ValueError, match=r"VFM 'vit_photos_patch8_64', but model.vfm is 'vit_other'"):
        trainer().fit(other_name, datamodule=data())


def test_a_missing_former_stage_is_named(tiny_module, trainer, data):
    with pytest.raises(ValueError, match=r"init_from: there is no checkpoint 'nowhere\.ckpt'"):
        trainer().fit(tiny_module(init_from="nowhere.ckpt"), datamodule=data())


@pytest.mark.parametrize("order", ["simultaneous", "published"])
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


def test_validation_repeats_and_needs_the_whole_set(tiny_module, trainer, data):
    module = tiny_module()
    small, large = (
        trainer().validate(module, datamodule=data(val_batch_size=size), verbose=False)[0] for size in (7, 26)
    )
    assert small.keys() >= {"val/psnr", "val/ssim", "val/perceptual_vit_photos_patch8_64", "val/psnr_thumbnail"}
    assert small == pytest.approx(large, rel=1e-4)


def test_thumbnail_baseline_is_exact_for_constant_images(tiny_module, trainer, batch):
    flat = Batch(torch.full_like(batch.images, 77), batch.labels, batch.index)
    result = trainer().validate(tiny_module(), repeat(flat, 1), verbose=False)[0]
    assert result["val/psnr_thumbnail"] == float("inf")


def test_a_sampled_evaluation_belongs_to_the_image(tiny_module, batch):
    module = tiny_module(evaluate="sample").eval()
    mode = tiny_module().eval()
    whole = module.latents(batch)
    part = Batch(*(tensor[1:2] for tensor in batch))
    torch.testing.assert_close(module.latents(part), whole[1:2], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(whole, mode.latents(batch))
    assert module.latents(batch) is not module.latents(part)  # kept for the batch at hand alone


def test_reconstructions_are_rounded_or_truncated(tiny_module, batch):
    rounded, truncated = (tiny_module(rounding=how).eval() for how in ("round", "truncate"))
    pixels = [((m.evaluation_images(batch)[1] + 1) * 127.5) for m in (rounded, truncated)]
    assert all(torch.allclose(x, x.round(), atol=1e-3) for x in pixels)
    difference = pixels[0].round() - pixels[1].round()
    assert set(difference.unique().tolist()) == {0.0, 1.0}


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
