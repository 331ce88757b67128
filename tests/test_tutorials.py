"""What the tutorials and how-tos say is what happens."""

import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from building import CONFIGS, build, build_ldm, callback, count
from command_line import run
from pages import commands, fences
from PIL import Image
from safetensors.torch import load_file

from vfm_vae.data.datamodule import ImageNetDataModule

TOY = {
    ("vfm_vae", "fit"): ["--model.max_images=16", "--trainer.val_check_interval=2"],
    ("vfm_vae", "predict"): [],
    ("ldm", "fit"): ["--trainer.max_steps=2", "--trainer.val_check_interval=2", "--data.batch_size=8"],
    ("ldm", "predict"): ["--data.num_samples=3"],
}


def test_configs_for_images_of_ones_own_build():
    tokenizer = ["demo/tokenizer.yaml", "own_images/tokenizer.yaml"]
    cli = build(*tokenizer, options=["--data.root=photos", "--trainer.accelerator=cpu"])
    assert cli.datamodule.source == "folder" and cli.datamodule.image_size == 64
    assert callback(cli, "Report").path is None  # nothing of the demo's is written
    ldm = build_ldm("demo/ldm.yaml", "own_images/ldm.yaml", options=["--trainer.accelerator=cpu"])
    assert ldm.model.num_classes == 1 and str(ldm.datamodule.root) == "runs/own_images/latents"
    assert callback(ldm, "SampleImages").classes is None  # one row, of all classes in turn


def test_the_one_for_256_px_is_lightningdit_b():
    names = ["ldm/lightningdit.yaml", "ldm/size/b.yaml", "data/latents.yaml", "trainer/gpu.yaml"]
    with torch.device("meta"):
        ldm = build_ldm(*names, "own_images/ldm_256px.yaml", options=["--trainer.accelerator=cpu"])
    assert 120e6 < count(ldm.model.model) < 140e6 and ldm.datamodule.batch_size == 256
    assert str(ldm.datamodule.root) == "runs/own_images/latents_256px" and ldm.model.num_classes == 1


def test_a_folder_of_images_takes_the_place_of_imagenet():
    given = yaml.safe_load((CONFIGS / "data/folder.yaml").read_text())["data"]
    assert ImageNetDataModule(**given).source == "folder"


@pytest.mark.slow
def test_your_own_images_by_the_commands_of_the_page(camera: Path, tmp_path: Path):
    shown = [fence for fence in fences("docs/tutorials/your_own_images.md") if fence.language == "bash"]
    done = [command for fence in shown if not fence.title for command in commands(fence.text)]
    assert [(command[2], command[3]) for command in done] == list(TOY)
    for _, _, program, *arguments in done:
        words = [word.replace("~", str(tmp_path)) for word in arguments]
        ended = run(tmp_path, program, *words, *TOY[program, arguments[0]], "--trainer.accelerator=cpu")
        assert ended.code == 0, ended.err
    runs = tmp_path / "runs/own_images"
    assert {file.stem for file in (runs / "tokenizer/images").iterdir()} == {"train", "val"}
    latents = [load_file(file)["latents"] for file in runs.glob("latents/*/*.safetensors")]
    assert sum(map(len, latents)) == 24 and all(torch.isfinite(part).all() for part in latents)
    assert (runs / "ldm/images/samples_guidance_1.png").is_file()
    samples = [np.asarray(Image.open(file)) for file in sorted((runs / "samples").glob("*.png"))]
    assert [sample.shape for sample in samples] == [(64, 64, 3)] * 3
    assert {file.name for file in tmp_path.iterdir()} == {"Pictures", "runs"}
    assert len(list((tmp_path / "Pictures").iterdir())) == 24  # nothing is written there


def test_the_metric_that_the_page_adds_measures(tiny_module, data, trainer, monkeypatch: pytest.MonkeyPatch):
    (code,) = [fence.text for fence in fences("docs/how_to/add_a_metric.md") if fence.language == "python"]
    module = types.ModuleType("colours")
    monkeypatch.setitem(sys.modules, "colours", module)
    exec(code, module.__dict__)
    for options in ({}, {"num_images": 5}):
        metric = module.ColourShift(**options)
        ((logged),) = trainer(callbacks=[metric]).validate(tiny_module(), data(val_batch_size=8), verbose=False)
        assert 0 < logged["val/colour_shift"] < 1
        assert metric.num_measured == options.get("num_images", 26)


def test_the_page_on_cknna_says_what_its_example_prints(capsys: pytest.CaptureFixture):
    (code,) = [fence.text for fence in fences("docs/tutorials/reading_cknna.md") if fence.language == "python"]
    exec(code, {})
    assert f"# {', '.join(capsys.readouterr().out.split())}" in code
