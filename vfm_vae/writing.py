"""Writes files whole or not at all; everything else in the project writes by this.

A file comes to be beside its place, under a hidden name, is brought to the disk, and takes its place at once: whatever
happens meanwhile, a full disk or a kill, under its name lies the former file or the new one. The former needs its space
until then. Several processes and machines may write beside one another, and the same file, too: the last one remains.
"""

import errno
import fcntl
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from io import BufferedWriter
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image
from torch import Tensor

# Safetensors' names of what torch stores.
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
# Metadata of a safetensors file that says no more than others do.
PLAIN: Mapping[str, str] = {"format": "pt"}


class NotWritten(OSError, ValueError):
    """A file could not be written; what was under its name before is still there.

    It counts as a ValueError too: the place that an option gave won't do, and command lines say that in one line.
    """


@contextmanager
def whole_file(path: str | Path, size: int = 0, option: str | None = None) -> Iterator[BufferedWriter]:
    """Opens a file that appears under its name when the block ends well, whole and on the disk.

    Args:
        path: The file; missing folders are created.
        size: Bytes that it will have at least, where that is known: so much space must be there to begin with.
        option: What gave the path, for the message; None where nothing in particular did.

    Yields:
        What to write to; it can seek. Its `name` is where the file lies until it is whole.

    Raises:
        NotWritten: if the disk is full, the folder not to be written, and the like. The block's own errors pass.
    """
    path = Path(path)
    try:
        file = _begin(path, size)
    except OSError as error:
        raise _not_written(path, error, option) from error
    try:
        yield file
        file.flush()
        os.fsync(file.fileno())
        os.replace(file.name, path)
        _sync_folder(path.parent)
    except BaseException as error:
        with suppress(OSError):  # on a disk that takes nothing any more
            os.unlink(file.name)
        if (cause := _refusal(error)) is not None:
            raise _not_written(path, cause, option) from error
        raise
    finally:
        file.raw.close()  # what a full disk did not take would otherwise be tried again


def check_place(path: str | Path, size: int = 0, option: str | None = None) -> None:
    """Checks that `whole_file` could begin; arguments and errors are the same. A missing folder is made."""
    path = Path(path)
    try:
        with _begin(path, size) as file:
            os.unlink(file.name)
    except OSError as error:
        raise _not_written(path, error, option) from error


def remove_leftovers(folder: Path) -> None:
    """Removes files that killed processes left unfinished in a folder, but none that is being written."""
    for partial in folder.glob(".*.partial"):
        with suppress(OSError), open(partial, "r+b") as file:  # others' files, and what was just finished
            if _is_ours(file):
                partial.unlink()


def write_text(path: str | Path, content: str, option: str | None = None) -> None:
    """Writes text in UTF-8, as `whole_file` does."""
    encoded = content.encode()
    with whole_file(path, len(encoded), option) as file:
        file.write(encoded)


def write_json(path: str | Path, content: Any) -> None:
    """Writes plain data as JSON, as `whole_file` does."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_picture(path: str | Path, pixels: np.ndarray, colours: int | None = None) -> None:
    """Writes a picture in the format that its name ends with, as `whole_file` does.

    Args:
        path: The file.
        pixels: uint8 `[H, W, 3]`.
        colours: Reduces the picture to so many colours, which makes the file smaller.

    Raises:
        ValueError: if no format has that ending.
    """
    ending = Path(path).suffix.lower()
    if (kind := Image.registered_extensions().get(ending)) is None:
        raise ValueError(f"path: {str(path)!r} has no image format's ending; use .png, for instance")
    picture = Image.fromarray(pixels) if colours is None else Image.fromarray(pixels).quantize(colours)
    with whole_file(path) as file:
        picture.save(file, format=kind)


def write_torch(path: str | Path, content: Any) -> None:
    """Writes what `torch.load` reads, as `whole_file` does, tensor by tensor: there is never a copy of the whole."""
    with whole_file(path, num_bytes(content)) as file:
        torch.save(content, file)


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], facts: Mapping[str, str] = PLAIN) -> None:
    """Writes a safetensors file with its metadata, as `whole_file` does, tensor by tensor."""
    with whole_file(path, sum(tensor.nbytes for tensor in tensors.values())) as file:
        put_tensors(file, tensors, facts)


def put_tensors(file: BinaryIO, tensors: Mapping[str, Tensor], facts: Mapping[str, str] = PLAIN) -> None:
    """Writes tensors by name, and metadata, as safetensors.

    The bytes are those of the library's own function, which leaves a file of random name behind where it is killed,
    and does not wait for the disk.
    """
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))  # so all lie aligned
    header: dict[str, Any] = {"__metadata__": dict(facts)}
    end = 0
    for name in order:
        tensor = tensors[name]
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    described = json.dumps(header, separators=(",", ":")).encode()
    described += b" " * (-len(described) % 8)
    file.write(len(described).to_bytes(8, "little") + described)
    for name in order:
        file.write(tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def num_bytes(content: Any) -> int:
    """What the tensors in nested dictionaries and lists take, each storage counted once."""
    storages: dict[int, int] = {}

    def visit(part: Any) -> None:
        if isinstance(part, Tensor):
            storage = part.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        elif isinstance(part, Mapping):
            visit(list(part.values()))
        elif isinstance(part, list | tuple):
            for inner in part:
                visit(inner)

    visit(content)
    return sum(storages.values())


def _begin(path: Path, size: int) -> BufferedWriter:
    """A file beside its place, which no other process writes, and which is known to be nobody's once this one ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(path.parent).free
    if size > free:
        raise OSError(f"{size / 1e6:,.1f} MB are needed, {free / 1e6:,.1f} MB free")
    if path.is_dir():
        raise IsADirectoryError("a folder lies there")
    file = _open(path.with_name(f".{path.name}.partial"))
    if ours := _is_ours(file):
        file.truncate()  # a process that was killed may have left something
        return file
    file.close()
    if ours is None:
        os.unlink(file.name)
    while True:  # another process writes the same file just now, or the file system has no locks
        file = _open(path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial"))
        if _is_ours(file) is not False:
            return file
        file.close()


def _open(path: Path) -> BufferedWriter:
    return open(path, "wb", opener=lambda name, _: os.open(name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666))


def _is_ours(file: BinaryIO) -> bool | None:
    """Whether this process alone has the file now and it still has its name; None where the file system has no locks.

    The lock ends with the process, so it tells a file that is written from one that a killed process left.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(file.name))
    except FileNotFoundError:
        return False


def _sync_folder(folder: Path) -> None:
    """Brings a file's new name to the disk, where the file system knows how."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # as Linux says of folders that can't be synced
            raise
    finally:
        os.close(descriptor)


def _refusal(error: BaseException) -> OSError | None:
    """What the system said; torch, in whose writing that came up, only says which position it was at."""
    if isinstance(error, NotWritten) or not isinstance(error, OSError | RuntimeError):
        return None
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__context__
    return cause


def _not_written(path: Path, cause: OSError, option: str | None) -> NotWritten:
    is_elsewhere = cause.filename is not None and Path(cause.filename).parent != path.parent
    reason = str(cause) if is_elsewhere or not cause.strerror else cause.strerror
    kept = "; the former file is kept" if path.is_file() else ""
    message = f"can't write {str(path)!r} ({reason}){kept}"
    return NotWritten(message if option is None else f"{option}: {message}; give another place")
