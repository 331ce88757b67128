"""Writes checkpoints of training: whole files, read back, with errors on all ranks."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from fsspec.core import url_to_fs
from fsspec.utils import get_protocol
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import Strategy

from vfm_vae.checkpoints import read_checkpoint
from vfm_vae.joined import Joined
from vfm_vae.lightning_private import undeclared
from vfm_vae.writing import NotWritten, check_place, num_bytes, remove_leftovers, whole_file

# How many averages of a parameter's size an optimiser keeps.
AVERAGES: dict[type, int] = {torch.optim.Adam: 2, torch.optim.AdamW: 2, torch.optim.Muon: 1}


class CheckpointFiles(TorchCheckpointIO):
    """Writes checkpoints as `whole_file` does, and lets one take its place only when it was read back.

    Lightning's own way builds a checkpoint in memory, writes it into TMPDIR, and copies it from there where that is
    another disk. Addresses of other file systems, such as s3://…, are left to it.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Writes a checkpoint.

        Raises:
            NotWritten: if that is not possible, or what was written can't be read.
        """
        if storage_options is not None or (place := local_path(path)) is None:
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        with whole_file(place, num_bytes(checkpoint)) as file:
            torch.save(checkpoint, file)
            file.flush()
            _read_back(Path(file.name), checkpoint.get("global_step"))


class WholeCheckpoints(Callback):
    """Makes a run's checkpoints whole files, see `write_whole`. The command lines add it to every run.

    Before its first step, training looks whether its checkpoints can be written, as far as can be known.

    Raises:
        NotWritten: if a folder of checkpoints can't be written to, or the disk has no space for one, on all ranks.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """From here on the trainer writes and reads so."""
        write_whole(trainer)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Checks the folders."""
        check_places(trainer, pl_module)


def check_places(trainer: Trainer, module: LightningModule) -> None:
    """Checks that a run can write its checkpoints, and removes unfinished files of killed processes.

    Raises:
        NotWritten: if a folder can't be written to, or the disk has no space for one checkpoint, on all ranks.
    """
    if undeclared(trainer).fast_dev_run:
        return
    size = expected_bytes(trainer, module)

    def look() -> None:
        for folder in _folders(trainer) if trainer.is_global_zero else ():
            former = [file.stat().st_size for file in folder.glob("*.ckpt") if file.is_file()]
            is_sharded = (folder / "last.ckpt").is_dir()
            check_place(folder / ("shard" if is_sharded else "last.ckpt"), max(size, *former, 0))
            remove_leftovers(folder)

    alike(trainer.strategy, look)


def write_whole(trainer: Trainer) -> None:
    """Makes a trainer write its checkpoints with `CheckpointFiles`, and all ranks raise if one can't be written.

    Reading, it says what is wrong with a damaged file, and which whole one lies beside it. Nothing is changed where the
    trainer was given a CheckpointIO.
    """
    strategy = trainer.strategy
    if type(strategy.checkpoint_io) is TorchCheckpointIO:
        strategy.checkpoint_io = CheckpointFiles()
        methods: Any = strategy  # whose methods are replaced
        methods.save_checkpoint = partial(_save, strategy, strategy.save_checkpoint)
        methods.load_checkpoint = partial(_load, strategy.load_checkpoint)


def alike(strategy: Strategy, action: Callable[[], None]) -> None:
    """Runs an action on all ranks; if rank zero, which writes, fails, all ranks raise.

    Raises:
        NotWritten: if rank zero did.
    """
    failure: NotWritten | None = None
    try:
        action()
    except NotWritten as error:
        failure = error
    message = strategy.broadcast(str(failure) if failure is not None else None)
    if message is not None or failure is not None:
        raise NotWritten(message or str(failure)) from failure


def newest_whole(path: Path) -> Path | None:
    """The newest of the checkpoints beside a damaged one that are whole; None if there is none."""
    others = [other for other in path.parent.glob("*.ckpt") if other != path and other.is_file()]
    for other in sorted(others, key=lambda file: file.stat().st_mtime, reverse=True):
        try:
            read_checkpoint(other, "", mmap=True)
        except ValueError:
            continue
        return other
    return None


def local_path(address: str | Path | None) -> Path | None:
    """Where a file lies on this machine; None for an address of another file system, or where there is none."""
    if address is None or get_protocol(str(address)) != "file":
        return None
    return Path(url_to_fs(str(address))[1])


def expected_bytes(trainer: Trainer, module: LightningModule) -> int:
    """What a checkpoint takes at least: the module's state, and the averages that Adam, AdamW and Muon keep."""
    parts = [list(module.state_dict().values())]
    for whole in trainer.optimizers:
        for optimizer in whole.parts if isinstance(whole, Joined) else (whole,):
            averages = next((n for kind, n in AVERAGES.items() if isinstance(optimizer, kind)), 0)
            parts += [group["params"] for group in optimizer.param_groups] * averages
    return sum(tensor.numel() * tensor.element_size() for part in parts for tensor in part)


def _folders(trainer: Trainer) -> set[Path]:
    """Where a trainer's ModelCheckpoints write on this machine."""
    checkpoints = [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]
    places = {local_path(found.dirpath) for found in checkpoints if found.save_top_k or found.save_last}
    return {place for place in places if place is not None}


def _read_back(written: Path, step: int | None) -> None:
    try:
        found = read_checkpoint(written, "", mmap=True)
    except ValueError as error:
        raise OSError(f"what was written can't be read back: {str(error).removeprefix(': ')}") from error
    if found.get("global_step") != step:
        raise OSError(f"step {found.get('global_step')} was read back, not {step}")


def _save(
    strategy: Strategy, save: Callable[..., None], checkpoint: dict[str, Any], filepath: str | Path, **options: Any
) -> None:
    alike(strategy, lambda: save(checkpoint, filepath, **options))


def _load(load: Callable[..., dict[str, Any]], path: str | Path, **options: Any) -> dict[str, Any]:
    place = local_path(path)
    if place is not None and not (place / "meta.pt").is_file():  # of a folder that all ranks have written together
        try:
            if "pytorch-lightning_version" not in read_checkpoint(place, "ckpt_path", mmap=True):
                raise ValueError(f"ckpt_path: {str(place)!r} is no checkpoint of Lightning; give one that `fit` wrote")
        except ValueError as error:
            whole = newest_whole(place)
            beside = f"the newest whole one beside it is {str(whole)!r}" if whole else "no whole one lies beside it"
            raise ValueError(f"{error}; {beside}") from error
    return load(path, **options)
