"""The moving average of the weights: its closed form, its checkpoint, and that training never notices it."""

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from callbacks.ema import EMA
from vfm_vae.contracts import WeightAverage

NAMES = {"model.encode.weight", "model.encode.bias", "model.decode.weight", "model.decode.bias"}


class Recorder(Callback):
    """Notes the weights at start and after every batch."""

    def __init__(self):
        self.weights = []
        self.steps = []

    def on_train_start(self, trainer, pl_module):
        self.weights.append(self.take(pl_module))

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.weights.append(self.take(pl_module))
        self.steps.append(trainer.global_step)

    @staticmethod
    def take(pl_module):
        return {name: p.detach().clone() for name, p in pl_module.named_parameters()}


def assert_same(a, b, **tolerance):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], **({"rtol": 0, "atol": 0} | tolerance))


def by_hand(weights, betas):
    average = {name: weights[0][name].double() for name in NAMES}
    for now, beta in zip(weights[1:], betas, strict=True):
        average = {name: beta * old + (1 - beta) * now[name].double() for name, old in average.items()}
    return {name: value.float() for name, value in average.items()}


def test_is_what_the_module_looks_for():
    assert isinstance(EMA(), WeightAverage)


def test_closed_form_by_images(module, data, trainer):
    ema, recorder = EMA(half_life_images=10, ramp_up=0.5), Recorder()
    trainer(ema, recorder).fit(module, data)
    half_lives = [max(min(10, 0.5 * seen), 1e-8) for seen in range(0, 24, 4)]
    assert half_lives[-1] == 10 and half_lives[1] == 2
    assert_same(ema.weights, by_hand(recorder.weights, [0.5 ** (4 / h) for h in half_lives]), rtol=1e-5, atol=1e-6)
    assert ema.images_seen == 24 and ema.weights.keys() == NAMES


def test_closed_form_by_decay(module, data, trainer):
    ema, recorder = EMA(decay=0.9), Recorder()
    trainer(ema, recorder).fit(module, data)
    assert_same(ema.weights, by_hand(recorder.weights, [0.9] * 6), rtol=1e-5, atol=1e-6)


def test_half_life_halves(module):
    ema = EMA(half_life_images=1000, ramp_up=None)
    assert ema.beta(1000) == 0.5 and ema.beta(64) ** (1000 / 64) == pytest.approx(0.5)
    ema = EMA(half_life_images=1000, ramp_up=0.05)
    assert ema.beta(4) == 0  # nothing seen: the average is the weights
    ema.images_seen = 10_000
    assert ema.beta(500) == 0.5


def test_accumulating_batches_count_with_their_step(new_module, data, trainer):
    ema, recorder = EMA(half_life_images=10, ramp_up=None), Recorder()
    trainer(ema, recorder, max_steps=3).fit(new_module(accumulate=2), data)
    assert recorder.steps == [0, 1, 1, 2, 2, 3]
    assert_same(ema.weights, by_hand(recorder.weights[::2], [0.5 ** (8 / 10)] * 3), rtol=1e-5, atol=1e-6)


def test_average_of_constant_weights_is_constant(new_module, data, trainer):
    module = new_module(lr=0.0)
    before = Recorder.take(module)
    ema = EMA(half_life_images=100, ramp_up=None)
    trainer(ema).fit(module, data)
    assert_same(ema.weights, {name: before[name] for name in NAMES})


def test_evaluation_uses_the_average_and_training_does_not_notice(new_module, data, trainer):
    plain, averaged = new_module(), new_module()
    ema = EMA(half_life_images=50, ramp_up=None)
    options = {"val_check_interval": 2, "limit_val_batches": 1}
    trainer(**options).fit(plain, data)
    run = trainer(ema, **options)
    run.fit(averaged, data)
    assert_same(Recorder.take(plain), Recorder.take(averaged))
    assert not torch.equal(plain.validated[-1], averaged.validated[-1])
    torch.testing.assert_close(averaged.validated[-1], ema.weights["model.encode.weight"], rtol=0, atol=0)
    for evaluate in (run.validate, run.test, run.predict):
        evaluate(averaged, data)
        torch.testing.assert_close(averaged.validated[-1], ema.weights["model.encode.weight"], rtol=0, atol=0)
        assert_same(Recorder.take(plain), Recorder.take(averaged))


def test_checkpoints_hold_both_even_when_saved_during_validation(new_module, data, trainer, tmp_path):
    class SaveDuringValidation(Callback):
        def on_validation_epoch_end(self, trainer, pl_module):
            trainer.save_checkpoint(tmp_path / "during.ckpt")

    ema, module = EMA(half_life_images=50, ramp_up=None), new_module()
    model_checkpoint = ModelCheckpoint(tmp_path, "after", monitor="val/loss")
    options = {"val_check_interval": 6, "enable_checkpointing": True}
    trainer(model_checkpoint, ema, SaveDuringValidation(), **options).fit(module, data)
    for name in ("during", "after"):
        checkpoint = torch.load(tmp_path / f"{name}.ckpt", weights_only=True)
        assert checkpoint["ema"]["images_seen"] == 24
        assert_same(checkpoint["ema"]["weights"], ema.weights)
        assert_same(checkpoint["state_dict"], dict(module.state_dict()))
    fresh = new_module()
    fresh.load_state_dict(checkpoint["state_dict"] | checkpoint["ema"]["weights"])
    torch.testing.assert_close(fresh.model.encode.weight.data, module.validated[-1])


