"""Training of denoisers: what a step does, that it goes on where it was, and that sampling is reproducible."""

import copy
import itertools
import math
import shutil

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils._python_dispatch import TorchDispatchMode

from callbacks.ema import EMA
from callbacks.throughput import Throughput
from ldm.condition import Labels
from ldm.guidance import Guidance
from ldm.metrics import LossByTime
from ldm.samplers import EulerMaruyama
from vfm_vae.data.latents import LatentStatistics
from vfm_vae.data.sampling import seed_of
from vfm_vae.types import LatentBatch


def weights(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_one_batch_overfits(diffusion, latents, trainer):
    module, data = diffusion(), latents(batch_size=48, val_batch_size=13)
    run = trainer(max_steps=1)
    run.fit(module, datamodule=data)
    before = run.validate(module, datamodule=data, verbose=False)[0]["val/loss"]
    run = trainer(max_steps=80)
    run.fit(module, datamodule=data)
    after = run.validate(module, datamodule=data, verbose=False)[0]["val/loss"]
    assert after < 0.75 * before


def test_the_loss_is_that_of_the_paper(diffusion, latents, trainer):
    """Recomputed by hand from the same draws, with weights that let no argument go unnoticed."""
    module, seen = diffusion(cosine_weight=0.5, label_drop=0.0), {}
    for parameter in module.model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model = copy.deepcopy(module.model)

    class Watch(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            seen["batch"], seen["loss"] = batch, outputs["loss"]

    trainer(max_steps=1, callbacks=[Watch()]).fit(module, datamodule=latents())
    z, labels, *_ = seen["batch"]
    torch.manual_seed(seed_of(1, 0, 0))
    x = (z - module.normalization.mean) / module.normalization.std
    noise, t = torch.randn_like(x), torch.randn(len(x)).sigmoid()
    t_wide = t[:, None, None, None]
    with torch.no_grad():
        prediction = model(t_wide * x + (1 - t_wide) * noise, t, Labels(labels, 3)).velocity
    target = x - noise
    cosine = torch.nn.functional.cosine_similarity(prediction, target, dim=1)
    expected = (prediction - target).square().mean() + 0.5 * (1 - cosine).mean()
    assert seen["loss"].item() == pytest.approx(expected.item(), rel=1e-5)


def test_label_drop_uses_the_null_label(diffusion, latents, trainer):
    for share, expected in ((1.0, {3}), (0.0, {0, 1, 2})):
        module, seen = diffusion(label_drop=share), set()
        module.model.label_embed.register_forward_pre_hook(lambda _, args, seen=seen: seen.update(args[0].tolist()))
        trainer(max_steps=3).fit(module, datamodule=latents())
        assert seen - {3} == expected - {3} and (3 in seen) == (share == 1)


def test_so_many_labels_are_dropped(diffusion, latents, trainer):
    module, seen = diffusion(label_drop=0.2), []
    module.model.label_embed.register_forward_pre_hook(lambda _, args: seen.extend(args[0].tolist()))
    trainer(max_steps=12, limit_val_batches=0).fit(module, datamodule=latents(batch_size=48))
    assert len(seen) == 576 and 0.13 < seen.count(3) / len(seen) < 0.27  # four standard deviations


def test_steps_images_and_one_average_per_step(diffusion, latents, trainer):
    module, average = diffusion(), EMA(decay=0.5)
    start = weights(module.model)
    run = trainer(max_steps=3, accumulate_grad_batches=2, callbacks=[average])
    history = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            history.append(weights(pl_module.model))

    run.callbacks.append(Watch())
    run.fit(module, datamodule=latents())
    assert run.global_step == 3 and module.images_seen == 48
    expected = start
    for step in history[1::2]:
        expected = {name: 0.5 * expected[name] + 0.5 * step[name] for name in step}
    for name, tensor in average.weights.items():
        assert torch.allclose(tensor, expected[name.removeprefix("model.")], atol=1e-6)


@pytest.mark.parametrize("limit", [1e-3, 0, None])
def test_clipping(diffusion, latents, trainer, limit):
    module, norms = diffusion(), []

    class Watch(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            norms.append(trainer.callback_metrics["train/grad_norm"].item())

    before = weights(module.model)
    run = trainer(max_steps=1, gradient_clip_val=limit, callbacks=[Watch()], log_every_n_steps=1)
    module.optimizer = lambda parameters: torch.optim.SGD(parameters, lr=1.0)
    run.fit(module, datamodule=latents())
    moved = torch.stack([(p - before[n]).norm() for n, p in module.model.state_dict().items()]).norm()
    assert norms[0] > 1e-2 and moved.item() == pytest.approx(limit or norms[0], rel=1e-2)


def test_clipping_goes_with_a_fused_optimiser_in_bf16(diffusion, latents, trainer):
    module = diffusion()
    module.optimizer = lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, fused=True)
    trainer(max_steps=2, gradient_clip_val=1.0, precision="bf16-mixed").fit(module, datamodule=latents())
    with pytest.raises(ValueError, match="gradient_clip_algorithm: only 'norm'"):
        options = {"gradient_clip_val": 1.0, "gradient_clip_algorithm": "value"}
        trainer(max_steps=1, **options).fit(diffusion(), datamodule=latents())


def test_checkpoints_come_without_validation_latents_too(diffusion, latents, trainer, cache, tmp_path):
    checkpoint = ModelCheckpoint(tmp_path, save_last=True, save_top_k=1, save_on_train_epoch_end=True)
    saved = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer, *_):
            saved.append((tmp_path / "last.ckpt").is_file())

    validation = {"check_val_every_n_epoch": None, "val_check_interval": 2}
    run = trainer(max_steps=8, enable_checkpointing=True, callbacks=[checkpoint, Watch()], **validation)
    run.fit(diffusion(), datamodule=latents(root=cache / "train"))
    assert saved == [False] * 6 + [True] * 2  # an epoch has six batches
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["images_seen"] == 64


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
        return func(*args, **(kwargs or {}))


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
    trainer(max_steps=4, callbacks=[EMA(decay=0.9), step], **options).fit(module, datamodule=latents())
    assert step.steps == 3
    with pytest.raises(AssertionError, match="_local_scalar_dense"):
        trainer(max_steps=2, callbacks=[Step(NothingIsRead())], log_every_n_steps=1).fit(module, datamodule=latents())


@pytest.mark.gpu
def test_a_step_that_does_not_log_waits_for_no_gpu(diffusion, latents, tmp_path):
    class Strict:
        def __enter__(self):
            torch.cuda.set_sync_debug_mode("error")

        def __exit__(self, *_):
            torch.cuda.set_sync_debug_mode("default")

    module, step = diffusion(), Step(Strict())
    module.optimizer = adamw(fused=True)
    options = {"logger": False, "enable_model_summary": False, "enable_checkpointing": False, "precision": "bf16-mixed"}
    run = Trainer(
        accelerator="gpu", devices=1, max_steps=5, gradient_clip_val=1.0, log_every_n_steps=100, callbacks=[step],
        default_root_dir=tmp_path, **options,
    )  # fmt: skip
    run.fit(module, datamodule=latents())
    assert step.steps == 4


@pytest.fixture
def interrupted(diffusion, latents, trainer, tmp_path):
    """Checkpoint of the fourth of six batches of an epoch."""
    checkpoint = ModelCheckpoint(tmp_path / "checkpoints", every_n_train_steps=4, save_last=True)
    run = trainer(max_steps=4, enable_checkpointing=True, callbacks=[checkpoint, EMA(decay=0.9)])
    run.fit(diffusion(), datamodule=latents())
    return tmp_path / "checkpoints" / "last.ckpt"


def test_resumed_equals_uninterrupted(diffusion, latents, trainer, interrupted):
    results = []
    for path in (None, interrupted):
        module, average = diffusion(), EMA(decay=0.9)
        run = trainer(max_steps=9, callbacks=[average])
        run.fit(module, datamodule=latents(), ckpt_path=path, weights_only=True)
        optimizer = run.optimizers[0].state_dict()["state"]
        results.append((weights(module), average.weights, module.images_seen, optimizer))
    whole, resumed = results
    assert same(whole[0], resumed[0]) and same(whole[1], resumed[1])
    assert whole[2] == resumed[2] == 72
    assert all(same(whole[3][key], resumed[3][key]) for key in whole[3])


def test_the_checkpoint_holds_the_statistics(diffusion, latents, trainer, interrupted):
    data = latents()
    data.setup("fit")
    stored = torch.load(interrupted, weights_only=True)
    statistics = data.latent_statistics
    assert torch.equal(stored["state_dict"]["normalization.mean"], statistics.mean)
    assert torch.equal(stored["state_dict"]["normalization.std"], statistics.std)
    z = torch.stack([data.train_set[i][0] for i in range(len(data.train_set))])
    module = diffusion()
    module.load_state_dict(stored["state_dict"])
    normalised = module.normalization(z)
    assert normalised.std().item() == pytest.approx(1, abs=0.1)
    assert torch.allclose(module.normalization.inverse(normalised), z, atol=1e-5)


def test_sampling_needs_no_data_and_uses_the_average(diffusion, latents, trainer, interrupted):
    nowhere = {"root": "nowhere", "source": "folder", "num_samples": 7}
    module = diffusion()
    (batches,) = [trainer(callbacks=[EMA(decay=0.9)]).predict(
        module, datamodule=latents(**nowhere), ckpt_path=interrupted, weights_only=True
    )]  # fmt: skip
    drawn = torch.cat([batch.latents for batch in batches])
    stored = torch.load(interrupted, weights_only=True)
    module.load_state_dict(stored["state_dict"] | stored["ema"]["weights"])
    assert torch.allclose(drawn, module.draw(torch.arange(7), decode=False).latents, atol=1e-5)
    module.load_state_dict(stored["state_dict"])
    assert not torch.allclose(drawn, module.draw(torch.arange(7), decode=False).latents, atol=1e-5)


@pytest.mark.parametrize("sampler", [None, EulerMaruyama(6)])
def test_samples_do_not_depend_on_the_batch(diffusion, latents, trainer, sampler):
    module = diffusion(guidance=Guidance(2.0), **({"sampler": sampler} if sampler else {}))
    trainer(max_steps=20).fit(module, datamodule=latents())
    together = module.draw(torch.arange(9), decode=False)
    apart = [module.draw(part, decode=False) for part in torch.arange(9).split([4, 1, 4])]
    assert torch.equal(together.condition.labels, torch.cat([part.condition.labels for part in apart]))
    assert torch.allclose(together.latents, torch.cat([part.latents for part in apart]), atol=1e-4)
    assert not torch.allclose(together.latents[0], together.latents[1], atol=0.1)
    given = module.draw(torch.arange(9), together.condition, decode=False)
    assert torch.equal(given.latents, together.latents)


def test_labels_are_random_or_balanced(diffusion):
    numbers = torch.arange(300)
    balanced = diffusion(label_mode="balanced").sample_condition(numbers).labels
    assert torch.equal(balanced.bincount(), torch.tensor([100, 100, 100]))
    random = diffusion().sample_condition(numbers).labels
    assert random.unique().tolist() == [0, 1, 2]
    assert not torch.equal(random, diffusion(seed=2).sample_condition(numbers).labels)
    assert torch.equal(random[40:50], diffusion().sample_condition(numbers[40:50]).labels)


def test_samples_show_their_class_after_training(diffusion, latents, trainer):
    module = diffusion(guidance=Guidance(2.0))
    trainer(max_steps=300).fit(module, datamodule=latents(batch_size=16))
    drawn = module.draw(torch.arange(30), decode=False)
    found = ((drawn.latents.mean((1, 2, 3)) - 0.375) / 2).round().long()
    assert (found == drawn.condition.labels).float().mean() > 0.9


def test_validation_repeats_and_needs_the_whole_set(diffusion, latents, trainer):
    module = diffusion()
    trainer(max_steps=5).fit(module, datamodule=latents())
    small, large = (
        trainer().validate(module, datamodule=latents(val_batch_size=size), verbose=False)[0] for size in (5, 13)
    )
    assert small == pytest.approx(large, rel=1e-5)
    buckets = [value for name, value in small.items() if name.startswith("loss_by_time/val_")]
    assert 3 <= len(buckets) <= 10 and all(math.isfinite(value) for value in buckets)


def test_bf16_mixed_keeps_loss_and_weights_finite(diffusion, latents, trainer):
    module = diffusion()
    run = trainer(max_steps=3, precision="bf16-mixed")
    run.fit(module, datamodule=latents())
    assert module.skipped_steps == 0
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in module.parameters())
    assert module.draw(torch.arange(2), decode=False).latents.dtype == torch.float32


