"""Samples that RAE's public code guides, by classifier-free guidance and by autoguidance, in float32."""

import pytest
import torch
from ditdh_reference import SETTINGS, ditdh_a, guide, labels, reference

from ldm.guidance import Autoguidance, Guidance
from ldm.pipeline import LatentDiffusion
from ldm.samplers import Euler
from vfm_vae.data.latents import LatentStatistics

SAMPLING = SETTINGS["sampling"]


def interval(name: str) -> dict[str, float]:
    """Of public times, where 1 is noise, in this project's."""
    low, high = SAMPLING[name]
    return {"start": 1 - high, "end": 1 - low}


@pytest.fixture(scope="module")
def partner(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of the model that guides."""
    folder = tmp_path_factory.mktemp("guide")
    model = LatentDiffusion(guide())
    shape = 1, SETTINGS["config"]["in_channels"], 1, 1
    model.normalization.take(LatentStatistics(torch.zeros(shape), torch.ones(shape)))
    model.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("name", ["cfg", "autoguidance", "autoguidance_interval"])
@torch.no_grad()
def test_guided_samples(partner: str, name: str):
    guidance = {
        "cfg": Guidance(SAMPLING["cfg_scale"], **interval("cfg_interval")),
        "autoguidance": Autoguidance(partner, SAMPLING["autoguidance_scale"]),
        "autoguidance_interval": Autoguidance(
            partner, SAMPLING["autoguidance_scale"], **interval("autoguidance_interval")
        ),
    }[name]
    sampler = Euler(SAMPLING["num_steps"], shift=1 / SAMPLING["shift"], end=SAMPLING["t1"])
    samples = sampler(guidance.field(ditdh_a(), labels("sample/labels")), reference()["sample/noise"])
    assert (samples - reference()[f"sample/{name}"]).abs().max() <= 2e-5
    assert (samples - reference()["sample/unguided"]).abs().max() > 5e-3
