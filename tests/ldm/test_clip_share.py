"""The share of steps whose gradients were clipped, in both modules, and after a resume."""

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from vfm_vae.lightning_private import logs_now
from vfm_vae.optimization import ClipShare

EVERY = 3  # steps between loggings
LIMITS = {"tokenizer": 4.0, "diffusion": 20.0}  # of norms, which some steps pass


def test_a_share_is_of_the_steps_that_were_taken():
    share, taken, refused = ClipShare("share"), torch.tensor(0.0), torch.tensor(1.0)
    assert share.taken() == {} and share.state() is None
    for norm in (1.0, 2.0, 3.0, 0.5):
        share.note(torch.tensor(norm), 1.0, taken)
    for norm in (float("nan"), float("inf"), 9.0):
        share.note(torch.tensor(norm), 1.0, refused)
    other = ClipShare("share")
    other.go_on(share.state())
    assert share.taken() == other.taken() == {"share": 0.5}
    assert share.taken() == {}  # it has begun anew
    share.note(torch.tensor(9.0), 1.0, refused)
    assert share.taken() == {"share": 0}
    for limit in (None, 0.0):
        share.note(torch.tensor(9.0), limit, taken)
    assert share.taken() == {}


class Watch(Callback):
    """The norms of each step, and what was logged of them; the gradients of one step may be spoilt."""

    def __init__(self, limit: float, spoilt: int | None):
        self.limit = limit
        self.norms, self.logged, self.wanted, self.spoilt = [], [], [], spoilt
        self.since = 0  # the last logging

    def on_train_start(self, trainer, pl_module):
        weight = next(p for p in pl_module.model.parameters() if p.requires_grad)
        weight.register_hook(lambda g: g * float("nan") if len(self.norms) == self.spoilt else g)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        norms = getattr(pl_module, "grad_norms", None) or {"grad_norm": pl_module._grad_norm}
        self.norms.append([float(norm) for norm in norms.values()])
        if logs_now(trainer):
            found = {n: float(v) for n, v in trainer.callback_metrics.items() if n.startswith("train/clip_share")}
            self.logged.append(list(found.values()))
            # Of a refused step, neither player's counts.
            taken = [norms for norms in self.norms[self.since :] if max(norms) < float("inf") and min(norms) >= 0]
            players = zip(*taken, strict=True)
            self.wanted.append([sum(norm > self.limit for norm in player) / len(player) for player in players])
            self.since = len(self.norms)


def rounded(shares: list[list[float]]) -> list[list[float]]:
    """As float32 has them."""
    return [torch.tensor(players).tolist() for players in shares]


@pytest.fixture(params=["tokenizer", "diffusion"])
def fit(request, tiny_module, data, diffusion, latents, trainer, tmp_path):
    """Trains one of the two modules, with norms clipped at a limit that some pass."""
    is_tokenizer = request.param == "tokenizer"

    def run(max_steps: int, ckpt_path=None, micro_batch_size=None, spoilt=None, clips=True, saved_at=None):
        limit = LIMITS[request.param] if clips else None
        watch, options = Watch(LIMITS[request.param], spoilt), {} if is_tokenizer else {"gradient_clip_val": limit}
        module = tiny_module(gradient_clip_val=limit) if is_tokenizer else diffusion()
        saves = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=saved_at or max_steps, save_top_k=-1)
        options |= {"max_steps": max_steps, "log_every_n_steps": EVERY, "limit_val_batches": 0}
        run = trainer(callbacks=[watch, saves], enable_checkpointing=True, **options)
        dataset = (data if is_tokenizer else latents)(micro_batch_size=micro_batch_size)
        run.fit(module, datamodule=dataset, ckpt_path=ckpt_path, weights_only=True)
        return watch

    return run


def test_each_player_has_its_share_and_a_resumed_run_the_same(fit, tmp_path):
    whole = fit(6, saved_at=5)  # amid the second share
    assert whole.logged == rounded(whole.wanted) and len(whole.logged) == 2
    assert {share for shares in whole.logged for share in shares} - {0, 1}, whole.norms  # the limit tells steps apart
    resumed = fit(6, tmp_path / "step=5.ckpt")
    assert resumed.norms[-1] == whole.norms[-1] and resumed.logged == whole.logged[-1:]


def test_steps_of_several_batches_count_once_and_refused_ones_not_at_all(fit):
    watch = fit(3, micro_batch_size=4, spoilt=1)
    assert not watch.norms[1][0] < float("inf")
    assert watch.logged == rounded(watch.wanted)


def test_without_clipping_there_is_no_share(fit):
    assert fit(3, clips=False).logged == [[]]