def test_what_does_not_fit_is_named(diffusion, latents, trainer, tmp_path, interrupted):
    def fit(module, **options):
        trainer(max_steps=1).fit(module, datamodule=latents(**options))

    with pytest.raises(ValueError, match=r"latents in '.*train' are \(4, 4, 4\) .*input_size say \(6, 4, 4\)"):
        fit(diffusion(model={"in_channels": 6}))
    with pytest.raises(ValueError, match=r"model.num_classes: .* labels up to 2, but the denoiser knows 2"):
        fit(diffusion(model={"num_classes": 2}))
    with pytest.raises(
        ValueError, match=r"root: no latents .* in '.*/train'; make one with `python -m vfm_vae predict`"
    ):
        fit(diffusion(), root=tmp_path)
    with pytest.raises(ValueError, match=r"model\.tokenizer: training on images needs one"):
        fit(
            diffusion(model={"num_classes": 13}),
            source="photos",
            root=tmp_path / "p",
            photos={"train_per_class": 1, "val_per_class": 1},
        )
    with pytest.raises(ValueError, match=r"model\.tokenizer: images need a tokenizer"):
        trainer().predict(diffusion(predict="images"), datamodule=latents(num_samples=2))
    with pytest.raises(ValueError, match="only a trained model can sample"):
        trainer().predict(diffusion(), datamodule=latents(num_samples=2))
    with pytest.raises(ValueError, match=r"for latents of 4 channels, but model\.in_channels is 6"):
        options = {"datamodule": latents(num_samples=2), "ckpt_path": interrupted, "weights_only": True}
        trainer().predict(diffusion(model={"in_channels": 6}), **options)
    other = diffusion()
    other.pipeline.latent_source = {"vfm": "vit_other", "fingerprint": "0" * 64}
    stored = torch.load(interrupted, weights_only=True)
    torch.save(stored | {"tokenizer": {"vfm": "vit_a", "fingerprint": "1" * 64}}, interrupted)
    with pytest.raises(ValueError, match=r"another tokenizer \(vit_other, 000000000000….*expected \(vit_a, 1111"):
        trainer().validate(other, datamodule=latents(), ckpt_path=interrupted, weights_only=True)
    shifted = stored["state_dict"] | {"normalization.mean": stored["state_dict"]["normalization.mean"] + 1}
    torch.save(stored | {"state_dict": shifted}, interrupted)
    with pytest.raises(ValueError, match="clearly different means or deviations"):
        trainer().fit(diffusion(), datamodule=latents(), ckpt_path=interrupted, weights_only=True)


