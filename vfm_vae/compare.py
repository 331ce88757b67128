"""`python -m vfm_vae.compare`: tokenizers side by side on a folder of images, as a table and as a picture."""

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser
from rich.console import Console
from torchvision.models import VGG16_Weights

from vfm_vae.checkpoints import published_place
from vfm_vae.cli import MATMUL_PRECISION, NAMED, add_matmul_precision, set_matmul_precision, short_errors
from vfm_vae.comparing import ComparedImages, Comparison, Measured
from vfm_vae.contracts import VFM
from vfm_vae.description import class_at
from vfm_vae.embedded.judge import Judge
from vfm_vae.images import Rounding
from vfm_vae.losses.reconstruction import LPIPSLoss
from vfm_vae.metrics.inception import Inception
from vfm_vae.metrics.side_by_side import markdown_table, picture, terminal_table
from vfm_vae.metrics.summary import json_numbers, settings_table, versions
from vfm_vae.options import about, named_as
from vfm_vae.pretrained_tokenizer import PretrainedTokenizer
from vfm_vae.tokenizer import FrozenTokenizer
from vfm_vae.vfm import FrozenVFM
from vfm_vae.writing import check_place, write_json, write_picture, write_text

EMBEDDED = "vit_photos_patch8_64"
EMBEDDED_SIZE = 64
TOKENIZER_OPTIONS = {  # by what they are called in configs of diffusion models
    "model.tokenizer.vfm_weights": "--vfm_weights {}=FILE",
    "model.tokenizer.tokenizer_class": "--tokenizer_class",
}
FILES = PICTURE, TABLE, NUMBERS = "comparison.png", "table.md", "comparison.json"


