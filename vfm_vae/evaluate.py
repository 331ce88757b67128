"""`python -m vfm_vae.evaluate`: measures samples in a file or a folder against a reference, without a model."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jsonargparse import ArgumentParser
from PIL import Image
from rich.console import Console
from rich.progress import track
from torch import Tensor

from vfm_vae.checkpoints import seems_to_be
from vfm_vae.cli import MATMUL_PRECISION, add_matmul_precision, set_matmul_precision, short_errors
from vfm_vae.data.archive import ImageArchive
from vfm_vae.data.decoding import decode
from vfm_vae.data.listing import list_images
from vfm_vae.frozen import device_of
from vfm_vae.metrics.inception import Inception
from vfm_vae.metrics.reference import Network, ReferenceImages, name_of, network_settings
from vfm_vae.metrics.suite import DistributionSuite
from vfm_vae.metrics.summary import (
    check_entries,
    json_numbers,
    settings_table,
    summary_table,
    versions,
    write_entry,
)
from vfm_vae.options import at_least, named_as, positive
from vfm_vae.vfm import FrozenVFM

END_OF_PNG = b"\0\0\0\0IEND\xaeB`\x82"


class SampleFiles:
    """Samples that were drawn before: an `.npz` with `arr_0`, or a folder of images.

    Args:
        path: The folder or the file.

    Raises:
        ValueError: there is no such file or folder, or it holds no images, or files that are cut short or of another
            size than the first; when they are read, if one is damaged within.
    """

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        self._files: list[Path] = []
        self._size: tuple[int, int] | None = None
        if self.path.is_dir():
            self._files = [self.path / name for name in list_images(self.path, "samples")]
            self.num_images = len(self._files)
            for file in self._files:
                self._look_at(file)
        else:
            try:
                self._archive = ImageArchive(self.path)
                self.num_images = self._archive.num_images()
            except ValueError as error:
                raise ValueError(f"samples: {error}; give an .npz with 'arr_0' or a folder of images") from error
        if not self.num_images:
            raise ValueError(f"samples: no images in {path!r}")

    def batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Uint8 images `[B, 3, H, W]` and their numbers `[B]`."""
        if not self._files:
            yield from self._archive.images(batch_size)
            return
        for start in range(0, self.num_images, batch_size):
            files = self._files[start : start + batch_size]
            images = [self._read(file) for file in files]
            yield torch.stack(images), torch.arange(start, start + len(files))

    def _look_at(self, file: Path) -> None:
        """Checks by its first and last bytes that a file is a whole image of the same size as the others."""
        try:
            with Image.open(file) as image:
                size, is_png = image.size, image.format == "PNG"
        except Exception as error:  # decoders raise OSError, SyntaxError, struct.error and more at bad bytes
            what = seems_to_be(file)
            raise ValueError(f"samples: {str(file)!r} can't be read as an image: it is {what}") from error
        if is_png and not _ends_with(file, END_OF_PNG):
            raise ValueError(f"samples: {str(file)!r} is cut short ({file.stat().st_size} bytes); draw it again")
        self._check_size(file, size)

    def _check_size(self, file: Path, size: tuple[int, int]) -> None:
        self._size = self._size or size
        if size != self._size:
            sizes = " pixels, but others ".join(f"{height}x{width}" for width, height in (size, self._size))
            raise ValueError(f"samples: {str(file)!r} has {sizes}; all have to be of one size")

    def _read(self, file: Path) -> Tensor:
        try:
            pixels = np.array(decode(file, exif_transpose=False))
        except ValueError as error:
            raise ValueError(f"samples: {str(file)!r} can't be read as an image ({error})") from error
        self._check_size(file, (pixels.shape[1], pixels.shape[0]))
        return torch.from_numpy(pixels).permute(2, 0, 1)


def _ends_with(file: Path, end: bytes) -> bool:
    with open(file, "rb") as content:
        content.seek(-len(end), os.SEEK_END)
        return content.read() == end


