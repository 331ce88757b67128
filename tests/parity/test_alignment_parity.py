"""CKNNA, mutual neighbours, CKA and HSIC against published reference values in float64."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from vfm_vae.metrics.alignment import CKNNA, cka, cknna, hsic, mutual_knn, prepare_features

DATA = Path(__file__).parent / "data"
VALUES = json.loads((DATA / "alignment.json").read_text())
PREPARE = {
    "raw": lambda x: x,
    "prepared_normalised": prepare_features,
    "normalised_only": lambda x: F.normalize(x, dim=1),
}


MEASURES = {
    "cknna.unbiased_true": lambda a, b, k: cknna(a, b, k),
    "cknna.unbiased_false": lambda a, b, k: cknna(a, b, k, unbiased=False),
    "mutual_knn": mutual_knn,
    "cka": lambda a, b, k: cka(a, b),
    "unbiased_cka": lambda a, b, k: cka(a, b, unbiased=True),
    "hsic_biased": lambda a, b, k: hsic(a, b),
    "hsic_unbiased": lambda a, b, k: hsic(a, b, unbiased=True),
}


@pytest.fixture(scope="module")
def reference():
    return load_file(DATA / "alignment.safetensors")


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("variant", PREPARE)
@pytest.mark.parametrize("case", VALUES)
def test_values_equal_the_reference(reference, case, variant, measure):
    expected = VALUES[case][variant]
    assert set(expected) == {"topk", *MEASURES}
    a, b = (PREPARE[variant](reference[f"input/{case}/{side}"]) for side in "AB")
    value = MEASURES[measure](a, b, expected["topk"]).item()
    assert value == pytest.approx(expected[measure], rel=1e-5, abs=0)


@pytest.mark.parametrize("side", "AB")
@pytest.mark.parametrize("case", VALUES)
def test_features_are_prepared_as_in_the_reference(reference, case, side):
    features, clamped = reference[f"input/{case}/{side}"], reference[f"output/{case}/prepared_exact.{side}"]
    prepared = prepare_features(features)
    torch.testing.assert_close(prepared, reference[f"output/{case}/prepared_normalised.{side}"], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(prepared, F.normalize(clamped, dim=1), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("case", VALUES)
def test_the_metric_prepares_and_measures(reference, case):
    expected = VALUES[case]["prepared_normalised"]
    a, b = (reference[f"input/{case}/{side}"] for side in "AB")
    metric = CKNNA(k=expected["topk"])
    for part in torch.randperm(len(a)).split(17):
        metric.update(a[part], b[part], part)
    assert metric.compute().item() == pytest.approx(expected["cknna.unbiased_true"], rel=1e-5, abs=0)
