"""How tests are run: which come first, which a machine can't run, and what all of them start from."""

import gc
import os
import shutil
import signal
import subprocess
from functools import cache

import pytest

LONG = {"test_ddp", "test_resume", "test_recipe", "test_preemption", "test_rank_failure", "test_cli", "test_ldm_cli"}
LONG |= {"test_another_vfm", "test_compilation", "test_diffusers", "test_inception", "test_module"}


def pytest_configure(config: pytest.Config) -> None:
    """Who runs tests, and does not only hand them out, imports what takes seconds, and can start processes.

    One thread each, where several processes share the cores. Of what is imported nothing could go: nobody looks for it.
    """
    worker = "PYTEST_XDIST_WORKER" in os.environ
    if worker or config.getoption("dist", "no") == "no":
        gc.disable()
        import processes
        import shared
        import torch

        config.pluginmanager.register(shared)
        processes.serve()
        if worker:
            torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files come first, so that at the end no core waits for one of them."""
    items.sort(key=lambda item: item.path.stem not in LONG)


def pytest_collection_finish() -> None:
    """What is imported stays: nobody needs to look over and over for what of it could go."""
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True, scope="session")
def hear_ctrl_c() -> None:
    """A shell makes what it runs in the background deaf to Ctrl-C, and tests and their processes with it."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Leaves tests out that a machine cannot run, whoever asks for all: of GPUs, and of disks of their own."""
    import torch

    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    if item.get_closest_marker("mounts") and not can_mount():
        pytest.skip("needs a machine that permits `unshare --map-root-user --mount`")


@cache
def can_mount() -> bool:
    """Whether a process may have a file system of its own."""
    command = ["unshare", "--map-root-user", "--mount", "mount", "-t", "tmpfs", "disk", "/tmp"]
    return shutil.which("unshare") is not None and subprocess.run(command, capture_output=True).returncode == 0
