"""The numbers of a study, from what its runs wrote."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import yaml
from numpy.typing import NDArray
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ldm.study.plan import ENTRY, LAST, Plan, parts_of
from ldm.study.runner import Marks
from vfm_vae.metrics.summary import read_entries
from vfm_vae.timeline import EPOCH
from vfm_vae.tokenizer import read_tokenizer

Verdict = Literal["lower", "higher", "not told apart"]
ACCURACY = "val/class_accuracy"
CERTAIN = 2.0  # standard deviations of a difference between two single runs


@dataclass(frozen=True)
class Curve:
    """A number along training.

    Attributes:
        steps: Steps at which it was measured.
        values: By seed and step, `[seeds, steps]`.
    """

    steps: list[int]
    values: NDArray[np.float64]


@dataclass(frozen=True)
class Comparison:
    """What seeds say of two numbers.

    Attributes:
        difference: Mean of the first less mean of the second.
        spread: Standard deviation of the difference between two single runs, √(s₁² + s₂²); nan for a single seed.
    """

    difference: float
    spread: float

    @property
    def verdict(self) -> Verdict:
        """Whether the first is lower or higher: by more than `CERTAIN` spreads, or nothing is said."""
        if not abs(self.difference) > CERTAIN * self.spread:
            return "not told apart"
        return "lower" if self.difference < 0 else "higher"


def compare(first: NDArray[np.float64], second: NDArray[np.float64]) -> Comparison:
    """Compares two numbers that were measured for several seeds each, `[seeds]`."""
    spread = np.hypot(deviation(first), deviation(second))
    return Comparison(float(first.mean() - second.mean()), float(spread))


def deviation(values: NDArray[np.float64]) -> Any:
    """Standard deviation over seeds, the first dimension; nan where there is but one."""
    return values.std(0, ddof=1) if len(values) > 1 else np.full(values.shape[1:], np.nan)


class Results:
    """What a study measured.

    Args:
        plan: The study, of which all parts are done.

    Attributes:
        tokenizers: Measures of those that were measured, by name, each over seeds, `[seeds]`.
        curves: Those of the diffusion models along training.
        guided: Measures of guided samples by name and scale, each over seeds, `[seeds]`.

    Raises:
        ValueError: if the runs of a diffusion model were measured at other steps for another seed, or a part is not
            done.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        tested = [name for name, tokenizer in plan.tokenizers.items() if tokenizer.test]
        self.tokenizers = {name: self._measures(partial(plan.tokenizer_run, name)) for name in tested}
        self.curves = {name: self._curves(name) for name in plan.denoisers}
        self.guided = {
            name: {scale: self._measures(partial(plan.guided_run, name, scale)) for scale in guided.scales}
            for name, guided in plan.guided.items()
        }

    def _measures(self, run_of: Callable[[int], Path]) -> dict[str, NDArray[np.float64]]:
        """What was measured after training, in the folders that a function returns for each seed."""
        runs = [run_of(seed) for seed in self.plan.seeds]
        entries = [read_entries(run / "metrics.json").get(ENTRY) for run in runs]
        if missing := [str(run) for run, entry in zip(runs, entries, strict=True) if entry is None]:
            raise ValueError(f"report: {missing[0]} was not measured; run the study without --report=true")
        numbers = [entry["metrics"] for entry in entries if entry is not None]
        return {tag: np.array([each[tag] for each in numbers], float) for tag in numbers[0]}

    def _curves(self, name: str) -> dict[str, Curve]:
        runs = [self.plan.denoiser_run(name, seed) for seed in self.plan.seeds]
        read = [read_curves(run) for run in runs]
        curves = {}
        for tag, known in read[0].items():
            steps = sorted(known)
            if differing := [run for run, curve in zip(runs, read, strict=True) if sorted(curve.get(tag, ())) != steps]:
                raise ValueError(f"report: {differing[0]} was measured at other steps than {runs[0]}")
            curves[tag] = Curve(steps, np.array([[curve[tag][step] for step in steps] for curve in read], float))
        return curves

    def samples(self, denoiser: str, distance: str) -> Curve:
        """A distance of a diffusion model's samples along training."""
        return self.curves[denoiser][self.plan.distances[distance].samples]

    def blocks(self, denoiser: str) -> dict[int, Curve]:
        """CKNNA of a diffusion model's blocks by number, along training."""
        prefix = "val/cknna/block_"
        tags = sorted(tag for tag in self.curves[denoiser] if tag.startswith(prefix))
        return {int(tag.removeprefix(prefix)): self.curves[denoiser][tag] for tag in tags}


class Logged(NamedTuple):
    """A number that a run logged.

    Attributes:
        steps: Steps trained by then.
        seconds: When, in seconds.
        value: The number.
    """

    steps: int
    seconds: float
    value: float


def read_curves(run: Path) -> dict[str, dict[int, float]]:
    """What a run's validations logged, by name and steps trained; where one was logged twice, what came last.

    Raises:
        ValueError: if there is nothing, or it can't be told of which steps it is.
    """
    logged = {tag: numbers for tag, numbers in _logged(run).items() if tag.startswith("val/")}
    if not logged:
        raise ValueError(f"report: {run} has logged no validation; run the study without --report=true")
    return {tag: {number.steps: number.value for number in numbers} for tag, numbers in logged.items()}


