"""What the page's buttons do: from what its controls say to HTML. No part of it knows gradio."""

import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from ldm.app import pictures
from ldm.app.between import Interpolation, images_between
from ldm.app.drawing import SAMPLERS, Order, Step, Stopped, draw, draw_between
from ldm.app.inputs import EXAMPLES as EXAMPLES  # the page takes this and `take` from here
from ldm.app.inputs import Upload, image_of
from ldm.app.inputs import take as take
from ldm.app.models import Models, class_choices
from ldm.app.reconstructing import Reconstruction, reconstruct, show
from ldm.pipeline import LatentDiffusion
from ldm.samplers import Dopri5
from vfm_vae.types import Samples

PAUSE = 0.1  # seconds between two pictures of progress
UNGUIDED = 2.0  # scale to begin with, for a model that says none


class Asked(NamedTuple):
    """What the controls of sampling say.

    Attributes:
        model: Name of the diffusion model.
        values: Classes, or prompts.
        each: Samples of each.
        seed: Seed of the noise.
        scale: Strength of guidance.
        start: Time at which it begins.
        end: Time at which it ends.
        sampler: Name of the sampler.
        steps: Its steps.
    """

    model: str
    values: Sequence[Any]
    each: int
    seed: int
    scale: float
    start: float
    end: float
    sampler: str
    steps: int


def settings_of(model: LatentDiffusion) -> dict[str, Any]:
    """What the page needs to know of a diffusion model: what it is told, and what its controls begin with."""
    is_text = model.conditioning.text_encoder is not None
    own = type(model.sampler).__name__
    scale = model.guidance.scale
    return {
        "is_text": is_text,
        "classes": [] if is_text else class_choices(model),
        "sampler": own if own in SAMPLERS else "Euler",
        "steps": getattr(model.sampler, "steps", 50),
        "scale": scale if model.guidance.acts else UNGUIDED,
        "start": model.guidance.start,
        "end": model.guidance.end,
    }


def reconstructed(models: Models, names: Sequence[str], upload: Upload | None, example: str, side: int) -> str:
    """What the chosen tokenizers make of an image, as HTML.

    Raises:
        ValueError: if there is nothing to show; the message says why.
    """
    if not names:
        raise ValueError("choose a tokenizer")
    image, title = image_of(upload, example, side)
    image = image.to(models.device)
    made: dict[str, Reconstruction | str] = {}
    for name in names:
        try:
            with models.lock:
                made[name] = reconstruct(models.tokenizers[name], image)
        except ValueError as error:
            made[name] = " ".join(str(error).split())
    return show(image.cpu(), title, made)


def generated(models: Models, asked: Asked, stop: threading.Event) -> Iterator[str]:
    """Draws samples, as HTML that changes while they are drawn.

    Raises:
        ValueError: if something is wrong with what is asked for; the message says what.
    """
    model, order = _order(models, asked)
    names = _names(model, asked.values)
    titles = [name for name in names for _ in range(asked.each)]
    return _shown(draw(model, order, stop, models.lock), titles, f"seed {order.seed}", names[0])


def between_conditions(models: Models, asked: Asked, count: int, stop: threading.Event) -> Iterator[str]:
    """Draws samples between two classes or prompts, as HTML that changes while they are drawn.

    Raises:
        ValueError: if something is wrong with what is asked for; the message says what.
    """
    model, order = _order(models, asked._replace(each=1))
    names = _names(model, asked.values)
    titles = _ends_and_between(names, count)
    note = f"the same noise, seed {order.seed}; at each time the velocities of both are mixed"
    return _shown(draw_between(model, order, count, stop, models.lock), titles, note, names[0])


def between_images(
    models: Models,
    name: str,
    ends: Sequence[tuple[Upload | None, str]],
    side: int,
    count: int,
    path: Interpolation,
) -> str:
    """Images between two, as HTML.

    Args:
        models: The models.
        name: Name of the tokenizer.
        ends: The two images, each an upload, or the name of an example where there is none.
        side: Height and width in pixels.
        count: How many images, both ends included.
        path: How latents are interpolated.

    Raises:
        ValueError: if there is nothing to show; the message says why.
    """
    images, titles = zip(*(image_of(upload, example, side) for upload, example in ends), strict=True)
    first, second = (image.to(models.device) for image in images)
    with models.lock:
        found = images_between(models.tokenizers[name], first, second, count, path)
    labels = _ends_and_between(titles, count)
    figures = [_figure(image, label) for image, label in zip(found, labels, strict=True)]
    return pictures.row(figures, name, f"{path} in the latent", "vv-strip")


def _order(models: Models, asked: Asked) -> tuple[LatentDiffusion, Order]:
    model = models.diffusion[asked.model]
    values = [value for value in asked.values for _ in range(asked.each)]
    is_text = model.conditioning.text_encoder is not None
    if not values:
        raise ValueError("write a prompt" if is_text else "choose a class")
    steps = None if SAMPLERS.get(asked.sampler) is Dopri5 else asked.steps
    what = {"prompts": values} if is_text else {"labels": values}
    return model, Order(
        **what,
        seed=asked.seed,
        scale=asked.scale,
        start=asked.start,
        end=asked.end,
        sampler=asked.sampler,
        steps=steps,
    )


def _names(model: LatentDiffusion, values: Sequence[Any]) -> list[str]:
    if model.conditioning.text_encoder is not None:
        return [str(value) for value in values]
    called = {number: name for name, number in class_choices(model)}
    return [called[value] for value in values]


def _ends_and_between(ends: Sequence[str], count: int) -> list[str]:
    """What images between two ends are called, the ends among them."""
    return [ends[0], *(f"{number / (count - 1):.2f}" for number in range(1, count - 1)), ends[1]]


def _figure(image: Tensor, title: str, note: str = "") -> str:
    return pictures.figure(pictures.pixels(image), title, note)


def _shown(steps: Iterator[Step | Samples], titles: Sequence[str], note: str, first: str) -> Iterator[str]:
    """Progress, the first sample on its way, and the samples, as HTML."""
    frames: list[str] = []

    def strip() -> str:
        note = f"{first}: what the model takes the first image for, at time t from noise (0) to data (1)"
        return pictures.row(frames, "From noise to image", note, "vv-strip")

    yield pictures.bar(0, "waiting for the model")
    told = begun = time.monotonic()
    try:
        for item in steps:
            if isinstance(item, Samples):
                assert item.images is not None
                images = item.images.cpu()
                frames.append(_figure(images[0], "t = 1"))
                shown = [_figure(image, title) for image, title in zip(images, titles, strict=True)]
                yield pictures.row(shown, "Samples", f"{note} · {time.monotonic() - begun:.1f} s") + strip()
                return
            if item.frame is not None:
                frames.append(_figure(item.frame.cpu(), f"t = {item.time:.2f}"))
            if item.frame is not None or time.monotonic() - told > PAUSE:
                told = time.monotonic()
                yield _progress(item) + strip()
    except Stopped:
        yield pictures.line("stopped") + strip()


def _progress(step: Step) -> str:
    of = "" if step.total is None else f" of {step.total}"
    return pictures.bar(step.part, f"evaluation {step.done}{of}, t = {step.time:.2f}")
