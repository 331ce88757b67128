"""A step whose gradients are not finite changes nothing, and no step waits for the device to tell."""

import copy
import itertools

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch.utils._python_dispatch import TorchDispatchMode
from training import same, weights

from callbacks.ema import EMA
from callbacks.post_hoc_ema import PostHocEMA


def adamw(fused):
    return lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, fused=fused)


@pytest.mark.parametrize("fused", [False, True])
def test_training_that_can_not_go_on_stops_where_it_logs(diffusion, latents, trainer, monkeypatch, fused):
    monkeypatch.setattr("ldm.skipping.MAX_SKIPPED_IN_A_ROW", 3)
    module = diffusion()
    module.optimizer = adamw(fused)
    module.model.final.out.weight.register_hook(lambda gradient: gradient * float("nan"))
    with pytest.raises(ValueError, match="gradients of 3 steps in a row were not finite"):
        trainer(max_steps=9, log_every_n_steps=2).fit(module, datamodule=latents())
    assert module.skipped_steps == 4


@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_changes_nothing(diffusion, latents, trainer, fused, clip, value):
    """Of five steps, the third is left out: neither weights, nor moments, nor the count of steps change."""
    module, history, logged = diffusion(), [], []
    module.optimizer = adamw(fused)

    class Watch(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            (optimizer,) = trainer.optimizers
            assert not hasattr(optimizer, "found_inf")
            states = copy.deepcopy(optimizer.state_dict()["state"])
            history.append(weights(pl_module.model) | {f"{i} {n}": t for i, s in states.items() for n, t in s.items()})
            logged.append(trainer.callback_metrics["train/skipped_steps"].item())

    def spoil(gradient):
        return gradient * value if len(history) == 2 else gradient

    module.model.final.out.weight.register_hook(spoil)
    run = trainer(max_steps=5, gradient_clip_val=clip, callbacks=[Watch()], log_every_n_steps=1)
    run.fit(module, datamodule=latents())
    assert [same(*pair) for pair in itertools.pairwise(history)] == [False, True, False, False]
    assert history[-1]["0 step"] == 4
    assert module.skipped_steps == 1 and logged == [0, 0, 1, 1, 1]
    assert all(tensor.isfinite().all() for tensor in history[-1].values())


def test_the_first_step_may_be_left_out(diffusion, latents, trainer):
    module = diffusion()
    module.optimizer = adamw(fused=True)
    handle = module.model.final.out.weight.register_hook(lambda gradient: gradient * float("nan"))
    before = weights(module.model)
    trainer(max_steps=2).fit(module, datamodule=latents())
    assert same(before, weights(module.model)) and module.skipped_steps == 2
    handle.remove()
    trainer(max_steps=1).fit(module, datamodule=latents())
    assert not same(before, weights(module.model)) and module.skipped_steps == 2
    assert all(p.isfinite().all() for p in module.parameters())


class NothingIsRead(TorchDispatchMode):
    """Stands for a device that the host waits for where it reads a number, or a number of elements."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        aten = torch.ops.aten
        reads = (aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.is_nonzero, aten.equal)
        assert func.overloadpacket not in reads, func
        if func.overloadpacket in (aten.index, aten.index_put, aten.index_put_):  # by a mask, whose rows are counted
            assert all(index is None or index.dtype != torch.bool for index in args[1]), func
        return func(*args, **(kwargs or {}))


class NoGPU:
    """The host waits for none."""

    def __enter__(self):
        torch.cuda.set_sync_debug_mode("error")

    def __exit__(self, *_):
        torch.cuda.set_sync_debug_mode("default")


class Step(Callback):
    """Enters a context for each step of training but the first."""

    def __init__(self, context):
        self.context, self.inside, self.steps = context, False, 0

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx:
            self.inside = True
            self.context.__enter__()

    def on_train_batch_end(self, *_):
        self.steps += self.inside
        self.leave()

    def on_exception(self, *_):
        self.leave()

    def leave(self):
        if self.inside:
            self.inside = False
            self.context.__exit__(None, None, None)


@pytest.mark.parametrize("clip", [None, 1.0])
def test_a_step_that_does_not_log_waits_for_nothing(diffusion, latents, trainer, clip):
    module, step = diffusion(), Step(NothingIsRead())
    module.optimizer = adamw(fused=True)
    options = {"gradient_clip_val": clip, "log_every_n_steps": 100, "enable_progress_bar": True}
    trainer(max_steps=4, callbacks=[EMA(decay=0.9), PostHocEMA(every_n_steps=9), step], **options).fit(
        module, datamodule=latents()
    )
    assert step.steps == 3
    with pytest.raises(AssertionError, match="_local_scalar_dense"):
        trainer(max_steps=2, callbacks=[Step(NothingIsRead())], log_every_n_steps=1).fit(module, datamodule=latents())


@pytest.mark.gpu
def test_a_step_that_does_not_log_waits_for_no_gpu(diffusion, latents, tmp_path):
    module, step = diffusion(), Step(NoGPU())
    module.optimizer = adamw(fused=True)
    options = {"logger": False, "enable_model_summary": False, "enable_checkpointing": False, "precision": "bf16-mixed"}
    run = Trainer(
        accelerator="gpu", devices=1, max_steps=5, gradient_clip_val=1.0, log_every_n_steps=100, callbacks=[step],
        default_root_dir=tmp_path, **options,
    )  # fmt: skip
    run.fit(module, datamodule=latents())
    assert step.steps == 4
