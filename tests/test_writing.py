"""Files appear under their names whole, or not at all: whatever writes them, and whatever happens meanwhile."""

import errno
import fcntl
import io
import json
import multiprocessing
import os
import re
import shutil
import signal
import stat
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import torch

from callbacks.images import show
from callbacks.writers import keep_settings, write_images
from vfm_vae.data.archive import write_archive
from vfm_vae.data.latents import LatentStatistics
from vfm_vae.data.shard_index import Shard, _save_index
from vfm_vae.data.texts import EmptyCaption
from vfm_vae.embedded.vit import WEIGHTS
from vfm_vae.files import write_image
from vfm_vae.metrics.summary import write_entry
from vfm_vae.published_files import write_training
from vfm_vae.writing import (
    NotWritten,
    check_place,
    num_bytes,
    remove_leftovers,
    whole_file,
    write_picture,
    write_tensors,
    write_text,
    write_torch,
)

ROOT = Path(__file__).parents[1]
TRAINER = SimpleNamespace(is_global_zero=True, loggers=[], strategy=SimpleNamespace(broadcast=lambda x: x))
GREY = torch.zeros(1, 3, 4, 4)
SHARD = Shard(1, 1, np.array([b"a"]), *(np.zeros(1, np.int64) for _ in range(3)), [], True)

# All that writes a file, each with the name of the file.
WRITERS = {
    "text.txt": lambda folder: write_text(folder / "text.txt", "new"),
    "weights.ckpt": lambda folder: write_torch(folder / "weights.ckpt", {"a": torch.ones(3)}),
    "shard.safetensors": lambda folder: write_tensors(folder / "shard.safetensors", {"a": torch.ones(3)}),
    "all.npz": lambda folder: write_archive(folder / "all.npz", [np.zeros((2, 2, 3), np.uint8)], 1),
    "metrics.json": lambda folder: write_entry(folder / "metrics.json", "run", {"metrics": {}}),
    "latents_stats.pt": lambda folder: LatentStatistics(GREY, GREY).write(folder / "latents_stats.pt"),
    "text_empty.pt": lambda folder: EmptyCaption(GREY, 1).write(folder),
    "index.npz": lambda folder: _save_index(folder / "index.npz", {"a.tar": SHARD}),
    "training.ckpt": lambda folder: write_training(folder, {"state_dict": {}}, {}),
    "00000003.png": lambda folder: write_images(folder, GREY, torch.tensor([3])),
    "pair.jpg": lambda folder: write_image(folder / "pair.jpg", GREY),
    "grid.png": lambda folder: show(TRAINER, torch.zeros(3, 8, 8).byte(), folder / "grid.png", "grid"),
    "samples.json": lambda folder: keep_settings(TRAINER, folder / "samples.json", {"seed": 0}),
}


def fail(*args):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("name", WRITERS)
def test_a_file_that_fails_leaves_the_former_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str):
    former = b"{}" if name == "metrics.json" else b"former"
    if name != "samples.json":  # which is never written over
        (tmp_path / name).write_bytes(former)
    before = list(tmp_path.iterdir())
    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(NotWritten, match=rf"can't write '.*{name}' \(No space left on device\)"):
        WRITERS[name](tmp_path)
    assert list(tmp_path.iterdir()) == before
    assert all(file.read_bytes() == former for file in before)


@pytest.mark.parametrize("name", WRITERS)
def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str):
    done = []
    sync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: (done.append("sync"), sync(file)))
    monkeypatch.setattr(os, "replace", lambda *names: (done.append("replace"), replace(*names)))
    umask = os.umask(0o027)
    try:
        WRITERS[name](tmp_path)
    finally:
        os.umask(umask)
    assert done[:3] == ["sync", "replace", "sync"]  # the file, and its folder
    assert (tmp_path / name).stat().st_mode & 0o777 == 0o640  # as the user's umask says


def test_nothing_writes_files_in_another_way():
    others = re.compile(
        r"write_text\(|write_bytes\(|torch\.save\(|save_file\(|savez|savefig|\.save\(|open\([^)]*, \"[wax]b?\""
    )
    own = re.compile(r"from vfm_vae\.writing import[^\n]*|def write_text|with whole_file[^\n]*")
    found = {}
    for folder in ("vfm_vae", "ldm", "callbacks"):
        for file in (ROOT / folder).rglob("*.py"):
            text = own.sub("", file.read_text())
            text = re.sub(r"(?<![.\w])write_text\(", "", text)  # ours, not a Path's
            if lines := [line.strip() for line in text.splitlines() if others.search(line)]:
                found[str(file.relative_to(ROOT))] = len(lines)
    assert found == {
        "ldm/app/pictures.py": 1,  # into memory
        "vfm_vae/writing.py": 3,
        "vfm_vae/saving.py": 1,  # into a whole file
        "vfm_vae/data/shard_index.py": 1,  # into a whole file
        "vfm_vae/data/archive.py": 2,  # into a whole file
        "vfm_vae/report/drawing.py": 1,  # into memory
        "vfm_vae/report/pictures.py": 1,  # into memory
        "vfm_vae/embedded/photos.py": 3,  # into a folder that appears as a whole
    }


def killed_while_replacing(path: Path) -> None:
    """In a process of its own."""
    os.replace = lambda *names: os.kill(os.getpid(), signal.SIGKILL)
    write_text(path, "of a process that was killed " * 99)


def test_a_kill_while_replacing_costs_nothing(tmp_path: Path):
    """The former file stays; what the killed process left is used by the next, and never more than one file."""
    path = tmp_path / "last.txt"
    write_text(path, "former")
    for _ in range(2):
        process = multiprocessing.get_context("fork").Process(target=killed_while_replacing, args=(path,))
        process.start()
        process.join(60)
        assert process.exitcode == -signal.SIGKILL
        assert path.read_text() == "former"
        assert len(list(tmp_path.iterdir())) == 2
    write_text(path, "new")
    assert [file.name for file in tmp_path.iterdir()] == ["last.txt"] and path.read_text() == "new"


