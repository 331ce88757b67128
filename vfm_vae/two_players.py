"""Manual optimization of generator and discriminators: accumulation, clipping, and skipped steps."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import ParallelStrategy
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from vfm_vae.data.steps import batches_per_step
from vfm_vae.lightning_private import forget_logged
from vfm_vae.losses.guard import NonFiniteGuard
from vfm_vae.modules.maps import without_autocast
from vfm_vae.optimization import ClipShare, step_unless
from vfm_vae.options import at_least
from vfm_vae.schedules import schedule_of


class TwoPlayers(LightningModule):
    """Trains a generator and its discriminators, each by an optimiser of its own, in an order that subclasses choose.

    A step may be made of several batches. The guard sees every term: once it refuses, neither player steps any more
    before the next step begins.

    Args:
        guard: Decides which steps are taken.
        accumulate_grad_batches: Batches whose gradients make one step, where the data module doesn't divide steps.
        gradient_clip_val: Largest gradient norm of either player; None or 0 clips nothing.

    Attributes:
        images_seen: Images trained on, over all ranks and stages.

    Raises:
        ValueError: if an option lies outside its range.
    """

    GENERATOR, DISCRIMINATOR = 0, 1  # positions of their optimisers

    def __init__(
        self, guard: NonFiniteGuard | None, accumulate_grad_batches: int, gradient_clip_val: float | None
    ) -> None:
        super().__init__()
        at_least(1, accumulate_grad_batches=accumulate_grad_batches)
        at_least(0, gradient_clip_val=gradient_clip_val)
        self.automatic_optimization = False
        self.guard = guard or NonFiniteGuard()
        self.accumulate_grad_batches = accumulate_grad_batches
        self.gradient_clip_val = gradient_clip_val
        self.images_seen = 0
        self.grad_norms: dict[str, Tensor] = {}  # of the last step
        self.rates: dict[str, float | Tensor] = {}  # of the last step
        self.clip_shares = ClipShare("clip_share"), ClipShare("clip_share_discriminator")
        self._refused: Tensor | None = None  # what the guard says of the step at hand

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Forgets the numbers of the previous step, so that each step logs its own."""
        accumulated = self.trainer.accumulate_grad_batches
        if accumulated > 1 and batch_idx % accumulated == 0:
            forget_logged(self.trainer)

    def completes_step(self, batch_idx: int) -> bool:
        """Whether a batch is the last of those that make a step."""
        return (batch_idx + 1) % batches_per_step(self.trainer) == 0 or self.trainer.is_last_batch

    def judge(self, **terms: Mapping[str, Tensor]) -> None:
        """Asks the guard about losses; a refusal holds for all batches of a step."""
        self._refused = self.guard.refuses(self.images_seen, **terms, already=self._refused)

    def learn(self, player: int, loss: Tensor, step_ends: bool) -> None:
        """Backward pass, and the optimiser's step where the accumulated batches are complete.

        A schedule of the learning rate counts all of these steps, also those that are refused.
        """
        optimizer = self._players()[player]
        # What was computed in float32 has its gradients in float32: autocast is for the forward pass alone.
        with self._accumulating(not step_ends), without_autocast(loss):
            self.manual_backward(loss / batches_per_step(self.trainer))
        if not step_ends:
            return
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = get_total_norm([p.grad for p in parameters])
        self.grad_norms[("grad_norm", "grad_norm_discriminator")[player]] = norm
        self.judge(others={"grad_norm": norm})  # finite losses can have gradients that are not
        if self.gradient_clip_val:  # 0 is off, as Lightning has it
            clip_grads_with_norm_(parameters, self.gradient_clip_val, norm)
        # Only the generator goes through Lightning's wrapper, which counts global_step: one step per batch.
        step = (optimizer if player == self.GENERATOR else optimizer.optimizer).step
        assert self._refused is not None  # `judge` was asked
        step_unless(self._refused, optimizer.optimizer, step)
        self.clip_shares[player].note(norm, self.gradient_clip_val, self._refused)
        self.rates[("lr", "lr_discriminator")[player]] = optimizer.param_groups[0]["lr"]
        if (schedule := schedule_of(self.trainer, optimizer.optimizer)) is not None:
            schedule.step()

    def numbers_of_steps(self) -> dict[str, Tensor | float]:
        """Numbers of the last steps to log, by name; the shares of clipped steps begin anew."""
        numbers = self.grad_norms | self.rates | {"skipped_steps": self.guard.skipped}
        for share in self.clip_shares:
            numbers |= share.taken()
        return {f"train/{name}": value for name, value in numbers.items()}

    def finish_batch(self, num_images: int, step_ends: bool) -> None:
        """Counts images; where a step ends, drops its gradients, also those of a refused one."""
        self.images_seen += num_images * self.trainer.world_size
        if step_ends and self._refused is not None:
            for optimizer in self._players():
                optimizer.zero_grad()
            self.guard.end_step(self._refused)
            self._refused = None

    def _players(self) -> list[Any]:
        """The optimisers, in Lightning's wrappers."""
        optimizers = self.optimizers()
        return optimizers if isinstance(optimizers, list) else [optimizers]

    def _accumulating(self, wanted: bool) -> AbstractContextManager[Any]:
        """Leaves gradients unsynchronised between ranks until the accumulated step is complete."""
        strategy = self.trainer.strategy
        return strategy.block_backward_sync() if wanted and isinstance(strategy, ParallelStrategy) else nullcontext()
