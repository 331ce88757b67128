"""The base class of tokenizers: folders, checkpoints, and what identifies their latents."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

from torch import Tensor, nn

from vfm_vae.contracts import VFM, Tokenizer
from vfm_vae.description import describe
from vfm_vae.frozen import sha256_of
from vfm_vae.images import Interpolation
from vfm_vae.pretrained import Pretrained
from vfm_vae.types import Posterior, VFMFeatures
from vfm_vae.vfm import check_source, check_vfm, vfm_from

CARD = """# {name}: latents of {channels} channels, {compression} times smaller than the image

A tokenizer for latent diffusion models.

```python
from {module} import {name}

model = {name}.from_pretrained("this folder, or owner/model on the hub")
z = model.encode(images).mode()  # images [B, 3, H, W] in [-1, 1]
images = model.decode(z).image
```
"""


class PretrainedTokenizer(nn.Module, Pretrained, Tokenizer):
    """A tokenizer that is saved as a folder, and read from one or from a checkpoint of its training.

    A subclass writes `encode`, `decode`, `latent_channels` and `compression`. One with a VFM takes it as its argument
    `vfm`, and is built without it when it is read; if it can't encode then, it writes `attach_vfm`, too. `Aligned` says
    what it takes to be drawn towards the VFM's features.

    Attributes:
        absent_vfm: The VFM that the weights belong to, as `VFM.source` says it, where it is known by name alone.
        decoding_arguments: Names of arguments that latents do not depend on, beside `vfm` and `decoder`.
    """

    decoding_arguments: ClassVar[frozenset[str]] = frozenset()

    def __init__(self) -> None:
        super().__init__()
        self.vfm: VFM | None = None
        self.absent_vfm: dict[str, Any] | None = None

    @classmethod
    def from_pretrained(cls, name: str | Path, vfm: bool = True, vfm_weights: str | None = None, **hub: Any) -> Self:
        """Loads a folder that `save_pretrained` wrote, or a model of the Hugging Face hub.

        Args:
            name: The folder, or the hub's `owner/model`.
            vfm: Whether to load the VFM, too, where the tokenizer has one; it decodes without it.
            vfm_weights: File with the VFM's weights, to take instead of a download.
            **hub: Options of `huggingface_hub.snapshot_download`: `revision`, `token`, `cache_dir`, …

        Returns:
            The tokenizer, in eval mode.

        Raises:
            ValueError: if there is no such model, it is in a format that is not this version's, or its VFM can't be
                had or has other weights than it was trained on.
        """
        model = super().from_pretrained(name, **hub)
        return model.attach_vfm(vfm_weights) if vfm else model

    @classmethod
    def from_checkpoint(cls, path: str | Path, vfm: bool = True, vfm_weights: str | None = None) -> Self:
        """Loads a checkpoint of training; its averaged weights where it has them.

        Args:
            path: File that `python -m vfm_vae fit` wrote.
            vfm: Whether to load the VFM, too, where the tokenizer has one.
            vfm_weights: File with the VFM's weights, where the one that training read is not at hand.

        Returns:
            The tokenizer, in eval mode.

        Raises:
            ValueError: if the file is no tokenizer's checkpoint, or its VFM can't be had or is another.
        """
        model = super().from_checkpoint(path)
        return model.attach_vfm(vfm_weights) if vfm else model

    def completed(self, config: Mapping[str, Any]) -> Self:
        """Notes the VFM that a config names, and returns the model."""
        self.absent_vfm = config.get("vfm")
        return self

    def attach_vfm(self, weights: str | None = None) -> Self:
        """Loads the VFM, if the tokenizer encodes with it, and returns the model; here it does not.

        Args:
            weights: File with the VFM's weights.

        Raises:
            ValueError: if the VFM can't be had, or is not needed.
        """
        if weights is not None:
            raise ValueError(f"vfm_weights: {type(self).__name__} does not encode with a VFM; leave them out")
        return self

    def load_named_vfm(self, weights: str | None = None) -> VFM:
        """Loads the VFM that is known by name, for `attach_vfm`.

        Args:
            weights: File with its weights, to take instead of those that training read or of a download.

        Raises:
            ValueError: if none is known, or its weights can't be had, or they are others.
        """
        if self.absent_vfm is None:
            name = type(self).__name__
            raise ValueError(f"vfm: the model does not say which VFM it was trained on; pass one to {name}(…)")
        vfm = vfm_from(self.absent_vfm, weights)
        check_source(vfm)
        check_vfm(vfm, {"vfm": self.absent_vfm})
        return vfm

    @property
    def encodes_with_vfm(self) -> bool:
        """Whether the latents depend on the VFM: so they do where `attach_vfm` is written."""
        return type(self).attach_vfm is not PretrainedTokenizer.attach_vfm

    def vfm_source(self) -> dict[str, Any] | None:
        """The VFM that the weights belong to, with its fingerprint where that is known; None where nothing is."""
        return self.absent_vfm if self.vfm is None else self.vfm.source()

    def encode_with_features(self, images: Tensor) -> tuple[Posterior, VFMFeatures | None]:
        """Encodes images for training, and looks at them with the VFM, where there is one."""
        return self.encode(images), None if self.vfm is None else self.vfm(images)

    @property
    def side_multiple(self) -> int:
        """The latent's height and width must be multiples of this."""
        return 1

    @property
    def interpolation(self) -> Interpolation:
        """How training resizes images for it."""
        return "bicubic"

    def check_image_size(self, size: int) -> None:
        """Checks that images of this size can be tokenized, before anything runs.

        Raises:
            ValueError: if not.
        """
        cells = self.side_multiple
        step = cells * self.compression
        if size < step or size % step:
            latent, how = f"has a position for every {step}x{step} pixels", ""
            if cells > 1:
                latent, how = f"needs sides that divide by {cells}", f" ({cells} cells of {self.compression} pixels)"
            raise ValueError(
                f"image_size: {size} does not fit this tokenizer, whose latent {latent}: give a multiple of {step}{how}"
            )

    def compile_regions(self) -> None:
        """Compiles nothing unless a subclass does."""

    def latent_identity(self) -> dict[str, Any] | None:
        """What a cache of latents, and a model trained on it, say of where they come from.

        The fingerprint is of the class, of its arguments and of all weights, except for a part called `decoder`. Where
        the tokenizer encodes with its VFM, it is also of that VFM's weights and arguments, and None where these are
        not known.
        """
        encoding = {name: w for name, w in self.state_dict().items() if not name.startswith("decoder.")}
        # `source` rather than `view`: it is known without the VFM, too, and what it sees follows from its arguments.
        source = (self.vfm_source() or {}) if self.encodes_with_vfm else None
        vfm = None if source is None else {name: value for name, value in source.items() if name != "weights"}
        known = vfm is None or vfm.get("fingerprint") is not None
        without = {"vfm", "decoder", *self.decoding_arguments}
        settings = [_as_text(describe(self, without=without)), _as_text(vfm)]
        return {
            "tokenizer": type(self).__name__,
            "fingerprint": sha256_of(encoding, *settings) if known else None,
            "channels": self.latent_channels,
            "compression": self.compression,
        }

    def described(self) -> dict[str, Any]:
        """How to make it again on this machine: the model without the VFM, and which VFM that is."""
        return {"model": describe(self, without={"vfm"}), "vfm": self.vfm_source()}

    def pretrained_config(self) -> dict[str, Any]:
        """The config of a folder: what `described` says, without paths on this machine."""
        config = self.described()
        return config | {"vfm": config["vfm"] and config["vfm"] | {"weights": None}}

    def model_card(self) -> str:
        """The text of the model card."""
        kind = type(self)
        sizes = {"channels": self.latent_channels, "compression": self.compression}
        return CARD.format(name=kind.__name__, module=kind.__module__, **sizes)


def _as_text(description: Mapping[str, Any] | None) -> str:
    """A description as text, which stays the same when it is written and read: there 1 may become 1.0."""
    return json.dumps(json.loads(json.dumps(description), parse_int=float), sort_keys=True)
