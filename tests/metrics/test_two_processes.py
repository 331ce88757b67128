"""Every metric over two processes equals itself in one, with a number of samples that does not divide."""

import pytest
import torch
from torch import distributed, multiprocessing

from vfm_vae.metrics.alignment import CKNNA
from vfm_vae.metrics.distribution import FrechetDistance, Gaussian, InceptionScore
from vfm_vae.metrics.precision_recall import PrecisionRecall
from vfm_vae.metrics.reference import ReferenceImages
from vfm_vae.vfm import FrozenVFM

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


def without_a_place(rank, path, photos):
    """What each rank of two is told where the reference's statistics can't be stored, or changed and are cut."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{path}/other", rank=rank, world_size=2)
    vfm = FrozenVFM("vit_photos_patch8_64")
    told = []
    for statistics in (f"{path}/file/here.npz", f"{path}/cut.npz", f"{path}/good.npz"):
        try:
            mean = ReferenceImages(f"{photos}/val", 64, statistics).load(vfm, with_features=False).pool.mean
            told.append(mean.sum().item())
        except ValueError as error:
            told.append(str(error))
    torch.save(told, f"{path}/{rank}.told")
    distributed.destroy_process_group()


def test_no_rank_waits_for_another_that_can_not_store_a_reference(tmp_path, photos):
    (tmp_path / "file").touch()
    (tmp_path / "cut.npz").write_bytes(b"PK\x03\x04")
    multiprocessing.start_processes(without_a_place, args=(str(tmp_path), str(photos)), nprocs=2, start_method="fork")
    one, two = (torch.load(tmp_path / f"{rank}.told") for rank in range(2))
    assert one == two
    assert one[0].startswith("statistics: can't write ") and "is cut short" in one[1] and isinstance(one[2], float)
