"""Measures tokenizers one after the other, on the same images and by one protocol."""

import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from lightning.pytorch.utilities import rank_zero_warn
from rich.progress import track
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from vfm_vae.contracts import VFM
from vfm_vae.data.decoding import decode
from vfm_vae.data.listing import EXTENSIONS, list_images
from vfm_vae.data.transforms import CentreCrop
from vfm_vae.frozen import Frozen
from vfm_vae.images import Rounding, from_uint8, quantised, to_uint8
from vfm_vae.metrics.alignment import cknna_of_neighbours, prepare_features
from vfm_vae.metrics.features import FeatureStore
from vfm_vae.metrics.neighbours import Neighbours, nearest_neighbours
from vfm_vae.metrics.reconstruction import ReconstructionMetrics
from vfm_vae.metrics.reference import Network, Reference, network_settings
from vfm_vae.metrics.semantic import is_identity, names_of, transformed
from vfm_vae.metrics.suite import DistributionSuite
from vfm_vae.options import at_least
from vfm_vae.pretrained_tokenizer import PretrainedTokenizer

K = 10  # neighbours, as CKNNA is published with
REPEATS = 5  # of what is timed
MANY = 1000  # images from which on other processes decode them


class ComparedImages(Dataset[Any]):
    """Images of a folder and of all folders in it, after ADM's centre crop, upright as their EXIF orientation says.

    Args:
        folder: The folder.
        image_size: Height and width of the crops in pixels.
        num_images: How many to take, spread evenly over the sorted names; None for all.

    Raises:
        ValueError: if there are none; when one is read, if it is damaged.
    """

    def __init__(self, folder: str | Path, image_size: int, num_images: int | None = None) -> None:
        at_least(1, image_size=image_size, num_images=num_images)
        self.folder, self.crop = Path(folder), CentreCrop(image_size)
        names = list_images(folder, "images")
        if not names:
            raise ValueError(f"images: there are none in {str(folder)!r}; known endings are {' '.join(EXTENSIONS)}")
        count = min(num_images or len(names), len(names))
        self.names = [names[number * len(names) // count] for number in range(count)]

    def __len__(self) -> int:
        """Number of images."""
        return len(self.names)

    def __getitem__(self, number: int) -> tuple[Tensor, int]:
        """An image, uint8 `[3, image_size, image_size]`, and its number."""
        file = self.folder / self.names[number]
        try:
            return self.crop(decode(file)), number
        except ValueError as error:
            raise ValueError(f"images: {str(file)!r} can't be read ({error}); repair it or take it away") from error

    def batches(self, batch_size: int) -> DataLoader[Any]:
        """All images in order: uint8 `[B, 3, H, W]` and their numbers, int64 `[B]`."""
        num_workers = 8 if len(self) > MANY else 0  # fewer are done before workers have started
        return DataLoader(self, batch_size, num_workers=num_workers, generator=torch.Generator())


class Measured(NamedTuple):
    """What was found out about a tokenizer.

    Attributes:
        metrics: Numbers by the names that they have in `metrics.json`, without `val/` or `test/`.
        latent: Shape of the latent of one image, `[C, h, w]`.
        parameters: How many parameters of its own encoding (`encoder`) and decoding (`decoder`) take, and how many the
            frozen VFM has that it encodes with (`vfm`).
        seconds: How long `encode` and `decode` take for one image.
        shown: Reconstructions of the images to show, uint8 `[S, 3, H, W]`.
    """

    metrics: dict[str, float]
    latent: tuple[int, ...]
    parameters: dict[str, int]
    seconds: dict[str, float]
    shown: Tensor


class Comparison:
    """Measures tokenizers on the same images by the same protocol: the posterior's mode, images after 8 bits.

    An image is encoded once for all numbers, and never more than a batch of images is held, beside the features and
    the few reconstructions that are shown. CKNNA and SE-CKNNA are as `callbacks.cknna.CKNNACallback` measures them.

    Args:
        images: The images.
        network: The network whose features the Fréchet distance compares; None for none.
        vfm: The VFM that latents are compared with; None for none.
        perceptual: Perceptual distances by name, as `ReconstructionMetrics` takes them.
        se_cknna: Whether to measure SE-CKNNA, too, for which every image is encoded ten times more.
        rounding: How reconstructions are converted to 8 bits.
        num_shown: How many reconstructions to keep, spread evenly over the images.
        batch_size: How many images are processed at a time.
        device: Where to compute.
    """

    def __init__(
        self,
        images: ComparedImages,
        network: Network | None = None,
        vfm: VFM | None = None,
        perceptual: Mapping[str, Callable[[Tensor, Tensor], Tensor]] | None = None,
        se_cknna: bool = True,
        rounding: Rounding = "round",
        num_shown: int = 6,
        batch_size: int = 16,
        device: torch.device | str = "cpu",
    ) -> None:
        at_least(1, num_shown=num_shown, batch_size=batch_size)
        self.images, self.perceptual, self.rounding = images, dict(perceptual or {}), rounding
        self.batch_size, self.device = batch_size, torch.device(device)
        self.network = network if self._suffice(2, "a Fréchet distance", network) else None
        self.vfm = vfm if self._suffice(K + 1, f"CKNNA with {K} neighbours", vfm) else None
        self.changes = names_of("each") if se_cknna and self.vfm is not None else []
        count = min(num_shown, len(images))
        self.shown = torch.tensor([row * len(images) // count for row in range(count)])
        for part in (self.network, self.vfm):
            if part is not None:
                part.to(self.device)
        self._real: Reference | None = None
        self._near: Neighbours | None = None

    def _suffice(self, least: int, what: str, asked_for: object) -> bool:
        """Whether there are enough images for a number; warns if there are not, although it is asked for."""
        if len(self.images) < least and asked_for is not None:
            rank_zero_warn(f"images: {what} needs at least {least}, given {len(self.images)}; it is left out")
        return len(self.images) >= least

    def originals(self) -> Tensor:
        """The images to show, uint8 `[S, 3, H, W]`."""
        return torch.stack([self.images[number][0] for number in self.shown.tolist()])

    def settings(self) -> dict[str, Any]:
        """What the numbers depend on, as plain data."""
        is_gpu = self.device.type == "cuda"
        return {
            "num_images": len(self.images),
            "evaluation_crop": "adm",
            "latent": "mode",
            "rounding": self.rounding,
            "network": None if self.network is None else network_settings(self.network),
            "vfm": None if self.vfm is None else network_settings(self.vfm),
            "k": K,
            "batch_size": self.batch_size,
            "timed_runs": REPEATS,
            "device": torch.cuda.get_device_name(self.device) if is_gpu else str(self.device),
            "num_threads": torch.get_num_threads(),
            "precision": "float32",
            "matmul_precision": torch.get_float32_matmul_precision(),
        }

    @torch.no_grad()
    def look_at_originals(self) -> None:
        """Extracts the features that all tokenizers are compared with, once."""
        if self.network is None and self.vfm is None:
            return
        suite = None if self.network is None else DistributionSuite(self.network, len(self.images)).to(self.device)
        store = FeatureStore().to(self.device)
        for images, index in self._batches("originals"):
            if suite is not None:
                suite.update(images, index, real=True)
            if self.vfm is not None:
                store.update(self.vfm(from_uint8(images)).tokens.mean(1), index)
        self._real = None if suite is None else suite.as_reference()
        self._near = None if self.vfm is None else _neighbours(store)

    @torch.no_grad()
    def measure(self, tokenizer: PretrainedTokenizer, name: str) -> Measured:
        """Measures a tokenizer, which is on the device meanwhile.

        Args:
            tokenizer: The tokenizer, in eval mode.
            name: What it is called in the progress bar.

        Raises:
            ValueError: if it does not take the images, or its reconstructions are not finite.
        """
        tokenizer.to(self.device)
        metrics = ReconstructionMetrics(self.perceptual).to(self.device)
        suite = None
        if self.network is not None:
            suite = DistributionSuite(self.network, len(self.images), self._real, reconstructions=True).to(self.device)
        features = {change: FeatureStore().to(self.device) for change in ["clean", *self.changes]}
        shown: list[Tensor] = []
        z = torch.empty(0)
        for images, index in self._batches(name):
            z = tokenizer.encode(from_uint8(images)).mode()
            reconstructions = quantised(tokenizer.decode(z).image, self.rounding)
            metrics.update(reconstructions, from_uint8(images))
            if suite is not None:
                suite.update(to_uint8(reconstructions), index)
            for change, latents in self._latents(tokenizer, images, index, z, features).items():
                features[change].update(latents.mean(dim=(2, 3)), index)
            shown.append(to_uint8(reconstructions)[torch.isin(index, self.shown.to(index))].cpu())
        values = metrics.compute() | ({} if suite is None else suite.compute()) | self._alignment(features)
        first = from_uint8(next(iter(self.images.batches(self.batch_size)))[0].to(self.device))
        measured = Measured(
            metrics={name: float(value) for name, value in values.items()},
            latent=tuple(z.shape[1:]),
            parameters=num_parameters(tokenizer, first[:1]),
            seconds=seconds_per_image(tokenizer, first),
            shown=torch.cat(shown),
        )
        tokenizer.to("cpu")
        return measured

    def _batches(self, name: str) -> Iterator[tuple[Tensor, Tensor]]:
        for images, index in track(self.images.batches(self.batch_size), name):
            yield images.to(self.device), index.to(self.device)

    def _latents(
        self, tokenizer: PretrainedTokenizer, images: Tensor, index: Tensor, z: Tensor, wanted: dict[str, FeatureStore]
    ) -> dict[str, Tensor]:
        """Latents by transformation; one whose size the tokenizer refuses is no longer wanted from then on."""
        latents = {"clean": z}
        if not self.changes:
            return latents
        for change, ((_, maps),) in transformed("each", images, index).items():
            if is_identity(change):
                latents[change] = z
            elif change in wanted:
                try:
                    latents[change] = tokenizer.encode(from_uint8(maps)).mode()
                except ValueError as error:
                    rank_zero_warn(f"SE-CKNNA leaves out {change}: {error}")
                    del wanted[change]
        return latents

    def _alignment(self, features: Mapping[str, FeatureStore]) -> dict[str, Tensor]:
        """CKNNA of clean images, of each transformation, and, where none was refused, the mean of those."""
        if self._near is None:
            return {}
        cknna = {name: cknna_of_neighbours(_neighbours(store), self._near) for name, store in features.items()}
        values = {"cknna/latent": cknna.pop("clean")}
        values |= {f"se_cknna/latent/{change}": value for change, value in cknna.items()}
        if cknna and len(cknna) == len(self.changes):
            values["se_cknna/latent/mean"] = torch.stack(list(cknna.values())).mean()
        return values


def _neighbours(store: FeatureStore) -> Neighbours:
    return nearest_neighbours(prepare_features(store.compute()), K)


def num_parameters(tokenizer: PretrainedTokenizer, images: Tensor) -> dict[str, int]:
    """Counts what takes part in encoding and in decoding: the parameters that gradients of their results reach.

    Args:
        tokenizer: The tokenizer; what `encode` and `decode` both use counts twice, what only training uses not at all.
        images: `[B, 3, H, W]` in [-1, 1] to try it with.

    Returns:
        As `Measured.parameters`.
    """
    parameters: list[nn.Parameter] = list(tokenizer.parameters())
    trained = [parameter.requires_grad for parameter in parameters]
    tokenizer.requires_grad_(True)
    with torch.enable_grad():
        z = tokenizer.encode(images).mode()
        image = tokenizer.decode(z.detach()).image
        counts = {"encoder": _reached(z, parameters), "decoder": _reached(image, parameters)}
    for parameter, was_trained in zip(parameters, trained, strict=True):
        parameter.requires_grad_(was_trained)
    vfm = tokenizer.vfm if tokenizer.encodes_with_vfm else None
    network: Any = vfm.network if isinstance(vfm, Frozen) else vfm
    return counts | {"vfm": 0 if network is None else sum(parameter.numel() for parameter in network.parameters())}


def _reached(output: Tensor, parameters: list[nn.Parameter]) -> int:
    if not output.requires_grad:  # a frozen network alone has made it
        return 0
    gradients = torch.autograd.grad(output.float().sum(), parameters, allow_unused=True)
    return sum(p.numel() for p, gradient in zip(parameters, gradients, strict=True) if gradient is not None)


def seconds_per_image(tokenizer: PretrainedTokenizer, images: Tensor) -> dict[str, float]:
    """Times `encode` and `decode` on a batch `[B, 3, H, W]` in [-1, 1]: the median of several runs, after one more."""
    z = tokenizer.encode(images).mode()
    calls = {"encode": lambda: tokenizer.encode(images).mode(), "decode": lambda: tokenizer.decode(z).image}
    return {name: _seconds(call, images.device) / len(images) for name, call in calls.items()}


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    times = []
    for _ in range(1 + REPEATS):
        _wait(device)
        start = time.perf_counter()
        call()
        _wait(device)
        times.append(time.perf_counter() - start)
    return median(times[1:])


def _wait(device: torch.device) -> None:
    """Waits until the device has done all that was asked of it."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
