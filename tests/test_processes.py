"""Programs that are forked run as in a new interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import processes
import pytest

STATE = """
import os, signal, sys, threading
main = sys.modules["__main__"]
print(sys.argv, os.getcwd(), __name__, __spec__, main.__dict__ is globals())
print(sys.path[:2], os.environ.get("NAME"), os.environ.get("OTHER"))
print(*(signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)))
print(threading.active_count(), sorted(os.listdir("/proc/self/fd")), sys.stdin.read())
print("told", file=sys.stderr)
os.write(2, b"and that")
sys.exit(3 if sys.argv[1] == "number" else "a message")
"""


@pytest.mark.parametrize("end", ["number", "message"])
def test_a_program_runs_as_in_a_new_interpreter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str):
    (tmp_path / "state.py").write_text(STATE)
    monkeypatch.setenv("OTHER", "1")
    environment = {"PATH": os.environ["PATH"], "NAME": "x", "PYTHONPATH": "/nowhere"}
    command = ["state.py", end, "two words"]
    ours = processes.run(command, cwd=tmp_path, env=environment)
    streams = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True}
    theirs = subprocess.run([sys.executable, *command], cwd=tmp_path, env=environment, **streams)
    for part in ("returncode", "stdout", "stderr"):
        assert getattr(ours, part) == getattr(theirs, part)
    assert ours.returncode == (3 if end == "number" else 1)


def test_where_nothing_can_be_forked_a_program_gets_a_new_interpreter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(processes, "_server", None)
    (tmp_path / "ends.py").write_text("import sys; print('out'); sys.exit('told')")
    ended = processes.run(["ends.py"], cwd=tmp_path)
    assert (ended.returncode, ended.stdout, ended.stderr) == (1, "out\n", "told\n")
    waits = processes.start(["-c", "import signal; signal.pause()"], cwd=tmp_path)
    assert waits.poll() is None
    os.kill(waits.pid, 15)
    assert waits.wait(20) == -15 == waits.returncode
