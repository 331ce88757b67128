"""Python programs in processes of their own that start at once: forked from one that has imported what takes seconds.

A program gets the directory, arguments, path, environment, signals and random numbers of a new interpreter. What
modules read from the environment while they are imported is as it was when the tests began; where a test is about
that, or about what is imported, it starts an interpreter. On other systems than Linux, all programs get a new one.
"""

import atexit
import contextlib
import faulthandler
import gc
import importlib
import io
import json
import logging
import multiprocessing.util
import os
import random
import runpy
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import NoReturn

import numpy as np
import torch
from lightning.fabric.utilities import rank_zero
from lightning.pytorch.strategies.launchers import subprocess_script

TESTS = Path(__file__).parent
# Beside what this file and conftest.py import: what command lines need.
PRELOADED = ("callbacks", "ldm.cli", "ldm.module", "ldm.models", "ldm.samplers", "lightning.pytorch.loggers")
PRELOADED += (
    "matplotlib.figure",
    "scipy.linalg",
    "torch.utils.tensorboard",
    "vfm_vae.cli",
    "vfm_vae.text",
    "webdataset",
)
NUMBER = struct.Struct("i")  # a process's, then its exit code


class Process:
    """A program that was started; `returncode` is the negative signal that ended it, as in `subprocess.Popen`."""

    def __init__(self, pid: int, end: int, streams: Sequence[io.TextIOWrapper]) -> None:
        self.pid, self.returncode = pid, None
        self._end, self._streams = end, streams

    def poll(self) -> int | None:
        """The exit code, once there is one."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Waits for the end, at most so many seconds."""
        if self.returncode is None:
            if not select.select([self._end], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(str(self.pid), timeout)
            (self.returncode,) = NUMBER.unpack(os.read(self._end, NUMBER.size))
            os.close(self._end)
        return self.returncode

    def printed(self) -> tuple[str, str]:
        """What it has written to its standard output and error by now."""
        for stream in self._streams:
            stream.seek(0)
        return self._streams[0].read(), self._streams[1].read()


class Interpreter(subprocess.Popen):
    """A program in a new interpreter, with the methods of a `Process`."""

    def __init__(self, words: Sequence[str], **options) -> None:
        new = partial(tempfile.TemporaryFile, "w+", errors="replace")
        self._streams = [new(), new()]
        out, err = self._streams
        super().__init__([sys.executable, *words], stdin=subprocess.DEVNULL, stdout=out, stderr=err, **options)

    printed = Process.printed


_server: socket.socket | None = None


def serve() -> None:
    """Forks the process that programs are forked from, before this one computes anything or starts a thread pool."""
    global _server
    if sys.platform != "linux":  # elsewhere libraries don't bear a fork
        return
    _server, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    if os.fork() == 0:
        with _no_return():
            _serve(theirs.detach())
    theirs.close()


def start(
    words: Sequence[str | Path],
    *,
    cwd: Path,
    env: Mapping[str, str] | None = None,
    start_new_session: bool = False,
    ranks: int = 1,
) -> Process | Interpreter:
    """Starts `python words…`: `-m`, a module and its arguments, or a script and its arguments.

    With two ranks, the second is there, too, for Lightning to start it: a child of the first one, as it would be.
    """
    if _server is None:
        return Interpreter([str(word) for word in words], cwd=cwd, env=env, start_new_session=start_new_session)
    streams = [os.fdopen(os.memfd_create(name), "w+", errors="replace") for name in ("stdout", "stderr")]
    end, theirs = os.pipe()
    program = {"words": [str(word) for word in words], "cwd": str(cwd), "env": dict(os.environ if env is None else env)}
    request = json.dumps({"program": program, "session": start_new_session, "ranks": ranks}).encode()
    socket.send_fds(_server, [request], [*(stream.fileno() for stream in streams), theirs])
    os.close(theirs)
    return Process(*NUMBER.unpack(os.read(end, NUMBER.size)), end, streams)


def run(
    words: Sequence[str | Path],
    *,
    cwd: Path,
    env: Mapping[str, str] | None = None,
    timeout: float = 240,
    ranks: int = 1,
) -> subprocess.CompletedProcess:
    """Runs `python words…` to its end."""
    process = start(words, cwd=cwd, env=env, ranks=ranks)
    try:
        code = process.wait(timeout)
    except subprocess.TimeoutExpired:
        os.kill(process.pid, signal.SIGKILL)
        raise
    return subprocess.CompletedProcess(words, code, *process.printed())


# In the process that forks


def _serve(connection: int) -> None:
    """Forks until nobody can ask for more."""
    faulthandler.disable()  # would write to a file of pytest
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.closerange(3, connection)
    os.closerange(connection + 1, os.sysconf("SC_OPEN_MAX"))
    asked, loaded = socket.socket(fileno=connection), False
    while True:
        request, files, *_ = socket.recv_fds(asked, 1 << 20, 3)
        if not request:
            return
        if not loaded:
            _load()
            loaded = True
        if os.fork() == 0:
            _keep(json.loads(request), files)
        for file in files:
            os.close(file)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:  # keepers that are done
                pass


def _load() -> None:
    for name in PRELOADED:
        importlib.import_module(name)
    for name, module in list(sys.modules.items()):  # programs import tests from where they say
        if str(getattr(module, "__file__", None)).startswith(f"{TESTS}/"):
            del sys.modules[name]
    sys.path[:] = [entry for entry in sys.path if not Path(entry).is_relative_to(TESTS)]
    sys.meta_path[:] = [finder for finder in sys.meta_path if "pytest" not in type(finder).__module__]
    atexit._clear()
    atexit.register(multiprocessing.util._exit_function)
    assert len(os.listdir("/proc/self/task")) == 1  # a fork has one thread, and would wait for the others
    gc.collect()
    gc.freeze()
    gc.enable()


def _keep(request: dict, files: list[int]) -> NoReturn:
    """Forks a program, and tells its number and its end."""
    pid = os.fork()
    if pid == 0:
        _begin(request, files)
    with _no_return():
        os.write(files[-1], NUMBER.pack(pid))
        os.write(files[-1], NUMBER.pack(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])))


