"""What `gpu.py` measures: each run in a process of its own, which notes its figures in a file as it gets them.

    python tests/bench/gpu_runs.py lightningdit --out figures.json

Data is one batch on the device, over and over: the loader has a benchmark of its own.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from textwrap import shorten

import torch
from cknna import LARGE_WIDTH, related_features
from evaluation import save_random_weights
from full_size import MODELS, FlopCount, diffusion, tokenizer
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor
from torch._dynamo.utils import counters
from torch.utils.data import DataLoader

from callbacks.ema import EMA
from callbacks.throughput import peak_flops
from ldm.condition import Labels
from ldm.samplers import VelocityField
from vfm_vae.metrics.alignment import cknna as cknna_of
from vfm_vae.metrics.inception import POOL_WIDTH, Inception
from vfm_vae.metrics.precision_recall import PrecisionRecall
from vfm_vae.metrics.suite import DistributionSuite
from vfm_vae.modules.equivariance import EquivarianceRegularizer, Transform

WARM_UP = 3  # steps that are left out
GUIDANCE = 6.0  # of the published guided numbers, after 64 epochs
SAMPLES = 50_000
LARGE_MEMORY = 100e9  # bytes of a GPU that holds 128 latents where nothing is compiled


@dataclass
class Bench:
    """Where and how to measure, and what came of it.

    Attributes:
        out: the file of figures.
        device: `cuda` or `cpu`.
        toy: tiny models and few repetitions, to try the benchmark itself.
        batch_size: instead of the run's own.
        options: further ones of the command line, for training.
        figures: measured so far.
    """

    out: Path
    device: str = "cuda"
    toy: bool = False
    batch_size: int | None = None
    options: list[str] = field(default_factory=list)
    figures: dict[str, object] = field(default_factory=dict)

    def note(self, **figures: object) -> None:
        """Adds figures, and writes all to the file, so that a process that is killed leaves them."""
        self.figures |= figures
        partial = self.out.with_suffix(".partial")
        partial.write_text(json.dumps(self.figures))
        partial.replace(self.out)

    def images(self, number: int) -> int:
        """How many to take at once."""
        return self.batch_size or (2 if self.toy else number)

    def wait(self) -> None:
        """For the device."""
        if self.device == "cuda":
            torch.cuda.synchronize()

    def seconds(self, function: Callable[[], object]) -> float:
        """That a function takes, its work on the device included."""
        self.wait()
        start = time.perf_counter()
        function()
        self.wait()
        return time.perf_counter() - start


class Clock(Callback):
    """Notes rate, memory and first steps of a training after each step.

    Args:
        bench: takes the figures.
        batch_size: of each step.
        alike: steps of full size, which come first; the rest are first steps, each of another shape.
        steps: to be timed.
    """

    def __init__(self, bench: Bench, batch_size: int, alike: int, steps: int) -> None:
        self.bench, self.batch_size, self.alike, self.steps = bench, batch_size, alike, steps
        self.seconds: list[float] = []

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Forgets the memory that building took."""
        if self.bench.device == "cuda":
            torch.cuda.reset_peak_memory_stats()

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: object, batch_idx: int) -> None:
        """Starts the clock."""
        self.bench.wait()
        self._start = time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *args: object) -> None:
        """Stops it, after the device has done its work."""
        self.bench.wait()
        self.seconds.append(time.perf_counter() - self._start)
        if len(self.seconds) > self.steps:
            return
        full, others = self.seconds[: self.alike], self.seconds[self.alike :]
        if others:
            graphs = counters["stats"]["unique_graphs"]
            self.bench.note(shapes=1 + len(others), first_steps_s=full[0] + sum(others), graphs_of_all_shapes=graphs)
            return
        usual = statistics.median(full[WARM_UP:] or full)
        self.bench.note(first_step_s=full[0], images_per_s=self.batch_size / usual, ms=1000 * usual)
        self.bench.note(graphs=counters["stats"]["unique_graphs"])  # that were compiled
        if self.bench.device == "cuda":
            self.bench.note(peak_gb=torch.cuda.max_memory_allocated() / 1e9)


class OneDevice(SingleDeviceStrategy):
    """Leaves all where it is when training ends, for so does the process; Lightning would copy it to the host."""

    def teardown(self) -> None:
        """Does nothing."""


class Script:
    """Gives steps the transforms of a list, and none after it, where the regulariser would draw them."""

    def __init__(self, transforms: list[Transform]) -> None:
        self.transforms = list(transforms)

    def draw(self, images_seen: int, latent_grid: list[int], **_: object) -> Transform:
        """The next."""
        return self.transforms.pop(0) if self.transforms else Transform()


