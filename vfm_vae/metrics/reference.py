"""The real images that samples are compared with: their features and statistics, from a folder or a file."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from vfm_vae.contracts import VFM
from vfm_vae.data.archive import IMAGES, ImageArchive, write_archive
from vfm_vae.data.flat import FlatFolderDataset, is_flat
from vfm_vae.data.folder import ImageFolderDataset
from vfm_vae.data.identity import files_state, names_digest
from vfm_vae.data.images import ImageDataset
from vfm_vae.data.transforms import CentreCrop
from vfm_vae.frozen import device_of
from vfm_vae.images import from_uint8
from vfm_vae.metrics.distribution import Gaussian, Moments
from vfm_vae.metrics.features import FeatureStore
from vfm_vae.metrics.inception import POOL_WIDTH, SPATIAL_WIDTH, Inception, InceptionFeatures
from vfm_vae.vfm import FORMERLY
from vfm_vae.writing import check_place

NUM_IMAGES = 10_000  # of a reference, for precision and recall; as many as ADM's has
SOURCE = "source"

Network = Inception | VFM
"""Whose features can be compared."""


class LabelledFeatures(NamedTuple):
    """Features of images and their classes.

    Attributes:
        features: `[n, d]`.
        labels: int64 `[n]`.
    """

    features: Tensor
    labels: Tensor


class Reference(NamedTuple):
    """Real images as a distribution of features.

    Attributes:
        pool: Distribution of the pooled features.
        spatial: Distribution of Inception's spatial features; None for other networks, or if a file has none.
        features: Pooled features of some of the images, `[m, d]`; None where they were not asked for.
    """

    pool: Gaussian
    spatial: Gaussian | None
    features: Tensor | None


def name_of(network: Network) -> str:
    """What numbers measured on a network's features are named after: `inception`, or the VFM's short name."""
    return "inception" if isinstance(network, Inception) else short_name(network.name)


def short_name(name: str) -> str:
    """A VFM's name without its tag; of a folder or a model of the hub, the last part, with its dots replaced."""
    return Path(name).name.replace(".", "_") if "/" in name and ":" not in name else name.split(".")[0]


def network_settings(network: Network) -> dict[str, Any]:
    """What features depend on, as JSON has it: the network's whole name, its weights, and how a VFM sees images."""
    if isinstance(network, Inception):
        splits = {"score_splits": "of permuted samples"}  # formerly of successive ones
        return {"network": name_of(network), "network_weights": network.fingerprint()} | splits
    return {"network": network.name, "network_weights": network.fingerprint()} | network.view()


def extract(network: Network, images: Tensor) -> InceptionFeatures:
    """Features of uint8 images `[B, 3, H, W]`; those of a VFM are pooled ones alone, the others None."""
    if isinstance(network, Inception):
        return network(images)
    return InceptionFeatures(network(from_uint8(images)).pooled, None, None)


@torch.no_grad()
def folder_features(
    vfm: VFM, folder: str | Path, image_size: int, part: Sequence[int] = (0, 1), batch_size: int = 64
) -> LabelledFeatures:
    """Pooled features of the images in a tree `<folder>/<class>/*`, after ADM's centre crop.

    Args:
        vfm: Extracts the features.
        folder: Root of the tree.
        image_size: Height and width of the crops in pixels.
        part: (r, n) takes every n-th image from the r-th on, so that n ranks share the work.
        batch_size: How many images are processed at a time.

    Raises:
        ValueError: if there is no such tree, or an image is damaged.
    """
    dataset = _dataset(folder, image_size)
    device = device_of(vfm)
    features, labels = [torch.zeros(0, vfm.width, device=device)], [torch.zeros(0, dtype=torch.int64, device=device)]
    for images, classes, _ in _batches(dataset, range(part[0], len(dataset), part[1]), batch_size):
        features.append(extract(vfm, images.to(device)).pool)
        labels.append(classes.to(device))
    return LabelledFeatures(torch.cat(features), torch.cat(labels))


