"""Every number that a config can set has a range, and one outside is refused with the name of its option."""

import inspect
import math
import pkgutil
import re
import typing
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from importlib import import_module
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback

import callbacks
import ldm.models
from ldm.models.lightningdit import LightningDiT
from ldm.module import DiffusionModule
from ldm.sweep.grid import Sweep
from vfm_vae.cli import NAMED
from vfm_vae.data.datamodule import ImageNetDataModule
from vfm_vae.discriminators.projected import ProjectedDiscriminator
from vfm_vae.evaluate import evaluate_samples
from vfm_vae.losses.objective import Objective
from vfm_vae.module import TokenizerModule
from vfm_vae.modules.adapter import Adapter
from vfm_vae.modules.decoder import Decoder
from vfm_vae.options import at_least, finite, named_as, positive, within
from vfm_vae.tokenizer import VFMVAE
from vfm_vae.vfm import FrozenVFM

VFM = "vit_photos_patch8_64"
PACKAGES = ("vfm_vae", "ldm", "callbacks")

TRIED = (-1, 0, math.nan, math.inf)
MEANT = {
    -1: {
        "leaves the end to the trainer": ["max_images"],
        "counts from the last layer": ["FrozenVFM.layers", "TransformersVFM.layers", "TransformersText.layer"],
    },
    0: {
        "trains nothing, as trainer.max_steps": ["max_images"],
        "clips nothing, as trainer.gradient_clip_val": ["gradient_clip_val"],
        "is a seed": ["seed", "photos"],
        "is a class": ["classes"],
        "is what enters the first block": [
            "FrozenVFM.layers", "TransformersVFM.layers", "TransformersText.layer", "ProjectedDiscriminator.layers",
        ],
        "is the finest level": ["ConvVAE.attention"],
        "is black": ["TransformersVFM.mean", "RAE.pixel_mean"],
        "is a loss that is not wanted": [
            "l1", "l2", "perceptual", "ssim", "multi_resolution", "kl", "quantization", "entropy", "alignment",
            "adversarial", "adversarial_patch", "feature_matching", "cosine_weight", "weight", "cls_weight", "beta",
            "base_weight",
        ],
        "leaves a part out": [
            "brightness", "saturation", "contrast", "translation", "cutout", "cls_channels", "align_channels",
            "attention_depths", "Decoder.num_res_blocks", "multi_resolution_images", "count_batches", "latent_noise",
            "RAE.statistics_images", "base_depth",
        ],
        "is from the first image on": ["adversarial_from", "discriminate_from"],
        "subtracts nothing": ["spatial_norm"],
        "is never": ["probability", "prior_probability", "crop_probability", "label_drop"],
        "bears nothing": ["distmat_margin", "cos_margin", "max_bad_fraction"],
        "is noise": ["start", "Guidance.end", "Autoguidance.end", "InternalGuidance.end", "times", "time",
            "starts", "ends",
        ],
        "is what the model says without a label": ["scale", "guidance_scales", "Sweep.scales"],
        "leaves the class token unguided": ["cls_scale"],
        "averages nothing": ["decay"],
        "loads in the process itself": ["num_workers"],
        "leaves no image out": ["min_size"],
        "says that all went well": ["exit_code"],
        "is strict at once, and with any value": ["grace_images", "floor"],
    },
    math.inf: {"is no limit": ["jump", "adversarial_limit"]},
}  # fmt: skip
FRACTIONS = (
    "probability", "prior_probability", "crop_probability", "label_drop", "translation", "cutout", "max_bad_fraction",
    "min_crop", "val_fraction", "decay", "last", "start", "end", "times", "time", "starts", "ends",
)  # fmt: skip


@cache
def vfm() -> FrozenVFM:
    return FrozenVFM(VFM, layers=[0, -1])


@cache
def reader() -> TemporaryDirectory[str]:
    """A folder with the config of a language model."""
    folder = TemporaryDirectory()
    Path(folder.name, "config.json").write_text('{"model_type": "t5", "num_layers": 2}')
    return folder


