"""Checks of options: an error of one line names the option and its range.

NaN and infinity lie outside of all; None, an option that is left out, lies within. Of a sequence, every entry counts.
"""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

Number = float | Sequence[float] | None


def at_least(minimum: float, **options: Number) -> None:
    """Checks that numbers are not below a minimum.

    Args:
        minimum: What is just allowed.
        **options: The numbers by their options' names.

    Raises:
        ValueError: if one is, or is not finite.
    """
    _check(lambda number: number >= minimum, f"at least {minimum}", options)


def unless_infinite(number: float) -> float | None:
    """The number as a limit to check; infinity counts as left out."""
    return None if number == math.inf else number


def positive(**options: Number) -> None:
    """Checks that numbers are above 0; arguments and errors are those of `at_least`."""
    _check(lambda number: number > 0, "above 0", options)


def within(low: float, high: float, **options: Number) -> None:
    """Checks that numbers lie in [low, high]; options and errors are those of `at_least`."""
    _check(lambda number: low <= number <= high, f"in [{low}, {high}]", options)


def one_of(option: str, given: str, *choices: str) -> None:
    """Checks that an option has one of the given values.

    Raises:
        ValueError: if not; the message names them.
    """
    if given not in choices:
        raise ValueError(f"{option}: one of {', '.join(map(repr, choices))}, given {given!r}")


def finite(**options: Number) -> None:
    """Checks that numbers are finite; arguments and errors are those of `at_least`."""
    _check(math.isfinite, "a finite number", options)


@contextmanager
def named_as(**options: str) -> Iterator[None]:
    """Makes errors name options instead of the arguments that they become.

    Args:
        **options: Their names by the arguments'.
    """
    try:
        yield
    except ValueError as error:
        message = str(error)
        for name, option in options.items():  # without an underscore a name may be but a word
            is_word = "_" not in name
            pattern = rf"^{name}(?=:)|(?<=`){name}(?=`)" if is_word else rf"(?<![\w/.]){name}(?![\w/]|\.\w)"
            message = re.sub(pattern, option.replace("\\", r"\\"), message)
        raise ValueError(message) from error


@contextmanager
def about(what: str, instead_of: str = "") -> Iterator[None]:
    """Makes errors begin with what they are about.

    Args:
        what: The beginning.
        instead_of: The option that they named there, if it is not the user's.
    """
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{what}: {str(error).removeprefix(f'{instead_of}: ')}") from error


def _check(fits: Callable[[float], bool], wanted: str, options: dict[str, Number]) -> None:
    for name, value in options.items():
        numbers = list(value) if isinstance(value, Sequence) else [] if value is None else [value]
        if not all(math.isfinite(number) and fits(number) for number in numbers):
            raise ValueError(f"{name}: must be {wanted}, given {numbers if isinstance(value, Sequence) else value}")
