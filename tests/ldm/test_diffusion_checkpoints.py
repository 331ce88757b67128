"""What a denoiser's checkpoint holds: training goes on from it, and it is sampled and validated by itself."""

import shutil

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from training import same, weights

from callbacks.ema import EMA
from vfm_vae.data.latents import LatentStatistics


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
