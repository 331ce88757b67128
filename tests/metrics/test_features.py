"""Features of all samples, whichever rank saw them."""

import pytest
import torch
from torch import distributed, multiprocessing

from vfm_vae.metrics.features import FeatureStore


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_store_keeps_features_in_the_order_of_their_index(dtype):
    features = torch.randn(30, 4).to(dtype)
    store = FeatureStore()
    index = torch.cat((torch.randperm(30), torch.tensor([3, 7])))
    for part in index.split(9):
        store.update(features[part], part)
    store.update(torch.full((2, 4), 1e6), torch.tensor([-1, -1]))
    torch.testing.assert_close(store.compute(), features.float(), rtol=0, atol=0)
    store.reset()
    store.update(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
    assert store.compute().shape == (0, 4)


def test_store_merges_ranks_of_which_one_is_empty():
    features = torch.randn(9, 4)
    stores = [FeatureStore() for _ in range(3)]
    stores[0].update(features[1::2], torch.arange(9)[1::2])
    stores[1].update(features[:0], torch.arange(0))
    stores[2].update(features[::2], torch.arange(9)[::2])
    for other in stores[1:]:
        stores[0].merge_state(other)
    assert torch.equal(stores[0].compute(), features)


def test_store_names_bad_arguments():
    for features, index in ((torch.rand(3), torch.arange(3)), (torch.rand(3, 2), torch.arange(2))):
        with pytest.raises(ValueError, match=r"features and index must be \[B, d\] and \[B\]"):
            FeatureStore().update(features, index)


def _store_on_rank(rank, path):
    torch.set_num_threads(1)  # a forked process has none of the threads that its parent may have started
    distributed.init_process_group("gloo", init_method=f"file://{path}/store", rank=rank, world_size=2)
    whole = torch.arange(20.0).reshape(5, 4).bfloat16()
    index = torch.arange(5)
    shared, lonely, mixed = (FeatureStore() for _ in range(3))
    shared.update(whole[rank::2], index[rank::2])
    lonely.update(whole if rank else torch.zeros(0, 4), index if rank else index[:0])
    mixed.update(whole[rank::2] if rank else whole[rank::2].float(), index[rank::2])
    kept = [store.compute() for store in (shared, lonely, mixed)]
    torch.save([torch.equal(features, whole.float()) for features in kept], f"{path}/{rank}.pt")
    distributed.destroy_process_group()


def test_store_gathers_over_processes(tmp_path):
    multiprocessing.start_processes(_store_on_rank, args=(str(tmp_path),), nprocs=2, start_method="fork")
    for rank in range(2):
        assert torch.load(tmp_path / f"{rank}.pt") == [True, True, True]
