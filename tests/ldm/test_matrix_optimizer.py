"""An optimiser of the matrices in a denoiser's blocks, joined with that of the other weights."""

import copy
import itertools
import math
from functools import partial

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.optim import SGD, Adam, AdamW, Muon
from torch.optim.lr_scheduler import LambdaLR, LinearLR
from training import same, weights

from ldm.module import DiffusionModule
from vfm_vae.joined import Joined, join
from vfm_vae.saving import expected_bytes

MUON = partial(Muon, lr=2e-2, momentum=0.95, weight_decay=0.0)


def optimizer_of(module: DiffusionModule) -> Joined:
    optimizer = module.configure_optimizers()
    assert isinstance(optimizer, Joined)
    return optimizer


def groups(optimizer: torch.optim.Optimizer) -> list[set[torch.Tensor]]:
    return [set(group["params"]) for group in optimizer.param_groups]


def test_matrices_within_blocks_have_their_own(diffusion):
    module = diffusion(matrix_optimizer=MUON)
    rest, matrices = groups(optimizer_of(module))
    names = {name for name, parameter in module.model.named_parameters() if parameter in matrices}
    assert {"blocks.0.attention.qkv.weight", "blocks.1.modulation.weight"} <= names, sorted(names)
    assert all(name.startswith("blocks.") and name.endswith("weight") for name in names)
    assert rest | matrices == set(module.model.parameters()) and not rest & matrices
    assert {module.model.label_embed.weight, module.model.final.out.weight} <= rest


