"""What samples are compared with: features and statistics of real images, from a folder or from a file."""

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

from vfm_vae.data.archive import IMAGES, ImageArchive, write_archive
from vfm_vae.data.folder import ImageFolderDataset
from vfm_vae.data.identity import files_state, names_digest
from vfm_vae.data.transforms import CentreCrop
from vfm_vae.images import from_uint8
from vfm_vae.metrics.distribution import Gaussian, Moments
from vfm_vae.metrics.features import FeatureStore
from vfm_vae.metrics.inception import POOL_WIDTH, SPATIAL_WIDTH, Inception, InceptionFeatures
from vfm_vae.vfm import FORMERLY, FrozenVFM
from vfm_vae.writing import check_place

NUM_IMAGES = 10_000  # of a reference, for precision and recall; as many as ADM's has
SOURCE = "source"


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
        pool: of the pooled features.
        spatial: of Inception's spatial features; None where the file has none, or for other networks.
        features: pooled features of some of the images, `[m, d]`; None where they were not asked for.
    """

    pool: Gaussian
    spatial: Gaussian | None
    features: Tensor | None


def name_of(network: Inception | FrozenVFM) -> str:
    """What numbers measured on a network's features are named after: `inception`, or the VFM without its tag."""
    return "inception" if isinstance(network, Inception) else network.name.split(".")[0]


def network_settings(network: Inception | FrozenVFM) -> dict[str, Any]:
    """What features depend on, as JSON has it: the network's whole name, its weights, and how a VFM sees images."""
    if isinstance(network, Inception):
        splits = {"score_splits": "of permuted samples"}  # formerly of successive ones
        return {"network": name_of(network), "network_weights": network.fingerprint()} | splits
    return {"network": network.name, "network_weights": network.fingerprint()} | view_of(network)


def view_of(vfm: FrozenVFM) -> dict[str, Any]:
    """How a VFM sees images and computes, as JSON has it: what its features depend on beside its weights."""
    return {name: getattr(vfm, name) for name in ("input_scale", "antialias", "antialias_positions", "precision")}


def extract(network: Inception | FrozenVFM, images: Tensor) -> InceptionFeatures:
    """Features of uint8 images `[B, 3, H, W]`; those of a VFM are pooled ones alone, the others None."""
    if isinstance(network, Inception):
        return network(images)
    return InceptionFeatures(network(from_uint8(images)).pooled, None, None)


@torch.no_grad()
def folder_features(
    vfm: FrozenVFM, folder: str | Path, image_size: int, part: Sequence[int] = (0, 1), batch_size: int = 64
) -> LabelledFeatures:
    """Pooled features of the images in a tree `<folder>/<class>/*`, after ADM's centre crop.

    Args:
        vfm: whose features.
        folder: the tree.
        image_size: side of the crops.
        part: (r, n) takes each n-th image from the r-th on, so that n ranks share the work.
        batch_size: images at a time.

    Raises:
        ValueError: there is no such tree, or an image is damaged.
    """
    dataset = _dataset(folder, image_size)
    device = next(vfm.network.parameters()).device
    features, labels = [torch.zeros(0, vfm.width, device=device)], [torch.zeros(0, dtype=torch.int64, device=device)]
    for images, classes, _ in _batches(dataset, range(part[0], len(dataset), part[1]), batch_size):
        features.append(extract(vfm, images.to(device)).pool)
        labels.append(classes.to(device))
    return LabelledFeatures(torch.cat(features), torch.cat(labels))