def test_leftovers_go_but_what_is_being_written_stays(tmp_path: Path):
    (tmp_path / ".epoch=3.ckpt.partial").write_text("of a process that was killed")
    with whole_file(tmp_path / "last.ckpt") as file:
        remove_leftovers(tmp_path)
        assert [left.name for left in tmp_path.iterdir()] == [".last.ckpt.partial"]
        file.write(b"whole")
    assert (tmp_path / "last.ckpt").read_bytes() == b"whole"


def test_two_may_write_the_same_file(tmp_path: Path):
    path = tmp_path / "index"
    with whole_file(path) as first, whole_file(path) as second:
        first.write(b"first, and longer")
        second.write(b"second")
    assert path.read_bytes() == b"first, and longer" and list(tmp_path.iterdir()) == [path]  # the last to be finished


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def no_locks(*args):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    path = tmp_path / "file"
    with whole_file(path) as first, whole_file(path) as second:
        second.write(b"second")
        first.write(b"first")
    assert path.read_bytes() == b"first" and list(tmp_path.iterdir()) == [path]


def test_a_file_system_that_syncs_no_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    sync = os.fsync

    def files_alone(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", files_alone)
    write_text(tmp_path / "file", "whole")
    assert (tmp_path / "file").read_text() == "whole"


def test_an_error_of_the_block_passes_and_leaves_nothing(tmp_path: Path):
    with pytest.raises(KeyError), whole_file(tmp_path / "file"):
        raise KeyError("block")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["weights.ckpt", "shard.safetensors", "text.txt"])
def test_too_little_space_is_seen_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
):
    (tmp_path / name).write_text("former")
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(100, 98, 2))
    with pytest.raises(NotWritten, match=r"MB are needed, 0.0 MB free.*the former file is kept"):
        WRITERS[name](tmp_path)
    assert (tmp_path / name).read_text() == "former"
    monkeypatch.undo()
    with pytest.raises(NotWritten, match="MB are needed"):
        check_place(tmp_path / name, 1 << 60)


@pytest.mark.parametrize("kind", ["a file above", "a folder there"])
def test_places_that_will_not_do(tmp_path: Path, kind: str):
    path = tmp_path / "checkpoints" / "last.ckpt"
    if kind == "a file above":
        path.parent.write_text("a file")
    else:
        path.mkdir(parents=True)
    for write in (check_place, lambda path: write_text(path, "new")):
        with pytest.raises(NotWritten, match=r"can't write '.*last.ckpt' \(.*(exists|folder)"):
            write(path)


def test_the_option_that_gave_the_place_is_named(tmp_path: Path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(ValueError, match=r"^cache_dir: can't write '.*'.*; give another place$"):
        write_text(tmp_path / "cache/list.txt", "new", "cache_dir")


def test_a_place_that_will_do_is_left_as_it_was(tmp_path: Path):
    check_place(tmp_path / "new/last.ckpt")
    assert list(tmp_path.rglob("*")) == [tmp_path / "new"]


def test_safetensors_are_those_of_the_library(tmp_path: Path):
    torch.manual_seed(0)
    tensors = {
        "b": torch.randn(3, 5).bfloat16(),
        "a": torch.randn(7, 2).t(),
        "c": torch.tensor(3),
        "none": torch.ones(0),
    }
    tensors |= {"x": torch.tensor([True, False]), "d": torch.randn(3).double(), "h": torch.randn(5).half()}
    write_tensors(tmp_path / "a.safetensors", tensors)
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    assert (tmp_path / "a.safetensors").read_bytes() == safetensors.torch.save(whole, {"format": "pt"})
    shipped = safetensors.torch.load_file(WEIGHTS)
    write_tensors(tmp_path / "b.safetensors", shipped)
    read = safetensors.torch.load_file(tmp_path / "b.safetensors")
    assert all(torch.equal(read[name], shipped[name]) for name in shipped)


def test_bytes_of_tensors():
    weight = torch.zeros(10)
    nested = {"a": weight, "again": [weight, weight[:2]], "state": ({"b": torch.zeros(3, dtype=torch.uint8)},), "n": 3}
    assert num_bytes(nested) == 43
    with io.BytesIO() as file:
        torch.save(nested, file)
        assert file.tell() >= 43


def test_an_archive_that_breaks_off_leaves_the_former_one(tmp_path: Path):
    path = tmp_path / "samples.npz"
    write_archive(path, [np.full((2, 2, 3), 7, np.uint8)], 1)

    def broken():
        yield np.zeros((2, 2, 3), np.uint8)
        raise OSError("image file is truncated")

    with pytest.raises(NotWritten, match=r"samples.npz' \(image file is truncated\); the former file is kept"):
        write_archive(path, broken(), 2)
    assert np.load(path)["arr_0"].max() == 7 and list(tmp_path.iterdir()) == [path]


def test_pictures_need_an_ending(tmp_path: Path):
    with pytest.raises(ValueError, match=r"path: '.*grid' has no image format's ending; use .png"):
        write_picture(tmp_path / "grid", np.zeros((2, 2, 3), np.uint8))


def test_json_stays_readable_while_it_is_written(tmp_path: Path):
    """Several runs share a file of metrics."""
    path = tmp_path / "metrics.json"
    for name in ("strong", "weak"):
        write_entry(path, name, {"metrics": {}})
    assert list(json.loads(path.read_text())) == ["strong", "weak"]
