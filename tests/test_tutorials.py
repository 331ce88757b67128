"""What the tutorials say is what happens."""

import yaml
from building import CONFIGS, build, build_ldm, callback

from vfm_vae.data.datamodule import ImageNetDataModule


def test_configs_for_images_of_ones_own_build():
    tokenizer = ["demo/tokenizer.yaml", "own_images/tokenizer.yaml"]
    cli = build(*tokenizer, options=["--data.root=photos", "--trainer.accelerator=cpu"])
    assert cli.datamodule.source == "folder" and cli.datamodule.image_size == 64
    assert callback(cli, "Report").path is None  # nothing of the demo's is written
    ldm = build_ldm("demo/ldm.yaml", "own_images/ldm.yaml", options=["--trainer.accelerator=cpu"])
    assert ldm.model.num_classes == 1 and str(ldm.datamodule.root) == "runs/own_images/latents"
    assert callback(ldm, "SampleImages").classes == [0]


def test_a_folder_of_images_takes_the_place_of_imagenet():
    given = yaml.safe_load((CONFIGS / "data/folder.yaml").read_text())["data"]
    assert ImageNetDataModule(**given).source == "folder"