def compare(
    tokenizers: Mapping[str, str],
    images: str,
    out: str = "runs/comparison",
    overwrite: bool = False,
    image_size: int = 256,
    num_images: int | None = None,
    network: Inception | VFM | str | None = None,
    vfm: VFM | str | None = None,
    se_cknna: bool = True,
    lpips: bool | None = None,
    vgg: str | None = None,
    rounding: Rounding = "round",
    vfm_weights: Mapping[str, str] | None = None,
    num_shown: int = 6,
    batch_size: int = 16,
    device: str | None = None,
) -> dict[str, Any]:
    """Compares tokenizers on the same images: reconstruction, alignment of the latent, sizes, times.

    The latent is the posterior's mode. All tokenizers are read first, so that a mistake shows at once; only one of them
    is on the device at a time.

    Args:
        tokenizers: Each by a name: a checkpoint of training, a folder, or `owner/model` on the Hugging Face hub.
        images: The folder of images, which are found in all folders below it, too.
        out: Folder for `table.md`, `comparison.json` and `comparison.png`.
        overwrite: Whether to replace an earlier comparison in that folder.
        image_size: Height and width in pixels of the images' centre crops.
        num_images: How many images to take, spread evenly over the folder; the default is all.
        network: The network whose features the Fréchet distance compares: `Inception`, the name of a VFM in timm, or
            another class. The default is the embedded judge for images of 64 px, and none for others.
        vfm: The vision foundation model that CKNNA compares latents with, by its name in timm or its class. The default
            is the embedded one for images of 64 px, and none for others.
        se_cknna: Whether to measure SE-CKNNA beside CKNNA; it encodes every image ten times more.
        lpips: Whether to measure LPIPS. The default is yes where VGG-16's weights are at hand; true downloads them.
        vgg: File with VGG-16's weights in torchvision's layout, for LPIPS.
        rounding: How reconstructions are converted to 8 bits, `round` or `truncate`.
        vfm_weights: Files with the weights of tokenizers' VFMs, by the tokenizers' names, where those that training
            read are gone.
        num_shown: How many images the picture shows.
        batch_size: How many images are processed at a time, also where time is measured.
        device: Device to compute on, such as `cuda:1`; the default is a GPU if there is one.

    Returns:
        What `comparison.json` holds.

    Raises:
        ValueError: if there are no tokenizers or images, one can't be read or does not take images of this size, there
            is no such device, or files would be lost.
    """
    folder = Path(out)
    _check_former(folder, overwrite)
    at = _device(device)
    is_small = image_size == EMBEDDED_SIZE
    perceptual = _lpips(lpips, vgg)
    comparison = Comparison(
        ComparedImages(images, image_size, num_images),
        network=_network("network", network or (Judge() if is_small else None), image_size),
        vfm=_network("vfm", vfm or (EMBEDDED if is_small else None), image_size),
        perceptual={} if perceptual is None else {perceptual.name: perceptual.to(at)},
        se_cknna=se_cknna,
        rounding=rounding,
        num_shown=num_shown,
        batch_size=batch_size,
        device=at,
    )
    read = _read(tokenizers, vfm_weights or {}, image_size)
    for name in FILES:
        check_place(folder / name, option="out")
    comparison.look_at_originals()
    measured: dict[str, Measured] = {}
    for name, tokenizer in read.items():
        with about(f"tokenizers: {name}"):
            measured[name] = comparison.measure(tokenizer.network, name)
    settings = {"images": images, "image_size": image_size} | comparison.settings()
    entries = {
        name: {"place": tokenizers[name], "identity": tokenizer.identity, "weights": tokenizer.fingerprint()}
        | {part: value for part, value in measured[name]._asdict().items() if part != "shown"}
        for name, tokenizer in read.items()
    }
    title = f"{len(comparison.images)} images of {image_size} px in {images}"
    console = Console()  # first, so that numbers are not lost if files can't be written after all
    console.print(settings_table(settings))
    console.print(terminal_table(entries, image_size, title))
    plain = {name: entry | {"metrics": json_numbers(entry["metrics"])} for name, entry in entries.items()}
    found = {"tokenizers": plain, "settings": settings, "versions": versions()}
    write_json(folder / NUMBERS, found)
    write_text(folder / TABLE, f"{title}:\n\n{markdown_table(entries, image_size)}\n{_caption(settings)}\n")
    shown = {name: part.shown for name, part in measured.items()}
    write_picture(folder / PICTURE, picture(comparison.originals(), shown))
    return found


def _check_former(folder: Path, overwrite: bool) -> None:
    former = [name for name in FILES if (folder / name).exists()]
    if former and not overwrite:
        raise ValueError(
            f"out: {str(folder)!r} holds an earlier comparison ({', '.join(former)}); give another folder, or "
            "--overwrite to replace it"
        )


def _device(name: str | None) -> torch.device:
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:  # the latter of a torch without CUDA
        cause = str(error).partition("\n")[0]
        raise ValueError(f"device: {name!r} can't be used here ({cause}); give another, or leave it out") from error
    return device


def _network(option: str, given: Any, image_size: int) -> Any:
    """The network that an option gives: itself, described by its class and arguments, or a VFM in timm by its name."""
    network = given
    if isinstance(given, str):
        with named_as(name=option):
            network = FrozenVFM(given)
    elif isinstance(given, Mapping):
        with about(option):
            network = class_at(given["class_path"])(**given.get("init_args", {}))
    if isinstance(network, VFM):
        with about(option):
            network.grid(image_size, image_size)
    return network


def _lpips(wanted: bool | None, vgg: str | None) -> LPIPSLoss | None:
    is_at_hand = vgg is not None or published_place(VGG16_Weights.IMAGENET1K_V1.url).exists()
    if not (is_at_hand if wanted is None else wanted):
        return None
    with named_as(weights="vgg"):
        return LPIPSLoss(vgg)


