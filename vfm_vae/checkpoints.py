"""Files of weights as they are read: checkpoints of torch and safetensors, told by their content, not by their names.

Nothing is unpickled but tensors and plain data. What can't be read is said in one line: which option gave it, where it
lies, and what it seems to be.
"""

import argparse
import json
import pickle
import struct
import zipfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

# What files begin with, at an offset, and what such a file is.
BEGINNINGS: tuple[tuple[int, bytes, str], ...] = (
    (0, b"version https://git-lfs.github.com/spec/", "a Git LFS pointer to the file; fetch it with `git lfs pull`"),
    (0, b"\x1f\x8b", "a gzip archive; unpack it"),
    (0, b"BZh", "a bzip2 archive; unpack it"),
    (0, b"\xfd7zXZ", "an xz archive; unpack it"),
    (0, b"(\xb5/\xfd", "a zstandard archive; unpack it"),
    (257, b"ustar", "a tar archive; unpack it"),
    (0, b"\x89PNG", "a PNG image"),
    (0, b"\xff\xd8\xff", "a JPEG image"),
    (0, b"\x93NUMPY", "a NumPy array (.npy)"),
    (0, b"\x89HDF", "an HDF5 file"),
    (0, b"GGUF", "a GGUF file"),
)

# All that reading a damaged pickle has been seen to raise.
UNREADABLE = (
    pickle.UnpicklingError,
    SafetensorError,
    RuntimeError,
    EOFError,
    OSError,
    struct.error,
    zipfile.BadZipFile,
    LookupError,
    ValueError,
    TypeError,
    AttributeError,
    AssertionError,
    OverflowError,
)


def read_weights(path: str | Path, option: str, mmap: bool = False) -> Any:
    """Reads a file of weights, of torch or safetensors, onto the CPU.

    Args:
        path: The file.
        option: Names what gave it in messages.
        mmap: Whether tensors stay on disk until they are used, where the file allows that: so it costs little to see
            whether a file is whole.

    Returns:
        What it holds; of safetensors, the tensors by name.

    Raises:
        ValueError: if there is no such file, it is cut short or something else, or it needs code to be read.
    """
    kind = _kind(path, option)
    try:
        if kind == "safetensors":
            return load_file(path)
        mmap = mmap and kind == "zip" and Path(path).suffix != ".safetensors"  # by which name torch would go
        # Options of a training script, argparse.Namespace, are plain data.
        with open(path, "rb") as file, torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(str(path) if mmap else file, map_location="cpu", weights_only=True, mmap=mmap)
    except UNREADABLE as error:
        _refuse(path, option, error)


def read_checkpoint(path: str | Path, option: str, mmap: bool = False) -> dict[str, Any]:
    """Reads a checkpoint of training; arguments and errors as of `read_weights`.

    Raises:
        ValueError: furthermore if there is no `state_dict` in it.
    """
    if not Path(path).exists():
        raise ValueError(f"{option}: there is no checkpoint {str(path)!r}")
    content = read_weights(path, option, mmap)
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        return dict(content)
    what = "tensors alone" if isinstance(content, Mapping) else f"a {type(content).__name__}"
    raise ValueError(
        f"{option}: {str(path)!r} holds {what}, and is no checkpoint of training, which has a 'state_dict'; give one "
        "that `fit` wrote"
    )


def seems_to_be(path: str | Path) -> str:
    """What a file is that can't be read as what it should be, as far as its first bytes tell."""
    path = Path(path)
    if not path.exists():
        return "missing"
    if path.is_dir():
        return "a folder, not a file"
    size = path.stat().st_size
    if size == 0:
        return "empty (0 bytes)"
    with open(path, "rb") as file:
        start = file.read(1024)
    for offset, beginning, what in BEGINNINGS:
        if start[offset:].startswith(beginning):
            return what
    if start.lstrip()[:14].lower().startswith((b"<!doctype html", b"<html")):
        return "an HTML page, perhaps of a failed download; download it again"
    if start.startswith(b"PK"):
        if not zipfile.is_zipfile(path):
            return f"cut short (its first {size} bytes are there, without the end); copy or make it again"
        with zipfile.ZipFile(path) as archive:
            return f"a zip archive of something else ({few(archive.namelist())})"
    if _is_safetensors(start):
        whole = _safetensors_size(path)
        if whole is None or whole > size:
            of = "" if whole is None else f" of {whole}"
            return f"a safetensors file cut short ({size}{of} bytes are there); copy or make it again"
        return "a damaged safetensors file"
    if start.startswith(b"\x80"):
        return f"a pickle that is damaged or cut short ({size} bytes)"
    if start.isascii() and b"\0" not in start:
        return f"text ({start.decode().strip()[:40].partition(chr(10))[0]!r}…)"
    return f"neither a file of torch nor safetensors ({size} bytes)"