def other_shapes(regularizer: EquivarianceRegularizer, side: int, multiple: int) -> list[Transform]:
    """Transforms that make steps of each other shape: of the decoder's maps, and of all maps; and a turned one."""

    def smaller(scales: tuple[float, ...]) -> list[float]:
        return [scale for scale in scales if scale < 1 and side * scale % multiple == 0]

    shapes = [Transform(quarter_turns=1), *(Transform(scale=scale) for scale in smaller(regularizer.scales))]
    return shapes + [Transform(prior_scale=scale) for scale in smaller(regularizer.prior_scales)]


def train(
    bench: Bench, what: str, batch_size: int, steps: int, compiled: bool = True, every_shape: bool = False
) -> None:
    """Steps of the published training, and after them one of two images whose FLOPs are counted.

    Args:
        bench: takes the figures.
        what: is trained.
        batch_size: at a time.
        steps: of full size.
        compiled: whether the model compiles its regions.
        every_shape: whether the tokenizer then takes a step of each other shape that its equivariance makes.
    """
    batch_size, steps = bench.images(batch_size), WARM_UP + 1 if bench.toy else steps
    options = [f"--model.torch_compile={'true' if compiled else 'false'}", *bench.options]
    with tempfile.TemporaryDirectory() as folder:
        module, batch = MODELS[what](folder, batch_size, options, bench.device, bench.toy)
    others: list[Transform] = []
    average = EMA(decay=0.9999)
    if what == "tokenizer":
        average = EMA(half_life_images=160_000, ramp_up=0.05)
        side = batch.images.shape[-1] // module.model.compression
        others = other_shapes(module.equivariance, side, module.model.decoder.side_multiple) if every_shape else []
        module.equivariance = Script([Transform()] * steps + others)
    batches = [batch] * (steps + len(others))
    few = type(batch)(*(None if tensor is None else tensor[:2] for tensor in batch))
    clock, count = Clock(bench, batch_size, steps, len(batches)), FlopCount(len(batches), recomputing=False)
    trainer = Trainer(
        accelerator="gpu" if bench.device == "cuda" else "cpu", devices=1, precision="bf16-mixed", max_epochs=1,
        strategy=OneDevice(torch.device("cuda", 0) if bench.device == "cuda" else "cpu"),
        gradient_clip_val=1.0 if what in ("reg", "ditdh") else None, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[average, clock, count],
    )  # fmt: skip
    bench.note(batch_size=batch_size)
    trainer.fit(module, DataLoader([*batches, few], batch_size=None))
    bench.note(tflop_per_image=count.flops / len(few.labels) / 1e12)
    if peak := peak_flops(trainer):
        bench.note(mfu=bench.figures["tflop_per_image"] * 1e12 * bench.figures["images_per_s"] / peak)


def train_eagerly(bench: Bench, what: str, batch_size: int, small_batch_size: int | None = None) -> None:
    """A few steps that are not compiled, of the small batch where the GPU is no large one."""
    is_small = bench.device == "cuda" and torch.cuda.get_device_properties(0).total_memory < LARGE_MEMORY
    train(bench, what, small_batch_size if small_batch_size and is_small else batch_size, 8, compiled=False)


def sampling(bench: Bench) -> None:
    """Latents by Euler's steps as `make samples` takes them, and their images; how long 50 000 take."""
    size = bench.images(64)
    with tempfile.TemporaryDirectory() as folder:
        module, batch = diffusion(folder, size, bench.options, bench.device, bench.toy)
        decoder = tokenizer(folder, 1, [], bench.device, bench.toy)[0].model
    module, decoder = module.to(bench.device).eval(), decoder.to(bench.device).eval()
    bench.note(batch_size=size)
    model, times = module.model, module.pipeline.sampler.times[:-1].tolist()
    guidance = module.pipeline.guidance.with_scale(GUIDANCE)
    guided = sum(guidance.acts_at(time) for time in times)
    velocity = guidance.field(model, Labels(batch.labels, model.num_classes))
    with torch.inference_mode():
        for form in ("eager", "compiled"):
            if form == "compiled":
                model.compile_regions()
            first, plain = evaluations(bench, velocity, batch.latents, 0.0)
            bench.note(**{f"{form}_first_s": first, f"{form}_latents_per_s": size / plain / len(times)})
            _, double = evaluations(bench, velocity, batch.latents, 0.5)
            seconds = double * guided + plain * (len(times) - guided)
            bench.note(**{f"{form}_guided_latents_per_s": size / seconds})
        latents = torch.randn(size, decoder.latent_channels, *model.input_size, device=bench.device)
        bench.seconds(lambda: decoder.decode(latents))
        bench.note(decoded_images_per_s=size / bench.seconds(lambda: decoder.decode(latents)))
    rates = bench.figures
    for form in ("", "guided_"):
        drawn = rates[f"compiled_{form}latents_per_s"]
        bench.note(**{f"{form}speedup": drawn / rates[f"eager_{form}latents_per_s"]})
        bench.note(**{f"{form}minutes_of_50000": SAMPLES * (1 / drawn + 1 / rates["decoded_images_per_s"]) / 60})


