"""What checkpoints and caches say of a VFM: its class comes back, and another VFM is refused."""

import json

import pytest
import torch

from vfm_vae.vfm import FrozenVFM, check_vfm, vfm_from, vfm_identity


class ShiftedVFM(FrozenVFM):
    """A subclass with an argument of its own, and without most of the others."""

    def __init__(self, shift: float, layers: tuple[int, ...] = (-1,)):
        super().__init__("vit_photos_patch8_64", layers)
        self.shift = shift

    def prepare(self, images):
        """Another input."""
        return super().prepare(images) + self.shift


def test_a_subclass_comes_back_as_itself():
    vfm, images = ShiftedVFM(0.5, layers=(2, -1)), torch.rand(1, 3, 64, 64) * 2 - 1
    source = json.loads(json.dumps(vfm.source()))
    assert source["class_path"] == f"{__name__}.ShiftedVFM" and source["fingerprint"] == vfm.fingerprint()
    again = vfm_from(source)
    assert type(again) is ShiftedVFM and again.shift == 0.5 and again.layers == (2, -1)
    assert torch.equal(again(images).layers[0], vfm(images).layers[0])


def test_a_checkpoint_of_another_class_is_refused():
    plain, shifted = FrozenVFM("vit_photos_patch8_64"), ShiftedVFM(0.5)
    assert "class_path" not in vfm_identity(plain)
    with pytest.raises(
        ValueError, match=r"was trained on a \S+\.ShiftedVFM, but model.vfm is a vfm_vae.vfm.FrozenVFM;"
    ):
        check_vfm(plain, {"vfm": vfm_identity(shifted)})
    check_vfm(shifted, {"vfm": vfm_identity(shifted)})
    check_vfm(shifted, {"vfm": vfm_identity(plain)})  # formerly no class was named
    check_vfm(plain, {"vfm": vfm_identity(plain), "format_version": 2})
    with pytest.raises(
        ValueError, match=r"was trained on a vfm_vae\.vfm\.FrozenVFM, but model\.vfm is a \S+\.ShiftedVFM"
    ):
        check_vfm(shifted, {"vfm": vfm_identity(plain), "format_version": 2})


def test_a_checkpoint_of_another_interpolation_is_refused():
    name = "vit_photos_patch8_64"
    usual, bicubic = FrozenVFM(name), FrozenVFM(name, interpolation="bicubic")
    assert usual.interpolation == "bilinear" and "interpolation" not in vfm_identity(usual)
    with pytest.raises(ValueError, match=r"^model\.vfm\.interpolation: .* with 'bicubic', but it is 'bilinear'; give"):
        check_vfm(usual, {"vfm": vfm_identity(bicubic)})
    check_vfm(bicubic, {"vfm": vfm_identity(bicubic)})
    check_vfm(bicubic, {"vfm": vfm_identity(usual)})  # which says nothing of it
