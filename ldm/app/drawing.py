"""What the tab Generate computes: samples, watched while they are drawn."""

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from copy import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ldm.condition import Condition
from ldm.pipeline import LatentDiffusion
from ldm.samplers import Dopri5, Euler, EulerMaruyama, GridSampler, Heun, Noise, Sampler, VelocityField
from vfm_vae.options import at_least
from vfm_vae.types import Samples

SAMPLERS: dict[str, type[Sampler]] = {kind.__name__: kind for kind in (Euler, Heun, EulerMaruyama, Dopri5)}
FRAMES = 7  # of a trajectory, before the sample itself
MOST = 64  # samples at a time


class Order(NamedTuple):
    """What is to be drawn, and how.

    Attributes:
        labels: Classes, a sample each.
        prompts: Texts instead, for a model of text to image.
        seed: Seed of the noise.
        scale: Strength of guidance; 1 for none.
        start: Guidance begins at this time, 0 being noise and 1 data.
        end: Guidance ends after this time.
        sampler: Name of the sampler, one of `SAMPLERS`; None for the model's own.
        steps: The sampler's steps, where it has any; None for the model's own.
    """

    labels: Sequence[int] | None = None
    prompts: Sequence[str] | None = None
    seed: int = 0
    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0
    sampler: str | None = None
    steps: int | None = None


class Step(NamedTuple):
    """How far a sampler is.

    Attributes:
        done: Evaluations of the velocity so far.
        total: How many there will be; None where the sampler chooses its steps itself.
        time: Time of the last one, 0 being noise and 1 data.
        frame: What the model takes the first sample for at that time, `[3, H, W]`; None most times.
    """

    done: int
    total: int | None
    time: float
    frame: Tensor | None

    @property
    def part(self) -> float:
        """How much is done, in [0, 1]."""
        return self.time if self.total is None else self.done / self.total


class Stopped(Exception):
    """Drawing was stopped by whoever asked for it."""


Watch = Callable[[Tensor, Tensor, Tensor], None]  # states, their time and their velocity


class Watched:
    """A sampler that shows every evaluation of the velocity; samples are those of the sampler, bit for bit."""

    def __init__(self, sampler: Sampler, watch: Watch):
        self.sampler, self.watch = sampler, watch

    def fitted_to(self, latent_shape: Sequence[int]) -> "Watched":
        """The watched sampler for latents of a shape `(C, h, w)`."""
        return Watched(self.sampler.fitted_to(latent_shape), self.watch)

    def __call__(self, field: VelocityField, noise: Tensor, fresh_noise: Noise | None = None) -> Tensor:
        """Samples."""

        def seen(state: Tensor, time: Tensor) -> Tensor:
            velocity = field(state, time)
            self.watch(state, time, velocity)
            return velocity

        return self.sampler(seen, noise, fresh_noise)


def with_sampler(sampler: Sampler, name: str | None, steps: int | None) -> Sampler:
    """A model's sampler with other steps, or another one with as much of its options as both have.

    Raises:
        ValueError: if there is no such sampler, or it can't have so many steps.
    """
    kind = type(sampler) if name is None else SAMPLERS.get(name)
    if kind is None:
        raise ValueError(f"sampler: one of {', '.join(SAMPLERS)}, given {name!r}")
    options: dict[str, Any] = {}
    if kind is type(sampler):
        options = dict(sampler.arguments)
    elif kind is not Dopri5:
        options["shift"] = getattr(sampler, "shift", 1.0)
        if issubclass(kind, GridSampler):
            options["end"] = getattr(sampler, "end", 1.0)
    if steps is not None and kind is not Dopri5:
        options["steps"] = steps
    return kind(**options)


def evaluations(sampler: Sampler) -> int | None:
    """How often a sampler, fitted to the latents, evaluates the velocity; None where that is not known beforehand."""
    times = getattr(sampler, "times", None)
    return None if times is None else (len(times) - 1) * (2 if isinstance(sampler, Heun) else 1)


def as_ordered(model: LatentDiffusion, order: Order) -> LatentDiffusion:
    """The model with the sampler and the guidance of an order; weights are shared."""
    model = copy(model)
    model.sampler = with_sampler(model.sampler, order.sampler, order.steps)
    model.guidance = model.guidance.with_interval(order.start, order.end).with_scale(order.scale)
    return model


def watched(model: LatentDiffusion, tell: Callable[[Step], None], stop: threading.Event) -> LatentDiffusion:
    """The model, but that it tells how far sampling is and can be stopped; weights are shared."""
    model = copy(model)
    total = evaluations(model.sampler.fitted_to(model.model.latent_shape))
    # Frames are decoded at evenly spaced evaluations, or times, the first among them.
    due = [number / FRAMES for number in range(FRAMES)]
    done = 0

    def watch(state: Tensor, time: Tensor, velocity: Tensor) -> None:
        nonlocal done
        if stop.is_set():
            raise Stopped
        part = float(time) if total is None else done / total
        frame = None
        if due and part >= due[0] - 1e-9:
            while due and part >= due[0] - 1e-9:
                due.pop(0)
            frame = expected(model, state[:1], float(time), velocity[:1])
        done += 1
        tell(Step(done, total, float(time), frame))

    sampler: Any = Watched(model.sampler, watch)
    model.sampler = sampler
    return model