def evaluations(
    bench: Bench, velocity: VelocityField, x: Tensor, time: float, repeats: int = 10
) -> tuple[float, float]:
    """Seconds of the first evaluation of a velocity, and of a later one."""
    t, repeats = torch.tensor(time), 1 if bench.toy else 10
    first = bench.seconds(lambda: velocity(x, t))
    velocity(x, t)
    return first, bench.seconds(lambda: [velocity(x, t) for _ in range(repeats)]) / repeats


@torch.no_grad()
def cknna(bench: Bench) -> None:
    """CKNNA of as many features as callbacks may have, after a few that load the kernels."""
    n, width = (500, 64) if bench.toy else (SAMPLES, LARGE_WIDTH)
    a, b = (related_features(n, width, seed).to(bench.device) for seed in (1, 2))
    cknna_of(a[:400], b[:400])
    bench.note(samples=n, channels=width, seconds=bench.seconds(lambda: cknna_of(a, b).item()))


@torch.no_grad()
def evaluation(bench: Bench) -> None:
    """Images through Inception, what follows from its features, and precision and recall of many samples."""
    batches, size, real, generated = (2, 4, 20, 40) if bench.toy else (8, 64, 10_000, SAMPLES)
    with tempfile.TemporaryDirectory() as folder:
        save_random_weights(Path(folder) / "inception.pth")
        network = Inception(f"{folder}/inception.pth").to(bench.device)
    suite = DistributionSuite(network, batches * size).to(bench.device)
    images = torch.randint(256, (size, 3, 256, 256), dtype=torch.uint8, device=bench.device)
    index = torch.arange(size, device=bench.device)
    for is_real in (True, False):  # the first time loads the kernels
        seconds = bench.seconds(
            lambda real=is_real: [suite.update(images, index + size * i, real=real) for i in range(batches)]
        )
    bench.note(images_per_s=batches * size / seconds, distances_s=bench.seconds(suite.compute))
    features = torch.randn(real + generated, POOL_WIDTH, device=bench.device)
    neighbours = PrecisionRecall(reference=features[:real]).to(bench.device)
    neighbours.update(features[real:], torch.arange(generated, device=bench.device))
    bench.note(precision_recall_s=bench.seconds(neighbours.compute))


RUNS: dict[str, Callable[[Bench], None]] = {
    "lightningdit": partial(train, what="diffusion", batch_size=128, steps=20),
    "lightningdit_warm": partial(train, what="diffusion", batch_size=128, steps=5),
    "reg": partial(train, what="reg", batch_size=128, steps=15),
    "reg_eager": partial(train_eagerly, what="reg", batch_size=128, small_batch_size=64),
    "lightningdit_eager": partial(train_eagerly, what="diffusion", batch_size=128, small_batch_size=64),
    "tokenizer_16_eager": partial(train_eagerly, what="tokenizer", batch_size=16),
    "sampling": sampling,
    "cknna": cknna,
    "evaluation": evaluation,
    "vavae": partial(train, what="vavae", batch_size=16, steps=13),
    "rae": partial(train, what="rae", batch_size=64, steps=13),
    "ditdh": partial(train, what="ditdh", batch_size=128, steps=13),
    "tokenizer": partial(train, what="tokenizer", batch_size=64, steps=9, every_shape=True),
    "tokenizer_16": partial(train, what="tokenizer", batch_size=16, steps=13),
}


def measure(name: str, bench: Bench) -> bool:
    """Does one run; whether it went well. What went wrong is a figure, too."""
    bench.note(torch=torch.__version__)
    try:
        if bench.device == "cuda":
            bench.note(card=torch.cuda.get_device_name())
        RUNS[name](bench)
    except Exception as error:
        bench.note(error=shorten(f"{type(error).__name__}: {error}", 300), traceback=traceback.format_exc())
    return "error" not in bench.figures


def main() -> None:
    """Measures what the command line names, or else a line of the standard input, which comes when it is time."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", nargs="?", choices=list(RUNS))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--option", action="append", default=[])
    options = parser.parse_args()
    name = options.name or sys.stdin.readline().strip()
    if name:
        bench = Bench(options.out, options.device, options.toy, options.batch_size, options.option)
        sys.exit(not measure(name, bench))


if __name__ == "__main__":
    main()