class ReferenceImages:
    """The real images that samples are compared with: an `.npz` as ADM's evaluator reads it, or a folder.

    A file holds the statistics `mu`, `sigma` of Inception's pooled features and `mu_s`, `sigma_s` of its spatial ones
    over all images, and some of the images as `arr_0`. From a folder such a file is made once, after ADM's centre crop,
    and used again as long as nothing changes: names, sizes and times of modification of the images, size of the crops,
    network, and how a VFM sees images. The images lie in the folder itself, or else in folders `<class>/` and below
    them. Files of earlier versions, which lack the times, are used again as long as no image is newer than they are.
    For a VFM, a file that was made elsewhere has no statistics: they are measured on its `arr_0`.

    Args:
        path: The file or the folder.
        image_size: Height and width in pixels of a folder's crops.
        statistics: File for the statistics of a folder. The default is `<folder>_<image_size>px_<network>.npz` beside
            the folder.
        remeasure: Whether to measure a folder again although its statistics are saved.

    Raises:
        ValueError: if there is no such file or folder, or `remeasure` is given for a file.
    """

    def __init__(
        self, path: str, image_size: int = 256, statistics: str | None = None, remeasure: bool = False
    ) -> None:
        self.path, self.image_size, self.remeasure = Path(path), image_size, remeasure
        self.statistics = Path(statistics) if statistics else None
        if self.path.is_dir():
            self._dataset: ImageDataset | None = _images(self.path, image_size)
        elif self.path.is_file():
            self._dataset = None
            _archive(self.path, "reference")
            if remeasure:
                raise ValueError(
                    f"remeasure: {path!r} is a file of statistics; give a folder of images to measure again"
                )
        else:
            raise ValueError(
                f"reference: nothing at {path!r}; give a folder of images, or an .npz with their statistics, such "
                "as ADM's VIRTUAL_imagenet256_labeled.npz (docs/evaluation.md says where it is)"
            )

    def settings(self) -> dict[str, Any]:
        """Where the images come from, as plain data."""
        crops = {} if self._dataset is None else {"reference_image_size": self.image_size}
        return {"reference": str(self.path)} | crops

    @torch.no_grad()
    def load(self, network: Network, with_features: bool, batch_size: int = 64) -> Reference:
        """Reads the statistics, or measures them; all ranks must call it, and share the work.

        Args:
            network: Extracts the features, on the device where they are wanted.
            with_features: Whether features of single images are wanted, too.
            batch_size: How many images each rank processes at a time.

        Raises:
            ValueError: if the file lacks something that is needed, was made with other weights, or can't be written,
                which is checked before anything is measured.
        """
        path = self.path if self._dataset is None else self._measured(self._dataset, network, batch_size)
        archive = _archive(path, "reference" if self._dataset is None else "statistics")
        source = _stored_source(archive)
        wanted = _features_source(network)
        is_of_network = source.items() >= wanted.items()
        if isinstance(network, Inception) and source and not is_of_network:
            raise ValueError(
                f"reference: the statistics in {str(path)!r} are of {source.get('network')!r} with weights "
                f"{str(source.get('fingerprint'))[:12]}…, not of Inception with {network.fingerprint()[:12]}…; give "
                "ADM's file, or the folder of images"
            )
        features = None
        if isinstance(network, Inception) or is_of_network:
            if not {"mu", "sigma"} <= archive.names:
                raise ValueError(f"reference: {str(path)!r} has no statistics 'mu' and 'sigma'")
            pool = _gaussian(archive, "mu", "sigma", network)
            spatial = _gaussian(archive, "mu_s", "sigma_s", network) if "mu_s" in archive.names else None
        else:
            features = _archive_features(archive, network, batch_size)
            pool, spatial = Gaussian(features.double().mean(0), features.double().T.cov()), None
        if with_features and features is None:
            features = _archive_features(archive, network, batch_size)
        return Reference(pool, spatial, features if with_features else None)

    def _measured(self, dataset: ImageDataset, network: Network, batch_size: int) -> Path:
        """The file with a folder's statistics, which is made if it is missing or out of date."""
        name = f"{self.path.name}_{self.image_size}px_{name_of(network)}.npz"
        path = self.statistics or self.path.with_name(name)
        source = _by_rank_zero(lambda: self._to_measure(dataset, path, network))
        if source is not None:
            pool, spatial = _measure(dataset, network, batch_size)
            _by_rank_zero(lambda: _save(path, dataset, source, pool, spatial))
        if not path.is_file():
            raise ValueError(
                f"statistics: rank {_rank()} does not see {str(path)!r}, which rank 0 has; give a path that all share"
            )
        return path

    def _to_measure(self, dataset: ImageDataset, path: Path, network: Network) -> dict[str, Any] | None:
        """The description of the statistics that have to be measured; None if they are there already."""
        files = files_state(dataset)
        source = _source(dataset, self.image_size, network) | {"files": files.digest}
        if path.is_file() and not self.remeasure:
            archive = _archive(path, "statistics")
            if SOURCE not in archive.names:
                raise ValueError(
                    f"statistics: {str(path)!r} was made elsewhere and would be overwritten; give another path"
                )
            stored = _stored_source(archive)
            is_former = "files" not in stored and files.newest <= path.stat().st_mtime
            if stored == source or (is_former and stored | {"files": files.digest} == source):
                return None
            differing = sorted(name for name in source if stored.get(name) != source[name])
            rank_zero_info(f"{path} is out of date ({', '.join(differing)} changed); {self.path} is measured again")
        count, widths = min(NUM_IMAGES, len(dataset)), _widths(network)
        check_place(path, count * self.image_size**2 * 3 + sum(width**2 * 8 for width in widths), "statistics")
        return source


def _dataset(folder: str | Path, image_size: int) -> ImageFolderDataset:
    folder = Path(folder)
    return ImageFolderDataset(folder.parent, folder.name, CentreCrop(image_size), max_bad_fraction=0)


def _images(folder: Path, image_size: int) -> ImageDataset:
    """The images of a folder, whether they lie in it or in folders of classes."""
    if is_flat(folder):
        return FlatFolderDataset(folder, CentreCrop(image_size), max_bad_fraction=0)
    return _dataset(folder, image_size)


