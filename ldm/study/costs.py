"""What a diffusion model of a study costs: parameters, seconds of training, operations of a sample."""

from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ldm.pipeline import LatentDiffusion
from ldm.study.plan import LAST, Plan
from ldm.study.results import read_curves, seconds_per_step
from vfm_vae.cli import find_config
from vfm_vae.description import class_at


@dataclass(frozen=True)
class Costs:
    """What a row of a table costs, for the first seed.

    Attributes:
        parameters: Those of the denoiser, and of its partner where it has one.
        seconds: Seconds that training takes, of both; validations do not count.
        gflops: Operations of drawing one latent, in 10⁹.
    """

    parameters: int
    seconds: float
    gflops: float


def costs_of(plan: Plan, name: str) -> Costs | None:
    """What a diffusion model or guided samples cost; None where a checkpoint is not there any more."""
    guided, seed = plan.guided.get(name), plan.seeds[0]
    trained = [name] if guided is None else [guided.denoiser, *([guided.partner] if guided.partner else [])]
    runs = [plan.denoiser_run(each, seed) for each in trained]
    checkpoints = [run / LAST for run in runs]
    if not all(checkpoint.is_file() for checkpoint in checkpoints):
        return None
    models = [LatentDiffusion.from_checkpoint(checkpoint) for checkpoint in checkpoints]
    if guided is not None:
        own = yaml.safe_load(Path(find_config(guided.configs[-1])).read_text())["model"]["guidance"]
        given = {"scale": guided.scales[-1]} | ({"partner": str(checkpoints[1])} if guided.partner else {})
        models[0].guidance = class_at(own["class_path"])(**own.get("init_args", {}) | given)
    parameters = sum(each.numel() for model in models for each in model.parameters())
    return Costs(parameters, sum(map(_seconds, runs)), operations(models[0]) / 1e9)


def _seconds(run: Path) -> float:
    steps = max(step for curve in read_curves(run).values() for step in curve)
    return steps * seconds_per_step(run)


def operations(model: LatentDiffusion) -> int:
    """Operations of drawing one latent: of all products, at two for a multiplication and addition."""
    # Only attention by plain products is counted on every device.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.draw(torch.arange(1), seed=0)
    return int(counter.get_total_flops())
