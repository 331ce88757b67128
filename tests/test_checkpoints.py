"""Files that are read: whatever is given instead of weights is named for what it is, in one line."""

import io
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from vfm_vae.checkpoints import few, fill, misfit, read_checkpoint, read_weights, seems_to_be

TENSORS = {"a": torch.arange(400.0), "b": torch.ones(2, 3)}


class Foreign:
    """Stands for a class of somebody else's project."""


def written(content, legacy=False):
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=not legacy)
    return buffer.getvalue()


def archived(kind):
    buffer = io.BytesIO()
    if kind == "npz":
        np.savez(buffer, arr_0=np.zeros(3))
    elif kind == "zip":
        with zipfile.ZipFile(buffer, "w") as archive:
            archive.writestr("notes.txt", "text")
    else:
        with tarfile.open(fileobj=buffer, mode="w") as tar:
            tar.addfile(tarfile.TarInfo("empty"))
    return buffer.getvalue()


def as_safetensors(tmp_path):
    save_file(TENSORS, tmp_path / "whole.safetensors")
    return (tmp_path / "whole.safetensors").read_bytes()


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 1200000000\n"

# What lies at the path → what is said of it.
FILES = {
    "empty": (lambda _: b"", "it is empty (0 bytes)"),
    "pointer": (lambda _: POINTER, "a Git LFS pointer to the file; fetch it with `git lfs pull`"),
    "page": (lambda _: b"\n<!DOCTYPE html><html><body>Quota exceeded", "an HTML page, perhaps of a failed download"),
    "text": (lambda _: b"no weights\nbut words", "it is text ('no weights'…)"),
    "cut": (lambda _: written(TENSORS)[:1500], "cut short (its first 1500 bytes are there, without the end)"),
    "cut legacy": (lambda _: written(TENSORS, legacy=True)[:700], "it is damaged ("),
    "cut safetensors": (
        lambda t: as_safetensors(t)[:500],
        "it is a safetensors file cut short (500 of 1752 bytes",
    ),
    "cut header": (lambda t: as_safetensors(t)[:40], "a safetensors file cut short (40 bytes are there)"),
    "foreign class": (lambda _: written({"model": Foreign()}), "is refused: reading it would run code ("),
    "foreign legacy": (lambda _: written({"model": Foreign()}, legacy=True), "is refused: reading it would run code ("),
    "zip": (lambda _: archived("zip"), "a zip archive of something else, ['notes.txt']"),
    "npz": (lambda _: archived("npz"), "a zip archive of something else, ['arr_0.npy']"),
    "tar": (lambda _: archived("tar"), "a tar archive; unpack it"),
    "noise": (lambda _: bytes(range(7, 250)), "neither a file of torch nor safetensors (243 bytes)"),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("ending", ["ckpt", "safetensors"])
def test_what_is_no_file_of_weights_is_named(tmp_path, name, ending):
    make, said = FILES[name]
    path = tmp_path / f"given.{ending}"
    path.write_bytes(make(tmp_path))
    for read in (read_weights, read_checkpoint):
        with pytest.raises(ValueError) as error:
            read(path, "model.init_from")
        message = str(error.value)
        assert message.startswith(f"model.init_from: {str(path)!r} ")
        assert said in message
        assert "\n" not in message and "weights_only" not in message


def test_a_folder_and_nothing_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"^init_from: '.*' can't be read as weights: it is a folder, not a file$"):
        read_checkpoint(tmp_path, "init_from")
    with pytest.raises(ValueError, match=r"^init_from: there is no checkpoint '.*none\.ckpt'$"):
        read_checkpoint(tmp_path / "none.ckpt", "init_from")
    with pytest.raises(ValueError, match=r"^weights: there is no file '.*none\.pth'$"):
        read_weights(tmp_path / "none.pth", "weights")
    assert seems_to_be(tmp_path / "none.pth") == "missing"


@pytest.mark.parametrize("kind", ["torch", "legacy", "safetensors"])
@pytest.mark.parametrize("ending", ["ckpt", "safetensors", "bin"])
@pytest.mark.parametrize("mmap", [False, True])
def test_the_content_says_how_a_file_is_read(tmp_path, kind, ending, mmap):
    content = as_safetensors(tmp_path) if kind == "safetensors" else written(TENSORS, legacy=kind == "legacy")
    path = tmp_path / f"weights.{ending}"
    path.write_bytes(content)
    read = read_weights(path, "weights", mmap)
    assert read.keys() == TENSORS.keys() and all(torch.equal(read[name], TENSORS[name]) for name in TENSORS)
    with pytest.raises(ValueError, match="holds tensors alone, and is no checkpoint of training"):
        read_checkpoint(path, "ckpt_path", mmap)
    path.write_bytes(written({"state_dict": TENSORS, "global_step": 3}))
    assert read_checkpoint(path, "ckpt_path", mmap)["global_step"] == 3


def test_weights_that_do_not_fit_are_named_in_one_line():
    layer = torch.nn.Linear(2, 3)
    state = layer.state_dict()
    assert misfit(state, state) is None
    with pytest.raises(ValueError, match=r"^tokenizer: of 2 tensors 1 missing \['bias'\], 1 left over \['other'\]$"):
        fill(layer, {"weight": state["weight"], "other": torch.ones(1)}, "tokenizer")
    with pytest.raises(ValueError, match=r"1 of another shape \['weight \(3, 5\) instead of \(3, 2\)'\]"):
        fill(layer, state | {"weight": torch.ones(3, 5)}, "tokenizer")
    fill(layer, {"weight": torch.ones(3, 2), "bias": torch.zeros(3)}, "tokenizer")
    assert layer.weight.sum() == 6
    assert few([f"blocks.{i}" for i in range(9)]) == "['blocks.0', 'blocks.1', 'blocks.2'] and 6 more"
