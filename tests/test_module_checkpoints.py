"""Training goes on from a checkpoint where it was, and a stage starts from the former one's."""

from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from training import changed, weights

from callbacks.ema import EMA


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where the checkpoint lies that tests read."""
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture
def interrupted(tiny_module, trainer, data, folder) -> Path:
    """Checkpoint of the fourth of six batches of an epoch: written once, by the first test that needs it."""
    path = folder / "last.ckpt"
    if not path.exists():
        checkpoint = ModelCheckpoint(folder, every_n_train_steps=4, filename="{step}", save_last=True)
        run = trainer(max_steps=4, enable_checkpointing=True, callbacks=[checkpoint, EMA()])
        run.fit(tiny_module(), datamodule=data())
    return path


def test_resumed_equals_uninterrupted(tiny_module, trainer, data, interrupted):
    whole, resumed = tiny_module(), tiny_module()
    whole_average, resumed_average = EMA(), EMA()
    trainer(max_steps=7, callbacks=[whole_average]).fit(whole, datamodule=data())
    trainer(max_steps=7, callbacks=[resumed_average]).fit(
        resumed, datamodule=data(), ckpt_path=interrupted, weights_only=True
    )
    assert not changed(whole.state_dict(), resumed.state_dict())
    assert not changed(whole_average.weights, resumed_average.weights)
    assert resumed.images_seen == whole.images_seen == 56


@pytest.mark.slow
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
