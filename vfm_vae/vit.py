"""Makes timm's vision transformers, and knows how their families treat images and positions."""

import difflib
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

import timm

from vfm_vae import embedded  # noqa: F401  importing it registers the embedded model with timm
from vfm_vae.images import Interpolation
from vfm_vae.vit_weights import load_vit, load_vit_from_source


class Family(NamedTuple):
    """What the networks of a family want, where timm's own data does not say it.

    Attributes:
        interpolation: How images are resized in front of the network: the choice of the VFM-VAE authors.
        target_interpolation: How training targets are resized beside it.
        antialias_positions: Whether the published network resamples its table of positions with antialias, as timm
            does for all. Of those in Hugging Face's transformers, DINOv2 with registers does; SigLIP, SigLIP2, DINOv2,
            MAE and CLIP do not.
        positions: How the published network interpolates that table.
    """

    interpolation: Interpolation = "bilinear"
    target_interpolation: Interpolation = "bilinear"
    antialias_positions: bool = False
    positions: Interpolation = "bicubic"


FAMILIES: tuple[tuple[str, Family], ...] = (
    ("vit_*_reg[0-9]*_dinov2*", Family("bicubic", "bicubic", antialias_positions=True)),
    ("vit_*_dinov[23]*", Family("bicubic", "bicubic")),
    ("vit_*.dino", Family("bicubic", "bicubic")),
    ("eva_*", Family("bilinear", "bicubic")),
    ("eva02_*", Family("bilinear", "bicubic")),
    ("vit_pe_*", Family(positions="bilinear")),
)
"""Families by pattern of timm's name, `architecture.tag`; the first that fits counts. Others are a plain `Family()`."""


def family_of(name: str, network: Any = None) -> Family:
    """The family of a timm name.

    Args:
        name: The name, with or without the tag of its weights.
        network: The network; needed for names of timm's sources, `hf-hub:` and `local-dir:`, which are arbitrary.
    """
    if ":" in name and network is not None:
        config = network.pretrained_cfg
        name = f"{config['architecture']}.{config.get('tag') or ''}".rstrip(".")
    return next((family for pattern, family in FAMILIES if fnmatchcase(name, pattern)), Family())


def create_vit(name: str, *, weights: str | Path | None = None, pretrained: bool = True, **kwargs: Any) -> Any:
    """Creates a timm vision transformer without its classifier, for images of any size where the family allows it.

    Args:
        name: timm name with or without its weights' tag, for instance `vit_large_patch16_siglip_512.v2_webli`; timm's
            `hf-hub:` and `local-dir:` sources work too.
        weights: File with the weights (safetensors or a torch checkpoint, in timm's or the family's published layout)
            to take instead of a download; it has to hold every tensor of the network.
        pretrained: False leaves the weights random.
        **kwargs: Further arguments of the timm model.

    Raises:
        ValueError: if timm does not know the name, the network is no vision transformer, or its weights are neither
            where `weights` says, whole and in its shapes, nor downloadable.
    """
    _check_name(name)
    is_sourced = ":" in name  # timm's own sources, hf-hub: and local-dir:
    if pretrained and weights is not None and not Path(weights).is_file():
        raise ValueError(f"weights: no file at {str(weights)!r} for {name!r}; give the file's path or leave it out")
    by_timm = pretrained and weights is None and not is_sourced  # what timm publishes; other files may hold anything
    arguments = {"pretrained": by_timm, "num_classes": 0, **kwargs}
    try:
        try:
            network = timm.create_model(name, dynamic_img_size=True, **arguments)
        except TypeError as error:
            if "dynamic_img_size" not in str(error):
                raise
            network = timm.create_model(name, **arguments)
    except Exception as error:
        if not pretrained or isinstance(error, TypeError):
            raise
        raise ValueError(_no_weights_message(name, error)) from error
    if not all(hasattr(network, part) for part in ("patch_embed", "blocks", "norm")):
        raise ValueError(
            f"name: {name!r} ({type(network).__name__}) is no plain vision transformer; choose one with patch tokens "
            "and a sequence of blocks, for instance 'vit_large_patch16_siglip_512.v2_webli'"
        )
    if pretrained and weights is not None:
        load_vit(network, name, weights)
    elif pretrained and is_sourced:
        load_vit_from_source(network, name)
    return network


def _check_name(name: str) -> None:
    if ":" in name:  # of timm's own sources
        return
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        similar = difflib.get_close_matches(architecture, timm.list_models(), n=3, cutoff=0.5)
        hint = f"did you mean {', '.join(map(repr, similar))}?" if similar else "timm.list_models() lists them all"
        raise ValueError(f"name: timm knows no model {name!r}; {hint}")
    known = [known.partition(".")[2] for known in timm.list_pretrained(f"{architecture}.*")]
    if tag and tag not in known:
        raise ValueError(
            f"name: {architecture!r} has no weights called {tag!r}; there are {sorted(filter(None, known))}"
        )


def _no_weights_message(name: str, error: Exception) -> str:
    cause = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return (
        f"weights: those of {name!r} could not be had by download ({type(error).__name__}: {cause}); give a local file "
        "as `weights`, or download them once where there is a network, or ask for random ones with `pretrained: false`"
    )
