"""A step that is not finite changes nothing, and no step waits for the device to tell."""

import copy
from functools import partial

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch.optim import Adam
from torch.utils._python_dispatch import TorchDispatchMode
from training import changed, repeat, weights

from callbacks.ema import EMA
from vfm_vae.losses.guard import NonFiniteGuard


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


@pytest.mark.parametrize("accumulate", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_training_that_can_not_go_on_stops_where_it_logs(tiny_module, trainer, batch, accumulate):
    module = tiny_module(accumulate_grad_batches=accumulate, guard=NonFiniteGuard(max_in_a_row=3))
    with pytest.raises(ValueError, match="the last 4 steps were refused"):
        trainer(callbacks=[Poison(set(range(20)))], log_every_n_steps=2 * accumulate).fit(module, repeat(batch))
    assert module.guard.num_skipped == 4


@pytest.mark.parametrize("fused", [pytest.param(True, marks=pytest.mark.slow), False])
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


def test_training_goes_on_after_a_skipped_step(tiny_module, trainer, batch):
    module = tiny_module(guard=NonFiniteGuard())
    trainer(callbacks=[Poison({1})], limit_train_batches=3, max_epochs=1).fit(module, repeat(batch))
    assert module.guard.num_skipped == 1
    assert all(parameter.isfinite().all() for parameter in module.parameters())