# In the process of a program


def _begin(request: dict, files: list[int]) -> NoReturn:
    if request["session"]:
        os.setsid()
    for source, target in ((os.open(os.devnull, os.O_RDONLY), 0), (files[0], 1), (files[1], 2)):
        os.dup2(source, target)
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))
    assert request["ranks"] in (1, 2)
    if request["ranks"] == 2:
        subprocess_script.subprocess = SimpleNamespace(Popen=_stand_by())
    _execute(**request["program"])


def _stand_by() -> Callable[..., "_Rank"]:
    """Forks a rank that waits until Lightning starts it by what is returned."""
    taken, given = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(given)
        with open(taken) as pipe:
            program = pipe.read()
        if not program:
            os._exit(0)
        subprocess_script.subprocess = subprocess
        _execute(**json.loads(program))
    os.close(taken)

    def popen(command: Sequence[str], env: Mapping[str, str], cwd: None) -> _Rank:
        with open(given, "w") as pipe:
            json.dump({"words": command[1:], "cwd": os.getcwd(), "env": dict(env)}, pipe)
        return _Rank(pid)

    return popen


class _Rank:
    """What Lightning asks of a process that it started."""

    def __init__(self, pid: int) -> None:
        self.pid, self.returncode = pid, None

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)


def _execute(words: list[str], cwd: str, env: dict[str, str]) -> NoReturn:
    """Runs a program as a new interpreter would, and ends as it would."""
    with _no_return():
        _renew(cwd, env)
        module = words[0] == "-m"
        sys.argv = words[module:]
        first = cwd if module else str(Path(cwd, words[0]).parent)
        sys.path[:] = [first, *filter(None, env.get("PYTHONPATH", "").split(os.pathsep)), *sys.path]
        code = 1
        try:
            if module:
                runpy.run_module(words[1], run_name="__main__", alter_sys=True)
            else:
                runpy.run_path(words[0], run_name="__main__")
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
            if code and not isinstance(end.code, int):
                print(end.code, file=sys.stderr)
        except KeyboardInterrupt:
            traceback.print_exc()
            sys.stderr.flush()
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
        except BaseException:
            traceback.print_exc()
        threading._shutdown()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        os._exit(code)


def _renew(cwd: str, env: dict[str, str]) -> None:
    """What a new interpreter has: its signals, streams, environment and random numbers."""
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGALRM, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    sys.stdin, sys.stdout = os.fdopen(0, closefd=False), os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, errors="backslashreplace", closefd=False)
    for handler in filter(None, (reference() for reference in logging._handlerList)):
        if type(handler) is logging.StreamHandler:
            handler.setStream(sys.stderr)
    rank_zero.rank_zero_only.rank = rank_zero._get_rank() or 0
    torch.set_num_threads(int(env.get("OMP_NUM_THREADS", os.cpu_count())))
    random.seed()
    np.random.seed()
    torch.seed()


@contextlib.contextmanager
def _no_return():
    """Ends a forked process, whatever happens: it must not go on with the tests."""
    try:
        yield
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)
