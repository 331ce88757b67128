"""What tests of training share: one batch over and over, and which weights moved."""

import torch
from torch.utils.data import DataLoader, Dataset

from vfm_vae.types import Batch


class Repeat(Dataset):
    """One batch, over and over."""

    def __init__(self, batch: Batch, times: int):
        self.batch, self.times = batch, times

    def __len__(self) -> int:
        return self.times

    def __getitem__(self, _: int) -> Batch:
        return self.batch


def repeat(batch: Batch, times: int = 1000) -> DataLoader:
    return DataLoader(Repeat(batch, times), batch_size=None)


def weights(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def changed(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    return {name for name in before if not torch.equal(before[name], after[name])}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