def test_the_loss_by_time_leaves_out_what_is_not_finite():
    losses = LossByTime(2)
    losses.update(torch.tensor([1.0, float("nan"), 3.0, float("inf"), 8.0]), torch.tensor([0.1, 0.2, 0.3, 0.9, 1.0]))
    assert losses.named("train") == {"loss_by_time/train_0.00": 2.0, "loss_by_time/train_0.50": 8.0}
    assert losses.count.tolist() == [2, 1]


def test_padding_counts_nowhere(diffusion, latents, trainer):
    module = diffusion()
    data = latents()
    data.setup("validate")
    batch = next(iter(data.val_dataloader()))
    module.normalization.take(data.latent_statistics)
    module.validation_step(batch, 0)
    alone = module.val_loss.compute()
    module.val_loss.reset()
    padding = LatentBatch(torch.full_like(batch.latents, 1e6), batch.labels, torch.full_like(batch.index, -1))
    module.validation_step(LatentBatch(*(torch.cat(pair) for pair in zip(batch[:3], padding[:3], strict=True))), 0)
    assert module.val_loss.compute().item() == pytest.approx(alone.item(), rel=1e-5)


def test_validation_alone_takes_the_statistics_of_training(diffusion, latents, trainer, interrupted, cache):
    """The validation latents' own would differ."""
    module = diffusion()
    trainer().validate(module, datamodule=latents(), verbose=False)
    assert torch.equal(module.normalization.mean, LatentStatistics.read(cache / "train").mean)
    assert not torch.allclose(module.normalization.mean, LatentStatistics.read(cache / "val").mean)
    trainer().validate(diffusion(), datamodule=latents(), ckpt_path=interrupted, weights_only=True, verbose=False)


