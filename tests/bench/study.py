"""What alignment does to a small denoiser, as a table: reads the `metrics.json` that `make study` leaves.

python tests/bench/study.py runs/study/metrics.json
"""

import json
import sys
from pathlib import Path

RUNS = {"none": "no alignment", "repa": "REPA", "reg": "REG"}


def table(entries: dict[str, dict[str, float]]) -> str:
    """A row for each measure, a column for each run, in Markdown."""
    rows = {"FD of samples to training images": next(n for n in entries["none"] if n.startswith("val/fd_"))}
    rows["class accuracy of samples"] = next(n for n in entries["none"] if "accuracy" in n)
    blocks = sorted(name for name in entries["none"] if name.startswith("val/cknna/block_"))
    rows |= {f"CKNNA of block {name.rpartition('_')[2]}": name for name in blocks}
    lines = ["| | " + " | ".join(RUNS.values()) + " |", "|---|" + "---|" * len(RUNS)]
    for title, name in rows.items():
        lines.append(f"| {title} | " + " | ".join(f"{entries[run][name]:.3f}" for run in RUNS) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    stored = json.loads(Path(sys.argv[1]).read_text())
    print(table({run: stored[run]["metrics"] for run in RUNS}))
