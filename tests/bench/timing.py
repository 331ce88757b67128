"""Timing that interleaves what it compares, so that a busy machine slows all alike."""

import time
from collections.abc import Callable, Sequence

from rich.console import Console
from rich.table import Table


def best_times(repeats: int = 5, **functions: Callable[[], object]) -> dict[str, float]:
    """Shortest seconds of each function over several rounds, after one that warms up."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            times[name].append(time.perf_counter() - start)
    return {name: min(seconds[1:]) for name, seconds in times.items()}


def table(title: str, rows: Sequence[Sequence[str]], *columns: str) -> None:
    """Prints rows below the names of their columns."""
    grid = Table(*columns, title=title)
    for row in rows:
        grid.add_row(*row)
    Console().print(grid)
