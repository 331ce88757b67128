"""Models as folders: what is saved comes back, bit by bit, and what does not fit is named."""

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError

from ldm.pipeline import LatentDiffusion
from vfm_vae import pretrained
from vfm_vae.modules.adapter import Adapter
from vfm_vae.modules.decoder import Decoder
from vfm_vae.modules.quantizer import VectorQuantizer
from vfm_vae.tokenizer import VFMVAE, FrozenTokenizer
from vfm_vae.vfm import FrozenVFM

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 1200000000\n"


@pytest.fixture
def model(tiny_model) -> VFMVAE:
    model = tiny_model().eval()
    for parameter in model.parameters():  # zeros and ones of a fresh model would hide what is mixed up
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


@pytest.fixture
def folder(model, tmp_path) -> Path:
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def change(folder: Path, **entries) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))


def test_images_and_latents_come_back_bit_by_bit(model, folder):
    loaded = VFMVAE.from_pretrained(folder)
    assert not loaded.training
    images = torch.rand(2, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        z = model.encode(images).mode()
        assert torch.equal(loaded.encode(images).mode(), z)
        assert torch.equal(loaded.decode(z).image, model.decode(z).image)
    assert loaded.latent_identity() == model.latent_identity()
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]


@pytest.mark.parametrize("moment", ["while it is written", "as it takes its place"])
def test_a_former_model_outlives_one_that_could_not_be_saved(model, folder, monkeypatch, moment):
    former = {path.name: path.read_bytes() for path in folder.iterdir()}
    name = "put_tensors" if moment == "while it is written" else "os.replace"

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pretrained if name == "put_tensors" else os, name.rpartition(".")[2], full)
    next(model.adapter.parameters()).data += 1
    with pytest.raises(OSError, match=r"^can't write '.*model.safetensors' .No space left on device.; the"):
        model.save_pretrained(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == former


def test_the_vfm_is_named_and_not_stored(model, folder):
    config = json.loads((folder / "config.json").read_text())
    assert config["vfm"]["name"] == "vit_photos_patch8_64"
    assert config["vfm"]["fingerprint"] == model.vfm.fingerprint()
    size = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    assert (
        (folder / "model.safetensors").stat().st_size
        < size + 50_000
        < 4 * sum(p.numel() for p in model.vfm.network.parameters())
    )


def test_without_its_vfm_a_model_decodes_and_remembers_whose_it_is(model, folder, tmp_path):
    loaded = VFMVAE.from_pretrained(folder, vfm=False)
    assert loaded.vfm is None
    z = torch.randn(1, 4, 8, 8)
    with torch.no_grad():
        assert torch.equal(loaded.decode(z).image, model.decode(z).image)
    assert loaded.latent_identity() == model.latent_identity()
    loaded.save_pretrained(tmp_path / "again")
    assert VFMVAE.from_pretrained(tmp_path / "again").vfm.fingerprint() == model.vfm.fingerprint()


def test_a_local_path_of_the_vfm_is_not_shared(tiny_model, tmp_path):
    model = tiny_model()
    weights = tmp_path / "vfm.pth"
    torch.save(model.vfm.network.state_dict(), weights)
    model.vfm = FrozenVFM("vit_photos_patch8_64", layers=[0, -1], weights=str(weights))
    model.save_pretrained(tmp_path / "model")
    assert str(tmp_path) not in (tmp_path / "model/config.json").read_text()
    assert VFMVAE.from_pretrained(tmp_path / "model", vfm_weights=str(weights)).vfm.arguments["weights"] == str(weights)


def test_other_weights_of_the_vfm_are_refused(folder, tmp_path):
    other = FrozenVFM("vit_photos_patch8_64", pretrained=False)
    torch.save(other.network.state_dict(), tmp_path / "other.pth")
    with pytest.raises(ValueError, match="trained on other weights of 'vit_photos_patch8_64'"):
        VFMVAE.from_pretrained(folder, vfm_weights=str(tmp_path / "other.pth"))


def test_a_discrete_model_comes_back(tmp_path):
    adapter = Adapter([128], [8], 8, 1, 16, 128, gaussian=False)
    decoder = Decoder(16, [16, 16, 16, 16, 8], [16], [], 0, w_channels=16)
    model = VFMVAE(adapter, decoder, FrozenVFM("vit_photos_patch8_64"), VectorQuantizer(32, 2, 8)).eval()
    model.save_pretrained(tmp_path)
    loaded = VFMVAE.from_pretrained(tmp_path)
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(loaded.encode(images).mode(), model.encode(images).mode())
    assert loaded.latent_identity() == model.latent_identity()


def test_a_frozen_tokenizer_reads_a_folder(model, folder):
    tokenizer = FrozenTokenizer(str(folder))
    assert tokenizer.identity == model.latent_identity()
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(tokenizer.encode(images).mode(), model.encode(images).mode())


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"format_version": 0}, "is in format version 0, but this version of vfm_vae reads 1; convert its checkpoint"),
        ({"format_version": 2}, "is in format version 2, .*; install a newer version"),
        ({"model": {"class_path": "subprocess.Popen", "init_args": {}}}, r"asks for \['subprocess.Popen'\], but only"),
        (
            {"model": {"class_path": "vfm_vae.tokenizer.VFMVAE", "init_args": {"decoder": "evil.Decoder"}}},
            "evil.Decoder",
        ),
        ({"format_version": "1"}, "is in format version 1, but"),
        ({"model": None}, "describes no model"),
        ({"model": {"class_path": "ldm.pipeline.LatentDiffusion"}}, "holds a ldm.pipeline.LatentDiffusion, and no VFM"),
    ],
)
def test_what_this_version_does_not_read_is_said(folder, entries, message):
    change(folder, **entries)
    with pytest.raises(ValueError, match=message):
        VFMVAE.from_pretrained(folder)