def _read(tokenizers: Mapping[str, str], vfm_weights: Mapping[str, str], image_size: int) -> dict[str, FrozenTokenizer]:
    """The tokenizers by name, on the CPU, after a look at whether they take the images."""
    if unknown := sorted(vfm_weights.keys() - tokenizers.keys()):
        raise ValueError(f"vfm_weights: no tokenizer is called {unknown[0]!r}; their names are {sorted(tokenizers)}")
    read = {}
    for name, place in tokenizers.items():
        with about(f"tokenizers: {name}", instead_of="checkpoint"):
            with named_as(**{of_config: option.format(name) for of_config, option in TOKENIZER_OPTIONS.items()}):
                read[name] = FrozenTokenizer(place, vfm_weights.get(name))
            network = read[name].network
            network.check_image_size(image_size)
            if network.vfm is not None and network.encodes_with_vfm:
                network.vfm.grid(image_size, image_size)
    return read


def _caption(settings: Mapping[str, Any]) -> str:
    """What has to be known beside the table."""
    parts = [
        f"Latents are the posterior's mode; images go through 8 bits ({settings['rounding']}).",
        f"Times on {settings['device']}, batches of {settings['batch_size']}, float32 with matmul_precision "
        f"{settings['matmul_precision']}: medians of {settings['timed_runs']} runs.",
    ]
    if settings["vfm"] is not None:
        parts.append(f"CKNNA with {settings['vfm']['network']}, k = {settings['k']}.")
    return " ".join([*parts, "The best of each row is bold."])


def pairs(option: str, words: Sequence[str]) -> dict[str, str]:
    """Reads `name=place` words; a place without a name is called what it is.

    Raises:
        ValueError: if two have the same name, or one lacks its name or its place.
    """
    named: dict[str, str] = {}
    for word in words:
        name, equals, place = word.partition("=")
        if not equals or Path(word).exists():
            name = place = word
        if not name or not place:
            raise ValueError(f"{option}: {word!r} lacks a name or a place; give name=place")
        if name in named:
            raise ValueError(f"{option}: two are called {name!r}; give each its own name, as name=place")
        named[name] = place
    return named


def _import_classes(paths: Sequence[str]) -> None:
    """Imports classes of tokenizers: folders may name those that are."""
    for path in paths:
        cls: Any = class_at(path, "tokenizer_class")
        if not (isinstance(cls, type) and issubclass(cls, PretrainedTokenizer)):
            raise ValueError(f"tokenizer_class: {path} is no PretrainedTokenizer; give a class that derives from it")


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs `compare` by the options of a command line; by default of this process's."""
    parser = ArgumentParser(
        prog="python -m vfm_vae.compare", exit_on_error=False, description=str(compare.__doc__).splitlines()[0]
    )
    parser.add_argument(
        "tokenizers",
        nargs="+",
        metavar="name=place",
        help="The tokenizers: each a name for the table and, as its place, a checkpoint of training, a folder, or "
        "`owner/model` on the Hugging Face hub.",
    )
    add_matmul_precision(parser)
    parser.add_function_arguments(compare, skip={"tokenizers", "overwrite", "vfm_weights"})
    parser.add_argument("--overwrite", action="store_true", help="Replace an earlier comparison in that folder.")
    parser.add_argument(
        "--vfm_weights",
        nargs="+",
        default=[],
        metavar="name=file",
        help="Files with the weights of tokenizers' VFMs, where those that training read are gone.",
    )
    parser.add_argument(
        "--tokenizer_class",
        nargs="+",
        default=[],
        metavar="class",
        help="Classes of tokenizers that are not this project's, such as `my_package.MyVAE`, to read folders of them.",
    )
    with short_errors():
        for module in NAMED:
            importlib.import_module(module)
        options = parser.parse_args(arguments).as_dict()
        set_matmul_precision(options.pop(MATMUL_PRECISION))
        _import_classes(options.pop("tokenizer_class"))
        options |= {name: pairs(name, options[name]) for name in ("tokenizers", "vfm_weights")}
        compare(**options)


if __name__ == "__main__":
    main()
