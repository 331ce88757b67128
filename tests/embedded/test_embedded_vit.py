import pytest
import timm
import torch

from vfm_vae.embedded import evaluate, photos
from vfm_vae.embedded.pretrain import CropSampler, Pretraining, jitter, patch_places
from vfm_vae.embedded.vit import WEIGHTS

NAME = "vit_photos_patch8_64"


@pytest.fixture(scope="module")
def vit():
    return timm.create_model(NAME, pretrained=True).eval()


@pytest.fixture(scope="module")
def features(vit, tmp_path_factory):
    root = photos.write_photos(tmp_path_factory.mktemp("data") / "photos", train_per_class=100)
    return tuple(evaluate.extract(vit.forward_features, root, split) for split in ("train", "val"))


def test_weights_are_small_and_become_float32(vit):
    assert WEIGHTS.stat().st_size <= 6 * 2**20
    assert {parameter.dtype for parameter in vit.parameters()} == {torch.float32}
    assert 1e6 < sum(parameter.numel() for parameter in vit.parameters()) < 3e6
    assert timm.create_model(NAME).patch_embed.proj.weight.ne(vit.patch_embed.proj.weight).any()


@pytest.mark.slow
def test_features_say_class_place_and_scale(features):
    numbers = evaluate.measure(*features)
    assert numbers["probe_top1"] >= 0.9
    assert numbers["neighbour_top1"] >= 0.85
    assert numbers["place_r2"] >= 0.7
    assert numbers["scale_r2"] >= 0.25
    assert numbers["place_r2_held_out"] >= 0.05
    assert numbers["within_variance"] >= 0.25
    assert numbers["neighbour_distance"] <= 0.9


def test_tokens_and_pooled_feature(vit):
    images = torch.randn(2, 3, 64, 64)
    tokens = vit.forward_features(images)
    assert tokens.shape == (2, 64, 128)
    assert vit.num_prefix_tokens == 0
    torch.testing.assert_close(vit(images), tokens.mean(1))
    layers = []
    hook = vit.norm.register_forward_hook(lambda module, inputs, output: layers.append(output))
    vit.forward_features(images)
    hook.remove()
    torch.testing.assert_close(layers[0], tokens)  # the final norm is the last thing that happens to the tokens


def test_dynamic_image_size(vit):
    dynamic = timm.create_model(NAME, pretrained=True, dynamic_img_size=True).eval()
    images = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(dynamic.forward_features(images), vit.forward_features(images))
    assert dynamic.forward_features(torch.randn(1, 3, 48, 96)).shape == (1, 72, 128)


def test_patch_places_of_a_mirrored_crop():
    boxes = torch.tensor([[-1.0, -1.0, 1.0, 1.0], [-1.0, -1.0, 1.0, 1.0], [0.0, 0.2, 0.4, 0.6]])
    where = patch_places(boxes, 2, torch.tensor([False, True, False]))
    torch.testing.assert_close(where[0, :, :2], torch.tensor([[-0.5, -0.5], [0.5, -0.5], [-0.5, 0.5], [0.5, 0.5]]))
    torch.testing.assert_close(where[1, :, :2], torch.tensor([[0.5, -0.5], [-0.5, -0.5], [0.5, 0.5], [-0.5, 0.5]]))
    torch.testing.assert_close(where.mean(1), evaluate.place_of(boxes))
    torch.testing.assert_close(where[2, :, 2], torch.zeros(4))  # a fifth of the photograph is as large as a tile


def test_pretraining_learns():
    torch.manual_seed(0)
    sampler = CropSampler(seed=0)
    model = Pretraining(timm.create_model(NAME, depth=1), len(photos.PHOTOS))
    images, labels, boxes = sampler(16)
    images = jitter(images / 127.5 - 1)
    assert images.abs().max() <= 1
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    totals = []
    for _ in range(20):
        losses = model(images, labels, boxes)
        total = sum(losses.values())
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        totals.append(total.item())
    assert set(losses) == {"pixels", "place", "class"}
    assert totals[-1] < 0.5 * totals[0]
    assert model.mask_token.grad.abs().sum() > 0
