"""The discriminators' parts and their losses against published reference tensors, in float32.

Two sets: in the second, images are resized bicubically and there is no vision transformer.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from timm.models import VisionTransformer
from torch import nn

from vfm_vae.discriminators.patchgan import PatchGAN
from vfm_vae.discriminators.projected import DiscriminatorHead, ProjectedDiscriminator, layer_tokens, set_input_size
from vfm_vae.losses.adversarial import (
    feature_matching_loss,
    hinge_discriminator_loss,
    hinge_generator_loss,
    least_squares_discriminator_loss,
    least_squares_generator_loss,
)
from vfm_vae.published import opponents_from_published

SETS = {name: load_file(Path(__file__).parent / "data" / f"discriminator_{name}.safetensors") for name in "ab"}
PATCHGAN = load_file(Path(__file__).parent / "data" / "patchgan_b.safetensors")


def select(reference: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): value for name, value in reference.items() if name.startswith(prefix)}


def check(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.fixture(params=SETS)
def reference(request):
    return SETS[request.param]


@pytest.fixture
def head(reference):
    head = DiscriminatorHead(width=32)
    head.load_state_dict(select(reference, "weights/head/"))  # published names and ours are the same
    return head


@torch.no_grad()
def test_head_in_eval_mode_uses_the_stored_spectral_norm(reference, head):
    head.eval()
    tokens = reference["input/head/input_b8"]
    check(head.main(tokens), reference["output/head/main_eval_b8"])
    check(head(tokens), reference["output/head/output_eval_b8"])
    check(head(reference["input/head/input_b16"]), reference["output/head/output_eval_b16"])


@torch.no_grad()
def test_head_in_training_mode_iterates_once(reference, head):
    check(head.train()(reference["input/head/input_b8"]), reference["output/head/output_train_b8"])
    after = select(reference, "output/head/after_train_forward.")
    assert len(after) == 6
    for name, expected in after.items():
        check(head.state_dict()[name], expected)


@torch.no_grad()
def test_tokens_of_a_vision_transformer_of_another_size():
    reference = SETS["a"]
    vit = VisionTransformer(img_size=32, patch_size=16, embed_dim=24, depth=5, num_heads=3, mlp_ratio=2, num_classes=0)
    vit.load_state_dict(select(reference, "weights/vit/"), strict=False)
    set_input_size(vit.eval(), 48)
    features = layer_tokens(vit, reference["input/vit/input"], layers=(1, 2, 4, 5, 0))
    for i, tokens in enumerate(features):
        check(tokens, reference[f"output/vit/features.{i}"])


@pytest.mark.parametrize("size", ["large", "small"])
@pytest.mark.parametrize(("name", "interpolation"), [("a", "bilinear"), ("b", "bicubic")])
def test_preparation_of_images(name, interpolation, size):
    backbone = "vit_small_patch16_224.dino"  # for its mean and std
    discriminator = ProjectedDiscriminator(
        backbone, pretrained=False, size=32, layers=(0,), interpolation=interpolation
    )
    prepared = discriminator.prepare(SETS[name][f"input/preprocess/{size}"])
    check(prepared, SETS[name][f"output/preprocess/{size}_out"])


def test_hinge_losses(reference):
    real, generated = reference["input/loss/stylegan_real"], reference["input/loss/stylegan_fake"]
    loss_real, loss_generated = hinge_discriminator_loss(real, generated)
    check(loss_real, reference["output/loss/stylegan_disc_real"])
    check(loss_generated, reference["output/loss/stylegan_disc_fake"])
    check(hinge_generator_loss(generated), reference["output/loss/stylegan_gen"])


def test_published_size_of_the_heads():
    head = DiscriminatorHead(width=384)
    assert sum(parameter.numel() for parameter in head.parameters()) == 1_477_249
    assert isinstance(head.main[1].fn[0], nn.Conv1d)


def scales_of(reference: dict[str, torch.Tensor], prefix: str) -> list[list[torch.Tensor]]:
    """Outputs by scale and layer; the full size is scale 0 here."""
    return [[reference[f"{prefix}.scale{scale}.layer{layer}"] for layer in range(5)] for scale in range(3)]


def test_patchgan():
    patchgan = PatchGAN(base_channels=4)
    weights = select(PATCHGAN, "weights/patchgan/")
    published = {f"patchgan_discriminator.{name}": tensor for name, tensor in weights.items()}
    patchgan.load_state_dict(select(opponents_from_published(published), "patchgan."))
    images = PATCHGAN["input/patchgan/input_b16"].clone().requires_grad_()
    outputs = patchgan(images)
    expected = scales_of(PATCHGAN, "output/patchgan/output_b16")
    assert [len(layers) for layers in outputs] == [5, 5, 5]
    for layers, expected_layers in zip(outputs, expected, strict=True):
        for actual, value in zip(layers, expected_layers, strict=True):
            check(actual.detach(), value)
    sum(layers[-1].mean() for layers in outputs).backward()
    check(images.grad.norm(), PATCHGAN["output/patchgan/input_grad_norm_b16"], 1e-4)


@pytest.mark.parametrize(
    ("loss", "discriminator_loss", "generator_loss"),
    [
        ("mse", least_squares_discriminator_loss, least_squares_generator_loss),
        ("hinge", hinge_discriminator_loss, hinge_generator_loss),
    ],
)
def test_losses_of_several_scales(loss, discriminator_loss, generator_loss):
    real, generated = (
        [layers[-1] for layers in scales_of(PATCHGAN, f"input/loss/{kind}")] for kind in ("real", "fake")
    )
    loss_real, loss_generated = discriminator_loss(real, generated)
    check(loss_real, PATCHGAN[f"output/loss/patchgan_{loss}.disc_real"])
    check(loss_generated, PATCHGAN[f"output/loss/patchgan_{loss}.disc_fake"])
    check(generator_loss(generated), PATCHGAN[f"output/loss/patchgan_{loss}.gen"])


def test_feature_matching():
    real, generated = (scales_of(PATCHGAN, f"input/loss/{kind}") for kind in ("real", "fake"))
    check(feature_matching_loss(real, generated), PATCHGAN["output/loss/feature_matching"])
