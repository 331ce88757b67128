"""Images per second and core: our DataModule on tar shards against a plain webdataset and Pillow pipeline.

Both do the same work on the same shards: decode JPEGs of 500×375 pixels, a random square crop of 50–100 % of the short
side, Lanczos to 256 pixels, a flip half of the time, uint8 batches of 64. One process, one thread.

    python tests/bench/loader.py
"""

import io
import tempfile
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import webdataset
from PIL import Image
from timing import best_times, table
from torch import Tensor
from torch.utils.data import default_collate

from vfm_vae.data.datamodule import ImageNetDataModule
from vfm_vae.embedded.photos import load_photo

NUM_IMAGES, BATCH_SIZE, SIZE, PHOTOS = 512, 64, (500, 375), ("astronaut", "coffee", "cat", "motorcycle")


def write_shards(root: Path) -> None:
    """Photographs in shards, each crop a little other than the next."""
    photos = [load_photo(name) for name in PHOTOS]
    generator = np.random.default_rng(0)
    for split, count in (("train", NUM_IMAGES), ("val", 4)):
        with webdataset.ShardWriter(str(root / f"bench-{split}-%04d.tar"), maxcount=128, verbose=0) as writer:
            for number in range(count):
                photo = photos[number % len(photos)]
                left, top = (int(generator.integers(side // 4)) for side in photo.size)
                right, bottom = left + 3 * photo.width // 4, top + 3 * photo.height // 4
                file = io.BytesIO()
                photo.resize(SIZE, Image.Resampling.LANCZOS, (left, top, right, bottom)).save(file, "JPEG", quality=95)
                writer.write({"__key__": f"{number:06d}", "jpg": file.getvalue(), "cls": number % 10})


def plain_crop(image: Image.Image) -> Tensor:
    """The training crop as most would write it."""
    side = round(min(image.size) * np.random.uniform(0.5, 1))
    left, top = (np.random.randint(length - side + 1) for length in image.size)
    image = image.crop((left, top, left + side, top + side)).resize((256, 256), Image.Resampling.LANCZOS)
    if np.random.rand() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def plain(root: Path) -> Iterator[list[Tensor]]:
    """webdataset's own pipeline with Pillow."""
    pattern = str(root / "bench-train-{0000..0003}.tar")
    dataset = webdataset.WebDataset(pattern, shardshuffle=4).shuffle(256).decode("pilrgb").to_tuple("jpg", "cls")
    return iter(dataset.map_tuple(plain_crop, int).batched(BATCH_SIZE, collation_fn=default_collate))


def ours(root: Path, resampling: str = "lanczos") -> ImageNetDataModule:
    """The DataModule, without workers."""
    data = ImageNetDataModule(str(root), 256, BATCH_SIZE, num_workers=0, source="shards", resampling=resampling)
    data.prepare_data()
    data.setup("fit")
    return data


def read(batches: Iterator[Sequence[Tensor]]) -> None:
    """Takes as many batches as the data set has images for."""
    assert sum(len(batch[1]) for batch in islice(batches, NUM_IMAGES // BATCH_SIZE)) == NUM_IMAGES


def main() -> None:
    """Prints the table."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_shards(root)
        lanczos, bicubic = ours(root), ours(root, "bicubic")
        times = best_times(
            plain=lambda: read(plain(root)),
            lanczos=lambda: read(iter(lanczos.train_dataloader())),
            bicubic=lambda: read(iter(bicubic.train_dataloader())),
        )
    names = {"plain": "webdataset and Pillow, Lanczos", "lanczos": "ours, Lanczos", "bicubic": "ours, bicubic"}
    rows = [
        (names[name], f"{NUM_IMAGES / seconds:.0f}", f"{times['plain'] / seconds:.2f}x")
        for name, seconds in times.items()
    ]
    title = f"JPEGs of {SIZE[0]}x{SIZE[1]} in tar shards to crops of 256x256, one core"
    table(title, rows, "", "images/s", "against the plain pipeline")


if __name__ == "__main__":
    main()
