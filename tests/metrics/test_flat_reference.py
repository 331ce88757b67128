"""References whose images lie in one folder, without classes, as COCO's do."""

import json
import shutil

import numpy as np
import pytest
import torch

from vfm_vae.data.folder import ImageFolderDataset
from vfm_vae.data.identity import names_digest
from vfm_vae.data.transforms import CentreCrop
from vfm_vae.images import from_uint8
from vfm_vae.metrics import reference as module
from vfm_vae.metrics.reference import ReferenceImages
from vfm_vae.vfm import FrozenVFM

VFM = "vit_photos_patch8_64"


@pytest.fixture(scope="module")
def vfm():
    return FrozenVFM(VFM)


@pytest.fixture
def flat(photos, tmp_path):
    """A photograph of each class side by side, and what a system puts there."""
    folder = tmp_path / "flat"
    folder.mkdir()
    for place in sorted((photos / "val").iterdir()):
        shutil.copy(next(place.iterdir()), folder / f"{place.name}.png")
    (folder / ".thumbnails").mkdir()
    shutil.copy(folder / f"{place.name}.png", folder / ".thumbnails/small.png")
    return folder


def source_of(file):
    with np.load(file) as arrays:
        return json.loads(str(arrays["source"])), arrays["arr_0"]


def test_a_flat_folder_is_measured_once(vfm, flat, monkeypatch):
    with pytest.warns(UserWarning, match=r"left out in .*flat': 1 \.txt"):
        (flat / "licences.txt").touch()
        measured = ReferenceImages(str(flat), 64).load(vfm, with_features=True)
    source, images = source_of(flat.with_name(f"flat_64px_{VFM}.npz"))
    assert source["num_images"] == len(images) == 13
    features = vfm(from_uint8(torch.from_numpy(images).permute(0, 3, 1, 2))).pooled
    torch.testing.assert_close(measured.pool.mean, features.double().mean(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(measured.pool.covariance, features.double().T.cov(), rtol=1e-4, atol=1e-6)
    monkeypatch.setattr(module, "_measure", None)  # can't be called
    again = ReferenceImages(str(flat), 64).load(vfm, with_features=False)
    assert torch.equal(again.pool.mean, measured.pool.mean)


def test_a_folder_of_classes_is_read_as_ever(vfm, flat, tmp_path):
    """Also where some images lie beside the classes, and where their paths would sort otherwise than the classes do."""
    root = tmp_path / "root"
    for number, file in enumerate(sorted(flat.glob("*.png"))[:9]):
        place = root / "all" / ("", "a", "a b")[number // 3]
        place.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, place)
    with pytest.warns(UserWarning, match="3 images in no class folder"):
        ReferenceImages(str(root / "all"), 64).load(vfm, with_features=False)
        classes = ImageFolderDataset(root, "all", CentreCrop(64))
    source, images = source_of(root / f"all_64px_{VFM}.npz")
    assert source["num_images"] == 6 and source["names"] == names_digest(classes)
    assert np.array_equal(images[3].transpose(2, 0, 1), classes[3][0])


def test_a_damaged_image_is_named(vfm, flat):
    next(flat.glob("*.png")).write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"1 of the 13 images in .*flat' are damaged"):
        ReferenceImages(str(flat), 64).load(vfm, with_features=False)