def test_joined_trains_as_each_by_itself(diffusion, latents, trainer):
    module = diffusion(matrix_optimizer=MUON)
    apart = copy.deepcopy(module.model)
    rest, matrices = (
        [p for p, q in zip(apart.parameters(), module.model.parameters(), strict=True) if q in group]
        for group in groups(optimizer_of(module))
    )
    optimizers = [AdamW(rest, lr=2e-3), MUON(matrices)]

    class StepApart(Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            for mine, theirs in zip(apart.parameters(), pl_module.model.parameters(), strict=True):
                mine.grad = None if theirs.grad is None else theirs.grad.clone()
            for one in optimizers:
                one.step()

    before = weights(module.model)
    trainer(max_steps=4, callbacks=[StepApart()]).fit(module, datamodule=latents())
    assert same(weights(module.model), weights(apart)) and not same(weights(module.model), before)


def test_a_schedule_reaches_both():
    parameters = [torch.nn.Parameter(torch.ones(2, 2)) for _ in range(2)]
    optimizer = Joined(AdamW(parameters[:1], lr=1.0), Muon(parameters[1:], lr=0.5))
    schedule = LambdaLR(optimizer, lambda step: 0.1**step)
    optimizer.step()
    schedule.step()
    assert [part.param_groups[0]["lr"] for part in optimizer.parts] == pytest.approx([0.1, 0.05])
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    schedule.step()
    assert [part.param_groups[0]["lr"] for part in optimizer.parts] == pytest.approx([0.01, 0.005])


def test_resumed_equals_uninterrupted(diffusion, latents, trainer, tmp_path):
    checkpoint, results = ModelCheckpoint(tmp_path, save_last=True, every_n_train_steps=4), []
    trainer(max_steps=4, enable_checkpointing=True, callbacks=[checkpoint]).fit(
        diffusion(matrix_optimizer=MUON), datamodule=latents()
    )
    for path in (None, tmp_path / "last.ckpt"):
        module, run = diffusion(matrix_optimizer=MUON), trainer(max_steps=9)
        run.fit(module, datamodule=latents(), ckpt_path=path, weights_only=True)
        results.append((weights(module), run.optimizers[0].state_dict()["state"]))
    (whole, state), (resumed, resumed_state) = results
    assert (
        same(whole, resumed) and {"exp_avg_sq"} <= state[0].keys() and {"momentum_buffer"} == state[max(state)].keys()
    )
    assert all(same(state[key], resumed_state[key]) for key in state | resumed_state)


@pytest.mark.parametrize(
    ("first", "then", "message"),
    [
        (None, MUON, "had none, so its optimizer's state does not fit; leave it out, or begin"),
        (MUON, None, "had one, so its optimizer's state does not fit; give it again, or begin"),
    ],
)
def test_a_state_with_or_without_one_is_refused(diffusion, latents, trainer, tmp_path, first, then, message):
    run, file = trainer(max_steps=1), tmp_path / "last.ckpt"
    run.fit(diffusion(matrix_optimizer=first), datamodule=latents())
    run.save_checkpoint(file)
    with pytest.raises(ValueError, match=f"^matrix_optimizer: the run that wrote the checkpoint {message}"):
        trainer(max_steps=2).fit(
            diffusion(matrix_optimizer=then), datamodule=latents(), ckpt_path=file, weights_only=True
        )


def test_a_state_of_another_class_is_refused():
    def make(first: type, second: type | None) -> torch.optim.Optimizer:
        weights = [torch.nn.Parameter(torch.ones(2, 2)) for _ in range(2)]
        return join(weights, partial(first, lr=1e-3), weights[1:], second and partial(second, lr=1e-3))

    state = make(AdamW, Muon).state_dict()
    make(Adam, Muon).load_state_dict(state)
    del state["param_groups"][0]["decoupled_weight_decay"]  # as an earlier version of torch wrote it
    LinearLR(other := make(AdamW, Muon))
    other.load_state_dict(state)
    of_another = "the checkpoint's state is of another class of optimizer than"
    with pytest.raises(ValueError, match=f"^matrix_optimizer: {of_another} AdamW; give the one that the run had"):
        make(AdamW, AdamW).load_state_dict(state)
    with pytest.raises(ValueError, match=f"^optimizer: {of_another} SGD; give"):
        make(SGD, Muon).load_state_dict(state)
    with pytest.raises(ValueError, match=f"^optimizer: {of_another} SGD; give"):
        make(SGD, None).load_state_dict(make(AdamW, None).state_dict())


@pytest.mark.parametrize("matrix_optimizer", [MUON, partial(AdamW, lr=1e-3, fused=True)])
def test_a_refused_step_changes_neither_part(diffusion, latents, trainer, matrix_optimizer):
    module, history = diffusion(matrix_optimizer=matrix_optimizer), []
    module.optimizer = partial(AdamW, lr=1e-3, fused=True)

    class Watch(Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            (optimizer,) = trainer.optimizers
            assert not any(hasattr(part, "found_inf") for part in (optimizer, *optimizer.parts))
            states = copy.deepcopy(optimizer.state_dict()["state"])
            history.append(weights(pl_module.model) | {f"{i} {n}": t for i, s in states.items() for n, t in s.items()})

    module.model.final.out.weight.register_hook(lambda g: g * math.nan if len(history) == 2 else g)
    trainer(max_steps=4, gradient_clip_val=1.0, callbacks=[Watch()]).fit(module, datamodule=latents())
    assert [same(*pair) for pair in itertools.pairwise(history)] == [False, True, False]
    assert module.skipped_steps == 1
    for part in groups(optimizer_of(module)):  # both went on afterwards
        names = {name for name, parameter in module.model.named_parameters() if parameter in part}
        assert any(not torch.equal(history[2][name], history[3][name]) for name in names)


def test_wrong_options_are_refused_when_a_module_is_made(diffusion):
    with pytest.raises(ValueError, match=r"^matrix_optimizer: Learning rate should be >= 0 but is: -1"):
        diffusion(matrix_optimizer=partial(Muon, lr=-1.0))
    with pytest.raises(ValueError, match=r"^matrix_optimizer.lr: must be a finite number"):
        diffusion(matrix_optimizer=partial(Muon, lr=math.inf))
    with pytest.raises(ValueError, match=r"^matrix_optimizer: LightningDiT has no matrices in its blocks; leave it"):
        model = diffusion().model
        model.blocks = torch.nn.ModuleList([torch.nn.LayerNorm(32)])
        DiffusionModule(model, partial(AdamW, lr=1e-3), matrix_optimizer=MUON)


def test_space_for_a_checkpoint_is_that_of_both_states(diffusion, latents, trainer):
    module, run = diffusion(matrix_optimizer=MUON), trainer(max_steps=1)
    run.fit(module, datamodule=latents())
    rest, matrices = (sum(p.numel() for p in group) for group in groups(optimizer_of(module)))
    state = sum(tensor.nbytes for tensor in module.state_dict().values())
    assert expected_bytes(run, module) == state + 4 * (2 * rest + matrices)
