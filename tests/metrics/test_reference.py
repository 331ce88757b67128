"""References from folders and files: measured once, used again, refused where they don't fit."""

import json
import os
import shutil
import time

import numpy as np
import pytest
import torch
from PIL import Image

from vfm_vae.data.archive import write_archive
from vfm_vae.data.folder import ImageFolderDataset
from vfm_vae.data.transforms import CentreCrop
from vfm_vae.images import from_uint8
from vfm_vae.metrics import reference as module
from vfm_vae.metrics.reference import ReferenceImages, extract, name_of
from vfm_vae.metrics.suite import DistributionSuite
from vfm_vae.vfm import FrozenVFM

VFM = "vit_photos_patch8_64"


@pytest.fixture(scope="module")
def vfm():
    return FrozenVFM(VFM)


@pytest.fixture
def folder(photos, tmp_path):
    shutil.copytree(photos / "val", tmp_path / "real")
    return tmp_path / "real"


def images_of(folder):
    dataset = ImageFolderDataset(folder.parent, folder.name, CentreCrop(64))
    return torch.stack([dataset[i][0] for i in range(len(dataset))])


def test_a_folder_is_measured_once(vfm, folder, monkeypatch):
    images = images_of(folder)
    features = vfm(from_uint8(images)).pooled
    measured = ReferenceImages(str(folder), 64).load(vfm, with_features=True)
    torch.testing.assert_close(measured.pool.mean, features.double().mean(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(measured.pool.covariance, features.double().T.cov(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(measured.features, features, rtol=1e-4, atol=1e-5)
    assert measured.spatial is None

    saved = folder.with_name(f"real_64px_{VFM}.npz")
    with np.load(saved) as arrays:
        assert {"arr_0", "mu", "sigma", "source"} == set(arrays)
        assert (arrays["arr_0"] == images.permute(0, 2, 3, 1).numpy()).all()
    monkeypatch.setattr(module, "_measure", None)  # can't be called
    again = ReferenceImages(str(folder), 64).load(vfm, with_features=False)
    assert torch.equal(again.pool.mean, measured.pool.mean) and again.features is None
    from_file = ReferenceImages(str(saved)).load(vfm, with_features=True)
    assert torch.equal(from_file.pool.covariance, measured.pool.covariance)


def test_a_folder_that_changed_is_measured_again(vfm, folder):
    first = ReferenceImages(str(folder), 64).load(vfm, with_features=False)
    next(folder.glob("*/*")).unlink()
    second = ReferenceImages(str(folder), 64).load(vfm, with_features=False)
    assert not torch.equal(first.pool.mean, second.pool.mean)
    features = vfm(from_uint8(images_of(folder))).pooled.double()
    torch.testing.assert_close(second.pool.mean, features.mean(0), rtol=1e-5, atol=1e-6)


@pytest.fixture
def measurements(monkeypatch):
    """How often a folder was measured."""
    measure, calls = module._measure, []

    def count(*args):
        calls.append(args)
        return measure(*args)

    monkeypatch.setattr(module, "_measure", count)
    return calls


def replace(file, picture, times):
    """Other pixels under the same name, in as many bytes; with former times, as `cp -p` leaves them."""
    size = file.stat().st_size
    Image.fromarray(picture).save(file, "JPEG", quality=20)
    with open(file, "ab") as content:
        content.write(b"\0" * (size - content.tell()))
    assert file.stat().st_size == size
    if times is not None:
        os.utime(file, ns=times)


@pytest.mark.parametrize("former", [False, True])
def test_other_images_under_the_same_names_and_sizes_are_measured_again(vfm, folder, measurements, former):
    """Once; `former` statistics, which do not say the files' times, are held to being newer than all of them."""
    saved = folder.with_name(f"real_64px_{VFM}.npz")
    first = ReferenceImages(str(folder), 64).load(vfm, with_features=False)
    if former:
        forget(saved, "files")
    ReferenceImages(str(folder), 64).load(vfm, with_features=False)
    assert len(measurements) == 1
    file = sorted(folder.glob("*/*"))[0]
    times = (file.stat().st_atime_ns, file.stat().st_mtime_ns) if former else None
    time.sleep(0.01)
    replace(file, np.zeros((64, 64, 3), np.uint8), times)
    second = ReferenceImages(str(folder), 64).load(vfm, with_features=False)
    ReferenceImages(str(folder), 64).load(vfm, with_features=False)
    assert len(measurements) == 2
    assert not torch.equal(first.pool.mean, second.pool.mean)
    features = vfm(from_uint8(images_of(folder))).pooled.double()
    torch.testing.assert_close(second.pool.mean, features.mean(0), rtol=1e-5, atol=1e-6)


def test_remeasure_insists(vfm, folder, measurements):
    for remeasure, times in ((False, 1), (False, 1), (True, 2), (True, 3)):
        ReferenceImages(str(folder), 64, remeasure=remeasure).load(vfm, with_features=False)
        assert len(measurements) == times
    saved = folder.with_name(f"real_64px_{VFM}.npz")
    saved.write_bytes(saved.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"^statistics: '.*' is no \.npz file: it is cut short"):
        ReferenceImages(str(folder), 64).load(vfm, with_features=False)
    ReferenceImages(str(folder), 64, remeasure=True).load(vfm, with_features=False)


def test_what_can_not_be_stored_is_said_before_anything_is_measured(vfm, folder, measurements, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"^statistics: can't write '.*here\.npz'"):
        ReferenceImages(str(folder), 64, str(tmp_path / "file/here.npz")).load(vfm, with_features=False)
    np.savez(tmp_path / "theirs.npz", mu=np.zeros(3))
    theirs = (tmp_path / "theirs.npz").read_bytes()
    with pytest.raises(ValueError, match=r"^statistics: '.*' was made elsewhere and would be overwritten"):
        ReferenceImages(str(folder), 64, str(tmp_path / "theirs.npz")).load(vfm, with_features=False)
    assert (tmp_path / "theirs.npz").read_bytes() == theirs
    usage = type(shutil.disk_usage("/"))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9 - 1000, 1000))
    with pytest.raises(ValueError, match=r"^statistics: can't write '.*' \(.*; give another place"):
        ReferenceImages(str(folder), 64).load(vfm, with_features=False)
    assert not measurements


def test_another_input_scale_has_statistics_of_its_own(vfm, folder):
    scaled = FrozenVFM(VFM, input_scale=0.5)
    saved = folder.with_name(f"real_64px_{VFM}.npz")
    by_hand = scaled(from_uint8(images_of(folder))).pooled.double()
    measured = ReferenceImages(str(folder), 64).load(vfm, with_features=False)
    from_file = ReferenceImages(str(saved)).load(scaled, with_features=False)  # of its images, as another network's
    again = ReferenceImages(str(folder), 64).load(scaled, with_features=False)
    for reference in (from_file, again):
        assert not torch.allclose(reference.pool.mean, measured.pool.mean, rtol=1e-2)
        torch.testing.assert_close(reference.pool.mean, by_hand.mean(0), rtol=1e-5, atol=1e-6)


SEEN_OTHERWISE = {"antialias_positions": True, "precision": "float32", "antialias": True, "input_scale": 0.5}


@pytest.mark.parametrize("option", SEEN_OTHERWISE)
def test_a_vfm_that_sees_images_otherwise_has_statistics_of_its_own(folder, option, monkeypatch):
    saved = folder.with_name(f"real_64px_{VFM}.npz")
    scaled = {"input_scale": 0.75, "antialias": False}  # so that each option matters
    first, other = FrozenVFM(VFM, **scaled), FrozenVFM(VFM, **scaled | {option: SEEN_OTHERWISE[option]})
    measured = ReferenceImages(str(folder), 64).load(first, with_features=False)
    from_file = ReferenceImages(str(saved)).load(other, with_features=False)  # of its images, as another network's
    again = ReferenceImages(str(folder), 64).load(other, with_features=False)
    by_hand = other(from_uint8(images_of(folder))).pooled.double()
    for reference in (from_file, again):
        torch.testing.assert_close(reference.pool.mean, by_hand.mean(0), rtol=1e-5, atol=1e-6)
    same = torch.equal(again.pool.mean, measured.pool.mean)
    assert same == (option == "precision")  # which is of CUDA alone
    with np.load(saved) as arrays:
        assert json.loads(str(arrays["source"]))[option] == SEEN_OTHERWISE[option]
    monkeypatch.setattr(module, "_measure", None)  # can't be called
    ReferenceImages(str(folder), 64).load(other, with_features=False)


def forget(path, *options):
    """Takes from a file's source what older ones don't say."""
    with np.load(path) as arrays:
        kept = dict(arrays)
    source = json.loads(str(kept["source"]))
    kept["source"] = np.array(json.dumps({name: value for name, value in source.items() if name not in options}))
    np.savez(path, **kept)


def test_older_statistics_are_of_vfms_as_they_were(folder, monkeypatch):
    scaled = {"input_scale": 0.75}
    before, now = FrozenVFM(VFM, antialias_positions=True, **scaled), FrozenVFM(VFM, **scaled)
    measured = ReferenceImages(str(folder), 64).load(before, with_features=False)
    forget(folder.with_name(f"real_64px_{VFM}.npz"), "antialias", "antialias_positions", "precision")
    with monkeypatch.context() as patch:
        patch.setattr(module, "_measure", None)  # can't be called
        again = ReferenceImages(str(folder), 64).load(before, with_features=False)
        assert torch.equal(again.pool.mean, measured.pool.mean)
    other = ReferenceImages(str(folder), 64).load(now, with_features=False)
    assert not torch.equal(other.pool.mean, measured.pool.mean)


def test_inception_refuses_statistics_of_others(vfm, folder, inception, tmp_path):
    ReferenceImages(str(folder), 64).load(vfm, with_features=False)
    with pytest.raises(ValueError, match=rf"^reference: the statistics in .* are of '{VFM}' .*not of Inception"):
        ReferenceImages(str(folder.with_name(f"real_64px_{VFM}.npz"))).load(inception, with_features=False)
    source = {"network": "inception", "fingerprint": "f" * 64}
    ours = source | {"fingerprint": inception.fingerprint()}
    made = {"mu": np.zeros(2048), "sigma": np.eye(2048)}
    for name, origin in (("other", source), ("ours", ours)):
        np.savez(tmp_path / f"{name}.npz", source=np.array(json.dumps(origin)), **made)
    with pytest.raises(ValueError, match="are of 'inception' with weights ffffffffffff…, not of Inception with"):
        ReferenceImages(str(tmp_path / "other.npz")).load(inception, with_features=False)
    assert ReferenceImages(str(tmp_path / "ours.npz")).load(inception, with_features=False).spatial is None


def test_somebodys_file_has_inceptions_statistics_and_images_for_other_networks(vfm, folder, inception, tmp_path):
    images = images_of(folder)[:9]
    made = {"mu": np.arange(2048.0), "sigma": np.eye(2048), "mu_s": np.ones(2023), "sigma_s": 2 * np.eye(2023)}
    write_archive(tmp_path / "adm.npz", images.permute(0, 2, 3, 1).numpy(), 9, **made)
    ours = ReferenceImages(str(tmp_path / "adm.npz")).load(inception, with_features=True, batch_size=4)
    assert ours.pool.mean.tolist() == list(range(2048)) and ours.spatial.covariance[0, 0] == 2
    torch.testing.assert_close(ours.features, inception(images).pool, rtol=1e-3, atol=1e-4)
    theirs = ReferenceImages(str(tmp_path / "adm.npz")).load(vfm, with_features=False)
    features = vfm(from_uint8(images)).pooled.double()
    torch.testing.assert_close(theirs.pool.mean, features.mean(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(theirs.pool.covariance, features.T.cov(), rtol=1e-4, atol=1e-6)


def test_what_is_missing_is_named(vfm, folder, inception, tmp_path):
    with pytest.raises(ValueError, match=r"reference: nothing at 'nowhere\.npz'; give a folder of images.*ADM's"):
        ReferenceImages("nowhere.npz")
    np.savez(tmp_path / "mean.npz", mu=np.zeros(3))
    with pytest.raises(ValueError, match="has no statistics 'mu' and 'sigma'"):
        ReferenceImages(str(tmp_path / "mean.npz")).load(inception, with_features=False)
    np.savez(tmp_path / "few.npz", mu=np.zeros(3), sigma=np.eye(3))
    with pytest.raises(ValueError, match="holds statistics but no images"):
        ReferenceImages(str(tmp_path / "few.npz")).load(inception, with_features=True)
    few = ReferenceImages(str(tmp_path / "few.npz")).load(inception, with_features=False)
    with pytest.raises(ValueError, match="statistics are of 3 features, but inception has 2048"):
        DistributionSuite(inception, 10, few)
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(ValueError, match="statistics: can't write"):
        ReferenceImages(str(folder), 64, str(file / "here.npz")).load(vfm, with_features=False)


@pytest.mark.slow
def test_suite_names_its_numbers_by_what_is_compared(vfm, folder, inception):
    images = images_of(folder)
    index = torch.arange(8)
    against_itself = DistributionSuite(inception, 8)
    against_itself.update(images[:8], index)
    against_itself.update(images[:8], index, real=True)
    values = against_itself.compute()
    assert set(values) == {"rfid", "rsfid", "ris"}
    assert values["rfid"].abs() < 1e-3 and values["rsfid"].abs() < 1e-3 and values["ris"] >= 1
    real = ReferenceImages(str(folder), 64).load(vfm, with_features=True)
    suite = DistributionSuite(vfm, 8, real, precision_recall=True)
    suite.update(images[:8], index)
    values = suite.compute()
    assert set(values) == {f"fd_{VFM}", f"precision_{VFM}", f"recall_{VFM}"}
    assert values[f"precision_{VFM}"] == 1  # they are real ones
    assert name_of(inception) == "inception" and extract(vfm, images[:1]).logits is None
    assert not suite.state_dict()
