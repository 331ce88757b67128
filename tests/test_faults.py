"""Training from the command line on a small disk that goes wrong while `last.ckpt` is replaced, and going on after it.

The disk is a file system of its own in memory, which only the processes of a test see; TMPDIR is on another one.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Files go to the small disk.
SMALL = """
model: {max_images: 96}
data: {root: %s}
trainer:
  limit_val_batches: 0
  logger:
    class_path: lightning.pytorch.loggers.TensorBoardLogger
    init_args: {save_dir: disk, name: run, version: ""}
  callbacks:
  - class_path: callbacks.ema.EMA
  - class_path: fault.Fault
  - class_path: callbacks.checkpoint.LastCheckpoint
    init_args: {every_n_steps: 4}
  - class_path: callbacks.preemption.StopOnSignal
"""

# At step 8, while `last.ckpt` of step 4 is replaced, what FAULT says.
FAULT = '''
import os, shutil, signal, subprocess
from lightning.pytorch import Callback

FAULT = os.environ.get("FAULT")


def fill(free):
    """Leaves so many bytes of the disk."""
    with open("disk/filler", "wb") as file:
        file.write(bytes(usage("disk").free - free))


def fill_meanwhile(place):
    found = usage(place)
    fill(1 << 20)
    return found


def kill(*names):
    if str(names[1]).endswith("last.ckpt"):
        os.kill(os.getpid(), signal.SIGKILL)
    replace(*names)


def read_only():
    subprocess.run(["mount", "-o", "remount,ro", "disk"], check=True)


replace, usage = os.replace, shutil.disk_usage


class Fault(Callback):
    def on_save_checkpoint(self, trainer, module, checkpoint):
        if trainer.global_step != 8:
            return
        if FAULT == "killed":
            os.replace = kill
        elif FAULT == "filled":
            shutil.disk_usage = fill_meanwhile  # after it is asked for the space

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.global_step == 6 and FAULT == "read-only":
            read_only()
            os.kill(os.getpid(), signal.SIGTERM)
'''

# What happens on the disk, as long as the processes live that see it.
STORY = """
import json, os, subprocess, sys, torch
from pathlib import Path

*configs, fault = sys.argv[1:]
os.mkdir("disk")
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100m", "disk", "disk"], check=True)
last = Path("disk/run/checkpoints/last.ckpt")


def fit(**environment):
    command = [sys.executable, "-m", "vfm_vae", "fit", *configs, "-c", "run.yaml"]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
    step = torch.load(last, weights_only=True)["global_step"] if last.is_file() else None
    return {"code": done.returncode, "errors": done.stderr, "step": step}


def files():
    return sorted(file.name for file in last.parent.iterdir())


story = [fit(FAULT=fault) | {"files": files()}]
subprocess.run(["mount", "-o", "remount,rw", "disk"], check=True)
Path("disk/filler").unlink(missing_ok=True)
story.append(fit() | {"files": files()})
print(json.dumps(story))
"""


@pytest.mark.slow
@pytest.mark.mounts
@pytest.mark.parametrize(
    ("fault", "code", "reason"),
    [("killed", -9, ""), ("filled", 2, "No space left on device"), ("read-only", 2, "Read-only file system")],
)
def test_the_former_checkpoint_outlives_it(tmp_path: Path, photos: Path, fault: str, code: int, reason: str):
    (tmp_path / "run.yaml").write_text(SMALL % photos)
    (tmp_path / "fault.py").write_text(FAULT)
    (tmp_path / "story.py").write_text(STORY)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    command = ["unshare", "--map-root-user", "--mount", sys.executable, "story.py"]
    command += ["-c", str(ROOT / "configs/demo/tokenizer.yaml"), "-c", str(ROOT / "tests/small.yaml"), fault]
    told = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=250)
    assert told.returncode == 0, told.stderr
    broken, after = json.loads(told.stdout)
    assert (broken["code"], broken["step"]) == (code, 4)
    says = rf"^error: can't write '.*/last.ckpt' \({reason}\); the former file is kept$" if reason else ""
    assert re.search(says, broken["errors"], re.MULTILINE) and ": saved" not in broken["errors"]
    left = [".last.ckpt.partial"] if fault == "killed" else []
    assert broken["files"] == [*left, "last.ckpt"]
    assert (after["code"], after["step"], after["files"]) == (0, 12, ["last.ckpt"])
