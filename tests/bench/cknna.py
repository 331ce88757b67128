"""CKNNA from a search of neighbours against its usual dense form, and its time and memory at many samples."""

import math
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from timing import best_times, table
from torch import Tensor

from vfm_vae.metrics.alignment import cknna

K = 10
WIDTH, TARGETS = 768, {4000: 8.0, 10000: 20.0}  # samples: at least so many times as fast as the dense form
LARGE_WIDTH, LARGE = 1024, (5000, 10000, 20000, 50000)
MEMORY_TARGET = 2000.0  # MB above the features at the largest
GROWTH_TARGET = 1.25  # of time over n^2, against the fewest samples: leaves room for a busy machine


def related_features(n: int, width: int, seed: int) -> Tensor:
    """Unit rows `[n, width]`; whatever the seed, 32 directions are in common."""
    common = torch.randn(n, 32, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(n, width, generator=generator)
    features.addmm_(common, torch.randn(32, width, generator=generator), alpha=1 / math.sqrt(32))
    for part in features.split(1024):
        F.normalize(part, dim=1, out=part)
    return features


def dense_cknna(a: Tensor, b: Tensor) -> Tensor:
    """The unbiased form as it is usually written: kernels, masks and products are `n x n`."""
    n = len(a)

    def neighbours(kernel: Tensor) -> Tensor:
        near = kernel.clone().fill_diagonal_(-math.inf).topk(K).indices
        return torch.zeros_like(kernel).scatter_(1, near, 1)

    def hsic(p: Tensor, q: Tensor) -> Tensor:
        p, q = p.clone().fill_diagonal_(0), q.clone().fill_diagonal_(0)
        sums = p.sum() * q.sum() / ((n - 1) * (n - 2)) - 2 * (p @ q).sum() / (n - 2)
        return ((p * q.T).sum() + sums) / (n * (n - 3))

    def align(p: Tensor, q: Tensor) -> Tensor:
        mask = neighbours(p) * neighbours(q)
        return hsic(mask * p, mask * q)

    kernel_a, kernel_b = a @ a.T, b @ b.T
    scale = align(kernel_a, kernel_a) * align(kernel_b, kernel_b)
    return align(kernel_a, kernel_b) / (scale.sqrt() + 1e-6)


def against_dense() -> list[str]:
    """Prints the ratios; returns what missed its target."""
    rows, missed = [], []
    for n, target in TARGETS.items():
        a, b = (related_features(n, WIDTH, seed) for seed in (1, 2))
        values = {"ours": cknna(a, b, K).item(), "dense": dense_cknna(a, b).item()}
        seconds = best_times(1, ours=lambda a=a, b=b: cknna(a, b, K), dense=lambda a=a, b=b: dense_cknna(a, b))
        difference = abs(values["ours"] - values["dense"])
        assert difference < 1e-4, f"at {n} samples CKNNA differs by {difference:.1e}"
        ratio = seconds["dense"] / seconds["ours"]
        times = f"{seconds['dense']:.2f} s", f"{seconds['ours']:.3f} s"
        rows.append((str(n), *times, f"{ratio:.1f}x", f"{target:g}x", f"{values['ours']:.5f}", f"{difference:.0e}"))
        if ratio < target:
            missed.append(f"{n} samples: {ratio:.1f} times as fast as the dense form, below {target:g}")
    columns = "samples", "dense", "ours", "ratio", "at least", "CKNNA", "difference"
    table(f"CKNNA of {WIDTH} channels against the dense form, CPU", rows, *columns)
    return missed


def memory_mb(field: str) -> float:
    """What the system says about this process: `VmRSS`, what it holds, or `VmHWM`, the most since it was reset.

    The peak in `resource.getrusage` would not do: a process starts with that of the one that started it.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def measure(n: int) -> None:
    """Prints seconds, megabytes above the features and the value; for a process of its own."""
    a, b = (related_features(n, LARGE_WIDTH, seed) for seed in (1, 2))
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak, which may be of making the features
    before = memory_mb("VmRSS")
    seconds, value = math.inf, math.nan
    for _ in range(2 if n > 20000 else 5):
        start = time.perf_counter()
        value = cknna(a, b, K).item()
        seconds = min(seconds, time.perf_counter() - start)
    print(seconds, memory_mb("VmHWM") - before, value)


def at_many_samples() -> list[str]:
    """Prints time and memory; returns what missed its target."""
    rows, missed, first = [], [], math.nan
    for n in LARGE:
        answer = subprocess.run([sys.executable, __file__, str(n)], check=True, capture_output=True, text=True).stdout
        seconds, memory, value = (float(word) for word in answer.split()[-3:])
        first = seconds / n**2 if math.isnan(first) else first
        growth = seconds / n**2 / first
        features = 2 * n * LARGE_WIDTH * 4 / 2**20
        sizes = f"{features:.0f} MB", f"{memory:.0f} MB"
        rows.append((str(n), f"{seconds:.2f} s", *sizes, f"{growth:.2f}", f"{value:.5f}"))
        if memory > MEMORY_TARGET:
            missed.append(f"{n} samples: {memory:.0f} MB above the features, more than {MEMORY_TARGET:.0f}")
        if growth > GROWTH_TARGET:
            missed.append(f"{n} samples: time over n^2 is {growth:.2f} times that at {LARGE[0]}, above {GROWTH_TARGET}")
    columns = "samples", "time", "features", "above them", "time / n^2, relative", "CKNNA"
    table(f"CKNNA of {LARGE_WIDTH} channels, a process for each, CPU", rows, *columns)
    return missed


def main() -> None:
    """Prints both tables; ends with an error where a target is missed."""
    missed = against_dense() + at_many_samples()
    if missed:
        sys.exit("missed: " + "; ".join(missed))


if __name__ == "__main__":
    measure(int(sys.argv[1])) if len(sys.argv) > 1 else main()
