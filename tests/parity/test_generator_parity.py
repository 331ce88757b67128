"""The tokenizer against two small generators of the public implementation, value by value, in float32."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from vfm_vae.discriminators.patchgan import PatchGAN
from vfm_vae.discriminators.projected import DiscriminatorHead
from vfm_vae.losses.alignment import adaptive_weight, pool_tokens, vf_loss
from vfm_vae.published import opponents_from_published, tokenizer_from_published, tokenizer_to_published
from vfm_vae.published_names import tokenizer_names

DATA = Path(__file__).parent / "data"
# Relative to the largest absolute reference value; the formulas leave 2e-5, gradient norms 3e-4.
TOLERANCE, GRADIENT_TOLERANCE = 2e-5, 3e-4
KEYS = json.loads((DATA / "tokenizer_keys.json").read_text())
FIXED = ("blur_weight", "zero_k_bias")  # constants, which are made anew


class Case:
    """One generator: weights, inputs and outputs."""

    def __init__(self, name: str):
        tensors = load_file(DATA / f"{name}.safetensors")
        self.info = json.loads((DATA / f"{name}.json").read_text())
        self.weights = {k.removeprefix("weights/"): v for k, v in tensors.items() if k.startswith("weights/")}
        self.inputs = {k.removeprefix("input/"): v for k, v in tensors.items() if k.startswith("input/")}
        self.output = {k.removeprefix("output/"): v for k, v in tensors.items() if k.startswith("output/")}
        self.features = [self.inputs[f"patch_features.{i}"] for i in range(3)]
        layers = self.info["config"]["patch_from_layers"]
        self.final_tokens = self.features[layers.index(-1)]
        self.model = tokenizer_from_published(self.weights, self.info["config"])

    def check(self, actual: torch.Tensor, name: str, tolerance: float = TOLERANCE) -> None:
        expected = self.output[name]
        assert actual.shape == expected.shape, name
        error = (actual - expected).abs().max() / expected.abs().max()
        assert error <= tolerance, f"{name}: relative error {error:.2e}"

    def vf_map(self) -> torch.Tensor:
        side = self.info["patch_grids"][0]
        return pool_tokens(self.final_tokens, (side, side), tuple(self.info["latent_grid"]))

    def vf_loss(self, z: torch.Tensor) -> torch.Tensor:
        return vf_loss(self.model.adapter.align(z), self.vf_map())[0]


@pytest.fixture(params=["tiny_generator_a", "tiny_generator_b"])
def case(request: pytest.FixtureRequest) -> Case:
    return Case(request.param)


@torch.no_grad()
def test_encoding_and_decoding(case: Case):
    model = case.model
    posterior = model.encode_features(case.features)
    case.check(posterior.mean, "mean")
    case.check(posterior.logvar, "logvar")
    case.check(posterior.kl().mean(), "kl_loss")
    z = posterior.mode()
    case.check(z, "z")
    case.check(model.adapter.decode(z), "post_quant")
    case.check(model.decoder.mapping(model.adapter.decode(z)), "w")
    case.check(model.adapter.align(z), "linear_proj_z")
    case.check(case.vf_loss(z), "vf_loss")
    decoded = model.decode(z)
    case.check(decoded.image, "image")
    for i, image in enumerate(decoded.multiscale):
        case.check(image, f"multiscale.{i}")
    assert [image.shape[2] for image in decoded.multiscale] == case.info["block_resolutions"][:-1]


@torch.no_grad()
def test_sampling(case: Case):
    z = case.model.encode_features(case.features).sample(case.inputs["eps"])
    case.check(z, "sampled.z")
    case.check(case.vf_loss(z), "sampled.vf_loss")


@torch.no_grad()
def test_transformed_latent(case: Case):
    case.check(case.model.decode(case.output["eq.z"]).image, "eq.image")


@torch.no_grad()
def test_global_latent(case: Case):
    model = case.model
    latent = model.adapter.decode(case.output["z"])
    case.check(model.decoder.mapping(latent, truncation=0.7), "w_truncated_0.7")
    model.decoder.mapping.train()(latent)
    case.check(model.decoder.mapping.average, "x_avg_after_one_training_forward")


def test_gradient_of_latent(case: Case):
    z = case.output["z"].clone().requires_grad_()
    image = case.model.decode(z).image
    for name, value in {"mean": image.mean(), "sqmean": image.square().mean()}.items():
        (gradient,) = torch.autograd.grad(value, z, retain_graph=True)
        case.check(gradient, f"grad_z_of_image_{name}", 1e-4)


def test_adaptive_weight(case: Case):
    z = case.model.encode_features(case.features).mode()
    reconstruction = (case.model.decode(z).image - case.inputs["target_image"]).abs().mean()
    weight = adaptive_weight(reconstruction, case.vf_loss(z), case.model.adapter.last_encoding_weight)
    case.check(5.0 * weight, "adaptive_vf_weight", GRADIENT_TOLERANCE)
    case.check(reconstruction.detach(), "rec_l1")


def test_gradient_norm_of_every_parameter(case: Case):
    model = case.model
    posterior = model.encode_features(case.features)
    z = posterior.mode()
    decoded = model.decode(z)
    loss = decoded.image.square().mean() + sum(image.square().mean() for image in decoded.multiscale)
    loss = loss + case.vf_loss(z) + 1e-3 * posterior.kl().mean()
    case.check(loss.detach(), "combined_loss", 1e-5)
    loss.backward()
    norms = {
        name.removeprefix("param_grad_norm/"): value.clone()
        for name, value in case.output.items()
        if name.startswith("param_grad_norm/")
    }
    expected = {
        n: torch.stack([norms[part] for part in tokenizer_names(n)]).norm() for n, _ in model.named_parameters()
    }
    largest = max(expected.values())
    for name, parameter in model.named_parameters():
        norm = parameter.grad.norm()
        error = abs(norm - expected[name]) / max(expected[name], 1e-6 * largest)
        assert error <= 1e-3, f"{name}: {norm:.4e}, expected {expected[name]:.4e}"


@pytest.mark.parametrize("name", ["tiny_generator_a", "tiny_generator_b"])
def test_weights_come_back_bit_by_bit(name: str):
    case = Case(name)
    back = tokenizer_to_published(case.model)
    assert back.keys() == case.weights.keys()
    assert all(torch.equal(back[n], tensor) for n, tensor in case.weights.items() if n.rpartition(".")[2] not in FIXED)
    assert all(torch.allclose(back[n], tensor) for n, tensor in case.weights.items())


@pytest.mark.parametrize("legacy", [True, False])
def test_every_full_size_key_is_taken_and_given_back(legacy: bool):
    names = KEYS["legacy_true"] if legacy else KEYS["legacy_false"]
    with torch.device("meta"):
        weights = {name: torch.empty(KEYS["legacy_true"][name]) for name in names}
        frozen = {"vfm_encoder.model.weight": torch.empty(3)}
        model = tokenizer_from_published(weights | frozen, KEYS["config"] | {"legacy": legacy})
    assert sum(p.numel() for p in model.parameters()) == KEYS["parameters"][f"legacy_{str(legacy).lower()}"]
    back = tokenizer_to_published(model)
    assert {name: list(tensor.shape) for name, tensor in back.items()} == {n: KEYS["legacy_true"][n] for n in names}


@pytest.mark.parametrize("variant", ["patchgan_with_features", "patchgan_without_features"])
def test_every_full_size_discriminator_key_is_taken(variant: str):
    names = KEYS["heads"] | KEYS[variant]
    weights = {name: torch.empty(shape, device="meta") for name, shape in names.items()}
    opponents = opponents_from_published(weights | {"dino.norm.weight": torch.empty(384)})
    with torch.device("meta"):
        expected = {f"patchgan.{name}": tensor for name, tensor in PatchGAN().state_dict().items()}
        for i in range(5):
            head = DiscriminatorHead(384).state_dict()
            expected |= {f"discriminator.heads.{i}.{name}": tensor for name, tensor in head.items()}
    assert {n: t.shape for n, t in opponents.items()} == {n: t.shape for n, t in expected.items()}
    with pytest.raises(ValueError, match=r"left over \['heads\.0\.unknown'\]"):
        opponents_from_published(weights | {"heads.0.unknown": torch.empty(3)})
    with pytest.raises(ValueError, match=r"missing \['heads\.4\.cls\.bias'\]"):
        opponents_from_published({n: tensor for n, tensor in weights.items() if n != "heads.4.cls.bias"})
