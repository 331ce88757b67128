"""Folders and checkpoints run nothing but the classes of models."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from vfm_vae import schema
from vfm_vae.description import Described, class_at, named_classes
from vfm_vae.pretrained import build
from vfm_vae.tokenizer import VFMVAE

PACKAGE = __name__


class Anything(Described):
    """Takes whatever it is given."""

    def __init__(self, part: Any = None, name: str = "", inner: "Anything | None" = None) -> None:
        self.part = part


@pytest.fixture
def folder(tiny_model, tmp_path) -> Path:
    tiny_model().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def checkpoint(tiny_model, tmp_path) -> Path:
    model = tiny_model()
    content = schema.of_weights({f"model.{name}": tensor for name, tensor in model.state_dict().items()})
    schema.write(content, VFMVAE.kind, model.described(), images_seen=0, vfm={"name": "vit_photos_patch8_64"})
    torch.save(content, tmp_path / "last.ckpt")
    return tmp_path / "last.ckpt"


def harm(file: Path) -> dict[str, Any]:
    return {"class_path": "subprocess.Popen", "init_args": {"args": f"touch {file}", "shell": True}}


def change(path: Path, option: str, value: Any) -> None:
    """Sets an argument of the VFM, or an option of the decoder, in what describes a model."""
    file = path / "config.json" if path.is_dir() else path
    content = json.loads(file.read_text()) if path.is_dir() else torch.load(file, weights_only=True)
    config = content if path.is_dir() else content["config"]
    if option == "vfm":
        config["vfm"]["model_args"] = value
    else:
        config["model"]["init_args"]["decoder"]["init_args"][option] = value
    if path.is_dir():
        file.write_text(json.dumps(content))
    else:
        torch.save(content, file)


@pytest.mark.parametrize("kind", ["folder", "checkpoint"])
@pytest.mark.parametrize("option", ["vfm", "w_channels"])
def test_a_description_deep_inside_runs_nothing(kind, option, folder, checkpoint, tmp_path):
    path = folder if kind == "folder" else checkpoint
    read = VFMVAE.from_pretrained if kind == "folder" else VFMVAE.from_checkpoint
    read(path)
    change(path, option, {"x": [harm(tmp_path / "harm")]})
    with pytest.raises(ValueError, match=r"asks for \['subprocess.Popen'\], but only classes of this") as raised:
        read(path)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "harm").exists()


def test_a_folder_imports_nothing(folder, tmp_path, monkeypatch):
    (tmp_path / "not_imported_yet.py").write_text("class Part: complete = 1 / 0")
    monkeypatch.syspath_prepend(str(tmp_path))
    change(folder, "vfm", {"x": {"class_path": "not_imported_yet.Part"}})
    with pytest.raises(ValueError, match=r"asks for \['not_imported_yet.Part'\]"):
        VFMVAE.from_pretrained(folder)
    assert "not_imported_yet" not in sys.modules


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("vfm_vae.checkpoints.zipfile.ZipFile", "there is no class 'vfm_vae.checkpoints.zipfile.ZipFile'"),
        ("vfm_vae.pretrained.HfApi", r"asks for \['vfm_vae.pretrained.HfApi'\], but only"),
        ("vfm_vae.pretrained.build", r"asks for \['vfm_vae.pretrained.build'\], but only"),
        ("vfm_vae.nothing.Part", "there is no class 'vfm_vae.nothing.Part'"),
    ],
)
def test_a_class_that_is_imported_in_this_project_is_not_of_it(path, message, folder, checkpoint):
    for place, read in ((folder, VFMVAE.from_pretrained), (checkpoint, VFMVAE.from_checkpoint)):
        change(place, "w_channels", {"class_path": path})
        with pytest.raises(ValueError, match=f"^(name|checkpoint): .*{message}") as raised:
            read(place)
        assert "\n" not in str(raised.value)


def test_the_class_of_a_model_that_is_not_there_is_named(folder):
    config = json.loads((folder / "config.json").read_text())
    config["model"]["class_path"] = "vfm_vae.nothing.Part"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"^name: '.*': there is no class 'vfm_vae\.nothing\.Part'"):
        VFMVAE.from_pretrained(folder)
    with pytest.raises(ValueError, match=r"^description: there is no class 'nothing\.Part'"):
        build(Anything, {"class_path": "nothing.Part"})


@pytest.mark.parametrize("path", ["vfm_vae.checkpoints.zipfile.ZipFile", "vfm_vae.hooks.Nothing", "Nothing", ""])
def test_a_class_that_is_not_there_is_named(path):
    with pytest.raises(ValueError, match=f"^there is no class '{path}': "):
        class_at(path)


def test_what_takes_anything_keeps_a_description_as_it_is(tmp_path):
    part = {"class_path": "vfm_vae.hooks.Nothing"}
    text = json.dumps(harm(tmp_path / "harm")).replace("class_path", r"class\u005fpath")
    made = build(Anything, {"class_path": f"{PACKAGE}.Anything", "init_args": {"part": text}})
    assert made.part["class_path"] == "subprocess.Popen" and not (tmp_path / "harm").exists()
    with pytest.raises(ValueError, match=r"^description: there is no class 'vfm_vae\.hooks\.Nothing'"):
        build(Anything, {"class_path": f"{PACKAGE}.Anything", "init_args": {"part": part}})


def test_text_with_a_dot_is_no_class():
    inner = {"name": "sd-v1.5", "part": "a.b", "inner": "evil.Part"}
    description = {"class_path": f"{PACKAGE}.Anything", "init_args": {"inner": inner, "name": "x.y"}}
    assert list(named_classes(description)) == [f"{PACKAGE}.Anything", "evil.Part"]
    assert list(named_classes('{"class_path": "evil.Part"}'))
