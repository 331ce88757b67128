"""Anybody's samples from files: as an .npz, as a folder, against a folder or statistics."""

import json

import numpy as np
import pytest
import torch
from command_line import run
from PIL import Image

from vfm_vae.data.archive import ImageArchive, write_archive
from vfm_vae.data.folder import ImageFolderDataset
from vfm_vae.data.transforms import CentreCrop
from vfm_vae.evaluate import SampleFiles, evaluate_samples, main
from vfm_vae.images import from_uint8
from vfm_vae.metrics.distribution import frechet_distance
from vfm_vae.vfm import FrozenVFM

VFM = "vit_photos_patch8_64"


@pytest.fixture
def pixels(photos):
    """Samples: training photographs, uint8 `[N, H, W, 3]`."""
    dataset = ImageFolderDataset(photos, "train", CentreCrop(64))
    return torch.stack([dataset[i][0] for i in range(0, 52, 2)]).permute(0, 2, 3, 1).numpy()


@pytest.fixture
def samples(pixels, tmp_path):
    """As a file and as a folder."""
    write_archive(tmp_path / "samples.npz", pixels, len(pixels))
    (tmp_path / "samples").mkdir()
    for number, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / f"samples/{number:08d}.png")
    return tmp_path


@pytest.mark.parametrize("name", ["samples.npz", "samples"])
def test_equals_the_distance_by_hand(samples, pixels, photos, name, capsys):
    file = samples / "numbers.json"
    options = {"vfm": VFM, "image_size": 64, "batch_size": 7, "statistics": str(samples / "real.npz")}
    evaluate_samples(str(samples / name), str(photos / "val"), metrics_file=str(file), **options)
    entry = json.loads(file.read_text())["samples"]
    vfm = FrozenVFM(VFM)
    real = ImageFolderDataset(photos, "val", CentreCrop(64))
    sets = (torch.stack([real[i][0] for i in range(len(real))]), torch.from_numpy(pixels).permute(0, 3, 1, 2))
    a, b = (vfm(from_uint8(images)).pooled.double() for images in sets)
    expected = frechet_distance(a.mean(0), a.T.cov(), b.mean(0), b.T.cov()).item()
    assert entry["metrics"][f"test/fd_{VFM}"] == pytest.approx(expected, rel=1e-4)
    assert 0 <= entry["metrics"][f"test/recall_{VFM}"] <= 1
    settings = entry["settings"]
    assert settings["num_images"] == 26 and settings["network"] == VFM and settings["input_scale"] == 1
    assert settings["precision_recall"] is True and settings["reference_image_size"] == 64
    assert torch.__version__.startswith(entry["versions"]["torch"])
    assert f"test/fd_{VFM}" in capsys.readouterr().out


def test_the_command_line(samples, photos):
    command = [f"--samples={samples / 'samples.npz'}", "--reference", str(photos / "train"), "--vfm", VFM]
    command += ["--image_size=64", f"--statistics={samples / 'train.npz'}"]
    ended = run(samples, "vfm_vae.evaluate", *command)
    assert ended.code == 0, ended.err
    assert "precision_vit_photos_patch8_64" in ended.out
    assert (samples / "metrics.json").is_file() and ImageArchive(samples / "train.npz").num_images() == 52
    for wrong, message in {
        "--reference=nowhere": "reference: nothing at 'nowhere'",
        "--bach_size=3": "bach_size",
        "--matmul_precision=low": "['highest', 'high', 'medium']. Got value: low",
    }.items():
        ended = run(samples, "vfm_vae.evaluate", *command, wrong)
        assert ended.code == 2 and "Traceback" not in ended.err
        assert message in next(line for line in ended.err.splitlines() if line.startswith("error: "))


def test_the_diffusion_program_names_the_command_for_files(samples):
    ended = run(samples, "ldm", "test", "--samples", "samples.npz")
    assert ended.code == 2 and "error: --samples: samples in files are measured by `python -m vfm_vae.eval" in ended.err


