"""Every metric over two processes equals itself in one, with a number of samples that does not divide."""

import pytest
import torch
from torch import distributed, multiprocessing

from vfm_vae.metrics.alignment import CKNNA
from vfm_vae.metrics.distribution import FrechetDistance, Gaussian, InceptionScore, PrecisionRecall

NUM = 101


def measure(parts):
    """The numbers of this process's parts: positions in the whole, with padding marked by -1."""
    generator = torch.Generator().manual_seed(0)
    real, generated = (torch.randn(NUM, 6, generator=generator) * scale for scale in (1.0, 1.3))
    logits = torch.randn(NUM, 11, generator=generator) * 3
    known = Gaussian(torch.zeros(6).double(), torch.eye(6).double())
    metrics = {
        "fid": FrechetDistance(6),
        "fid_known": FrechetDistance(6, known),
        "score": InceptionScore(NUM, split_size=40, num_classes=11),
        "neighbours": PrecisionRecall(),
        "neighbours_known": PrecisionRecall(reference=real),
        "cknna": CKNNA(k=7),
    }
    for part in parts:
        index = torch.where(part < 0, -1, part)
        rows = part.clamp(min=0)[index >= 0]
        for name in ("fid", "fid_known"):
            metrics[name].update(generated[rows], real=False)
        metrics["fid"].update(real[rows], real=True)
        rows = part.clamp(min=0)
        metrics["score"].update(logits[rows], index)
        metrics["neighbours"].update(generated[rows], index)
        metrics["neighbours"].update(real[rows], index, real=True)
        metrics["neighbours_known"].update(generated[rows], index)
        metrics["cknna"].update(real[rows], generated[rows], index)
    return {name: metric.compute() for name, metric in metrics.items()}


def on_rank(rank, path):
    torch.set_num_threads(1)  # a forked process has none of the threads that its parent may have started
    distributed.init_process_group("gloo", init_method=f"file://{path}/store", rank=rank, world_size=2)
    whole = torch.cat([torch.arange(NUM), torch.tensor([-1])])  # padded to be even
    torch.save(measure(whole[rank::2].split(9)), f"{path}/{rank}.pt")
    distributed.destroy_process_group()


def test_two_processes_equal_one(tmp_path):
    multiprocessing.start_processes(on_rank, args=(str(tmp_path),), nprocs=2, start_method="fork")
    one = measure([torch.arange(NUM)])
    for rank in range(2):
        for name, value in torch.load(tmp_path / f"{rank}.pt").items():
            for mine, theirs in zip(
                *((v.values() if isinstance(v, dict) else [v]) for v in (value, one[name])), strict=True
            ):
                assert mine.item() == pytest.approx(theirs.item(), rel=1e-6), name
