"""Learning rates from step to step, in both modules: as the options say, and where they were after a resume."""

import math
from functools import partial

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR, ReduceLROnPlateau, StepLR
from training import changed, repeat

from vfm_vae.schedules import WarmupDecay

FULL = 2e-3  # the rate of both modules' optimizers
RISING = partial(WarmupDecay, warmup_steps=4, constant_steps=1, decay="cosine", decay_steps=4, final=0.1)


def rates(num_steps: int, **options) -> list[float]:
    optimizer = SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule, taken = WarmupDecay(optimizer, **options), []
    for _ in range(num_steps):
        taken.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return taken


def test_rates_are_those_of_the_formula():
    assert rates(3) == [1, 1, 1]
    assert rates(6, warmup_steps=4) == [0.25, 0.5, 0.75, 1, 1, 1]
    line = {"decay": "linear", "decay_steps": 4, "final": 0.2}
    assert rates(7, **line) == pytest.approx([1, 0.8, 0.6, 0.4, 0.2, 0.2, 0.2])
    assert rates(7, warmup_steps=2, constant_steps=2, **line)[:6] == pytest.approx([0.5, 1, 1, 1, 1, 0.8])
    curve = [0.1 + 0.9 * (1 + math.cos(math.pi * k / 3)) / 2 for k in range(4)]
    assert rates(5, decay="cosine", decay_steps=3, final=0.1) == pytest.approx([*curve, 0.1])
    assert rates(3, decay="linear", decay_steps=2) == [1, 0.5, 0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"warmup_steps": -1}, "warmup_steps: must be at least 0, given -1"),
        ({"constant_steps": math.nan}, "constant_steps: must be at least 0, given nan"),
        ({"decay": "linear", "decay_steps": -2}, "decay_steps: must be at least 0, given -2"),
        ({"decay": "root", "decay_steps": 2}, "decay: one of 'none', 'linear', 'cosine', given 'root'"),
        ({"decay": "cosine"}, "decay, decay_steps: give both or none, given 'cosine' and 0"),
        ({"decay_steps": 3}, "decay, decay_steps: give both or none, given 'none' and 3"),
        ({"decay": "linear", "decay_steps": 2, "final": 1.5}, r"final: must be in \[0, 1\], given 1.5"),
    ],
)
def test_a_mistake_is_named_when_a_module_is_made(options, message, diffusion):
    with pytest.raises(ValueError, match=f"^lr_scheduler: {message}$"):
        diffusion(lr_scheduler=partial(WarmupDecay, **options))


def test_schedules_that_can_not_be_followed_are_refused(tiny_module, diffusion):
    for option in ("lr_scheduler", "discriminator_lr_scheduler"):
        with pytest.raises(ValueError, match=rf"^{option}: ReduceLROnPlateau follows a metric.*WarmupDecay$"):
            tiny_module(**{option: ReduceLROnPlateau})
    with pytest.raises(ValueError, match=r"^discriminator_lr_scheduler: there is no optimizer whose rate it could"):
        tiny_module(discriminator_optimizer=None, discriminator_lr_scheduler=RISING)