@torch.no_grad()
def expected(model: LatentDiffusion, state: Tensor, time: float, velocity: Tensor) -> Tensor:
    """The image `[3, H, W]` that a state `[1, ...]` is taken for: where its velocity would lead to, decoded."""
    assert model.tokenizer is not None
    data = state.float() + (1 - time) * velocity.float()
    latents = model.normalization.inverse(model.model.split(data)[0])
    image: Tensor = model.tokenizer.network.decode(latents).image[0].clamp(-1, 1)
    return image


def draw(
    model: LatentDiffusion,
    order: Order,
    stop: threading.Event | None = None,
    lock: AbstractContextManager[Any] | None = None,
) -> Iterator[Step | Samples]:
    """Draws samples, those of `LatentDiffusion.sample` with the order's sampler and guidance, bit for bit.

    Args:
        model: The model, with its tokenizer.
        order: What to draw.
        stop: Ends it when set.
        lock: Is held while the model computes.

    Yields:
        How far it is; at last the samples.

    Raises:
        ValueError: if there is something wrong with the order, or what is drawn is not finite.
        Stopped: if it was stopped.
    """
    asked = order.labels if order.prompts is None else order.prompts
    if not asked:
        raise ValueError("give a class or a prompt")
    if len(asked) > MOST:
        raise ValueError(f"{len(asked)} samples at a time are too many: at most {MOST}; ask for fewer of each")
    at_least(0, seed=order.seed)
    chosen = as_ordered(model, order)
    yield from watched_while(
        lambda tell, stop: watched(chosen, tell, stop).sample(order.labels, order.seed, prompts=order.prompts),
        stop,
        lock,
    )


Task = Callable[[Callable[[Step], None], threading.Event], Any]


def watched_while(task: Task, stop: threading.Event | None, lock: AbstractContextManager[Any] | None) -> Iterator[Any]:
    """Runs a task in a thread, and yields the steps that it tells of, then what it returns.

    Args:
        task: Takes what to tell steps to, and what says that it is to stop.
        stop: Says so; it is also set if whoever reads the steps stops reading.
        lock: Is held meanwhile.

    Raises:
        Exception: what the task raises.
    """
    stop, lock = stop or threading.Event(), lock or threading.Lock()
    told: queue.Queue[tuple[bool, Any]] = queue.Queue()

    def work() -> None:
        try:
            with lock:
                told.put((True, task(lambda step: told.put((False, step)), stop)))
        except BaseException as error:  # whichever it is, who reads must get it
            told.put((True, error))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while True:
            is_last, item = told.get()
            if isinstance(item, BaseException):
                raise item
            yield item
            if is_last:
                return
    finally:
        stop.set()


class Mixed:
    """Guidance's velocities for two conditions, mixed: `(1 − w) · v_A + w · v_B`, w for each sample.

    Args:
        model: The model whose guidance is taken.
        other: Condition B of each sample; A is what samples are drawn for.
        weights: w, `[B]` in [0, 1].
    """

    def __init__(self, model: LatentDiffusion, other: Condition, weights: Tensor):
        self.guidance, self.other, self.weights = model.guidance, other, weights
        self.acts = model.guidance.acts
        self.prepare = model.guidance.prepare

    def field(self, model: Any, condition: Condition) -> VelocityField:
        """The velocity that a sampler integrates."""
        other = self.other.to(self.weights.device)
        first, second = self.guidance.field(model, condition), self.guidance.field(model, other)

        def velocity(state: Tensor, time: Tensor) -> Tensor:
            weights = self.weights.reshape(-1, *(1,) * (state.ndim - 1)).to(state)
            return torch.lerp(first(state, time), second(state, time), weights)

        return velocity


def draw_between(
    model: LatentDiffusion,
    order: Order,
    count: int,
    stop: threading.Event | None = None,
    lock: AbstractContextManager[Any] | None = None,
) -> Iterator[Step | Samples]:
    """Draws samples between two classes or prompts, all from the same noise: at each time velocities are mixed.

    Args:
        model: The model, with its tokenizer.
        order: Two labels or prompts, and how to draw.
        count: How many samples, both ends included.
        stop: Ends it when set.
        lock: Is held while the model computes.

    Yields:
        How far it is; at last the samples, from the first to the second.

    Raises:
        ValueError: if there is something wrong with the order.
        Stopped: if it was stopped.
    """
    at_least(2, images=count)
    at_least(0, seed=order.seed)
    chosen = as_ordered(model, order)
    values: list[Any] = [*(order.labels or ()), *(order.prompts or ())]
    device = chosen.normalization.mean.device

    def task(tell: Callable[[Step], None], stop: threading.Event) -> Samples:
        first, second = (chosen.condition([value] * count) for value in values)
        mixing: Any = Mixed(chosen, second, torch.linspace(0, 1, count, device=device))
        chosen.guidance = mixing
        return watched(chosen, tell, stop).sample(first, order.seed, index=torch.zeros(count, dtype=torch.int64))

    yield from watched_while(task, stop, lock)