def test_what_is_missing_is_named_before_anything_is_measured(samples, photos, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="samples: there is no file at 'nowhere'"):
        SampleFiles("nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="samples: no images in"):
        SampleFiles(str(tmp_path / "empty"))
    np.savez(tmp_path / "latents.npz", latents=np.zeros(3))
    with pytest.raises(ValueError, match=r"samples: .*holds no images.*give an \.npz with 'arr_0'"):
        SampleFiles(str(tmp_path / "latents.npz"))
    monkeypatch.setenv("VFM_VAE_DEBUG", "1")
    arguments = ["--samples", str(samples / "samples"), "--reference", str(photos / "val")]
    options = {
        "--inception=no": r"^inception: there is no file 'no'; give the file of Inception",
        "--vfm=vit_no": "^vfm: timm knows no model 'vit_no'",
    }
    for option, message in options.items():
        with pytest.raises(ValueError, match=message):
            main([*arguments, option])
    with pytest.raises(ValueError, match=r"^vfm_weights: no file at 'no'"):
        main([*arguments, f"--vfm={VFM}", "--vfm_weights=no"])


@pytest.mark.parametrize(("options", "precision"), [([], "high"), (["--matmul_precision=highest"], "highest")])
def test_the_precision_of_products_is_set_and_noted(samples, photos, monkeypatch, options, precision):
    def watch(*args):
        assert torch.get_float32_matmul_precision() == precision
        return {}

    monkeypatch.setattr("vfm_vae.evaluate.measure", watch)
    paths = ["--samples", str(samples / "samples"), "--reference", str(photos / "val"), "--image_size=64"]
    main([*paths, f"--vfm={VFM}", f"--metrics_file={samples / 'numbers.json'}", *options])
    settings = json.loads((samples / "numbers.json").read_text())["samples"]["settings"]
    assert settings["matmul_precision"] == precision


@pytest.fixture
def unmeasured(monkeypatch):
    monkeypatch.setattr("vfm_vae.evaluate.measure", lambda *args: pytest.fail("measured for nothing"))


def test_a_file_that_can_not_be_written_is_refused_before_anything_is_measured(samples, photos, unmeasured, tmp_path):
    (tmp_path / "text").write_text("no numbers")
    for place in (tmp_path / "text", tmp_path / "samples", tmp_path / "text/metrics.json"):
        with pytest.raises(ValueError, match=r"^metrics_file: .*give another path$"):
            evaluate_samples(str(samples / "samples.npz"), str(photos / "val"), vfm=VFM, metrics_file=str(place))


def test_numbers_are_shown_before_they_are_written(samples, photos, monkeypatch, capsys):
    def full(*args):
        raise OSError("no space left")

    monkeypatch.setattr("vfm_vae.evaluate.write_entry", full)
    options = {"vfm": VFM, "image_size": 64, "statistics": str(samples / "real.npz"), "precision_recall": False}
    with pytest.raises(OSError, match="no space left"):
        evaluate_samples(str(samples / "samples"), str(photos / "val"), **options)
    assert f"test/fd_{VFM}" in capsys.readouterr().out


def test_images_of_other_sizes_and_damaged_ones_are_named(samples):
    files = SampleFiles(str(samples / "samples"))
    Image.new("RGB", (32, 16)).save(samples / "samples/00000012.png")
    with pytest.raises(
        ValueError, match=r"^samples: '.*/00000012\.png' has 16x32 pixels, but others 64x64; all have to be of one size"
    ):
        list(files.batches(5))
    whole = (samples / "samples/00000003.png").read_bytes()
    for content in (whole[: len(whole) // 2], b"nothing"):
        (samples / "samples/00000003.png").write_bytes(content)
        with pytest.raises(ValueError, match=r"^samples: '.*/00000003\.png' can't be read as an image"):
            list(files.batches(5))


def test_images_are_resized_for_patches_that_do_not_divide_them(samples, photos):
    size = {"img_size": 56, "depth": 1, "num_heads": 2, "embed_dim": 8}
    name = "vit_base_patch14_dinov2"

    def create(vfm, **kwargs):
        assert vfm == name
        return FrozenVFM(vfm, pretrained=False, model_args=size, **kwargs)

    options = {"vfm": name, "image_size": 64, "statistics": str(samples / "real.npz"), "precision_recall": False}
    file = samples / "numbers.json"
    paths = str(samples / "samples"), str(photos / "val")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vfm_vae.evaluate.FrozenVFM", create)
        with pytest.raises(ValueError, match=r"patches of 14 pixels.*times vfm_input_scale must be multiples of 14"):
            evaluate_samples(*paths, metrics_file=str(file), **options)
        evaluate_samples(*paths, metrics_file=str(file), vfm_input_scale=0.875, **options)
    entry = json.loads(file.read_text())["samples"]
    assert entry["settings"]["input_scale"] == 0.875 and entry["metrics"][f"test/fd_{name}"] > 0


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 1200000000\n"

# What a file among samples becomes, from its bytes → what is said of it.
DAMAGE = {
    "empty": (lambda _: b"", r"it is empty \(0 bytes\)"),
    "pointer": (lambda _: POINTER, "it is a Git LFS pointer"),
    "cut": (lambda content: content[: len(content) // 2], "cut short"),
    "page": (lambda _: b"<html>no quota</html>", "it is an HTML page"),
}


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize("name", ["samples.npz", "samples/00000025.png"])
def test_damaged_samples_are_named_before_anything_is_measured(samples, photos, unmeasured, kind, name):
    """Also the last of many: the reference would be measured, and all but one of the samples, for nothing."""
    damage, said = DAMAGE[kind]
    file = samples / name
    file.write_bytes(damage(file.read_bytes()))
    given = file if name.endswith(".npz") else file.parent
    with pytest.raises(ValueError, match=rf"^samples: '.*{file.name}' .*{said}") as error:
        evaluate_samples(str(given), str(photos / "val"), vfm=VFM)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_reference_is_named(samples, photos, unmeasured, kind):
    damage, said = DAMAGE[kind]
    (samples / "real.npz").write_bytes(damage((samples / "samples.npz").read_bytes()))
    with pytest.raises(ValueError, match=rf"^reference: '.*real\.npz' is no \.npz file: .*{said}"):
        evaluate_samples(str(samples / "samples"), str(samples / "real.npz"), vfm=VFM)


def test_damage_within_an_archive_is_named(samples, pixels):
    file = samples / "samples.npz"
    content = bytearray(file.read_bytes())
    content[5000] ^= 1  # a pixel
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"'.*samples\.npz' is damaged \(Bad CRC-32"):
        list(SampleFiles(str(file)).batches(7))
    np.savez(file, pixels)
    header = file.read_bytes().replace(b"(26, 64,", b"(27, 64,")
    file.write_bytes(header)
    with pytest.raises(
        ValueError, match=r"^samples: '.*samples\.npz' is damaged \('arr_0' has 319488 of the 331776 bytes"
    ):
        SampleFiles(str(file))


def test_remeasure_insists(samples, photos, monkeypatch):
    monkeypatch.setenv("VFM_VAE_DEBUG", "1")
    paths = ["--samples", str(samples / "samples"), "--reference", str(photos / "val"), "--image_size=64"]
    paths += [f"--vfm={VFM}", f"--metrics_file={samples / 'numbers.json'}", f"--statistics={samples / 'real.npz'}"]
    main(paths)
    before = (samples / "real.npz").stat().st_mtime_ns
    main(paths)
    assert (samples / "real.npz").stat().st_mtime_ns == before
    main([*paths, "--remeasure"])
    assert (samples / "real.npz").stat().st_mtime_ns > before
    with pytest.raises(ValueError, match=r"^remeasure: '.*real\.npz' is a file of statistics"):
        main(["--samples", str(samples / "samples"), "--reference", str(samples / "real.npz"), "--remeasure"])
