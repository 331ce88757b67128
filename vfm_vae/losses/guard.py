"""Guard against steps that would ruin the weights."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, distributed

from vfm_vae.options import at_least, positive, unless_infinite


class NonFiniteGuard:
    """Decides whether a step may be taken; all ranks decide together, so that none goes on alone.

    A step is refused when on any rank

    - a term is not finite (from the first step on), or
    - a reconstruction term is more than `jump` times that of the last accepted step, or
    - an adversarial term is above `adversarial_limit`.

    The last two begin `grace_images` images after the start or a resume: until then losses may rightly move that fast.

    Decisions stay on the device: nothing here waits for it but `num_skipped`, `check` and `state_dict`.

    Args:
        jump: largest allowed ratio of a reconstruction term to its last accepted value.
        floor: a last value at or below this allows any jump.
        adversarial_limit: largest allowed adversarial term.
        grace_images: images, over all ranks, before anything but finiteness is asked for.
        max_in_a_row: as many steps refused in a row end the training, which stands still.

    Raises:
        ValueError: if an option lies outside its range.

    Attributes:
        skipped: steps refused so far, former runs included, an integer on the device.
    """

    def __init__(
        self,
        jump: float = 10.0,
        floor: float = 1e-6,
        adversarial_limit: float = 1e4,
        grace_images: int = 50_000,
        max_in_a_row: int = 100,
    ) -> None:
        at_least(1, jump=unless_infinite(jump), max_in_a_row=max_in_a_row)
        at_least(0, floor=floor, grace_images=grace_images)
        positive(adversarial_limit=unless_infinite(adversarial_limit))
        self.jump = jump
        self.floor = floor
        self.adversarial_limit = adversarial_limit
        self.grace_images = grace_images
        self.max_in_a_row = max_in_a_row
        self.skipped = torch.zeros((), dtype=torch.int64)
        self._in_a_row = torch.zeros((), dtype=torch.int64)  # on the device as well
        self._first_images: int | None = None
        self._previous: dict[str, Tensor] = {}

    @property
    def num_skipped(self) -> int:
        """`skipped` as a number."""
        return int(self.skipped)

    def refuses(
        self,
        images_seen: int,
        *,
        reconstruction: Mapping[str, Tensor] | None = None,
        adversarial: Mapping[str, Tensor] | None = None,
        others: Mapping[str, Tensor] | None = None,
        already: Tensor | None = None,
    ) -> Tensor:
        """Says whether the step with these terms must not be taken; every rank asks alike.

        Args:
            images_seen: images trained on so far, over all ranks.
            reconstruction: scalars that fall slowly, by name.
            adversarial: scalars of the two-player game, by name.
            others: scalars of which nothing but finiteness is asked.
            already: what was said of other terms of this step; once it was refused, it stays so and counts once.

        Returns:
            1 or 0, a float32 scalar on the terms' device.
        """
        if self._first_images is None:
            self._first_images = images_seen
        reconstruction = reconstruction or {}
        strict = images_seen - self._first_images >= self.grace_images
        with torch.no_grad():
            refused = self._refused(reconstruction, adversarial or {}, others or {}, strict)
            if distributed.is_available() and distributed.is_initialized():
                distributed.all_reduce(refused, distributed.ReduceOp.MAX)
            before = torch.zeros_like(refused) if already is None else already
            refused = torch.maximum(refused, before)
            self.skipped = self.skipped.to(refused.device, non_blocking=True) + (refused > before)
            for name, term in reconstruction.items():
                # The last accepted value; below the floor where there is none, so that the next may be any.
                last = self._previous.get(name, torch.zeros(()))
                self._previous[name] = torch.where(refused > 0, last.to(term.device, non_blocking=True), term.detach())
        return refused

    def end_step(self, refused: Tensor) -> None:
        """Takes note of what was said of a whole step, 1 or 0."""
        self._in_a_row = (self._in_a_row.to(refused.device, non_blocking=True) + 1) * (refused > 0)

    def check(self) -> None:
        """Looks whether training goes on at all; this waits for the device.

        Raises:
            ValueError: if too many steps in a row, up to the last one, were refused.
        """
        if self._in_a_row >= self.max_in_a_row:
            raise ValueError(
                f"guard.max_in_a_row: the last {int(self._in_a_row)} steps were refused, their losses or gradients not "
                "being finite or within the guard's limits: look at the data, or go on from the last checkpoint with a "
                "lower learning rate"
            )

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint stores: numbers only."""
        previous = {name: float(term) for name, term in self._previous.items()}
        return {"num_skipped": self.num_skipped, "previous": previous}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from `state`; the grace period begins anew."""
        self.skipped = torch.tensor(state["num_skipped"])
        self._previous = {name: torch.tensor(value) for name, value in state["previous"].items()}
        self._first_images = None

    def _refused(
        self,
        reconstruction: Mapping[str, Tensor],
        adversarial: Mapping[str, Tensor],
        others: Mapping[str, Tensor],
        strict: bool,
    ) -> Tensor:
        """Whether this rank refuses: a float32 scalar on the terms' device, since not all backends reduce booleans."""
        terms = torch.stack([x.float() for x in (*reconstruction.values(), *adversarial.values(), *others.values())])
        refused = ~terms.isfinite().all()
        if strict:
            num = len(reconstruction)
            unknown = terms.new_zeros(())  # below the floor, so that a new term may have any value
            previous = [self._previous.get(name, unknown).to(terms, non_blocking=True) for name in reconstruction]
            if previous:
                last = torch.stack(previous)
                refused = refused | ((last > self.floor) & (terms[:num] > self.jump * last)).any()
            refused = refused | (terms[num : num + len(adversarial)] > self.adversarial_limit).any()
        return refused.float()