def seconds_per_step(run: Path) -> float:
    """Seconds that a run took for a step of training: the median, so validations and breaks don't count."""
    pairs = [(a, b) for a, b in pairwise(_logged(run)["train/loss"]) if b.steps > a.steps]
    return float(np.median([(b.seconds - a.seconds) / (b.steps - a.steps) for a, b in pairs]))


def _logged(run: Path) -> dict[str, list[Logged]]:
    """The numbers that a run logged, by name; none where there is no run."""
    if not run.is_dir():
        return {}
    events = EventAccumulator(str(run), size_guidance={"scalars": 0})
    events.Reload()
    found = {tag: events.Scalars(tag) for tag in events.Tags()["scalars"]}
    if not found:
        return {}
    # A former version counted steps, from 0.
    steps_of = (lambda step: step + 1) if EPOCH in found else _steps_of(run)
    return {tag: [Logged(steps_of(e.step), e.wall_time, e.value) for e in values] for tag, values in found.items()}


def _steps_of(run: Path) -> Callable[[int], int]:
    """Converts images that a run has seen into steps; it has trained in steps of equal size."""
    file = run / "metrics.json"
    trained = [entry for key, entry in read_entries(file).items() if key != ENTRY and entry.get("images_seen")]
    if not trained:
        raise ValueError(f"report: {file} does not say how many images the run has seen; train it to its end")
    last = max(trained, key=lambda entry: int(entry["step"]))
    images, steps = int(last["images_seen"]), int(last["step"])
    return lambda seen: round(seen * steps / images)


def facts_of(plan: Plan, name: str) -> dict[str, str]:
    """What a tokenizer is and how it was trained, from what its runs wrote, for a table."""
    tokenizer, run = plan.tokenizers[name], plan.tokenizer_run(name, plan.seeds[0])
    stages = [run.parent / stage for stage in tokenizer.stages]
    options = [yaml.safe_load((stage / "config.yaml").read_text()) for stage in stages]
    entries = [list(read_entries(stage / "metrics.json").items()) for stage in stages]
    last, model = options[-1], options[-1]["model"]
    steps = [next(entry["step"] for key, entry in found if key != ENTRY) for found in entries]
    counts = {"trained": "", "frozen": ""} if not (run / LAST).is_file() else _parameters(run / LAST)
    return {
        "architecture": _architecture(model["model"]),
        "trained parameters": counts["trained"],
        "frozen parameters": counts["frozen"],
        "images seen": f"{model['max_images']}",
        "steps": " + ".join(map(str, steps)),
        "batch": f"{last['data']['batch_size']}",
        "optimiser": model["optimizer"]["class_path"].rpartition(".")[2],
        "learning rate": f"{model['optimizer']['init_args']['lr']:g}",
        "losses": "; then ".join(dict.fromkeys(_losses(each["model"]) for each in options)),
        "noise of the decoder's input": f"{model.get('latent_noise', 0.0):g}",
        "data": plan.data,
        "seeds": ", ".join(map(str, plan.seeds)),
        "seconds of training": pm(_seconds(plan, name), 0),
    }


def _architecture(model: Mapping[str, Any]) -> str:
    vfm = (model["init_args"].get("vfm") or {}).get("init_args", {}).get("name")
    return model["class_path"].rpartition(".")[2] + (f", {vfm}" if vfm else "")


def _losses(model: Mapping[str, Any]) -> str:
    options = model["objective"].get("init_args", model["objective"])
    after = options.get("adversarial_from") or 0
    left_out = {"alignment_every", "multi_resolution_images", "adversarial_from", "distmat_margin", "cos_margin"}
    named = []
    for key, weight in options.items():
        if type(weight) in (int, float) and weight and key not in left_out:
            since = f" from image {after}" if after and key in ("adversarial", "adversarial_patch") else ""
            named.append(f"{key.replace('_', ' ')} {weight:g}{since}")
    return ", ".join(named)


def _parameters(checkpoint: Path) -> dict[str, str]:
    tokenizer = read_tokenizer(checkpoint)
    vfm = getattr(tokenizer.vfm, "network", None)
    counted = {"trained": tokenizer, "frozen": vfm}
    return {
        kind: "0" if module is None else f"{sum(each.numel() for each in module.parameters()) / 1e6:.2f} M"
        for kind, module in counted.items()
    }


def _seconds(plan: Plan, name: str) -> NDArray[np.float64]:
    """Seconds that a tokenizer's training took, all stages together, over seeds."""
    marks, parts = Marks(Path(plan.folder)), parts_of(plan)
    taken = dict.fromkeys(plan.seeds, 0.0)
    for seed in plan.seeds:
        for part in parts:
            if part.kind == "tokenizer" and part.name.startswith(f"seed{seed}/{name}/"):
                taken[seed] += marks.read(part).get("seconds", np.nan)
    return np.array(list(taken.values()))


def pm(values: NDArray[np.float64] | Sequence[float], digits: int = 3) -> str:
    """Mean ± standard deviation over seeds, as text; the mean alone for one seed."""
    array = np.asarray(values, float)
    spread = "" if len(array) < 2 else f" ± {deviation(array):.{digits}f}"
    return f"{array.mean():.{digits}f}{spread}"