class Rates(Callback):
    """Notes the rates that every batch begins with, and the optimizer steps before it."""

    def __init__(self):
        self.seen, self.logged = [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.seen.append([group["lr"] for optimizer in trainer.optimizers for group in optimizer.param_groups])

    def on_train_batch_end(self, trainer, *_):
        self.logged.append({n: v.item() for n, v in trainer.callback_metrics.items() if n.startswith("train/lr")})


BOTH = pytest.mark.parametrize("fit", ["tokenizer", "diffusion"], indirect=True)
ONE_FAST = pytest.mark.parametrize(
    "fit", [pytest.param("tokenizer", marks=pytest.mark.slow), "diffusion"], indirect=True
)


@pytest.fixture
def fit(request, tiny_module, data, diffusion, latents, trainer, tmp_path):
    """Trains one of the two modules up to a step, and saves it as `<steps>.ckpt`; returns it, and what was noted."""
    build, dataset = (tiny_module, data) if request.param == "tokenizer" else (diffusion, latents)

    def run(num_steps: int, resume_from: int | None = None, micro_batch_size: int | None = None, **options):
        watch, module, file = Rates(), build(**{"lr_scheduler": RISING} | options), tmp_path / f"{num_steps}.ckpt"
        saved = ModelCheckpoint(tmp_path, filename=f"{num_steps}", every_n_train_steps=num_steps)
        training = trainer(
            max_steps=num_steps, limit_val_batches=0, callbacks=[watch, saved], enable_checkpointing=True
        )
        resume = {} if resume_from is None else {"ckpt_path": tmp_path / f"{resume_from}.ckpt", "weights_only": True}
        training.fit(module, datamodule=dataset(micro_batch_size=micro_batch_size), **resume)
        assert training.global_step == num_steps and file.exists()
        return module, watch

    run.folder = tmp_path
    return run


def expected(*steps: int) -> list[float]:
    every = rates(max(steps) + 1, **RISING.keywords)
    return [FULL * every[step] for step in steps]


@BOTH
def test_a_resumed_run_goes_on_where_it_was(fit):
    whole, watch = fit(3)
    assert [rate for rate, *_ in watch.seen] == pytest.approx(expected(0, 1, 2))
    assert all(rate == FULL for _, *others in watch.seen for rate in others)  # discriminators have no schedule
    names = "train/lr", "train/lr_discriminator"  # logged with a schedule or without
    logged = [dict(zip(names, [rate, *others[:1]], strict=False)) for rate, *others in watch.seen]
    assert watch.logged == [pytest.approx(each, rel=1e-6) for each in logged]
    _, before = fit(1)
    resumed, after = fit(3, resume_from=1)
    assert before.seen + after.seen == watch.seen
    assert not changed(whole.state_dict(), resumed.state_dict())


@BOTH
def test_steps_of_several_batches_count_once(fit):
    """Also those of a run that began with whole steps."""
    fit(1)
    _, watch = fit(3, resume_from=1, micro_batch_size=4)
    assert [rate for rate, *_ in watch.seen] == pytest.approx(expected(1, 1, 2, 2))


@ONE_FAST
def test_the_same_schedules_are_needed_to_go_on(fit):
    fit(1, lr_scheduler=None)
    with pytest.raises(ValueError, match=r"^lr_scheduler: the run .* had none, .*; leave it out, or begin"):
        fit(2, resume_from=1)
    fit(2)
    for other in (None, partial(CosineAnnealingLR, T_max=4)):
        with pytest.raises(ValueError, match=r"^lr_scheduler: the run .* had vfm_vae.schedules.WarmupDecay, .*; give"):
            fit(3, resume_from=2, lr_scheduler=other)
    _, anew = fit(1, init_from=str(fit.folder / "2.ckpt"))
    assert anew.seen[0][0] == pytest.approx(expected(0)[0])


@ONE_FAST
def test_a_checkpoint_of_before_there_were_schedules_goes_on_without(fit):
    fit(1, lr_scheduler=None)
    stored = torch.load(fit.folder / "1.ckpt", weights_only=True)
    del stored["schedules"]
    torch.save(stored, fit.folder / "1.ckpt")
    fit(2, resume_from=1, lr_scheduler=None)
    with pytest.raises(ValueError, match=r"^lr_scheduler: the run that wrote the checkpoint had none"):
        fit(2, resume_from=1)


@pytest.mark.parametrize("fit", ["diffusion"], indirect=True)
def test_a_resumed_run_may_have_other_options(fit):
    fit(2, lr_scheduler=WarmupDecay)
    _, watch = fit(5, resume_from=2, lr_scheduler=partial(WarmupDecay, constant_steps=2, decay="linear", decay_steps=4))
    assert [rate for (rate,) in watch.seen] == pytest.approx([FULL, 0.75 * FULL, 0.5 * FULL])


def test_any_schedule_that_counts_steps_will_do(diffusion, latents, trainer):
    for make in (partial(StepLR, step_size=2, gamma=0.5), partial(CosineAnnealingLR, T_max=4)):
        watch, other = Rates(), AdamW([torch.nn.Parameter(torch.zeros(1))], lr=FULL)
        schedule, taken = make(other), []
        for _ in range(4):
            taken.append([other.param_groups[0]["lr"]])
            other.step()
            schedule.step()
        trainer(max_steps=4, callbacks=[watch]).fit(diffusion(lr_scheduler=make), datamodule=latents())
        assert watch.seen == taken and len({rate for (rate,) in taken}) > 1


@pytest.mark.parametrize("order", ["simultaneous", pytest.param("published", marks=pytest.mark.slow)])
def test_discriminators_count_their_own_steps(order, tiny_module, trainer, batch):
    watch, options = Rates(), {"lr_scheduler": RISING, "discriminator_lr_scheduler": RISING}
    module = tiny_module(objective={"adversarial_from": 16}, order=order, **options)
    trainer(max_steps=4, callbacks=[watch]).fit(module, repeat(batch))
    ours, theirs = map(list, zip(*watch.seen, strict=True))
    assert ours == pytest.approx(expected(0, 1, 2, 3)) and theirs == pytest.approx(expected(0, 0, 0, 1))
    assert watch.logged[1].keys() == {"train/lr"}
    assert watch.logged[3] == pytest.approx(
        dict(zip(("train/lr", "train/lr_discriminator"), watch.seen[3], strict=True))
    )


@pytest.mark.parametrize("fused", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_refused_steps_count(fused, tiny_module, diffusion, latents, trainer, batch, recwarn):
    """The first one, too, of which torch would warn."""
    for program in ("tokenizer", "diffusion"):
        watch, optimizer = Rates(), partial(AdamW, lr=FULL, fused=fused)
        if program == "tokenizer":
            module = tiny_module(optimizer=optimizer, lr_scheduler=RISING)
            weight, data = module.model.decoder.mapping.out.weight, repeat(batch)
        else:
            module, data = diffusion(lr_scheduler=RISING), latents()
            module.optimizer, weight = optimizer, module.model.final.out.weight
        weight.register_hook(lambda gradient, seen=watch.seen: gradient / (len(seen) > 1))
        trainer(max_epochs=1, limit_train_batches=3, limit_val_batches=0, callbacks=[watch]).fit(module, data)
        skipped = module.guard.num_skipped if program == "tokenizer" else module.skipped_steps
        assert skipped == 1 and [rate for rate, *_ in watch.seen] == pytest.approx(expected(0, 1, 2))
    assert not [warning for warning in recwarn if "lr_scheduler" in str(warning.message)]
