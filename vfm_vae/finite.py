"""Ends an evaluation or a prediction if something is not finite (nan, inf), before it becomes a number or a file."""

from torch import Tensor


class NotFinite(ValueError):
    """Something is nan or inf."""


def check_finite(what: str, values: Tensor) -> None:
    """Checks that a batch has neither nan nor inf; this waits for the device.

    Args:
        what: They are called in the message.
        values: `[B, ...]`.

    Raises:
        NotFinite: if a row does.
    """
    finite = values.detach().isfinite()
    if not finite.all():
        broken = ~finite.reshape(len(values), -1).all(1)  # [B]
        raise not_finite(f"{what}: {int(broken.sum())} of {len(broken)} hold nan or inf")


def not_finite(finding: str) -> NotFinite:
    """The error that says what was found, and where to look."""
    return NotFinite(
        f"{finding}; either the weights are broken (give another --ckpt_path), or numbers overflowed (try "
        "--trainer.precision=32-true)"
    )
