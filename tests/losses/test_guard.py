import json

import pytest
import torch
from torch import distributed, multiprocessing

from vfm_vae.losses.guard import NonFiniteGuard


def terms(**values):
    return {name: torch.tensor(value) for name, value in values.items()}


def strict(**options):
    """A guard that asks for everything from the first step on."""
    return NonFiniteGuard(grace_images=0, **options)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_refused_from_the_first_step(bad):
    guard = NonFiniteGuard()
    assert guard.refuses(0, reconstruction=terms(l1=bad), adversarial=terms(d=0.0))
    assert guard.refuses(32, reconstruction=terms(l1=1.0), adversarial=terms(d=bad))
    assert not guard.refuses(64, reconstruction=terms(l1=1.0), adversarial=terms(d=0.0))
    assert guard.num_skipped == 2


def test_tenfold_jump_over_the_last_accepted_step_is_refused():
    guard = strict()
    assert not guard.refuses(0, reconstruction=terms(l1=1.0, ssim=0.1))
    assert guard.refuses(1, reconstruction=terms(l1=10.5, ssim=0.1))
    assert guard.refuses(2, reconstruction=terms(l1=10.5, ssim=0.1))  # the refused step is no yardstick
    assert not guard.refuses(3, reconstruction=terms(l1=9.5, ssim=0.1))
    assert not guard.refuses(4, reconstruction=terms(l1=90.0, ssim=0.1))


def test_jumps_from_nothing_and_new_terms_are_allowed():
    guard = strict()
    assert not guard.refuses(0, reconstruction=terms(l1=1e-7))
    assert not guard.refuses(1, reconstruction=terms(l1=1.0, multi_resolution=100.0))


def test_adversarial_terms_may_jump_but_not_exceed_the_limit():
    guard = strict()
    assert not guard.refuses(0, reconstruction=terms(l1=1.0), adversarial=terms(g=0.1))
    assert not guard.refuses(1, reconstruction=terms(l1=1.0), adversarial=terms(g=9e3))
    assert guard.refuses(2, reconstruction=terms(l1=1.0), adversarial=terms(g=1.1e4))


def test_a_step_that_was_refused_stays_so_counts_once_and_sets_no_yardstick():
    guard = strict()
    assert not guard.refuses(0, reconstruction=terms(l1=1.0))
    first = guard.refuses(1, reconstruction=terms(l1=float("nan")))
    assert guard.refuses(1, reconstruction=terms(l1=100.0), already=first)
    assert guard.num_skipped == 1
    assert guard.refuses(2, reconstruction=terms(l1=11.0))


def test_others_only_have_to_be_finite():
    guard = strict()
    assert not guard.refuses(0, reconstruction=terms(l1=1.0), others=terms(kl=1.0))
    assert not guard.refuses(1, reconstruction=terms(l1=1.0), others=terms(kl=1e6))
    assert guard.refuses(2, reconstruction=terms(l1=1.0), others=terms(kl=float("nan")))


def test_asking_for_the_opponent_alone_keeps_the_yardstick():
    guard = strict()
    assert not guard.refuses(0, reconstruction=terms(l1=1.0))
    assert not guard.refuses(0, adversarial=terms(d=1.0))
    assert guard.refuses(1, reconstruction=terms(l1=11.0))


def test_grace_is_counted_from_the_start_and_from_a_resume():
    guard = NonFiniteGuard(grace_images=100)
    assert not guard.refuses(1_000_000, reconstruction=terms(l1=1.0))
    assert not guard.refuses(1_000_099, reconstruction=terms(l1=1e3), adversarial=terms(d=1e5))
    assert guard.refuses(1_000_100, reconstruction=terms(l1=1e5))

    state = json.loads(json.dumps(guard.state_dict()))  # numbers only
    resumed = NonFiniteGuard(grace_images=100)
    resumed.load_state_dict(state)
    assert resumed.num_skipped == 1
    assert resumed.state_dict() == state
    assert not resumed.refuses(1_000_100, reconstruction=terms(l1=1e5))
    assert resumed.refuses(1_000_200, reconstruction=terms(l1=1e7))


def test_last_accepted_step_survives_a_resume():
    guard = strict()
    guard.refuses(0, reconstruction=terms(l1=1.0))
    resumed = strict()
    resumed.load_state_dict(guard.state_dict())
    assert resumed.refuses(1, reconstruction=terms(l1=11.0))


def _run_rank(rank: int, path: str) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{path}/store", rank=rank, world_size=2)
    guard = strict()
    decisions = [
        bool(guard.refuses(0, reconstruction=terms(l1=1.0))),
        bool(guard.refuses(1, reconstruction=terms(l1=float("nan") if rank else 1.0))),
        bool(guard.refuses(2, reconstruction=terms(l1=1.0))),
    ]
    torch.save([decisions, guard.num_skipped], f"{path}/{rank}.pt")
    distributed.destroy_process_group()


def test_ranks_decide_together(tmp_path):
    multiprocessing.start_processes(_run_rank, args=(str(tmp_path),), nprocs=2, start_method="fork")
    for rank in range(2):
        assert torch.load(tmp_path / f"{rank}.pt") == [[False, True, False], 1]


@pytest.mark.parametrize("bad", [float("nan"), 100.0])
def test_training_that_stands_still_is_ended(bad):
    guard = strict(max_in_a_row=3)

    def step(value):
        guard.end_step(guard.refuses(0, reconstruction=terms(l1=value)))
        guard.check()

    for value in (1.0, bad, bad, 1.0, bad, bad):  # a step that was taken begins the count anew
        step(value)
    with pytest.raises(ValueError, match=r"^guard\.max_in_a_row: the last 3 steps were refused"):
        step(bad)