@cache
def tokenizer() -> VFMVAE:
    decoder = Decoder(16, [8] * 5, [8], [1], 0, w_channels=8)
    return VFMVAE(Adapter(**REQUIRED["Adapter"]()), decoder, vfm())


ADAM = partial(torch.optim.Adam, lr=1e-3)
SMALL = {"in_channels": 4, "input_size": 4, "depth": 1, "width": 16, "num_heads": 2, "num_classes": 3}
REQUIRED: dict[str, Callable[[], dict[str, Any]]] = {
    "Adapter": lambda: {
        "feature_channels": [128, 128], "layer_channels": [8, 8], "latent_channels": 4, "unshuffle": 1,
        "decoded_channels": 16, "alignment_channels": 128,
    },
    "Autoguidance": lambda: {"partner": "nowhere"},
    "CKNNACallback": lambda: {"vfms": [vfm()]},
    "ClassAccuracyCallback": lambda: {"vfm": vfm(), "images": "photos"},
    "Decoder": lambda: {"in_channels": 16, "channels": [8] * 5, "route_channels": [8], "num_res_blocks": 0},
    "DiffusionModule": lambda: {"model": LightningDiT(**SMALL), "optimizer": ADAM},
    "DistributionCallback": lambda: {"network": vfm()},
    "DiTDH": lambda: SMALL | {"head_depth": 1, "head_width": 16, "head_num_heads": 2},
    "evaluate_samples": lambda: {"samples": "nothing", "reference": "nothing"},
    "FrozenVFM": lambda: {"name": VFM},
    "ImageNetDataModule": lambda: {"root": "photos"},
    "LatentWriter": lambda: {"directory": "latents"},
    "LightningDiT": lambda: SMALL,
    "LuminaNextDiT": lambda: {name: value for name, value in SMALL.items() if name != "num_classes"} | {
        "num_kv_heads": 1,
    },
    "Objective": lambda: {"perceptual_loss": torch.nn.Identity()},
    "ProjectedDiscriminator": lambda: {"backbone": VFM, "size": 64, "layers": [2]},
    "RAE": lambda: {
        "latent_channels": 8, "compression": 8, "image_size": 16, "decoder_width": 8, "decoder_depth": 1,
        "decoder_heads": 2, "decoder_mlp_width": 8, "pixel_mean": [0.5] * 3, "pixel_std": [0.5] * 3,
    },
    "SampleImages": lambda: {"classes": [0]},
    "SiT": lambda: SMALL | {"cls_channels": 0, "align_channels": 0},
    "TextLightningDiT": lambda: {name: value for name, value in SMALL.items() if name != "num_classes"} | {
        "text_channels": 8,
    },
    "TokenizerModule": lambda: {
        "model": tokenizer(), "discriminator": ProjectedDiscriminator(**REQUIRED["ProjectedDiscriminator"]()),
        "objective": Objective(), "optimizer": ADAM, "discriminator_optimizer": ADAM,
    },
    "TransformersText": lambda: {"name": reader().name},
    "TransformersVFM": lambda: {
        "name": "owner/model", "pretrained": False, "mean": [0.5] * 3, "std": [0.5] * 3,
        "model_args": {"model_type": "dinov2", "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1},
    },
}  # fmt: skip


def modules_of(package: Any) -> Iterator[Any]:
    return (import_module(f"{package.__name__}.{name}") for _, name, _ in pkgutil.iter_modules(package.__path__))


def parts(annotation: Any) -> Iterator[Any]:
    """What an annotation is made of; choices of words and functions are left out."""
    if typing.get_origin(annotation) not in (typing.Literal, Callable):
        yield annotation
        for part in typing.get_args(annotation):
            yield from parts(part)


def hints(made: Callable) -> dict[str, Any]:
    function = made.__init__ if inspect.isclass(made) else made
    known = typing.get_type_hints(function)
    return {name: known[name] for name in inspect.signature(function).parameters if name in known}


def subclasses(kind: type) -> set[type]:
    """Those of the packages, and not what other tests derive."""
    ours = [below for below in kind.__subclasses__() if below.__module__.partition(".")[0] in PACKAGES]
    return {kind}.union(*(subclasses(below) for below in ours))


def configurable() -> list[Callable]:
    """All that a config or the command line can name: modules, data, callbacks, and what these are made of."""
    for module in NAMED:
        import_module(module)
    for package in (callbacks, ldm, ldm.models):
        list(modules_of(package))
    callback_classes = {kind for kind in subclasses(Callback) if kind.__module__.startswith("callbacks.")}
    known: set[Callable] = {evaluate_samples}
    open_ = {TokenizerModule, DiffusionModule, ImageNetDataModule, Sweep, *callback_classes}
    while open_:
        kind = open_.pop()
        known.add(kind)
        named = {part for annotation in hints(kind).values() for part in parts(annotation) if inspect.isclass(part)}
        ours = [part for part in named if part.__module__.partition(".")[0] in PACKAGES]
        open_ |= {below for part in ours for below in subclasses(part)} - known
    return sorted((kind for kind in known if not inspect.isabstract(kind)), key=lambda kind: kind.__name__)


def numbers() -> list[tuple[Callable, str]]:
    """Numeric options, also those that hold several numbers."""
    return [
        (made, name)
        for made in configurable()
        for name, annotation in hints(made).items()
        if {int, float} & set(parts(annotation))
    ]


def complaint(made: Callable, name: str, value: float) -> str:
    """What is said to a value."""
    known = set(parts(hints(made)[name]))
    kinds = {typing.get_origin(part) for part in known}
    given: Any = value
    if dict in kinds:
        given = {"seed": value}
    elif Sequence in kinds:
        given = [value] * len(REQUIRED.get(made.__name__, dict)().get(name, [0]))
    try:
        made(**REQUIRED.get(made.__name__, dict)() | {name: given})
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(("made", "name"), numbers(), ids=lambda x: getattr(x, "__name__", x))
def test_a_number_out_of_range_is_refused_by_its_name(made: Callable, name: str):
    for value in (*TRIED, 1.5) if name in FRACTIONS else TRIED:
        said = complaint(made, name, value)
        is_meant = {name, f"{made.__name__}.{name}"} & set(chain.from_iterable(MEANT.get(value, {}).values()))
        named = re.match(rf"[\w., ]*\b{name}\b[\w., ]*:", said)
        assert bool(named) != bool(is_meant), f"{name}={value}: {said!r}"


def test_ranges():
    at_least(1, a=1, b=None, c=[1, 2], d=(3.0,))
    positive(a=1e-9)
    within(0, 1, a=0, b=1)
    finite(a=-3)
    for check, wanted in (
        (partial(at_least, 2), "at least 2"), (positive, "above 0"), (partial(within, 0, 1), r"in \[0, 1\]"),
        (finite, "a finite number"),
    ):  # fmt: skip
        for value in (math.nan, math.inf, -math.inf) if check is finite else (math.nan, math.inf, -1, -1e-9):
            with pytest.raises(ValueError, match=rf"^size: must be {wanted}, given {value}$"):
                check(other=None, size=value)
            with pytest.raises(ValueError, match=rf"^sizes: must be {wanted}, given \[0.5, {value}\]$"):
                check(sizes=[0.5, value])


def test_options_are_renamed_in_messages_but_files_are_not():
    message = "vfm_weights: no file at 'a/vfm_weights.pt' nor vfm_weights.pt; give it (vfm_weights)"
    with pytest.raises(ValueError, match=r"^option") as raised, named_as(vfm_weights=r"option\1"):
        raise ValueError(message)
    assert str(raised.value) == r"option\1: no file at 'a/vfm_weights.pt' nor vfm_weights.pt; give it (option\1)"