@pytest.mark.parametrize("evaluation", ["validate", "test", "predict"])
def test_a_checkpoint_is_evaluated_by_its_average(new_module, data, trainer, tmp_path, evaluation):
    ema = EMA(half_life_images=50, ramp_up=None)
    run = trainer(ema)
    run.fit(new_module(), data)
    run.save_checkpoint(tmp_path / "last.ckpt")
    module = new_module()
    getattr(trainer(EMA()), evaluation)(module, data, ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    torch.testing.assert_close(module.validated[-1], ema.weights["model.encode.weight"], rtol=0, atol=0)
    assert not torch.equal(module.model.encode.weight, module.validated[-1])


def test_a_checkpoint_without_an_average_says_so(module, data, trainer, tmp_path):
    run = trainer()
    run.fit(module, data)
    run.save_checkpoint(tmp_path / "last.ckpt")
    with pytest.warns(UserWarning, match="no averaged weights"):
        trainer(EMA()).validate(module, data, ckpt_path=tmp_path / "last.ckpt", weights_only=True)


def test_resumed_equals_uninterrupted(new_module, data, trainer, tmp_path):
    whole = EMA(half_life_images=20)
    trainer(whole, max_epochs=2, max_steps=-1, limit_train_batches=5).fit(new_module(), data)
    run = trainer(EMA(half_life_images=20), max_epochs=1, max_steps=-1, limit_train_batches=5)
    run.fit(new_module(), data)
    run.save_checkpoint(tmp_path / "half.ckpt")
    resumed = EMA(half_life_images=20)
    second = trainer(resumed, max_epochs=2, max_steps=-1, limit_train_batches=5)
    second.fit(new_module(), data, ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    assert resumed.images_seen == whole.images_seen == 40
    assert_same(resumed.weights, whole.weights)


def test_the_next_stage_goes_on_with_what_no_longer_trains(new_module, data, trainer):
    first = EMA(half_life_images=50, ramp_up=None)
    module = new_module()
    trainer(first).fit(module, data)
    state = {"weights": dict(first.weights), "images_seen": first.images_seen}
    module.model.encode.requires_grad_(False)
    second, recorder = EMA(half_life_images=50, ramp_up=None), Recorder()
    second.load_average(state)
    trainer(second, recorder).fit(module, data)
    assert second.images_seen == 48
    expected = by_hand([state["weights"], *recorder.weights[1:]], [0.5 ** (4 / 50)] * 6)
    assert_same(second.weights, expected, rtol=1e-5, atol=1e-6)
    assert first.weights.keys() == NAMES and first.images_seen == 24


def test_weights_return_when_validation_breaks_off(new_module, data, trainer):
    class Broken(Callback):
        def on_validation_batch_end(self, *args):
            raise RuntimeError("broken")

    module, recorder = new_module(), Recorder()
    with pytest.raises(RuntimeError, match="broken"):
        trainer(EMA(half_life_images=50, ramp_up=None), recorder, Broken(), val_check_interval=4).fit(module, data)
    assert len(recorder.weights) == 5  # validation starts after the batch's other hooks
    assert_same(Recorder.take(module), recorder.weights[-1])


def test_bfloat16_weights_are_averaged_in_float32(new_module, data, trainer):
    module = new_module()
    module.model.bfloat16()
    ema = EMA()
    trainer(ema, max_steps=0).fit(module, data)
    ema.setup(trainer(), module, "fit")
    ema.on_train_start(trainer(), module)
    assert all(weight.dtype == torch.float32 for weight in ema.weights.values())
    ema._update(module, 0.5)
    ema._swap_in(module)
    assert module.model.encode.weight.dtype == torch.bfloat16
    ema._swap_out(module)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"half_life_images": 0}, "half_life_images"),
        ({"ramp_up": 0}, "ramp_up"),
        ({"decay": 1.0}, "decay"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        EMA(**options)


def test_misfits_are_named(new_module, data, trainer):
    with pytest.raises(ValueError, match=r"no \['generator'\]; its parts are \['model', 'discriminator'\]"):
        trainer(EMA(modules=["generator"])).fit(new_module(), data)
    ema = EMA()
    ema.load_average({"weights": {"model.encode.weight": torch.zeros(3)}, "images_seen": 0})
    with pytest.raises(ValueError, match=r"model\.encode\.weight.*does not fit"):
        trainer(ema).fit(new_module(), data)
    module = new_module()
    del module.images_seen
    with pytest.raises(ValueError, match="no images_seen"):
        trainer(EMA()).fit(module, data)
    module = new_module()
    module.model.requires_grad_(False)
    with pytest.raises(ValueError, match="nothing to average"):
        EMA().on_train_start(trainer(), module)
