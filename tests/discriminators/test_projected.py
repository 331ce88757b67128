import pytest
import torch

from vfm_vae.discriminators.augment import DifferentiableAugmentation
from vfm_vae.discriminators.layers import LocalBatchNorm
from vfm_vae.discriminators.projected import ProjectedDiscriminator, layer_tokens, set_input_size
from vfm_vae.vit import create_vit

SMALL = {"backbone": "vit_photos_patch8_64", "pretrained": False, "size": 64, "layers": (0, 3, 6)}
TINY_DINO = "vit_small_patch16_224.dino"
NO_AUGMENTATION = DifferentiableAugmentation(0, 0, 0, 0, 0)


@pytest.fixture(scope="module")
def discriminator():
    torch.manual_seed(0)
    return ProjectedDiscriminator(**SMALL)


def test_logits_of_every_token_of_every_layer(discriminator):
    assert discriminator(torch.rand(2, 3, 64, 64) * 2 - 1).shape == (2, 3 * 64)


def test_only_heads_are_parameters_and_state(discriminator):
    for names in (dict(discriminator.named_parameters()), discriminator.state_dict()):
        assert all(name.startswith("heads.") for name in names)
    assert len(discriminator.heads) == 3
    assert not discriminator.train().backbone.network.training


def test_discriminator_loss_trains_the_heads_and_never_the_backbone(discriminator):
    discriminator.zero_grad()
    discriminator(torch.rand(2, 3, 64, 64)).mean().backward()
    assert all(parameter.grad is not None for parameter in discriminator.parameters())
    for parameter in discriminator.backbone.network.parameters():
        assert not parameter.requires_grad
        assert parameter.grad is None


def test_generator_loss_reaches_the_images_and_no_frozen_head(discriminator):
    discriminator.zero_grad()
    images = torch.rand(2, 3, 64, 64, requires_grad=True)
    discriminator.requires_grad_(False)
    discriminator(images).mean().neg().backward()
    discriminator.requires_grad_(True)
    assert images.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in discriminator.parameters())


def test_two_training_passes_before_one_backward(discriminator):
    real, generated = discriminator(torch.rand(2, 3, 64, 64)), discriminator(torch.rand(2, 3, 64, 64))
    (real.mean() - generated.mean()).backward()


def test_training_draws_and_evaluation_does_not(discriminator):
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        discriminator.eval()
        assert torch.equal(discriminator(images), discriminator(images))
        discriminator.train()
        assert not torch.allclose(discriminator(images), discriminator(images), atol=1e-3)


def test_heads_stay_in_float32_under_autocast(discriminator):
    discriminator.eval()
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits = discriminator(images)
    assert logits.dtype == torch.float32
    assert torch.allclose(logits, discriminator(images), atol=0.1)
    discriminator.train()


def test_larger_images_are_cropped_half_of_the_time():
    torch.manual_seed(0)
    discriminator = ProjectedDiscriminator(**SMALL, augmentation=NO_AUGMENTATION)
    images = torch.arange(80.0 * 96).view(1, 1, 80, 96).expand(1, 3, 80, 96)
    crops = [crop for crop in (discriminator._crop(images) for _ in range(400)) if crop.shape[-2:] == (64, 64)]
    assert 150 < len(crops) < 250
    corners = torch.stack([crop[0, 0, 0, 0] for crop in crops])
    assert (corners // 96).unique().tolist() == list(range(17))
    assert (corners % 96).min() == 0
    assert (corners % 96).max() == 32
    same_size = torch.rand(1, 3, 64, 64)
    assert all(discriminator._crop(same_size) is same_size for _ in range(10))
    for probability, side in ((0.0, 80), (1.0, 64)):
        discriminator.crop_probability = probability
        assert {discriminator._crop(images).shape[-2] for _ in range(10)} == {side}


def test_class_token_is_added_where_there_is_one():
    torch.manual_seed(0)
    # A random network is enough, with and without class token and registers.
    for name, prefix in (("vit_small_patch14_reg4_dinov2", 5), ("vit_photos_patch8_64", 0)):
        vit = create_vit(name, pretrained=False, img_size=28 if prefix else 64, depth=1).eval()
        inputs = torch.rand(1, 3, *vit.patch_embed.img_size)
        with torch.no_grad():
            tokens = vit.blocks[0](vit.norm_pre(vit._pos_embed(vit.patch_embed(inputs))))
            expected = tokens[:, prefix:] + (tokens[:, :1] if prefix else 0)
            assert torch.allclose(layer_tokens(vit, inputs, (1,))[0], expected.mT, atol=1e-5)


def test_gradients_and_layers_in_the_order_asked_for():
    vit = create_vit(TINY_DINO, pretrained=False, img_size=32, depth=2).eval()
    inputs = torch.rand(1, 3, 32, 32)
    forward, backward = layer_tokens(vit, inputs, (0, 1, 2)), layer_tokens(vit, inputs, (2, 1, 0))
    for tokens, same in zip(forward, reversed(backward), strict=True):
        assert torch.equal(tokens, same)
    assert not vit.blocks[0]._forward_pre_hooks
    assert not vit.blocks[0]._forward_hooks


def test_position_embedding_is_resized_bilinearly_and_prefix_kept():
    vit = create_vit(TINY_DINO, pretrained=False, depth=1)
    ramp = torch.arange(14.0).view(1, 14, 1, 1).expand(1, 14, 14, vit.embed_dim).flatten(1, 2)
    with torch.no_grad():
        vit.pos_embed.copy_(torch.cat([torch.full((1, 1, vit.embed_dim), -5.0), ramp], 1))
    set_input_size(vit, 112)
    assert vit.pos_embed.shape == (1, 1 + 49, vit.embed_dim)
    assert (vit.pos_embed[:, 0] == -5).all()
    rows = vit.pos_embed[0, 1:, 0].view(7, 7)[:, 0]
    assert torch.allclose(rows, torch.arange(7.0) * 2 + 0.5)  # the mean of the two rows around each centre


def test_local_batch_norm_normalises_groups_of_consecutive_samples():
    torch.manual_seed(0)
    norm = LocalBatchNorm(5, virtual_batch_size=4)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2)
        norm.bias.uniform_(-1, 1)
    x = torch.randn(12, 5, 7) * 3 + 1
    expected = torch.cat([norm(group) for group in x.split(4)])
    assert torch.allclose(norm(x), expected, atol=1e-5)
    plain = ((norm(x) - norm.bias[:, None]) / norm.weight[:, None]).view(3, 4, 5, 7)
    assert torch.allclose(plain.mean((1, 3)), torch.zeros(3, 5), atol=1e-5)
    assert torch.allclose(plain.var((1, 3), correction=0), torch.ones(3, 5), atol=1e-3)
    # Ten samples make three groups, which don't divide; three make one smaller group.
    with pytest.raises(ValueError, match=r"batch size: 10 .* 3 equal groups"):
        norm(torch.randn(10, 5, 7))
    assert norm(x[:3]).shape == (3, 5, 7)
    assert norm.eval()(torch.randn(8, 5, 3, 3)).shape == (8, 5, 3, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layers": (0, 7)}, "layers: .* 0 to 6, given"),
        ({"layers": (-1,)}, "layers: "),
        ({"layers": ()}, "layers: "),
        ({"size": 60}, "size: .*multiple of the 8-pixel"),
        ({"size": 8}, "size: 8 gives 1 tokens"),
        ({"backbone": "vit_photos_patch9_64"}, "backbone: .*vit_photos_patch9_64"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        ProjectedDiscriminator(**(SMALL | arguments))
