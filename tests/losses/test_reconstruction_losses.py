from pathlib import Path
from types import SimpleNamespace

import lpips
import pytest
import torch
from torchvision import models
from torchvision.models.vgg import cfgs, make_layers

from vfm_vae.checkpoints import read_weights
from vfm_vae.losses.reconstruction import LPIPSLoss, SSIMLoss, VFMPerceptualLoss, l1, l2, multi_resolution_l1
from vfm_vae.vfm import FrozenVFM

VFM = {"name": "vit_photos_patch8_64", "layers": (2, -1), "pretrained": False}


def test_pixel_losses_do_not_clamp():
    images, target = torch.full((1, 3, 4, 4), 3.0), torch.full((1, 3, 4, 4), 1.0)
    assert l1(images, target).item() == 2
    assert l2(images, target).item() == 4


def test_ssim_of_equal_images_is_zero_and_clamps():
    images = torch.rand(2, 3, 24, 24) * 4 - 2
    assert SSIMLoss()(images, images.clamp(-1, 1)).item() == pytest.approx(0, abs=1e-6)
    assert SSIMLoss()(images, torch.rand_like(images)).item() > 0.5


def test_ssim_is_float32_under_autocast():
    images, target = torch.rand(2, 3, 16, 16), torch.rand(2, 3, 16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        loss = SSIMLoss()(images.bfloat16().float(), target)
    assert torch.equal(loss, SSIMLoss()(images.bfloat16().float(), target))


def test_multi_resolution_l1_sums_over_resolutions():
    target = torch.full((2, 3, 32, 32), 0.5)
    multiscale = [torch.zeros(2, 3, 8, 8, requires_grad=True), torch.ones(2, 3, 16, 16, dtype=torch.bfloat16)]
    loss = multi_resolution_l1(multiscale, target, "bilinear")
    assert loss.item() == pytest.approx(1.0)
    loss.backward()
    assert multiscale[0].grad.abs().sum() == pytest.approx(1.0)


@pytest.fixture(autouse=True)
def features_alone(monkeypatch):
    """LPIPS takes the features of a VGG-16; drawing the classifier's weights would take seconds."""
    monkeypatch.setattr(models, "vgg16", lambda pretrained: SimpleNamespace(features=make_layers(cfgs["D"], False)))


def test_lpips_is_frozen_and_passes_gradients_to_the_images(vgg_file):
    loss = LPIPSLoss(weights=vgg_file).train()
    assert not list(loss.parameters())
    assert not loss.state_dict()
    assert not any(module.training for module in loss.network.modules())
    assert not any(parameter.requires_grad for parameter in loss.network.parameters())
    images = (torch.rand(2, 3, 32, 32) * 2 - 1).requires_grad_()
    target = torch.rand(2, 3, 32, 32) * 2 - 1
    assert loss(target, target).item() == 0
    value = loss(images, target)
    value.backward()
    assert value.item() > 0
    assert images.grad.abs().sum() > 0


def test_lpips_reads_the_weights_it_is_given(vgg_file):
    network = LPIPSLoss(weights=vgg_file).network
    state = torch.load(vgg_file)
    assert torch.equal(network.net.slice1[0].weight, state["features.0.weight"])
    assert torch.equal(network.net.slice5[-2].weight, state["features.28.weight"])


def test_lpips_without_weights_says_what_to_do(tmp_path, monkeypatch):
    with pytest.raises(
        ValueError, match=r"weights: there is no file '.*nowhere.pth'; give the file of VGG-16, for"
    ) as caught:
        LPIPSLoss(weights=str(tmp_path / "nowhere.pth"))
    assert "\n" not in str(caught.value)

    def no_network(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.download_url_to_file", no_network)
    with pytest.raises(
        ValueError, match=r"VGG-16, for LPIPS could not be downloaded \(no network\).*checkpoints/vgg16"
    ):
        LPIPSLoss()


@pytest.mark.parametrize("kind", ["unrelated", "half", "but one", "other shape", "list", "cut"])
def test_lpips_takes_every_tensor_or_none(vgg_file, tmp_path, kind):
    state = torch.load(vgg_file)
    contents = {
        "unrelated": {"other": torch.zeros(1)},
        "half": dict(list(state.items())[::2]),
        "but one": {name: values for name, values in state.items() if name != "features.12.weight"},
        "other shape": state | {"features.0.weight": torch.zeros(64, 1, 3, 3)},
        "list": [1, 2],
        "cut": state,
    }
    path = tmp_path / "vgg.pth"
    torch.save(contents[kind], path)
    if kind == "cut":
        path.write_bytes(path.read_bytes()[:10_000_000])
    with pytest.raises(ValueError, match=r"^weights: '.*vgg\.pth' .*give the file of .*vgg16") as error:
        LPIPSLoss(weights=str(path))
    assert "\n" not in str(error.value)


def test_lpips_linear_heads_come_from_the_package_all_of_them(vgg_file, tmp_path, monkeypatch):
    network = LPIPSLoss(weights=vgg_file).network
    heads = read_weights(Path(lpips.__file__).parent / "weights/v0.1/vgg.pth", "lpips")
    assert len(heads) == 5
    for name, values in heads.items():
        assert torch.equal(network.get_parameter(name), values)
    (tmp_path / "weights/v0.1").mkdir(parents=True)
    torch.save(dict(list(heads.items())[:4]), tmp_path / "weights/v0.1/vgg.pth")
    monkeypatch.setattr(lpips, "__file__", str(tmp_path / "__init__.py"))
    with pytest.raises(ValueError, match=r"^lpips: .* of 5 tensors 1 missing \['4\.model\.1\.weight'\]"):
        LPIPSLoss(weights=vgg_file)


def test_vfm_perceptual_loss_sees_the_first_argument_alone():
    loss = VFMPerceptualLoss(FrozenVFM(**VFM))
    assert not list(loss.parameters())
    assert not loss.state_dict()
    images = (torch.rand(2, 3, 64, 64) * 2 - 1).requires_grad_()
    target = (torch.rand(2, 3, 64, 64) * 2 - 1).requires_grad_()
    assert loss(target, target).item() == pytest.approx(0, abs=1e-6)
    value = loss(images, target)
    value.backward()
    assert 0 < value.item() <= 4
    assert images.grad.abs().sum() > 0
    assert target.grad is None


def test_vfm_perceptual_loss_is_the_mean_squared_chord():
    loss = VFMPerceptualLoss(VFM)
    images, target = torch.rand(1, 3, 64, 64), -torch.rand(1, 3, 64, 64)
    pairs = zip(loss.vfm(images).layers, loss.vfm(target).layers, strict=True)
    cosines = [torch.cosine_similarity(a, b, dim=-1).mean() for a, b in pairs]
    assert len(cosines) == 2
    assert loss(images, target).item() == pytest.approx((2 - 2 * torch.stack(cosines).mean()).item(), rel=1e-4)
