"""Training of denoisers: what a step does, and what validation measures."""

import copy
import math

import pytest
import torch
from lightning.pytorch import Callback
from training import same, weights

from callbacks.ema import EMA
from callbacks.throughput import Throughput
from ldm.condition import Labels
from ldm.metrics import LossByTime
from vfm_vae.data.sampling import seed_of
from vfm_vae.types import LatentBatch


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
        rotary = model.rotary_cos, model.rotary_sin
        tokens = model.blocks[0](model.patch_embed(z) + model.position, condition[:, None], rotary)
    torch.testing.assert_close(module.alignment_features(batch, 1.0)["block_01"], tokens.mean(1))
    assert not model.blocks[0]._forward_hooks


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
