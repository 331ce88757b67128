"""Caches of latents: folders of safetensors shards, written by all ranks and read by rows.

A folder holds `*.safetensors` with `latents` and `latents_flip` `[n, C, h, w]` (or `moments`, mean then standard
deviation, `[n, 2C, h, w]`) and `labels` `[n]`; `latents_stats.pt` with the mean and standard deviation of each channel,
`[1, C, 1, 1]`; and `latents.json`, which names the tokenizer. That is LightningDiT's layout, whose own caches lack the
last file. A cache of several splits has a folder for each, `train` and `val`.

Beside `moments` there may be `features` `[n, 1 + N, D]` of a VFM that models are aligned to: class token and patch
tokens of the plain view, unscaled. `latents.json` then says which VFM's. And there may be the images' captions with a
text encoder's embeddings, see `vfm_vae.data.texts`; `latents.json` says which encoder's.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from vfm_vae.checkpoints import open_tensors, read_json, read_weights
from vfm_vae.data.samples import SampleSet
from vfm_vae.data.sampling import Draw, caption_drawn, seed_of
from vfm_vae.data.texts import EmptyCaption, ShardTexts
from vfm_vae.finite import not_finite
from vfm_vae.types import Caption, LatentBatch
from vfm_vae.writing import write_torch

STATISTICS, IDENTITY = "latents_stats.pt", "latents.json"


class LatentStatistics(NamedTuple):
    """Mean and standard deviation of each channel, over images and positions.

    Attributes:
        mean: float32 `[1, C, 1, 1]`.
        std: float32 `[1, C, 1, 1]`, unbiased.
    """

    mean: Tensor
    std: Tensor

    @classmethod
    def read(cls, path: str | Path) -> "LatentStatistics":
        """Reads `latents_stats.pt`, or the one in a folder.

        Raises:
            ValueError: there is no such file, or it holds something else.
        """
        path = Path(path)
        path = path / STATISTICS if path.is_dir() else path
        if not path.is_file():
            raise ValueError(f"no statistics of latents at {str(path)!r}; a finished cache has them in {STATISTICS}")
        stored = read_weights(path, "statistics")
        if not isinstance(stored, Mapping) or not {"mean", "std"} <= stored.keys():
            raise ValueError(f"{str(path)!r} holds no 'mean' and 'std' of latents")
        return cls(*(stored[name].float().reshape(1, -1, 1, 1) for name in ("mean", "std")))

    def write(self, path: Path) -> None:
        """Writes the file, at once."""
        write_torch(path, {"mean": self.mean, "std": self.std})


class RunningStatistics:
    """Adds latents up for `LatentStatistics`, in float64.

    Args:
        channels: C.
        device: Device that holds the sums.
    """

    def __init__(self, channels: int, device: torch.device | str = "cpu") -> None:
        # Numbers of one channel, their sums, and the sums of their squares.
        self.sums = torch.zeros(1 + 2 * channels, dtype=torch.float64, device=device)

    def add(self, mean: Tensor, std: Tensor | None = None) -> None:
        """Adds latents `[B, C, h, w]`, or the moments of Gaussians over them."""
        mean = mean.double()
        squares = mean.square() if std is None else mean.square() + std.double().square()
        count = mean.new_tensor([mean.numel() / mean.shape[1]])
        self.sums += torch.cat([count, mean.sum(dim=(0, 2, 3)), squares.sum(dim=(0, 2, 3))])

    def compute(self) -> LatentStatistics:
        """The statistics of all that was added.

        Raises:
            ValueError: if that held nan or inf.
        """
        if not self.sums.isfinite().all():
            raise not_finite(f"latents: some of {float(self.sums[0]):.0f} values of a channel hold nan or inf")
        count, (total, squares) = self.sums[0], self.sums[1:].chunk(2)
        mean = total / count
        variance = (squares - count * mean.square()) / (count - 1)
        return LatentStatistics(*(x.float().reshape(1, -1, 1, 1) for x in (mean, variance.clamp(min=0).sqrt())))


class ShardPlan:
    """Which images make which shard of a cache.

    Args:
        folder: Folder of the cache's split.
        num_images: Number of images in the split.
        shard_size: Images of one shard.
    """

    def __init__(self, folder: Path, num_images: int, shard_size: int) -> None:
        self.folder, self.num_images, self.shard_size = folder, num_images, shard_size

    def __len__(self) -> int:
        """Number of shards."""
        return -(-self.num_images // self.shard_size)

    def path(self, shard: int) -> Path:
        """File of a shard."""
        return self.folder / f"latents_shard{shard:05d}.safetensors"

    def images(self, shard: int) -> range:
        """Positions of a shard's images in the data set."""
        return range(shard * self.shard_size, min((shard + 1) * self.shard_size, self.num_images))

    def missing(self, rank: int = 0, num_ranks: int = 1) -> list[int]:
        """Shards that are still to be written by one rank.

        Raises:
            ValueError: if one that is there can't be read.
        """
        for shard in range(len(self)):
            if self.path(shard).is_file():
                with open_tensors(self.path(shard), "directory"):
                    pass
        return [shard for shard in range(len(self)) if not self.path(shard).is_file()][rank::num_ranks]