def test_a_folder_of_before_formats_were_counted_is_named(folder):
    for content in ("{}", "[]"):
        (folder / "config.json").write_text(content)
        with pytest.raises(ValueError, match="format version 0"):
            VFMVAE.from_pretrained(folder)


def test_weights_of_another_shape_are_named(folder):
    config = json.loads((folder / "config.json").read_text())
    config["model"]["init_args"]["decoder"]["init_args"]["w_channels"] = 12
    change(folder, **config)
    with pytest.raises(
        ValueError, match=r"are of another model than its config.json: of .* of another shape .*style.affine.weight"
    ):
        VFMVAE.from_pretrained(folder)


def test_arguments_that_are_not_known_are_named(folder):
    config = json.loads((folder / "config.json").read_text())
    config["model"]["init_args"]["decoder"]["init_args"]["colour"] = 1
    change(folder, **config)
    with pytest.raises(ValueError, match=r"^name: '.*': its config\.json does not fit: .*colour"):
        VFMVAE.from_pretrained(folder)


def test_damage_is_named(folder):
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match=r"^name: '.*model\.safetensors' .*cut short \(\d+ of \d+ bytes"):
        VFMVAE.from_pretrained(folder)
    file.write_bytes(POINTER)
    with pytest.raises(ValueError, match=r"^name: '.*model\.safetensors' can't be read as weights: it is a Git LFS"):
        VFMVAE.from_pretrained(folder)
    file.unlink()
    with pytest.raises(ValueError, match=r"^name: there is no file '.*model\.safetensors'"):
        VFMVAE.from_pretrained(folder)
    file.write_bytes(whole)
    (folder / "config.json").write_bytes(POINTER)
    with pytest.raises(ValueError, match=r"^name: '.*config\.json' can't be read as JSON .*: it is a Git LFS pointer"):
        VFMVAE.from_pretrained(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match=r"holds no config.json"):
        VFMVAE.from_pretrained(folder)


def test_what_is_not_there_is_said(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"there is no folder .*would be owner/model"):
        VFMVAE.from_pretrained(tmp_path / "nowhere")

    def offline(name: str, **_):
        raise LocalEntryNotFoundError("no connection")

    monkeypatch.setattr(pretrained, "snapshot_download", offline)
    with pytest.raises(ValueError, match=r"could not be had .LocalEntryNotFoundError: no connection"):
        VFMVAE.from_pretrained("someone/something")


@pytest.mark.parametrize("kind", [VFMVAE, LatentDiffusion])
def test_an_option_that_neither_model_nor_hub_has_is_named(kind, folder):
    with pytest.raises(TypeError, match=r"^from_pretrained got \['vfm_weigths'\], which are neither its own options"):
        kind.from_pretrained(folder, revision="main", vfm_weigths="weights.pth")


def test_the_hub_gives_back_what_it_was_given(model, tmp_path, monkeypatch):
    stored = tmp_path / "hub"

    class Hub:
        def __init__(self, token: str | None):
            assert token == "secret"

        def create_repo(self, name: str, private: bool | None, exist_ok: bool):
            assert (private, exist_ok) == (True, True)
            return type("Repository", (), {"repo_id": f"me/{name}"})

        def upload_folder(self, repo_id: str, folder_path: str, commit_message: str, create_pr: bool) -> str:
            assert create_pr
            Path(folder_path).rename(stored)
            Path(folder_path).mkdir()
            return f"https://hub/{repo_id}/{commit_message}"

    def download(name: str, revision: str, token: str, allow_patterns: list[str], local_files_only: bool) -> str:
        assert (name, revision, token, local_files_only) == ("me/model", "v1", "secret", True)
        assert {path.name for path in stored.iterdir()} == set(allow_patterns)
        return str(stored)

    monkeypatch.setattr(pretrained, "HfApi", Hub)
    monkeypatch.setattr(pretrained, "snapshot_download", download)
    options = {"private": True, "token": "secret", "create_pr": True}
    assert model.push_to_hub("model", **options) == "https://hub/me/model/Upload model"
    loaded = VFMVAE.from_pretrained("me/model", revision="v1", token="secret", local_files_only=True)
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in model.state_dict().items())
