"""Folders as runs of each kind leave them, small, and made without training."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

NASTY = "<script>alert(1)</script> & $x$ 'q\""
TOKENIZER = {
    "model": {
        "model": {"class_path": "vfm_vae.tokenizer.VFMVAE", "init_args": {"vfm": {"init_args": {"name": "vit_small"}}}},
        "objective": {"l1": 1.0},
        "optimizer": {"class_path": "torch.optim.Adam", "init_args": {"lr": 0.002}},
        "max_images": 800,
        "init_from": None,
    },
    "data": {"root": "data/photos", "image_size": 64},
    "trainer": {"callbacks": [{"class_path": "callbacks.ema.EMA", "init_args": {"decay": 0.9}}]},
}
DIFFUSION = {
    "model": {
        "model": {"class_path": "ldm.models.lightningdit.LightningDiT", "init_args": {"depth": 2}},
        "sampler": {"class_path": "ldm.samplers.Euler"},
        "alignment": None,
    },
    "data": {"root": "runs/latents", "source": "latents"},
    "trainer": {"max_steps": 40},
}
SETTINGS = {"model": {"seed": 0, "precision": "32-true"}, "CKNNACallback": {"num_images": 520, "k": 10}}


def session(**changes: Any) -> dict[str, Any]:
    """A session that ended well, but for some changes."""
    return {
        "command": "python -m vfm_vae fit -c demo/tokenizer.yaml -c demo/strong.yaml --model.seed=1",
        "program": "vfm_vae",
        "configs": ["demo/tokenizer.yaml", "demo/strong.yaml"],
        "options": ["--model.seed=1"],
        "started": "2026-01-02T10:00:00+01:00",
        "ended": "2026-01-02T11:30:05+01:00",
        "outcome": "finished",
        "error": None,
        "images_seen": [0, 800],
        "steps": [0, 100],
        "seconds": 5405.2,
        "commit": "0123456789abcdef+changes",
        "versions": {"python": "3.11.2", "torch": "2.14.1"},
        "device": "8 x NVIDIA H100 80GB HBM3",
        "devices": 8,
        "nodes": 1,
        "precision": "bf16-mixed",
        "peak_memory_gb": 41.25,
        "skipped_steps": 0,
        "damaged_images": 0,
        **changes,
    }


def write_run(
    folder: Path, config: dict, curves: dict[str, dict[int, float]], sessions: list[dict] | None = None
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    if sessions:
        (folder / "history.json").write_text(json.dumps({"sessions": sessions}))
    log(folder, curves)


def log(folder: Path, curves: dict[str, dict[int, float]]) -> None:
    writer = SummaryWriter(str(folder))
    for tag, points in curves.items():
        for step, value in points.items():
            writer.add_scalar(tag, value, step)
    writer.close()


def curve(start: float, first: int = 8, last: int = 800, count: int = 20) -> dict[int, float]:
    return {int(at): start / (1 + number) for number, at in enumerate(np.linspace(first, last, count))}


def picture(file: Path, width: int = 120, height: int = 80, noise: bool = False) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3)) if noise else np.zeros((height, width, 3))
    Image.fromarray(pixels.astype(np.uint8)).save(file)


def write_metrics(file: Path, **entries: dict[str, float | None]) -> None:
    content = {
        name: {
            "epoch": 3,
            "step": 100,
            "images_seen": 800,
            "metrics": metrics,
            "versions": {"torch": "2.14.1"},
            "settings": SETTINGS,
        }
        for name, metrics in entries.items()
    }
    file.write_text(json.dumps(content))


def tokenizer(folder: Path) -> None:
    """Two stages, the second one from the first, and a test of the last one."""
    losses = {"train/loss_l1": curve(1.0), "train/grad_norm": curve(5.0), "val/psnr": {400: 20.1, 800: 24.25}}
    losses |= {"train/lr": dict.fromkeys((8, 400, 800), 1e-3), "train/device/mfu": curve(0.5), "new/one": {8: 1.0}}
    write_run(folder / "strong", TOKENIZER, losses, [session()])
    model = TOKENIZER["model"] | {"init_from": "runs/demo/strong/checkpoints/last.ckpt", "max_images": 1600}
    later = {tag: {at + 800: value / 2 for at, value in points.items()} for tag, points in losses.items()}
    stopped = session(outcome="stopped", images_seen=[800, 1200], started="2026-01-03T10:00:00+01:00")
    goes_on = session(images_seen=[1200, 1600], started="2026-01-04T10:00:00+01:00", skipped_steps=2, damaged_images=3)
    write_run(folder / "weak", TOKENIZER | {"model": model}, later, [stopped, goes_on])
    picture(folder / "strong/images/val.png")
    picture(folder / "weak/images/val.png")
    tested = {"test/psnr": 24.5678901, "test/cknna/latent": 0.9612345, "test/my_metric": 1e-7, "test/ssim": None}
    for kind, strengths in {"noise": ("0.05", "0.20"), "scale": ("1", "0.5"), "rotation": ("0", "90")}.items():
        tested |= {f"test/se_cknna/latent/{kind}_{strength}": 0.7 for strength in strengths}
    validated = {"val/psnr": 24.251, "val/cknna/latent": 0.95, "train/loss_kl": 11564.29296875, "images_seen": 1600.0}
    write_metrics(folder / "metrics.json", strong=validated, weak=validated, weak_test=tested)


def diffusion(folder: Path, alignment: str | None = None) -> None:
    """A diffusion model, with samples, CKNNA of its blocks and losses by time."""
    curves = {"train/loss": curve(2.0), "val/loss": {400: 1.1, 800: 1.0}, "val/fd_vit_small/train": {400: 9, 800: 5}}
    for number in range(10):
        curves[f"loss_by_time/val_{number / 10:.2f}"] = {400: 1 + number / 10, 800: 0.5 + number / 10}
    curves |= {f"val/cknna/block_{block:02d}": {400: 0.1 * block, 800: 0.2 * block} for block in (1, 2, 3)}
    config = DIFFUSION | {"model": DIFFUSION["model"] | {"alignment": alignment}}
    command = {"program": "ldm", "configs": ["demo/ldm.yaml", "mine.yaml"], "command": "python -m ldm fit -c mine.yaml"}
    write_run(folder / "ldm", config, curves, [session(**command)])
    for scale in ("1", "2"):
        picture(folder / f"ldm/images/samples_guidance_{scale}.png")
    numbers = {
        "val/fd_vit_small/train": 5.04321,
        "val/class_accuracy": 0.83,
        "val/loss": 1.0,
        "val/cknna/block_01": 0.2,
    }
    write_metrics(folder / "metrics.json", ldm=numbers, ldm_guided=numbers | {"val/class_accuracy": 0.9})


def reg(folder: Path) -> None:
    """A diffusion model that is aligned."""
    diffusion(folder, alignment="ldm.alignment.REG")
    log(folder / "ldm", {"train/loss_alignment": curve(1.0), "train/loss_cls": curve(0.5)})


def study(folder: Path) -> None:
    """What a study writes, of one seed."""
    diffusion(folder / "seed0/ldm/ours")
    tokenizer(folder / "seed0/ours")
    picture(folder / "fd.png")
    report = (
        f"**Yes.** It is {NASTY}.\n\n![FD](fd.png)\n\n## Models\n\n| latents of | FD |\n|---|---|\n| `ours` | 5 ± 1 |\n"
    )
    (folder / "report.md").write_text(report)
    (folder / "parts").mkdir()
    for name, done in (("seed0.ours.strong", True), ("seed1.ours.strong", False)):
        (folder / f"parts/{name}.json").write_text(json.dumps({"done": done, "seconds": 3.0}))


def interrupted(folder: Path) -> None:
    """Killed before its first validation, in the middle of writing an event."""
    write_run(folder, TOKENIZER, {"train/loss_l1": curve(1.0)}, [session(ended=None, outcome=None, images_seen=[0, 0])])
    (file,) = folder.glob("events*")
    file.write_bytes(file.read_bytes()[: file.stat().st_size * 2 // 3])


def former(folder: Path) -> None:
    """A version that kept no history, and logged by steps, eight images each."""
    steps = {step: 1 / (1 + step) for step in range(9, 100, 10)}
    curves = {
        "train/loss_l1": steps,
        "epoch": dict.fromkeys(steps, 0.0),
        "hp_metric": {0: -1.0},
        "val/psnr": {99: 20.5},
    }
    write_run(folder, TOKENIZER, curves | {"images_seen": {step: 8.0 * (step + 1) for step in steps}})
    write_metrics(folder / "metrics.json", run={"val/psnr": 20.5})


def table(folder: Path) -> None:
    """The CSV logger's, whose folders are numbered."""
    place = folder / "lightning_logs/version_0"
    write_run(place, TOKENIZER, {}, [session()])
    for file in place.glob("events*"):
        file.unlink()
    with open(place / "metrics.csv", "w", newline="") as file:
        rows = csv.DictWriter(file, ["step", "train/loss_l1", "val/psnr"])
        rows.writeheader()
        rows.writerows({"step": at, "train/loss_l1": value} for at, value in curve(1.0).items())
        rows.writerow({"step": 800, "val/psnr": 21.5})
    write_metrics(place / "metrics.json", run={"val/psnr": 21.5})


KINDS = {each.__name__: each for each in (tokenizer, diffusion, reg, study, interrupted, former, table)}