class ReferenceImages:
    """Real images that samples are compared with, by name: an `.npz` as ADM's evaluator reads it, or a folder.

    A file holds `mu`, `sigma` of Inception's pooled features and `mu_s`, `sigma_s` of its spatial ones over all
    images, and some of these as `arr_0`. From a folder `<class>/*` such a file is made once, after ADM's centre crop,
    and used again as long as these are the same: names, sizes and times of modification of the files, size of the
    crops, network, and how a VFM sees images. Files of former versions, which do not say the times, are used again as
    long as no image is newer than they are. Of the features of a VFM the statistics of somebody's file say nothing:
    then they are taken over its `arr_0`.

    Args:
        path: of the file or the folder.
        image_size: side of a folder's crops in pixels.
        statistics: where to save what is measured of a folder; by default beside it, as
            `<folder>_<image_size>px_<network>.npz`.
        remeasure: measure a folder again, whatever is saved.

    Raises:
        ValueError: there is no such file or folder; a file is to be measured again.
    """

    def __init__(
        self, path: str, image_size: int = 256, statistics: str | None = None, remeasure: bool = False
    ) -> None:
        self.path, self.image_size, self.remeasure = Path(path), image_size, remeasure
        self.statistics = Path(statistics) if statistics else None
        if self.path.is_dir():
            self._dataset: ImageFolderDataset | None = _dataset(self.path, image_size)
        elif self.path.is_file():
            self._dataset = None
            _archive(self.path, "reference")
            if remeasure:
                raise ValueError(f"remeasure: {path!r} is a file, which has its statistics; it goes with a folder")
        else:
            raise ValueError(
                f"reference: nothing at {path!r}; give a folder of images, <reference>/<class>/*, or an .npz with "
                "their statistics, such as ADM's VIRTUAL_imagenet256_labeled.npz (docs/evaluation.md says where it is)"
            )

    def settings(self) -> dict[str, Any]:
        """What it is, as JSON has it."""
        crops = {} if self._dataset is None else {"reference_image_size": self.image_size}
        return {"reference": str(self.path)} | crops

    @torch.no_grad()
    def load(self, network: Inception | FrozenVFM, with_features: bool, batch_size: int = 64) -> Reference:
        """Measures or reads; to be called by all ranks, which share the work.

        Args:
            network: whose features; on the device where they are wanted.
            with_features: whether features of single images are wanted, too.
            batch_size: images at a time on each rank.

        Raises:
            ValueError: the file lacks what is needed, or is of another Inception or a VFM, or can't be written, which
                is seen before anything is measured.
        """
        path = self.path if self._dataset is None else self._measured(network, batch_size)
        archive = _archive(path, "reference" if self._dataset is None else "statistics")
        source = _stored_source(archive)
        wanted = _features_source(network)
        is_of_network = source.items() >= wanted.items()
        if isinstance(network, Inception) and source and not is_of_network:
            raise ValueError(
                f"reference: the statistics in {str(path)!r} are of {source.get('network')!r} with weights "
                f"{str(source.get('fingerprint'))[:12]}…, not of Inception with {network.fingerprint()[:12]}…; give "
                "ADM's file, or the folder that they were measured of"
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

    def _measured(self, network: Inception | FrozenVFM, batch_size: int) -> Path:
        """The file with a folder's statistics, made where it is missing or of something else."""
        name = f"{self.path.name}_{self.image_size}px_{name_of(network)}.npz"
        path = self.statistics or self.path.with_name(name)
        source = _by_rank_zero(lambda: self._to_measure(path, network))
        if source is not None:
            pool, spatial = _measure(self._dataset, network, batch_size)
            _by_rank_zero(lambda: _save(path, self._dataset, source, pool, spatial))
        if not path.is_file():
            raise ValueError(
                f"statistics: rank {_rank()} does not see {str(path)!r}, which rank 0 has; give a path that all share"
            )
        return path

    def _to_measure(self, path: Path, network: Inception | FrozenVFM) -> dict[str, Any] | None:
        """What the file has to say of its statistics once they are measured; None where they are there already."""
        files = files_state(self._dataset)
        source = _source(self._dataset, self.image_size, network) | {"files": files.digest}
        if path.is_file() and not self.remeasure:
            archive = _archive(path, "statistics")
            if SOURCE not in archive.names:
                raise ValueError(
                    f"statistics: {str(path)!r} was not measured here, and would be replaced; give another path"
                )
            stored = _stored_source(archive)
            is_former = "files" not in stored and files.newest <= path.stat().st_mtime
            if stored == source or (is_former and stored | {"files": files.digest} == source):
                return None
            differing = sorted(name for name in source if stored.get(name) != source[name])
            rank_zero_info(f"{path} holds statistics of others ({', '.join(differing)}); {self.path} is measured again")
        count, widths = min(NUM_IMAGES, len(self._dataset)), _widths(network)
        check_place(path, count * self.image_size**2 * 3 + sum(width**2 * 8 for width in widths), "statistics")
        return source


def _dataset(folder: str | Path, image_size: int) -> ImageFolderDataset:
    folder = Path(folder)
    return ImageFolderDataset(folder.parent, folder.name, CentreCrop(image_size), max_bad_fraction=0)


def _batches(dataset: ImageFolderDataset, indices: Sequence[int], batch_size: int) -> DataLoader:
    num_workers = 8 if len(indices) > 10_000 else 0  # fewer are through before workers have started
    # A generator of its own: the global one must not notice.
    generator = torch.Generator()
    return DataLoader(Subset(dataset, indices), batch_size, num_workers=num_workers, generator=generator)


def _source(dataset: ImageFolderDataset, image_size: int, network: Inception | FrozenVFM) -> dict[str, Any]:
    """What tells statistics from others'."""
    images = {"image_size": image_size, "num_images": len(dataset), "names": names_digest(dataset)}
    return _features_source(network) | images


def _features_source(network: Inception | FrozenVFM) -> dict[str, Any]:
    """What tells features from others'."""
    view = {} if isinstance(network, Inception) else view_of(network)
    return {"network": name_of(network), "fingerprint": network.fingerprint()} | view


def _stored_source(archive: ImageArchive) -> dict[str, Any]:
    """What a file says of its statistics; nothing if it is somebody's."""
    source = json.loads(str(archive.array(SOURCE))) if SOURCE in archive.names else {}
    if "input_scale" in source:  # of a VFM; older files leave out how all were measured then
        source = {"antialias": source["input_scale"] < 1, **FORMERLY, **source}
    return source


def _widths(network: Inception | FrozenVFM) -> tuple[int, ...]:
    """Of pooled features, and of spatial ones where there are any."""
    return (POOL_WIDTH, SPATIAL_WIDTH) if isinstance(network, Inception) else (network.width,)


def _archive(path: Path, option: str) -> ImageArchive:
    """A file whose option is named where it is none."""
    try:
        return ImageArchive(path)
    except ValueError as error:
        raise ValueError(f"{option}: {error}") from error


def _measure(
    dataset: ImageFolderDataset, network: Inception | FrozenVFM, batch_size: int
) -> tuple[Gaussian, Gaussian | None]:
    """Statistics over all images and ranks."""
    device = next(network.network.parameters()).device
    moments = [Moments(width).to(device) for width in _widths(network)]
    for images, _, _ in _batches(dataset, range(_rank(), len(dataset), _num_ranks()), batch_size):
        features = extract(network, images.to(device))
        for running, values in zip(moments, features, strict=False):
            running.update(values)
    pool, *spatial = (running.compute() for running in moments)
    return pool, spatial[0] if spatial else None


def _save(
    path: Path, dataset: ImageFolderDataset, source: dict[str, Any], pool: Gaussian, spatial: Gaussian | None
) -> None:
    count = min(NUM_IMAGES, len(dataset))
    images = (dataset[i * len(dataset) // count][0].permute(1, 2, 0).numpy() for i in range(count))
    arrays = {"mu": pool.mean, "sigma": pool.covariance}
    if spatial is not None:
        arrays |= {"mu_s": spatial.mean, "sigma_s": spatial.covariance}
    arrays = {name: values.cpu().numpy() for name, values in arrays.items()}
    write_archive(path, images, count, "statistics", **arrays, **{SOURCE: np.array(json.dumps(source))})


def _gaussian(archive: ImageArchive, mean: str, covariance: str, network: Inception | FrozenVFM) -> Gaussian:
    device = next(network.network.parameters()).device
    return Gaussian(*(torch.from_numpy(archive.array(name)).double().to(device) for name in (mean, covariance)))


def _archive_features(archive: ImageArchive, network: Inception | FrozenVFM, batch_size: int) -> Tensor:
    """Pooled features of a file's images, the same on every rank."""
    if IMAGES not in archive.names:
        raise ValueError(
            f"reference: {str(archive.path)!r} holds statistics but no images ({IMAGES!r}), which precision, recall "
            "and networks other than Inception need; give ADM's file or a folder, or set precision_recall: false"
        )
    device = next(network.network.parameters()).device
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
    """What rank zero finds, on every rank; where it fails, all do, so that none waits for another."""
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
