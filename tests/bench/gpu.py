"""What one GPU does with the full-size models: training, sampling, evaluation, within six minutes.

    python tests/bench/gpu.py                                      # all, in this order
    python tests/bench/gpu.py --only tokenizer --batch-size 32     # a run by itself, as it is or otherwise
    python tests/bench/gpu.py --toy --device cpu                   # tries the benchmark, measures nothing

Each run is a process with a time limit of its own, so that none spoils another. Compiled code goes to a folder that is
new, which the runs share: the first starts cold. The file of results is written over and over while they go on.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from shutil import which
from textwrap import shorten
from typing import Any, NamedTuple

import torch
from timing import table

Figures = dict[str, Any]


class Run(NamedTuple):
    """A run of `gpu_runs.py`.

    Attributes:
        seconds: that it should take; with less left it is not begun.
        limit: seconds after which it is ended.
    """

    seconds: float
    limit: float


RUNS = {
    "lightningdit": Run(50, 100),
    "lightningdit_warm": Run(20, 50),
    "reg": Run(45, 90),
    "reg_eager": Run(15, 40),
    "lightningdit_eager": Run(15, 40),
    "tokenizer_16_eager": Run(25, 50),
    "sampling": Run(50, 100),
    "cknna": Run(10, 30),
    "evaluation": Run(15, 40),
    "vavae": Run(100, 180),
    "rae": Run(30, 90),
    "ditdh": Run(60, 120),
    "tokenizer": Run(90, 400),  # last, since its compilation may take long
    "tokenizer_16": Run(35, 80),
}

# What was measured on one H200 before anything was compiled, and with the public code there.
CARD = "H200"
BEFORE = {
    ("lightningdit", "images_per_s"): 239.5,
    ("lightningdit", "peak_gb"): 81.1,
    ("tokenizer", "images_per_s"): 20.2,
    ("tokenizer_16", "images_per_s"): 20.2,
    ("tokenizer_16", "peak_gb"): 54.5,
}
PUBLIC = {
    ("lightningdit", "images_per_s"): 468.7,
    ("lightningdit", "peak_gb"): 53.9,
    ("tokenizer", "images_per_s"): 10.9,
    ("tokenizer_16", "images_per_s"): 10.9,
    ("tokenizer_16", "peak_gb"): 130.1,
}
TARGETS = {
    ("lightningdit", "images_per_s"): "≥ 610, goal 690",
    ("lightningdit", "peak_gb"): "≤ 54",
    ("lightningdit", "first_step_s"): "≤ 30",
    ("tokenizer", "images_per_s"): "≥ 60, goal 100",
    ("tokenizer", "first_steps_s"): "≤ 120",
    ("tokenizer_16", "images_per_s"): "≥ 60, goal 100",
    ("sampling", "speedup"): "≥ 2",
    ("sampling", "guided_speedup"): "≥ 2",
}
# A figure over that of another run.
RATIOS = [
    ("lightningdit", "lightningdit_eager", "images_per_s", ""),
    ("tokenizer_16", "tokenizer_16_eager", "images_per_s", ""),
    ("reg", "reg_eager", "images_per_s", "≥ 2.2"),
    ("lightningdit_warm", "lightningdit", "first_step_s", "≤ 0.25"),
]
UNSHOWN = {"card", "torch", "error", "traceback", "log", "wall_s"}


class Worker:
    """A process that imports everything, then waits to be told which run is its own.

    Args:
        folder: for its files, and for compiled code.
        options: of the command line.
    """

    def __init__(self, folder: Path, options: argparse.Namespace) -> None:
        handle, name = tempfile.mkstemp(suffix=".json", dir=folder)
        os.close(handle)
        self.out, self.log = Path(name), Path(name).with_suffix(".log")
        command = [sys.executable, str(Path(__file__).with_name("gpu_runs.py")), f"--out={name}"]
        command += [f"--device={options.device}", *(["--toy"] if options.toy else [])]
        command += [f"--batch-size={options.batch_size}"] if options.batch_size else []
        command += [f"--option={option}" for option in options.option]
        caches = {"TORCHINDUCTOR_CACHE_DIR": f"{folder}/compiled", "TRITON_CACHE_DIR": f"{folder}/compiled/triton"}
        pipes = {"stdin": subprocess.PIPE, "stdout": self.log.open("w"), "stderr": subprocess.STDOUT}
        self.process = subprocess.Popen(command, env=os.environ | caches, process_group=0, text=True, **pipes)
        pipes["stdout"].close()

    def begin(self, name: str) -> None:
        """Tells it."""
        with suppress(BrokenPipeError):  # where it has ended already, its log says why
            self.process.stdin.write(f"{name}\n")
            self.process.stdin.close()

    def figures(self) -> Figures:
        """What it has noted so far."""
        text = self.out.read_text()
        return json.loads(text) if text else {}

    def end(self) -> None:
        """Ends it, and the compiler's processes, which are of its group."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