def test_a_checkpoint_is_validated_on_validation_latents_alone(
    diffusion, latents, trainer, interrupted, cache, tmp_path
):
    shutil.copytree(cache / "val", tmp_path / "alone/val")
    data = latents(root=tmp_path / "alone")
    options = {"ckpt_path": interrupted, "weights_only": True, "verbose": False}
    alone = trainer().validate(diffusion(), datamodule=data, **options)[0]
    assert alone == trainer().validate(diffusion(), datamodule=latents(), **options)[0]
    with pytest.raises(ValueError, match="ckpt_path: the statistics of latents are unknown"):
        trainer().validate(diffusion(), datamodule=latents(root=tmp_path / "alone"), verbose=False)


def test_block_features_are_patch_averages_at_a_fixed_noise(diffusion, latents, trainer, cache):
    module, data = diffusion(), latents()
    for parameter in module.model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    trainer(max_steps=1).fit(module, datamodule=data)
    module.eval()
    batch = next(iter(data.val_dataloader()))
    features = module.alignment_features(batch, 0.7)
    assert list(features) == ["block_01", "block_02"] and features["block_02"].shape == (5, 32)
    alone = module.alignment_features(LatentBatch(*(tensor[3:4] for tensor in batch[:3])), 0.7)
    torch.testing.assert_close(alone["block_02"], features["block_02"][3:4], rtol=1e-4, atol=1e-5)
    half = module.alignment_features(batch)
    assert torch.equal(half["block_01"], module.alignment_features(batch, 0.5)["block_01"])
    assert not torch.equal(half["block_01"], features["block_01"])
    unlabelled = module.alignment_features(batch._replace(labels=batch.labels * 0), 0.7)
    assert torch.equal(unlabelled["block_02"], features["block_02"])
    # At t = 1 there is no noise: the first block's tokens, by hand.
    z = module.normalization(batch.latents)
    model, t = module.model, torch.ones(5)
    with torch.no_grad():
        condition = torch.nn.functional.silu(model.time_embed(t) + model.label_embed(torch.full((5,), 3)))
        tokens = model.blocks[0](model.patch_embed(z) + model.position, condition, (model.rotary_cos, model.rotary_sin))
    torch.testing.assert_close(module.alignment_features(batch, 1.0)["block_01"], tokens.mean(1))
    assert not model.blocks[0]._forward_hooks


