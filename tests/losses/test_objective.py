"""The generator's losses together: which there are, when, and what they weigh."""

import pytest
import torch

from vfm_vae.losses.objective import Objective
from vfm_vae.types import Decoded


def test_smaller_images_are_supervised_until_so_many_images_were_seen():
    objective = Objective(multi_resolution_images=10)
    decoded = Decoded(torch.zeros(1, 3, 8, 8), (torch.zeros(1, 3, 4, 4),))
    target = torch.ones(1, 3, 8, 8)
    terms = {seen: objective.reconstruction(decoded, target, "bilinear", seen) for seen in (0, 9, 10)}
    assert [set(found) for found in terms.values()] == [{"l1", "multi_resolution"}, {"l1", "multi_resolution"}, {"l1"}]


def test_the_total_is_the_weighted_sum():
    objective = Objective(l1=2.0, l2=3.0, alignment=0.0)
    assert objective.total({"l1": torch.tensor(5.0), "l2": torch.tensor(7.0)}).item() == pytest.approx(31)
    assert objective.total({}).item() == 0
