"""A guard that skips steps which would ruin the weights."""

from collections.abc import Mapping
from typing import Any, final

import torch
from torch import Tensor, distributed

from vfm_vae.options import at_least, positive, unless_infinite


@final
class NonFiniteGuard:
    """Decides whether a training step may be taken. All ranks decide together.

    A step is refused if on any rank

    - a loss is not finite, or
    - a reconstruction loss is more than `jump` times that of the last accepted step, or
    - an adversarial loss is above `adversarial_limit`.

    The last two rules begin `grace_images` images after the start or a resume: until then losses may well move so fast.

    Decisions stay on the device: only `num_skipped`, `check` and `state_dict` wait for it.

    Args:
        jump: Largest allowed ratio of a reconstruction loss to its last accepted value; infinite for no limit.
        floor: If the last accepted value is at or below this, any jump is allowed.
        adversarial_limit: Largest allowed adversarial loss; infinite for no limit.
        grace_images: For so many images over all ranks, only losses that are not finite are refused.
        max_in_a_row: Training ends with an error after so many refused steps in a row.

    Raises:
        ValueError: if an option lies outside its range.

    Attributes:
        skipped: How many steps were refused so far, earlier runs included; an integer tensor on the device.
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
        """Decides whether to refuse the step with these losses; every rank must ask with the same names.

        Args:
            images_seen: How many images training has seen so far, over all ranks.
            reconstruction: Reconstruction losses by name, scalars.
            adversarial: Adversarial losses by name, scalars.
            others: Other scalars, which only have to be finite.
            already: The decision on earlier losses of this step; once refused, a step stays refused and counts once.

        Returns:
            1 to refuse or 0, a float32 scalar on the losses' device.
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
                # The last accepted value, or 0 where there is none, after which any value is allowed.
                last = self._previous.get(name, torch.zeros(()))
                self._previous[name] = torch.where(refused > 0, last.to(term.device, non_blocking=True), term.detach())
        return refused

    def end_step(self, refused: Tensor) -> None:
        """Counts refused steps in a row, given the decision on a whole step, 1 or 0."""
        self._in_a_row = (self._in_a_row.to(refused.device, non_blocking=True) + 1) * (refused > 0)

    def check(self) -> None:
        """Checks that training makes progress; this waits for the device.

        Raises:
            ValueError: if the last `max_in_a_row` steps were all refused.
        """
        if self._in_a_row >= self.max_in_a_row:
            raise ValueError(
                f"guard.max_in_a_row: the last {int(self._in_a_row)} steps were refused, because losses or gradients "
                "were not finite or beyond the guard's limits: check the data, or resume from the last checkpoint with "
                "a lower learning rate"
            )

    def state_dict(self) -> dict[str, Any]:
        """The numbers that a checkpoint stores."""
        previous = {name: float(term) for name, term in self._previous.items()}
        return {"num_skipped": self.num_skipped, "previous": previous}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from `state`; the grace period starts again."""
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
        """Whether this rank refuses: a float32 scalar on the losses' device, as not all backends reduce booleans."""
        terms = torch.stack([x.float() for x in (*reconstruction.values(), *adversarial.values(), *others.values())])
        refused = ~terms.isfinite().all()
        if strict:
            num = len(reconstruction)
            unknown = terms.new_zeros(())  # after 0, any value is allowed
            previous = [self._previous.get(name, unknown).to(terms, non_blocking=True) for name in reconstruction]
            if previous:
                last = torch.stack(previous)
                refused = refused | ((last > self.floor) & (terms[:num] > self.jump * last)).any()
            refused = refused | (terms[num : num + len(adversarial)] > self.adversarial_limit).any()
        return refused.float()