@torch.inference_mode()
def measure(
    samples: SampleFiles,
    reference: ReferenceImages,
    network: Network,
    precision_recall: bool = True,
    batch_size: int = 64,
) -> dict[str, Tensor]:
    """Measures samples by the ADM protocol, with one pass of the network over each.

    Args:
        samples: What is measured.
        reference: What it is compared with.
        network: The network whose features are compared, on the device that computes them.
        precision_recall: Whether these two are wanted.
        batch_size: Images at a time.

    Returns:
        The numbers by the names that `DistributionSuite` gives them.
    """
    device = device_of(network)
    suite = DistributionSuite(
        network, samples.num_images, reference.load(network, precision_recall, batch_size), precision_recall
    ).to(device)
    for images, index in track(
        samples.batches(batch_size), f"{name_of(network)} features", -(-samples.num_images // batch_size)
    ):
        suite.update(images.to(device), index.to(device))
    return suite.compute()


def evaluate_samples(
    samples: str,
    reference: str,
    inception: str | None = None,
    vfm: str | None = None,
    vfm_weights: str | None = None,
    vfm_input_scale: float = 1.0,
    image_size: int = 256,
    statistics: str | None = None,
    remeasure: bool = False,
    precision_recall: bool = True,
    batch_size: int = 64,
    device: str | None = None,
    metrics_file: str = "metrics.json",
    name: str = "samples",
) -> None:
    """Measures samples in files by the ADM protocol: gFID, sFID, Inception Score, precision and recall.

    Args:
        samples: An .npz with `arr_0`, uint8 [N, H, W, 3], or a folder of images.
        reference: Real images: an .npz such as ADM's VIRTUAL_imagenet256_labeled.npz, or a folder of images, in which
            they lie together or by class.
        inception: File with Inception's weights, if they are not where torch-fidelity keeps them.
        vfm: Name of a vision foundation model in timm whose features are compared instead of Inception's. The numbers
            are no FIDs then.
        vfm_weights: File with the VFM's weights to use instead of a download.
        vfm_input_scale: Factor by which images are resized before the VFM, such as 0.875 for 256 px and patches of 14.
        image_size: Height and width in pixels of the centre crops of a reference folder's images.
        statistics: File for the statistics of a reference folder; the default is a file beside the folder. It is used
            again until the name, size or time of modification of an image changes.
        remeasure: Measure the reference folder again, whatever is saved.
        precision_recall: Whether to measure precision and recall, which need the reference's images.
        batch_size: How many images are processed at a time.
        device: Device to compute on, such as `cuda:1`; the default is a GPU if there is one.
        metrics_file: File for the numbers, with settings, counts and versions.
        name: Name of their entry in that file.
    """
    at_least(1, image_size=image_size, batch_size=batch_size)
    positive(vfm_input_scale=vfm_input_scale)
    files, real = SampleFiles(samples), ReferenceImages(reference, image_size, statistics, remeasure)
    check_entries(Path(metrics_file), "metrics_file")
    network: Network
    if vfm is None:
        with named_as(weights="inception"):
            network = Inception(inception)
    else:
        with named_as(name="vfm", weights="vfm_weights"):
            network = FrozenVFM(vfm, input_scale=vfm_input_scale, weights=vfm_weights)
    network.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    with named_as(input_scale="vfm_input_scale"):
        values = measure(files, real, network, precision_recall, batch_size)
    settings: dict[str, Any] = {
        "samples": samples,
        "num_images": files.num_images,
        "precision_recall": precision_recall,
        "matmul_precision": torch.get_float32_matmul_precision(),
    }
    settings |= real.settings() | network_settings(network)
    metrics = json_numbers({f"test/{key}": value for key, value in values.items()})
    entry = {"metrics": metrics, "settings": settings, "versions": versions()}
    console = Console()  # first, so that numbers are not lost if the file can't be written after all
    console.print(settings_table(settings))
    console.print(summary_table({name: entry}, title=metrics_file))
    write_entry(Path(metrics_file), name, entry)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs `evaluate_samples` by the options of a command line; by default of this process's."""
    parser = ArgumentParser(
        prog="python -m vfm_vae.evaluate",
        exit_on_error=False,
        description=str(evaluate_samples.__doc__).splitlines()[0],
    )
    add_matmul_precision(parser)
    parser.add_function_arguments(evaluate_samples, skip={"remeasure"})
    parser.add_argument(
        "--remeasure", action="store_true", help="Measure the reference folder again, whatever is saved."
    )
    with short_errors():
        options = parser.parse_args(arguments).as_dict()
        set_matmul_precision(options.pop(MATMUL_PRECISION))
        evaluate_samples(**options)


if __name__ == "__main__":
    main()
