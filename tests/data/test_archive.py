"""Images in .npz files: written and read a batch at a time, readable by numpy, and never unpickled."""

import numpy as np
import pytest
import torch

from vfm_vae.data.archive import ImageArchive, write_archive


@pytest.fixture
def pixels():
    return np.random.default_rng(0).integers(0, 256, (11, 6, 5, 3), dtype=np.uint8)


def test_what_is_written_is_read(tmp_path, pixels):
    path = tmp_path / "images.npz"
    write_archive(path, iter(pixels), 11, mu=np.arange(3.0), source=np.array("here"))
    with np.load(path) as arrays:
        assert (arrays["arr_0"] == pixels).all() and arrays["mu"].tolist() == [0, 1, 2]
    archive = ImageArchive(path)
    assert archive.names == {"arr_0", "mu", "source"} and archive.num_images() == 11
    assert str(archive.array("source")) == "here"
    batches = list(archive.images(4))
    assert [len(images) for images, _ in batches] == [4, 4, 3]
    assert torch.cat([index for _, index in batches]).tolist() == list(range(11))
    images = torch.cat([images for images, _ in batches])
    assert (images.permute(0, 2, 3, 1).numpy() == pixels).all()


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_numpys_own_files_are_read(tmp_path, pixels, save):
    save(tmp_path / "images.npz", pixels, np.arange(11))
    (images, _), *rest = ImageArchive(tmp_path / "images.npz").images(64)
    assert (images.permute(0, 2, 3, 1).numpy() == pixels).all() and not rest


def test_what_is_no_archive_of_images_is_named(tmp_path, pixels):
    with pytest.raises(ValueError, match="there is no file at"):
        ImageArchive(tmp_path / "nowhere.npz")
    (tmp_path / "text.npz").write_text("text")
    with pytest.raises(ValueError, match=r"is no \.npz"):
        ImageArchive(tmp_path / "text.npz")
    np.savez(tmp_path / "statistics.npz", mu=np.zeros(3))
    with pytest.raises(ValueError, match=r"holds no images.*mu"):
        ImageArchive(tmp_path / "statistics.npz").num_images()
    np.savez(tmp_path / "floats.npz", pixels / 255)
    with pytest.raises(ValueError, match=r"must be uint8 \[N, H, W, 3\]; it is float64"):
        ImageArchive(tmp_path / "floats.npz").num_images()
    np.savez(tmp_path / "objects.npz", arr_0=np.array([{}], dtype=object))
    with pytest.raises(ValueError, match="allow_pickle=False"):
        ImageArchive(tmp_path / "objects.npz").array("arr_0")


def test_half_an_archive_is_not_left(tmp_path, pixels):
    with pytest.raises(ValueError, match="12 images were announced, but there were 11"):
        write_archive(tmp_path / "images.npz", iter(pixels), 12)
    with pytest.raises(ValueError, match="can't be in one archive"):
        write_archive(tmp_path / "images.npz", [pixels[0], pixels[1, 1:]], 2)
    assert not (tmp_path / "images.npz").exists()
