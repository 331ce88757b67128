"""Images in `.npz` files as ADM's evaluator reads and writes them, never whole in memory: 50 000 take 10 GB."""

import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np
import torch
from torch import Tensor

from vfm_vae.checkpoints import few, seems_to_be
from vfm_vae.writing import whole_file

IMAGES, LABELS = "arr_0", "arr_1"


class ImageArchive:
    """An `.npz` file with images as `arr_0`, uint8 `[N, H, W, 3]`, and whatever else it holds.

    Args:
        path: The file; nothing in it is unpickled.

    Raises:
        ValueError: there is no such file, or it is no `.npz`; when it is read, if it is damaged.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise ValueError(f"there is no file at {str(path)!r}")
        if not zipfile.is_zipfile(self.path):
            raise ValueError(f"{str(path)!r} is no .npz file: it is {seems_to_be(self.path)}")
        with zipfile.ZipFile(self.path) as archive:
            members = archive.namelist()
        self.names = {name.removesuffix(".npy") for name in members if name.endswith(".npy")}
        if not self.names:
            raise ValueError(f"{str(path)!r} is no .npz file: it is a zip archive of {few(members)}")

    def array(self, name: str) -> np.ndarray:
        """One of the arrays, whole."""
        with self._named(), np.load(self.path, allow_pickle=False) as arrays:
            return arrays[name]

    def num_images(self) -> int:
        """How many images there are.

        Raises:
            ValueError: `arr_0` is missing, or holds something else.
        """
        with self._named(), zipfile.ZipFile(self.path) as archive, archive.open(self._member()) as file:
            shape = self._shape(file)
            held = archive.getinfo(self._member()).file_size - file.tell()
            if held != np.prod(shape):
                raise ValueError(f"{IMAGES!r} has {held} of the {np.prod(shape)} bytes of {shape}; make the file again")
            return shape[0]

    def images(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The images in order, uint8 `[B, 3, H, W]`, and their positions, int64 `[B]`."""
        with self._named(), zipfile.ZipFile(self.path) as archive, archive.open(self._member()) as file:
            count, *shape = self._shape(file)
            for start in range(0, count, batch_size):
                size = min(batch_size, count - start)
                pixels = np.frombuffer(file.read(size * int(np.prod(shape))), np.uint8).reshape(size, *shape)
                yield torch.from_numpy(pixels.copy()).permute(0, 3, 1, 2), torch.arange(start, start + size)

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Makes errors name the damaged file."""
        try:
            yield
        except (zipfile.BadZipFile, zlib.error, EOFError, ValueError) as error:
            place = repr(str(self.path))
            if place in str(error):
                raise
            raise ValueError(f"{place} is damaged ({error})") from error

    def _member(self) -> str:
        if IMAGES not in self.names:
            raise ValueError(f"{str(self.path)!r} holds no images ({IMAGES!r}), only {sorted(self.names)}")
        return f"{IMAGES}.npy"

    def _shape(self, file: IO[bytes]) -> tuple[int, ...]:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran_order, dtype = read(file)
        if dtype != np.uint8 or len(shape) != 4 or shape[-1] != 3 or fortran_order:
            raise ValueError(f"{str(self.path)!r}: {IMAGES!r} must be uint8 [N, H, W, 3]; it is {dtype} {shape}")
        return shape


def write_archive(
    path: Path, images: Iterable[np.ndarray], num_images: int, option: str | None = None, **arrays: np.ndarray
) -> None:
    """Writes an `.npz`, as `whole_file` does.

    Args:
        path: The file.
        images: uint8 `[H, W, 3]` each, all of one size; becomes `arr_0`.
        num_images: Number of images.
        option: What gave the path, for the message.
        **arrays: What else the file is to hold.

    Raises:
        ValueError: they are of several sizes, or not so many.
        NotWritten: the file can't be written.
    """
    count, shape = 0, None
    with whole_file(path, option=option) as whole, zipfile.ZipFile(whole, "w") as archive:
        with archive.open(f"{IMAGES}.npy", "w", force_zip64=True) as file:
            for image in images:
                if shape is None:
                    shape = image.shape
                    header = {"descr": "|u1", "fortran_order": False, "shape": (num_images, *shape)}
                    np.lib.format.write_array_header_1_0(file, header)
                if image.shape != shape:
                    raise ValueError(f"images of {shape} and {image.shape} can't be in one archive")
                file.write(np.ascontiguousarray(image).tobytes())
                count += 1
        for name, values in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array(file, np.asanyarray(values), allow_pickle=False)
        if count != num_images:
            raise ValueError(f"{num_images} images were announced, but there were {count}")
