"""DiTDH against published weights, outputs, gradients, losses and samples of RAE's public code, in float32.

The importer turns time around, so public times t are 1 − t here, and public velocities are minus ours.
"""

import json
from collections.abc import Mapping

import pytest
import torch
from ditdh_reference import SETTINGS, ditdh_a, labels, published_weights, reference
from reference import DATA

from ldm import path
from ldm.guidance import Guidance
from ldm.models.ditdh import DiTDH
from ldm.published import denoiser_from_published, published_name, to_published
from ldm.samplers import Euler

OFFICIAL = json.loads((DATA / "ditdh_keys.json").read_text())
SHIFT = SETTINGS["sampling"]["shift"]
TABLES = {"pos_embed", *(f"{tower}_feat_rope.freqs_{part}" for tower in ("enc", "dec") for part in ("cos", "sin"))}


def close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 2e-5) -> None:
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= tolerance


@torch.no_grad()
def test_velocity_and_everything_within():
    model, outputs = ditdh_a(), {}

    def keep(name: str, module: torch.nn.Module) -> None:
        module.register_forward_hook(lambda *args: outputs.__setitem__(name, args[-1]))

    for number, block in enumerate(model.blocks):
        keep(f"block{number}_out", block)
    keep("t_emb", model.time_embed)
    keep("head_condition", model.to_head)
    x, t = reference()["inputs/x"], 1 - reference()["inputs/t"]
    close(-model(x, t, labels("inputs/y")).velocity, reference()["outputs/velocity"])
    known = {name.removeprefix("intermediate/") for name in reference() if name.startswith("intermediate/")}
    assert outputs.keys() == known and len(known) == 7
    for name, tensor in outputs.items():
        close(tensor, reference()[f"intermediate/{name}"])


def test_gradients():
    """Of the public network, so with its weights as they are and its time."""
    model, weights = ditdh_a(), published_weights("weights/")
    model.load_state_dict({name: weights[published_name(name)] for name in model.state_dict()})
    velocity = model(reference()["inputs/x"], reference()["inputs/t"], labels("inputs/y")).velocity
    (velocity * reference()["grad/weighting"]).sum().backward()
    norms = {published_name(name): parameter.grad.norm().item() for name, parameter in model.named_parameters()}
    assert norms == pytest.approx(SETTINGS["grad_norms"], rel=1e-4)


@torch.no_grad()
def test_losses_at_shifted_times():
    given = {name.removeprefix("loss/"): tensor for name, tensor in reference().items() if name.startswith("loss/")}
    t = path.times("lognormal", torch.logit(1 - given["times_before_shift"]), 1 / SHIFT)
    close(t, 1 - given["times"], 1e-6)
    x_t = path.interpolate(given["latents"], given["noise"], t)
    close(x_t, given["x_t"], 1e-6)
    target = path.velocity(given["latents"], given["noise"])
    close(-target, given["target"], 1e-6)
    velocity = ditdh_a()(x_t, t, labels("inputs/y")).velocity
    close(path.squared_error(velocity, target), given["per_sample"])


def sampler() -> Euler:
    """As the public sampler, which ends short of data."""
    return Euler(SETTINGS["sampling"]["num_steps"], shift=1 / SHIFT, end=SETTINGS["sampling"]["t1"])


def test_times_of_sampling():
    close(1 - sampler().times, reference()["sample/times"], 1e-6)


@torch.no_grad()
def test_unguided_samples():
    field = Guidance().field(ditdh_a(), labels("sample/labels"))
    close(sampler()(field, reference()["sample/noise"]), reference()["sample/unguided"])


def test_initialisation_is_the_published_one():
    torch.manual_seed(0)
    model = DiTDH(12, 4, 1, 3, 32, 4, 2, 64, 4, num_classes=6)
    expected = dict(SETTINGS["init"])
    close(model.position.std(), torch.tensor(expected.pop("pos_embed")["std"]))
    ours = {published_name(name): tensor for name, tensor in model.state_dict().items()}
    assert ours.keys() == expected.keys()
    for name, tensor in ours.items():
        few = tensor.numel() < 200  # of which a standard deviation tells little
        assert tensor.std().item() == pytest.approx(expected[name]["std"], rel=0.3 if few else 0.1), name
        spread = expected[name]["std"] / tensor.numel() ** 0.5
        assert tensor.mean().item() == pytest.approx(expected[name]["mean"], abs=6 * spread), name


@pytest.mark.parametrize(("size", "parameters"), [("XL", 838_675_796), ("S", 196_455_764)])
def test_every_full_size_key_is_taken_and_given_back(size: str, parameters: int):
    official = OFFICIAL[f"DiTDH-{size}"]
    with torch.device("meta"):
        weights = {name: torch.empty(shape) for name, shape in official["state"].items()}
        model = denoiser_from_published(weights, official["config"])
        named = DiTDH.of_size(f"{size}/1")
    assert shapes(to_published(model)) == shapes(weights)
    assert shapes(model.state_dict()) == shapes(named.state_dict())
    trained = sum(parameter.numel() for parameter in model.parameters())
    assert trained == official["trainable"]
    assert trained + model.position.numel() + len(model.time_embed.frequencies) == official["parameters"] == parameters


def shapes(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in tensors.items()}


def test_export_gives_the_published_weights_back():
    exported, weights = to_published(ditdh_a()), published_weights("weights/")
    assert exported.keys() == weights.keys()
    for name, weight in weights.items():
        if name in TABLES or name == "t_embedder.mlp.0.weight":  # which is turned in time, and back
            close(exported[name], weight, 1e-6)
        else:
            assert torch.equal(exported[name], weight), name
