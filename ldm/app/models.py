"""The models of the page, read and ready for use."""

import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torchvision.models import ResNet50_Weights

from ldm.app.finding import Source
from ldm.compatibility import DIFFUSION, check_tokenizer
from ldm.pipeline import LatentDiffusion
from vfm_vae.checkpoints import read_json, read_weights
from vfm_vae.description import class_at
from vfm_vae.pretrained import CONFIG, model_folder
from vfm_vae.pretrained_tokenizer import PretrainedTokenizer
from vfm_vae.tokenizer import read_tokenizer

SIDES = (64, 128, 256, 384, 512)
USUAL_SIDE = 256
Say = Callable[[str], None]


class Models:
    """Tokenizers and diffusion models by the names that the page gives them.

    Args:
        sources: Where they lie.
        device: Where to compute.
        say: Is told what is being read.

    Attributes:
        tokenizers: The tokenizers.
        diffusion: The diffusion models whose samples one of the tokenizers decodes.
        problems: What could not be used, a line each.
        lock: Whoever computes holds it, so that users of the page don't share a model at one time.

    Raises:
        ValueError: if no model can be used.
    """

    def __init__(self, sources: Sequence[Source], device: torch.device | str = "cpu", say: Say = lambda line: None):
        self.device, self.lock = torch.device(device), threading.Lock()
        self.tokenizers: dict[str, PretrainedTokenizer] = {}
        self.diffusion: dict[str, LatentDiffusion] = {}
        self.problems: list[str] = []
        for name, place in sources:
            say(f"reading {name}")
            try:
                model = read_model(place).to(self.device).eval()
            except ValueError as error:
                self.problems.append(f"{name}: {' '.join(str(error).split())}")
                continue
            if isinstance(model, LatentDiffusion):
                self.diffusion[name] = model
            else:
                self.tokenizers[name] = model
        for name, diffusion in list(self.diffusion.items()):
            if (problem := self._pair(diffusion)) is not None:
                self.problems.append(f"{name}: {problem}")
                del self.diffusion[name]
        if not self.tokenizers:
            raise ValueError("; ".join(self.problems) or "FOLDER: there is no tokenizer among the models")

    def _pair(self, diffusion: LatentDiffusion) -> str | None:
        """Gives a diffusion model the first tokenizer whose latents it makes; says what is wrong if there is none."""
        if diffusion.conditioning.num_classes is None and diffusion.conditioning.text_encoder is None:
            return f"the page can't ask for what {type(diffusion.conditioning).__name__} takes; it is left out"
        channels = diffusion.model.in_channels
        for tokenizer in self.tokenizers.values():
            try:
                check_tokenizer(diffusion.latent_source, tokenizer.latent_identity(), "tokenizer:")
            except ValueError:
                continue
            if tokenizer.latent_channels == channels:
                diffusion.use_tokenizer(tokenizer)
                return None
        return "none of the tokenizers makes its latents; give the one that does, too"

    def sides(self) -> tuple[list[int], int]:
        """Sides of images in pixels that one of the tokenizers takes, and the one to begin with.

        That is what the diffusion models draw, or else 64 where a tokenizer's VFM is the embedded one, or 256.
        """
        drawn = [max(m.model.input_size) * _tokenizer(m).compression for m in self.diffusion.values()]
        small = [str((t.vfm_source() or {}).get("name", "")).endswith("_64") for t in self.tokenizers.values()]
        first = drawn[0] if drawn else (SIDES[0] if all(small) else USUAL_SIDE)
        taken = [side for side in SIDES if any(takes(tokenizer, side) for tokenizer in self.tokenizers.values())]
        return sorted({*taken, first}), first


def takes(tokenizer: PretrainedTokenizer, side: int) -> bool:
    """Whether a tokenizer takes square images of a side in pixels."""
    try:
        tokenizer.check_image_size(side)
        if tokenizer.vfm is not None and tokenizer.encodes_with_vfm:
            tokenizer.vfm.grid(side, side)
    except ValueError:
        return False
    return True


def _tokenizer(diffusion: LatentDiffusion) -> PretrainedTokenizer:
    assert diffusion.tokenizer is not None
    network: PretrainedTokenizer = diffusion.tokenizer.network
    return network


def read_model(place: str) -> PretrainedTokenizer | LatentDiffusion:
    """Reads a model of either kind.

    Args:
        place: A folder, a checkpoint of training, or `owner/model` on the hub.

    Returns:
        The model, a diffusion model without its tokenizer.

    Raises:
        ValueError: if there is none.
    """
    if Path(place).is_file():
        is_diffusion = DIFFUSION.describes(read_weights(place, "FOLDER"))
        return LatentDiffusion.from_checkpoint(place) if is_diffusion else read_tokenizer(place)
    folder = model_folder(place, {})
    config = read_json(folder / CONFIG, "FOLDER") if (folder / CONFIG).is_file() else None
    described = config.get("model") if isinstance(config, dict) else None
    path = described.get("class_path") if isinstance(described, dict) else None
    if isinstance(path, str) and path.startswith("ldm.") and issubclass(class_at(path, "FOLDER"), LatentDiffusion):
        return LatentDiffusion.from_pretrained(folder)
    return read_tokenizer(place)


def class_choices(model: LatentDiffusion) -> list[tuple[str, int]]:
    """Classes as a list to choose from: what each is called, and its number.

    Names are those that the model's folder notes; of 1000 classes ImageNet's if it notes none; else there are numbers.
    """
    count = model.conditioning.num_classes or 0
    names = model.class_names
    if names is None and count == 1000:
        names = list(ResNet50_Weights.IMAGENET1K_V2.meta["categories"])
    return [(f"{number} {names[number]}" if names else str(number), number) for number in range(count)]
