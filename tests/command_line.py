"""The programs' command lines, run within the test's own process: what they import is imported already."""

import contextlib
import io
import os
import runpy
import signal
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch


class Ended(NamedTuple):
    """How a command ended: its exit code, and what it printed."""

    code: int
    out: str
    err: str


def run(folder: Path, program: str, *arguments: str) -> Ended:
    """Runs `python -m program arguments…` in a folder; nothing that it sets for its process outlives it."""
    out, err = io.StringIO(), io.StringIO()
    with _own_process(folder, [program, *arguments]), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            runpy.run_module(program, run_name="__main__", alter_sys=True)
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        except Exception:
            traceback.print_exc()
            code = 1
    return Ended(code, out.getvalue(), err.getvalue())


@contextlib.contextmanager
def _own_process(folder: Path, argv: list[str]) -> Iterator[None]:
    """Directory, arguments, environment, signals, precision and threads as a process of its own would have them."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    kept = os.getcwd(), sys.argv, sys.path[:], dict(os.environ)
    precision, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    random, threads = torch.get_rng_state(), torch.get_num_threads()
    os.chdir(folder)
    sys.argv, sys.path = argv, [str(folder), *sys.path]
    os.environ.pop("VFM_VAE_DEBUG", None)
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.set_rng_state(random)
        torch.set_float32_matmul_precision(precision)
        torch.backends.cudnn.allow_tf32 = convolutions
        os.chdir(kept[0])
        sys.argv, sys.path = kept[1:3]
        os.environ.clear()
        os.environ.update(kept[3])
        for number, handler in handlers.items():
            signal.signal(number, handler)
