"""VFM-VAE: a frozen vision foundation model as the encoder of a VAE (arXiv 2510.18457)."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from vfm_vae.compilation import compile_regions
from vfm_vae.description import describe
from vfm_vae.modules.adapter import Adapter, AttentionProjection
from vfm_vae.modules.decoder import Decoder
from vfm_vae.modules.posterior import DiagonalGaussian
from vfm_vae.modules.quantizer import QuantizedPosterior, VectorQuantizer
from vfm_vae.options import named_as
from vfm_vae.pretrained import Pretrained
from vfm_vae.types import Decoded
from vfm_vae.vfm import FORMERLY, Frozen, FrozenVFM, check_vfm, sha256_of

CARD = """# VFM-VAE: latents of {channels} channels, {compression} times smaller than the image

A tokenizer for latent diffusion models (arXiv 2510.18457). Its encoder is the frozen {vfm}, whose weights are not in
here.

```python
from vfm_vae.tokenizer import VFMVAE

model = VFMVAE.from_pretrained("this folder, or owner/model on the hub")
z = model.encode(images).mode()  # images [B, 3, H, W] in [-1, 1]
images = model.decode(z).image
```
"""


class VFMVAE(nn.Module, Pretrained):
    """Frozen VFM → adapter → posterior → adapter → decoder.

    Args:
        adapter: Between VFM tokens and latents.
        decoder: From latents to images.
        vfm: The encoder; without one the model takes VFM features from the caller, and decodes.
        quantizer: Makes the latent discrete; without one it is Gaussian.

    Attributes:
        absent_vfm: The VFM that the weights belong to, as `FrozenVFM.source` says it, where it is known by name alone.

    Raises:
        ValueError: if the parts do not fit each other.
    """

    def __init__(
        self,
        adapter: Adapter,
        decoder: Decoder,
        vfm: FrozenVFM | None = None,
        quantizer: VectorQuantizer | None = None,
    ):
        super().__init__()
        self.vfm = vfm
        self.adapter = adapter
        self.decoder = decoder
        self.quantizer = quantizer
        self.absent_vfm: dict[str, Any] | None = None
        self._check_quantizer()
        if vfm is not None:
            self._check_fit(vfm)

    @classmethod
    def from_pretrained(
        cls, name: str | Path, vfm: bool = True, vfm_weights: str | None = None, **hub: Any
    ) -> Self:
        """Loads a folder that `save_pretrained` wrote, or a model of the Hugging Face hub.

        Args:
            name: The folder, or the hub's `owner/model`.
            vfm: Whether to load the VFM, too; without it the model decodes, and encodes features.
            vfm_weights: File with the VFM's weights, to take instead of a download.
            **hub: Options of `huggingface_hub.snapshot_download`: `revision`, `token`, `cache_dir`, `force_download`,
                `local_files_only`, …

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
            path: File that training wrote.
            vfm: Whether to load the VFM, too.
            vfm_weights: File with the VFM's weights, where the one that training read is not at hand.

        Returns:
            The tokenizer, in eval mode.

        Raises:
            ValueError: if the file is no tokenizer's checkpoint, or its VFM can't be had or is another.
        """
        model = super().from_checkpoint(path)
        return model.attach_vfm(vfm_weights) if vfm else model

    def completed(self, config: Mapping[str, Any]) -> Self:
        """Notes which VFM the weights belong to."""
        self.absent_vfm = config["vfm"]
        return self

    def attach_vfm(self, weights: str | None = None) -> "VFMVAE":
        """Loads the VFM that is known by name, and returns the model.

        Args:
            weights: File with its weights, to take instead of those that training read or of a download.

        Raises:
            ValueError: if its weights can't be had, or they are others.
        """
        if self.absent_vfm is None:
            raise ValueError("vfm: the model does not say which VFM it was trained on; pass one to VFMVAE(…)")
        arguments = FORMERLY | {name: value for name, value in self.absent_vfm.items() if name != "fingerprint"}
        vfm = FrozenVFM(**arguments | ({} if weights is None else {"weights": weights}))
        check_vfm(vfm, {"vfm": self.absent_vfm})
        self._check_fit(vfm)
        self.vfm = vfm
        return self

    def vfm_source(self) -> dict[str, Any] | None:
        """The VFM that the weights belong to, with its fingerprint where that is known; None where nothing is."""
        return self.absent_vfm if self.vfm is None else self.vfm.source()

    def described(self) -> dict[str, Any]:
        """How to make it again on this machine: the model without the VFM, and which VFM that is."""
        return {"model": describe(self, without=["vfm"]), "vfm": self.vfm_source()}

    def pretrained_config(self) -> dict[str, Any]:
        """The same on any machine: without the place of the VFM's weights."""
        described, source = self.described(), self.vfm_source()
        return described | {"vfm": None if source is None else source | {"weights": None}}

    def model_card(self) -> str:
        """What the card says."""
        source = self.vfm_source()
        name = "vision foundation model" if source is None else source["name"]
        return CARD.format(channels=self.latent_channels, compression=self.compression, vfm=name)

    def _check_quantizer(self) -> None:
        if self.adapter.gaussian != (self.quantizer is None):
            raise ValueError(
                "quantizer: goes with an adapter of gaussian=False, and only with such: "
                f"got gaussian={self.adapter.gaussian} with{'out' if self.quantizer is None else ''} a quantizer"
            )
        if self.quantizer is not None and self.quantizer.width != self.latent_channels:
            raise ValueError(
                f"quantizer: is {self.quantizer.width} wide, but the adapter has latent_channels={self.latent_channels}"
            )

    def _check_fit(self, vfm: FrozenVFM) -> None:
        widths = [vfm.width] * len(vfm.layers)
        if self.adapter.feature_channels != widths:
            raise ValueError(
                f"{vfm.name} gives layers {list(vfm.layers)} of widths {widths}, "
                f"but the adapter has feature_channels={self.adapter.feature_channels}"
            )
        if self.adapter.alignment_channels != vfm.width:
            raise ValueError(
                f"{vfm.name} is {vfm.width} wide, but the adapter has "
                f"alignment_channels={self.adapter.alignment_channels}"
            )
        compression = vfm.patch_size * self.adapter.unshuffle / vfm.input_scale
        if compression != self.decoder.upscaling:
            raise ValueError(
                f"patch_size {vfm.patch_size} · unshuffle {self.adapter.unshuffle} / input_scale {vfm.input_scale} "
                f"compresses {compression:g} times, but {len(self.decoder.blocks)} decoder blocks enlarge "
                f"{self.decoder.upscaling} times; change unshuffle, input_scale, or the decoder's compression or "
                "number of channels"
            )

    @property
    def compression(self) -> int:
        """Sides of the image over sides of the latent."""
        return self.decoder.upscaling

    def check_image_size(self, size: int) -> None:
        """Says before anything runs whether images of this side can be tokenized.

        Raises:
            ValueError: if not.
        """
        cells = self.decoder.side_multiple
        step = cells * self.compression
        if size < step or size % step:
            raise ValueError(
                f"image_size: {size} does not fit this tokenizer, whose latent needs sides that divide by {cells}: "
                f"give a multiple of {step} ({cells} cells of {self.compression} pixels)"
            )

    def compile_regions(self) -> None:
        """Compiles adapter, decoder and VFM layer by layer, each where it is first called."""
        compile_regions((m for m in self.adapter.modules() if isinstance(m, AttentionProjection)), dynamic=True)
        self.decoder.compile_regions()
        if self.vfm is not None:
            compile_regions(self.vfm.network.blocks, dynamic=True)

    @property
    def latent_channels(self) -> int:
        """Channels of the latent."""
        return self.adapter.latent_channels

    def latent_identity(self) -> dict[str, Any]:
        """What a cache of latents, and a model trained on it, say of where they come from.

        The fingerprint is of all that makes the latents and of nothing else: tokenizers that differ in their decoders
        alone share it. It is None where the VFM's weights are not known.

        Raises:
            ValueError: if the model has no VFM, nor knows of one.
        """
        source = self.vfm_source()
        if source is None:
            raise ValueError("this VFMVAE has no VFM, so its latents have no identity: pass vfm=FrozenVFM(…)")
        encoding = nn.ModuleDict({"layers": self.adapter.layers, "fuse": self.adapter.fuse}).state_dict()
        if self.quantizer is not None:
            encoding["codebooks"] = self.quantizer.codebooks
        settings = [source["fingerprint"], list(source["layers"]), source["input_scale"], self.adapter.unshuffle]
        settings += [] if source.get("antialias") is None else [source["antialias"]]
        settings += [] if (FORMERLY | source)["antialias_positions"] else ["positions without antialias"]
        return {
            "vfm": source["name"],
            "fingerprint": None if source["fingerprint"] is None else sha256_of(encoding, str(settings)),
            "channels": self.latent_channels,
            "compression": self.compression,
        }

    def encode(self, images: Tensor) -> DiagonalGaussian | QuantizedPosterior:
        """Encodes images.

        Args:
            images: `[B, 3, H, W]` in [-1, 1].

        Returns:
            The posterior of latents `[B, C, H / compression, W / compression]`; the caller chooses `mode()` or
            `sample()`.

        Raises:
            ValueError: if the model has no VFM, or the VFM does not take this size.
        """
        if self.vfm is None:
            raise ValueError("this VFMVAE has no VFM: pass vfm=FrozenVFM(…), or call encode_features")
        features = self.vfm(images)
        return self.encode_features(features.layers, features.grid)

    def encode_features(
        self, features: Sequence[Tensor], grid: tuple[int, int] | None = None
    ) -> DiagonalGaussian | QuantizedPosterior:
        """Encodes VFM tokens.

        Args:
            features: Tokens `[B, N, C_i]` of each layer, in the order of the VFM's `layers`.
            grid: Rows and columns of the tokens; square if not given.

        Returns:
            The posterior.

        Raises:
            ValueError: if no grid is given and N is no square.
        """
        if grid is None:
            side = math.isqrt(features[0].shape[1])
            if side * side != features[0].shape[1]:
                raise ValueError(f"{features[0].shape[1]} tokens make no square: pass grid=(rows, columns)")
            grid = (side, side)
        encoded = self.adapter.encode(features, grid)
        return DiagonalGaussian(encoded) if self.quantizer is None else self.quantizer(encoded)

    def decode(self, z: Tensor, truncation: float = 1.0) -> Decoded:
        """Decodes latents.

        Args:
            z: `[B, C, h, w]`; h and w divide by `decoder.side_multiple`.
            truncation: Below 1 draws the global latent towards its average over training.

        Returns:
            Reconstruction `[B, 3, h · compression, w · compression]` and multi-scale images, small to large.
        """
        return self.decoder(self.adapter.decode(z), truncation)