def test_a_test_of_samples_draws_as_many_as_asked_for(diffusion, latents, trainer, interrupted):
    module = diffusion()
    drawn = []

    class Watch(Callback):
        def on_test_batch_end(self, trainer, pl_module, outputs, batch, *_):
            assert not batch.has_images
            drawn.extend(pl_module.draw(batch.index[batch.real], decode=False).index.tolist())

    run = trainer(callbacks=[EMA(decay=0.9), Watch()])
    (metrics,) = run.test(module, datamodule=latents(num_samples=17), ckpt_path=interrupted, verbose=False) or [{}]
    assert drawn == list(range(17))
    assert "test/loss" not in metrics  # there are no latents to measure it on
    (metrics,) = trainer(callbacks=[EMA(decay=0.9)]).test(
        module, datamodule=latents(), ckpt_path=interrupted, verbose=False
    )
    assert metrics["test/loss"] > 0


def test_a_rehearsal_has_a_steps_products_and_leaves_no_trace(diffusion, latents, trainer, monkeypatch):
    counted, states = [], []
    for rehearses in (True, False):
        module = diffusion()
        if not rehearses:
            monkeypatch.setattr(module, "rehearse", lambda batch: False)
        trainer(max_steps=2, callbacks=[Throughput(window_size=2)]).fit(module, datamodule=latents())
        counted.append(module.flops_per_batch)
        states.append(weights(module))
    assert counted[0] == pytest.approx(
        counted[1], rel=0.03
    )  # how attention's backward pass counts depends on the kernel
    assert same(*states)