class Results:
    """The file of results.

    Args:
        path: of the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.head = {"date": datetime.now().astimezone().isoformat(timespec="seconds"), "torch": torch.__version__}
        self.head["commit"] = commit()
        self.runs: dict[str, Figures] = {}
        path.parent.mkdir(parents=True, exist_ok=True)

    @property
    def card(self) -> str | None:
        """The device's name, which runs note."""
        return next((figures["card"] for figures in self.runs.values() if "card" in figures), None)

    def put(self, name: str, figures: Figures) -> None:
        """Notes a run's figures, in the file, too."""
        self.runs[name] = figures
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.head | {"card": self.card, "runs": self.runs}, indent=1))
        partial.replace(self.path)


def commit() -> str | None:
    """Of the code, where git knows."""
    if which("git") is None:
        return None
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None


def follow(worker: Worker, name: str, limit: float, results: Results) -> Figures:
    """Has a worker do a run within so many seconds; what came of it."""
    start = time.monotonic()
    worker.begin(name)
    late = False
    while worker.process.poll() is None and not late:
        time.sleep(0.2)
        late = time.monotonic() - start > limit
        results.put(name, worker.figures())
    worker.end()
    figures = worker.figures() | {"wall_s": time.monotonic() - start}
    log = worker.log.read_text(errors="replace").strip()[-8000:]
    if late:
        figures.setdefault("error", f"ended after {limit:.0f} s")
    elif worker.process.returncode:
        last = log.rpartition("\n")[2]
        figures.setdefault("error", f"the process ended with code {worker.process.returncode}: {last}")
    if "error" in figures:
        figures["log"] = log
    results.put(name, figures)
    return figures


def run_all(names: list[str], options: argparse.Namespace, results: Results) -> None:
    """Does the runs one after the other, while the next one's process imports what it needs."""
    end = time.monotonic() + options.budget
    workers: list[Worker] = []
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        try:
            workers.append(Worker(Path(folder), options))
            for name in names:
                left = end - time.monotonic()
                if left < RUNS[name].seconds:
                    figures = {"error": f"left out: {left:.0f} s are left, it takes about {RUNS[name].seconds:.0f}"}
                    results.put(name, figures)
                else:
                    workers.append(Worker(Path(folder), options))
                    figures = follow(workers[0], name, min(RUNS[name].limit, left), results)
                    workers.pop(0)
                print(line(name, figures), flush=True)
        finally:
            for worker in workers:
                worker.end()


def number(name: str, value: Any) -> str:
    """A figure as tables show it."""
    if name == "mfu":
        return f"{value:.1%}"
    return f"{value:.3g}" if isinstance(value, float) and abs(value) < 100 else f"{value:.0f}"


def line(name: str, figures: Figures) -> str:
    """A run's figures on one line."""
    shown = [f"{key} {number(key, value)}" for key, value in figures.items() if key not in UNSHOWN]
    shown += [f"took {figures['wall_s']:.0f} s"] if "wall_s" in figures else []
    return f"{name}: " + ", ".join(shown + ([figures["error"]] if "error" in figures else []))


def rows(results: Results) -> list[tuple[str, ...]]:
    """Of the table: each figure, beside the former one, the public code's and what is wanted."""
    found = []
    for name, figures in results.runs.items():
        for key, value in figures.items():
            if key not in UNSHOWN:
                beside = [versus(value, known.get((name, key)), results.card) for known in (BEFORE, PUBLIC)]
                found.append((name, key, number(key, value), *beside, TARGETS.get((name, key), "")))
        if "error" in figures:
            found.append((name, "error", shorten(figures["error"], 60), "", "", ""))
    for name, other, key, target in RATIOS:
        values = [results.runs.get(run, {}).get(key) for run in (name, other)]
        if all(values):
            found.append((f"{name} / {other}", key, f"{values[0] / values[1]:.2f}", "", "", target))
    return found


def versus(value: float, known: float | None, card: str | None) -> str:
    """A known figure, and how many times as much the measured one is, where both are of the same card."""
    if known is None:
        return ""
    return f"{known:g} ({value / known:.2f}x)" if CARD in (card or "") else f"{known:g}"


def main() -> None:
    """Prints a line for each run, and one table; ends with an error where a run did."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", action="append", choices=list(RUNS), help="may be given more than once")
    parser.add_argument("--out", type=Path, default=Path("runs/bench_gpu.json"))
    parser.add_argument("--budget", type=float, default=350.0, help="seconds for all runs together")
    parser.add_argument("--batch-size", type=int, help="instead of each run's own")
    parser.add_argument("--option", action="append", default=[], help="of the model's command line, --option=--a.b=c")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--toy", action="store_true", help="tiny models, a step or two")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("no GPU is at hand: this measures one (CUDA)", file=sys.stderr)
        sys.exit(2)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started ends, too
    os.environ.setdefault("COLUMNS", "120")  # of the table, where there is no terminal
    results = Results(options.out)
    run_all(options.only or list(RUNS), options, results)
    title = f"{results.card or options.device}, torch {results.head['torch']}; before and public code: {CARD}"
    table(title, rows(results), "run", "figure", "measured", "before", "public code", "wanted")
    sys.exit(any("log" in figures for figures in results.runs.values()))


if __name__ == "__main__":
    main()