def few(names: Collection[str], shown: int = 3) -> str:
    """Some of many names, and how many others there are."""
    first = sorted(names)[:shown]
    return ", ".join(first) + (f" and {len(names) - shown} more" if len(names) > shown else "")


def misfit(tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> str | None:
    """In which names and shapes tensors differ from those that a model takes; None where in none.

    Args:
        tensors: By name.
        wanted: State of the model.
    """
    missing, left_over = wanted.keys() - tensors.keys(), tensors.keys() - wanted.keys()
    shapes = {name: tuple(tensor.shape) for name, tensor in wanted.items()}
    reshaped = [
        f"{name} {tuple(tensors[name].shape)} instead of {shape}"
        for name, shape in shapes.items()
        if name in tensors and tuple(tensors[name].shape) != shape
    ]
    found = {"missing": missing, "left over": left_over, "of another shape": reshaped}
    differences = [f"{len(names)} {how} ({few(names)})" for how, names in found.items() if names]
    return f"of {len(wanted)} tensors {', '.join(differences)}" if differences else None


def fill(module: nn.Module, tensors: Mapping[str, Tensor], message: str) -> None:
    """Gives a module all of its weights.

    Args:
        module: Takes them.
        tensors: By the module's names.
        message: Begins what is said if they don't fit.

    Raises:
        ValueError: if tensors are missing, left over, or of another shape.
    """
    if (difference := misfit(tensors, module.state_dict())) is not None:
        raise ValueError(f"{message}: {difference}")
    module.load_state_dict(dict(tensors))


def _kind(path: str | Path, option: str) -> str:
    """How a file is to be read: as `safetensors`, as torch's `zip`, or as a `pickle`, its former format."""
    if Path(path).is_file():
        with open(path, "rb") as file:
            start = file.read(1024)
        if _is_safetensors(start):
            return "safetensors"
        if start.startswith(b"\x80"):
            return "pickle"
        if start.startswith(b"PK") and zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if any(name.endswith("/data.pkl") for name in archive.namelist()):
                    return "zip"
    _refuse(path, option, None)


def _refuse(path: str | Path, option: str, error: BaseException | None) -> NoReturn:
    """Says what is wrong with a file."""
    if error is not None and (needed := _needed_global(error)) is not None:
        raise ValueError(
            f"{option}: {str(path)!r} is refused: reading it would run code ({needed}), and nothing is unpickled here "
            "but tensors and plain data; save its state_dict alone with the project that it comes from"
        ) from error
    what = seems_to_be(path)
    if what == "missing":
        raise ValueError(f"{option}: there is no file {str(path)!r}")
    if error is None or what.startswith(("empty", "a safetensors file cut")):
        raise ValueError(f"{option}: {str(path)!r} can't be read as weights: it is {what}") from error
    cause = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    raise ValueError(f"{option}: {str(path)!r} can't be read as weights: it is damaged ({cause})") from error


def _needed_global(error: BaseException) -> str | None:
    """The class or function that a refused pickle asks for, by torch's words."""
    words = str(error).partition("GLOBAL ")[2].split()
    return words[0].rstrip(".,") if isinstance(error, pickle.UnpicklingError) and words else None


def _is_safetensors(start: bytes) -> bool:
    """Whether a file begins as safetensors do: the length of a header, and the header, in JSON."""
    return len(start) > 8 and start[8:9] == b"{" and int.from_bytes(start[:8], "little") < 1 << 30


def _safetensors_size(path: Path) -> int | None:
    """How long its header says that the file is; None where the header itself is cut."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = file.read(length)
    if len(header) < length:
        return None
    try:
        parts = json.loads(header)
        return (
            8 + length + max((part["data_offsets"][1] for n, part in parts.items() if n != "__metadata__"), default=0)
        )
    except (ValueError, LookupError, TypeError):
        return None