def measure_shards(plan: ShardPlan, rank: int = 0, num_ranks: int = 1, chunk: int = 1024) -> RunningStatistics:
    """Adds up the plain views, or the moments, of one rank's part of the shards.

    Args:
        plan: The shards, all of which are there.
        rank: Takes each `num_ranks`-th shard from this one on.
        num_ranks: Number of ranks, whose sums together are those of the whole.
        chunk: Rows read at a time.
    """
    shapes = _look_into(plan.path(0)).shapes
    name = "moments" if "moments" in shapes else "latents"
    running = RunningStatistics(shapes[name][0] // 2 if name == "moments" else shapes[name][0])
    for shard in range(rank, len(plan), num_ranks):
        with open_tensors(plan.path(shard), "directory") as file:
            rows = file.get_slice(name)
            for start in range(0, rows.get_shape()[0], chunk):
                values = rows[start : start + chunk]
                running.add(*(values.chunk(2, dim=1) if name == "moments" else (values,)))
    return running


def split_folder(root: str | Path, split: str) -> Path | None:
    """Folder of a cache's split; a folder of shards without splits, as LightningDiT has it, is `train`.

    Returns:
        The folder, or None where the cache lacks this split.

    Raises:
        ValueError: there is no such cache, or it is unfinished.
    """
    root = Path(root)
    is_flat = any(root.glob("*.safetensors"))
    folder = root if is_flat else root / split
    if split != "train" and (is_flat or not folder.is_dir()):
        return None
    hint = "make one with `python -m vfm_vae predict` and configs/vfm_vae/latents.yaml"
    if not any(folder.glob("*.safetensors")):
        raise ValueError(f"root: no latents (*.safetensors) in {str(folder)!r}; {hint}")
    if not (folder / STATISTICS).is_file():
        raise ValueError(
            f"root: {str(folder)!r} has no {STATISTICS}, so the cache is unfinished; run what makes it again"
        )
    return folder


class LatentDataset(SampleSet):
    """Latents of a cache's split, memory-mapped.

    In training, each time an image is drawn, a coin says whether the plain or the mirrored view is taken, where the
    cache has both, and a fresh sample is drawn where it has moments; otherwise it is the plain view or the mean. Where
    images have several captions, one is drawn; otherwise it is the first.

    Args:
        folder: Folder of the split.
        train: Whether to draw.
        seed: Seed of the draws.

    Attributes:
        shape: (C, h, w) of a latent.
        tokenizer: What the cache says of its tokenizer; None where it says nothing.
        features_shape: (1 + N, D) of the features that the cache holds for each image; None where it holds none.
        features_source: What the cache says of the VFM that made them, see `VFM.source`.
        text_shape: (L, D), the most tokens of a caption and the width of embeddings; None where there are no captions.
        text_source: What the cache says of the text encoder that made them, see `TextEncoder.source`.

    Raises:
        ValueError: a shard can't be read, differs from the others or has a negative label; there are features
            beside mirrored views; captions and embeddings don't fit together.
    """

    batch_type = LatentBatch

    def __init__(self, folder: str | Path, train: bool, seed: int = 0) -> None:
        self.folder, self.train, self.seed = Path(folder), train, seed
        self._paths = sorted(self.folder.glob("*.safetensors"))
        shards = [_look_into(path) for path in self._paths]
        if any(shard.shapes != shards[0].shapes for shard in shards):
            raise ValueError(f"root: the shards in {str(self.folder)!r} differ in what they hold; make the cache again")
        self._shapes = shards[0].shapes
        if self._shapes.keys() >= {"features", "latents_flip"}:
            raise ValueError(
                f"root: {str(self.folder)!r} holds mirrored views beside features, which are of plain views alone; "
                "make the cache again with model.predict: moments"
            )
        if len(self._shapes.get("features", (0, 0))) != 2:
            raise ValueError(f"root: the features in {str(self.folder)!r} are not [n, 1 + N, D]; make the cache again")
        moments = self._shapes.get("moments")
        self.shape = self._shapes["latents"] if moments is None else (moments[0] // 2, *moments[1:])
        self.labels = np.concatenate([shard.labels for shard in shards])
        self._ends = np.cumsum([len(shard.labels) for shard in shards])
        self._texts = [shard.texts for shard in shards if shard.texts is not None]
        self._empty = EmptyCaption.read(self.folder) if self._texts else None
        self._open: dict[int, Any] = {}
        identity = self.folder / IDENTITY
        stored: dict[str, Any] = read_json(identity, "root") if identity.is_file() else {}
        self.tokenizer = stored.get("tokenizer")
        self.features_shape: tuple[int, ...] | None = self._shapes.get("features")
        self.features_source: Mapping[str, Any] | None = stored.get("features")
        self.text_shape = None if self._empty is None else (self._empty.length, *self._shapes["text"])
        self.text_source: Mapping[str, Any] | None = stored.get("text")

    def __len__(self) -> int:
        """Number of images."""
        return len(self.labels)

    def __getitem__(self, draw: Draw | int) -> tuple[Any, ...]:
        """Returns a latent (float32 `[C, h, w]`), its label and its index, -1 for padding.

        Then come features and a `Caption` with its embeddings, as far as the cache has them; None stands for features
        in front of a caption.
        """
        draw = Draw(draw) if isinstance(draw, int) else draw
        sample = self._latent(draw), int(self.labels[draw.index]), -1 if draw.padding else draw.index
        features = None if self.features_shape is None else self._row("features", draw.index)
        if self._empty is not None:
            return *sample, features, self._caption(draw, self._empty)
        return sample if features is None else (*sample, features)

    def captions_of(self, index: int) -> list[str]:
        """All captions of an image; where there are none, it has the empty one."""
        if not self._texts:
            return [""]
        shard, row = self._place(index)
        texts, file = self._texts[shard], self._file(shard)
        return [texts.caption(file, number) for number in texts.of_image(row)]

    def __getstate__(self) -> dict[str, Any]:
        """Without the open files, which each worker opens itself."""
        return self.__dict__ | {"_open": {}}

    def _latent(self, draw: Draw) -> Tensor:
        if "moments" in self._shapes:
            mean, std = self._row("moments", draw.index).float().chunk(2)
            return mean + std * self._noise(draw, mean.shape) if self.train else mean
        mirrored = self.train and "latents_flip" in self._shapes and self._noise(draw, ()).item() < 0
        return self._row("latents_flip" if mirrored else "latents", draw.index).float()

    def _caption(self, draw: Draw, empty: EmptyCaption) -> Caption:
        shard, row = self._place(draw.index)
        texts, file = self._texts[shard], self._file(shard)
        numbers = texts.of_image(row)
        number = numbers[caption_drawn(self.seed, draw.epoch, draw.index, len(numbers)) if self.train else 0]
        return Caption(texts.caption(file, number), texts.tokens(file, number), *empty)

    def _row(self, name: str, index: int) -> Tensor:
        shard, row = self._place(index)
        values: Tensor = self._file(shard).get_slice(name)[row]
        return values

    def _place(self, index: int) -> tuple[int, int]:
        """An image's shard, and its row in there."""
        shard = int(np.searchsorted(self._ends, index, side="right"))
        return shard, int(index - (self._ends[shard - 1] if shard else 0))

    def _file(self, shard: int) -> Any:
        if shard not in self._open:
            self._open[shard] = safe_open(self._paths[shard], "pt")
        return self._open[shard]

    def _noise(self, draw: Draw, shape: Sequence[int]) -> Tensor:
        stream = torch.Generator().manual_seed(seed_of(self.seed, draw.epoch, draw.index, *b"latents"))
        return torch.randn(shape, generator=stream)


class _Shard(NamedTuple):
    """What a shard holds: shapes of its rows by name, labels, and where its captions lie, if it has any."""

    shapes: dict[str, tuple[int, ...]]
    labels: np.ndarray
    texts: ShardTexts | None


def _look_into(path: Path) -> _Shard:
    with open_tensors(path, "root") as file:
        names = {"latents", "latents_flip", "moments", "features", "text"} & set(file.keys())
        if not names & {"latents", "moments"}:
            raise ValueError(f"root: {str(path)!r} holds neither 'latents' nor 'moments'")
        shapes = {name: tuple(file.get_slice(name).get_shape()[1:]) for name in names}
        labels = file.get_tensor("labels").long().numpy()
        texts = ShardTexts(file, path, len(labels)) if "text" in names else None
    if (labels < 0).any():
        raise ValueError(
            f"root: {str(path)!r} holds the label {labels.min()}, but classes are numbered from 0 on; make the cache "
            "again from data whose labels are"
        )
    return _Shard(shapes, labels, texts)