def _batches(dataset: ImageDataset, indices: Sequence[int], batch_size: int) -> DataLoader[Any]:
    num_workers = 8 if len(indices) > 10_000 else 0  # fewer are done before workers have started
    # Its own generator, so that the global one's state does not change.
    generator = torch.Generator()
    return DataLoader(Subset(dataset, indices), batch_size, num_workers=num_workers, generator=generator)


def _source(dataset: ImageDataset, image_size: int, network: Network) -> dict[str, Any]:
    """What identifies statistics: the images and how features are computed."""
    images = {"image_size": image_size, "num_images": len(dataset), "names": names_digest(dataset)}
    return _features_source(network) | images


def _features_source(network: Network) -> dict[str, Any]:
    """What identifies features: the network and how it sees images."""
    view = {} if isinstance(network, Inception) else network.view()
    return {"network": name_of(network), "fingerprint": network.fingerprint()} | view


def _stored_source(archive: ImageArchive) -> dict[str, Any]:
    """What a file says about its statistics; nothing if it was made elsewhere."""
    source = json.loads(str(archive.array(SOURCE))) if SOURCE in archive.names else {}
    usual = {name: FORMERLY[name] for name in ("antialias_positions", "precision")}
    if "input_scale" in source:  # of a VFM; older files leave out how all were measured then
        source = {"antialias": source["input_scale"] < 1, **usual, **source}
    return source


def _widths(network: Network) -> tuple[int, ...]:
    """Widths of pooled features, and of spatial ones if there are any."""
    return (POOL_WIDTH, SPATIAL_WIDTH) if isinstance(network, Inception) else (network.width,)


def _archive(path: Path, option: str) -> ImageArchive:
    """Opens a file; errors name the option that gave it."""
    try:
        return ImageArchive(path)
    except ValueError as error:
        raise ValueError(f"{option}: {error}") from error


def _measure(dataset: ImageDataset, network: Network, batch_size: int) -> tuple[Gaussian, Gaussian | None]:
    """Statistics over all images and ranks."""
    device = device_of(network)
    moments = [Moments(width).to(device) for width in _widths(network)]
    for images, _, _ in _batches(dataset, range(_rank(), len(dataset), _num_ranks()), batch_size):
        features = extract(network, images.to(device))
        for running, values in zip(moments, (features.pool, features.spatial), strict=False):
            assert values is not None
            running.update(values)
    pool, *spatial = (running.compute() for running in moments)
    return pool, spatial[0] if spatial else None


def _save(path: Path, dataset: ImageDataset, source: dict[str, Any], pool: Gaussian, spatial: Gaussian | None) -> None:
    count = min(NUM_IMAGES, len(dataset))
    images = (dataset[i * len(dataset) // count][0].permute(1, 2, 0).numpy() for i in range(count))
    statistics = {"mu": pool.mean, "sigma": pool.covariance}
    if spatial is not None:
        statistics |= {"mu_s": spatial.mean, "sigma_s": spatial.covariance}
    arrays = {name: values.cpu().numpy() for name, values in statistics.items()}
    write_archive(path, images, count, "statistics", **arrays, **{SOURCE: np.array(json.dumps(source))})


def _gaussian(archive: ImageArchive, mean: str, covariance: str, network: Network) -> Gaussian:
    device = device_of(network)
    return Gaussian(*(torch.from_numpy(archive.array(name)).double().to(device) for name in (mean, covariance)))


def _archive_features(archive: ImageArchive, network: Network, batch_size: int) -> Tensor:
    """Pooled features of a file's images, the same on every rank."""
    if IMAGES not in archive.names:
        raise ValueError(
            f"reference: {str(archive.path)!r} holds statistics but no images ({IMAGES!r}), which precision, recall "
            "and networks other than Inception need; give ADM's file or a folder, or set precision_recall: false"
        )
    device = device_of(network)
    store = FeatureStore().to(device)
    width = POOL_WIDTH if isinstance(network, Inception) else network.width
    store.update(torch.zeros(0, width, device=device), torch.zeros(0, dtype=torch.int64, device=device))
    for number, (images, index) in enumerate(archive.images(batch_size)):
        if number % _num_ranks() == _rank():
            store.update(extract(network, images.to(device)).pool, index.to(device))
    return store.compute()


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def _rank() -> int:
    return dist.get_rank() if _is_distributed() else 0


def _num_ranks() -> int:
    return dist.get_world_size() if _is_distributed() else 1


def _by_rank_zero(action: Callable[[], Any]) -> Any:
    """Runs an action on rank zero and gives its result to every rank; if it fails, all fail, and none waits."""
    found: list[Any] = [None, None]
    failure: ValueError | None = None
    if _rank() == 0:
        try:
            found[0] = action()
        except ValueError as error:
            failure, found[1] = error, str(error)
    if _is_distributed():
        dist.broadcast_object_list(found)
    if found[1] is not None:
        raise ValueError(found[1]) from failure
    return found[0]
