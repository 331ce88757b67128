"""Reads files of weights, by their content rather than their names, and JSON.

Nothing is unpickled but tensors and plain data. What can't be read is said in one line: which option gave it, where it
lies, and what it seems to be.
"""

import argparse
import json
import pickle
import struct
import zipfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError, safe_open
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


@contextmanager
def open_tensors(path: str | Path, option: str) -> Iterator[Any]:
    """Opens a safetensors file, of which parts are to be read; arguments and errors as of `read_weights`."""
    try:
        with safe_open(path, "pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        _refuse(path, option, error)


def read_json(path: str | Path, option: str) -> Any:
    """Reads plain data.

    Raises:
        ValueError: if the file is no JSON.
    """
    try:
        return json.loads(Path(path).read_text())
    except ValueError as error:  # neither JSON nor text
        what = seems_to_be(path)
        raise ValueError(f"{option}: {str(path)!r} can't be read as JSON ({error}): it is {what}") from error


def read_published_weights(weights: str | Path | None, url: str, owner: str) -> tuple[Any, str]:
    """Reads a published file, from where it was put or downloaded to.

    Args:
        weights: The file; None is for `$TORCH_HOME/hub/checkpoints`, to which it is downloaded where it is missing.
        url: Address of the file; the hash in its name is checked after the download.
        owner: Name of what the weights are for, in messages.

    Returns:
        What it holds, and its path.

    Raises:
        ValueError: if the file can't be had, or can't be read as weights.
    """
    place = published_place(url) if weights is None else Path(weights)
    try:
        if weights is None and not place.exists():
            known = torch.hub.HASH_REGEX.search(place.name)
            place.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(place), known.group(1) if known else None)
    except (OSError, RuntimeError) as error:
        cause = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(
            f"weights: those of {owner} could not be downloaded ({cause}); put {url} at {str(place)!r}, or give its "
            "file as `weights`"
        ) from error
    try:
        return read_weights(place, "weights"), str(place)
    except ValueError as error:
        raise ValueError(f"{error}; give the file of {owner}: {url}") from error


def published_place(url: str) -> Path:
    """Where a published file is downloaded to."""
    return Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]


def seems_to_be(path: str | Path) -> str:
    """What a file that can't be read seems to be, by its first bytes."""
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
            return f"a zip archive of something else, {few(archive.namelist())}"
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
    return f"{sorted(map(str, names))[:shown]}" + (f" and {len(names) - shown} more" if len(names) > shown else "")


def misfit(tensors: Any, wanted: Mapping[str, Tensor]) -> str | None:
    """How tensors differ from those of a model in names and shapes; None if they do not.

    Args:
        tensors: By name, or what else a file holds.
        wanted: State of the model.
    """
    if not isinstance(tensors, Mapping):
        return f"there is a {type(tensors).__name__}, and no tensors by name"
    missing, left_over = wanted.keys() - tensors.keys(), tensors.keys() - wanted.keys()
    shapes = {name: (getattr(tensors[name], "shape", None), wanted[name].shape) for name in wanted.keys() - missing}
    reshaped = [
        f"{name} {'no tensor' if found is None else tuple(found)} instead of {tuple(expected)}"
        for name, (found, expected) in shapes.items()
        if found != expected
    ]
    found = {"missing": missing, "left over": left_over, "of another shape": reshaped}
    differences = [f"{len(names)} {how} {few(names)}" for how, names in found.items() if names]
    return f"of {len(wanted)} tensors {', '.join(differences)}" if differences else None


def fill(module: nn.Module, tensors: Any, message: str) -> None:
    """Loads all of a module's weights.

    Args:
        module: Takes them.
        tensors: By the module's names, or what else a file holds.
        message: Begins what is said if they don't fit.

    Raises:
        ValueError: if tensors are missing, left over, or of another shape.
    """
    if (difference := misfit(tensors, module.state_dict())) is not None:
        raise ValueError(f"{message}: {difference}")
    module.load_state_dict(dict(tensors))


def check_state(module: nn.Module, checkpoint: Mapping[str, Any], option: str) -> None:
    """Checks that a checkpoint has exactly the weights of a module; a sharded one has loaded them by itself.

    Args:
        module: Is to take them.
        checkpoint: A training checkpoint.
        option: Names the checkpoint.

    Raises:
        ValueError: if tensors are missing, left over, or of another shape.
    """
    if "state_dict" in checkpoint and (difference := misfit(checkpoint["state_dict"], module.state_dict())) is not None:
        raise ValueError(f"{option}: the checkpoint is of another model: {difference}")


def _kind(path: str | Path, option: str) -> str:
    """The format of a file: `safetensors`, torch's `zip`, or its older `pickle`."""
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
    if error is None or not what.startswith(("a zip archive", "a pickle", "a damaged")):  # which may be weights
        raise ValueError(f"{option}: {str(path)!r} can't be read as weights: it is {what}") from error
    cause = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    raise ValueError(f"{option}: {str(path)!r} can't be read as weights: it is damaged ({cause})") from error


def _needed_global(error: BaseException) -> str | None:
    """The class or function that a refused pickle asks for, by torch's words."""
    words = str(error).partition("GLOBAL ")[2].split()
    return words[0].rstrip(".,") if isinstance(error, pickle.UnpicklingError) and words else None


def _is_safetensors(start: bytes) -> bool:
    """Whether a file begins like safetensors: with the length of a header, and a header in JSON."""
    return len(start) > 8 and start[8:9] == b"{" and int.from_bytes(start[:8], "little") < 1 << 30


def _safetensors_size(path: Path) -> int | None:
    """The length of the file according to its header; None if the header itself is cut short."""
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
