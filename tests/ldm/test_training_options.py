"""Numbers of training that our modules do not take themselves: the trainer's, and the optimisers'."""

import math
from functools import partial

import pytest
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from ldm.guidance import Guidance
from ldm.module import DiffusionModule
from vfm_vae.optimization import check_trainer


@pytest.mark.parametrize("program", ["tokenizer", "diffusion"])
def test_a_clipping_norm_of_0_is_none(program: str, tiny_module, data, diffusion, latents, trainer):
    def trained(value: float | None) -> tuple[list[Tensor], list[Tensor]]:
        option = {"gradient_clip_val": value}
        if program == "tokenizer":
            training, module, datamodule = trainer(max_steps=1, limit_val_batches=0), tiny_module(**option), data()
        else:
            training, module, datamodule = trainer(max_steps=1, limit_val_batches=0, **option), diffusion(), latents()
        before = [parameter.detach().clone() for parameter in module.parameters()]
        training.fit(module, datamodule)
        return before, [parameter.detach() for parameter in module.parameters()]

    (before, plain), (_, clipped) = trained(None), trained(0)
    assert any(not torch.equal(*pair) for pair in zip(before, plain, strict=True))
    assert all(torch.equal(*pair) for pair in zip(plain, clipped, strict=True))


TRAINER = [
    ("accumulate_grad_batches", 0), ("accumulate_grad_batches", -2), ("check_val_every_n_epoch", 0),
    ("gradient_clip_val", -1.0), ("gradient_clip_val", math.nan), ("gradient_clip_val", math.inf),
    ("log_every_n_steps", -1), ("min_epochs", -1), ("min_steps", -1), ("num_sanity_val_steps", -2),
    ("val_check_interval", 0), ("val_check_interval", 0.0),
]  # fmt: skip


@pytest.mark.parametrize(("option", "value"), TRAINER)
def test_numbers_of_the_trainer_are_looked_at_before_its_first_step(option, value, diffusion, latents, trainer):
    with pytest.raises(ValueError, match=rf"trainer\.{option}: must be .*, given {value}$"):
        trainer(max_steps=1, **{option: value}).fit(diffusion(), latents())


def test_the_tokenizer_looks_at_them_too_and_lets_pass_what_means_something(tiny_module, data, trainer):
    with pytest.raises(ValueError, match=r"trainer\.log_every_n_steps: must be at least 0, given -1"):
        trainer(max_steps=1, log_every_n_steps=-1).fit(tiny_module(), data())
    check_trainer(trainer(num_sanity_val_steps=-1, gradient_clip_val=0, log_every_n_steps=0))
    check_trainer(trainer(check_val_every_n_epoch=None, val_check_interval=7))
    check_trainer(trainer(val_check_interval="00:00:10:00"))


@pytest.mark.parametrize("program", ["tokenizer", "diffusion"])
@pytest.mark.parametrize("stage", ["fit", "validate", "predict"])
@pytest.mark.parametrize("precision", ["bf16-true", "16-true", "64-true"])
def test_precisions_of_weights_other_than_float32_are_refused(
    program, stage, precision, tiny_module, data, diffusion, latents, trainer
):
    run = trainer(max_steps=1, precision=precision)
    module, datamodule = (tiny_module(), data()) if program == "tokenizer" else (diffusion(), latents())
    with pytest.raises(
        ValueError, match=rf"^trainer\.precision: {precision} is not supported, use bf16-mixed or 32-true"
    ):
        getattr(run, stage)(module, datamodule=datamodule)


def test_float16_is_for_evaluation_alone(trainer, monkeypatch):
    run = trainer()
    monkeypatch.setattr(type(run), "precision", "16-mixed")  # of GPUs: on CPUs Lightning takes bfloat16 instead
    check_trainer(run)
    run.state.fn = TrainerFn.FITTING
    with pytest.raises(ValueError, match=r"^trainer\.precision: 16-mixed is not supported, use bf16-mixed or 32-true$"):
        check_trainer(run)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "optimizer: Invalid learning rate: -1.0"),
        ({"lr": math.nan}, "optimizer: Invalid learning rate: nan"),
        ({"lr": math.inf}, "optimizer.lr: must be a finite number, given inf"),
        ({"lr": 1e-3, "betas": (0.9, 1.5)}, "optimizer: Invalid beta parameter at index 1: 1.5"),
        ({"lr": 1e-3, "weight_decay": -0.1}, "optimizer: Invalid weight_decay value: -0.1"),
        ({"lr": 1e-3, "eps": math.inf}, "optimizer.eps: must be a finite number, given inf"),
    ],
)
def test_optimisers_are_tried_when_a_module_is_made(options, message, tiny_module, diffusion):
    make = partial(torch.optim.AdamW, **options)
    with pytest.raises(ValueError, match=f"^{message}"):
        DiffusionModule(diffusion().model, make)
    with pytest.raises(ValueError, match=f"^discriminator_{message}"):
        tiny_module(discriminator_optimizer=make)


def test_guidance_is_of_channels_that_there_are(diffusion):
    assert diffusion(guidance=Guidance(2.0, channels=4)).pipeline.guidance.channels == 4
    with pytest.raises(ValueError, match=r"^guidance\.channels: must be in \[1, 4\], given 5"):
        diffusion(guidance=Guidance(2.0, channels=5))