class FrozenTokenizer(Frozen):
    """A trained tokenizer; it never trains again and is never saved.

    Computes in float32 or, under autocast, as that says.

    Args:
        checkpoint: File that `python -m vfm_vae fit` wrote, of which the averaged weights are taken where it has them;
            or a folder that `save_pretrained` or `python -m vfm_vae.convert` wrote, or `owner/model` on the hub.
        vfm_weights: File with the VFM's weights, where the one that training read is not at hand.

    Attributes:
        network: The VFMVAE.
        identity: Of its latents, see `VFMVAE.latent_identity`.

    Raises:
        ValueError: if there is no such tokenizer, or its VFM can't be had.
    """

    network: VFMVAE

    def __init__(self, checkpoint: str, vfm_weights: str | None = None) -> None:
        if not Path(checkpoint).exists() and Path(checkpoint).suffix == ".ckpt":
            raise ValueError(f"checkpoint: there is no tokenizer at {checkpoint!r}; train one first")
        read = VFMVAE.from_checkpoint if Path(checkpoint).is_file() else VFMVAE.from_pretrained
        with named_as(name="checkpoint", weights="vfm_weights"):
            network = read(checkpoint, vfm_weights=vfm_weights)
        super().__init__(network)
        self.identity = network.latent_identity()

    def compile_regions(self) -> None:
        """As the network has it."""
        self.network.compile_regions()

    def encode(self, images: Tensor) -> DiagonalGaussian | QuantizedPosterior:
        """The posterior of images `[B, 3, H, W]` in [-1, 1], without gradients."""
        with torch.no_grad():
            return self.network.encode(images)

    def decode(self, z: Tensor) -> Tensor:
        """Images `[B, 3, H, W]` in [-1, 1] of latents `[B, C, h, w]`, without gradients."""
        with torch.no_grad():
            return self.network.decode(z).image.clamp(-1, 1)
