"""Prompts on the command line: what is drawn for them, measured, swept over, and what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from captioned import captioner
from command_line import Ended, run
from lightning.pytorch import Trainer
from PIL import Image
from test_sweep import Size
from tiny_clip import write_clip

from ldm.models.denoiser import Denoiser
from ldm.models.lightningdit import LightningDiT
from ldm.models.text_lightningdit import TextLightningDiT
from ldm.pipeline import LatentDiffusion
from ldm.sweep.grid import Sweep
from ldm.sweep.trainer import SweepingTrainer
from vfm_vae.data.datamodule import ImageNetDataModule
from vfm_vae.data.latents import LatentStatistics
from vfm_vae.images import to_uint8
from vfm_vae.modules.adapter import Adapter
from vfm_vae.modules.decoder import Decoder
from vfm_vae.tokenizer import VFMVAE
from vfm_vae.vfm import FrozenVFM

TEXTS = """
model:
  model:
    class_path: TextLightningDiT
    init_args: {text_channels: 8, in_channels: 4, input_size: 8, patch_size: 2, depth: 1, width: 32, num_heads: 2}
  conditioning:
    class_path: ldm.text.Captions
    init_args: {encoder: {class_path: HashedWords, init_args: {width: 8, max_tokens: 6}}}
  optimizer: {class_path: AdamW, init_args: {lr: 2.0e-3}}
  sampler: {class_path: Euler, init_args: {steps: 6}}
  tokenizer: {checkpoint: tokenizer}
  seed: 1
data: {root: nowhere, val_batch_size: 3, num_workers: 0}
trainer: {accelerator: cpu, logger: false, enable_progress_bar: false, enable_model_summary: false}
"""
SIZES = {"in_channels": 4, "input_size": 8, "patch_size": 2, "depth": 1, "width": 32, "num_heads": 2}
PROMPTS = ["a cat: on the left", "two dogs!"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Two models as after training, one of texts and one of classes, and their tokenizer."""
    folder = tmp_path_factory.mktemp("texts")
    (folder / "texts.yaml").write_text(TEXTS)
    torch.manual_seed(0)
    adapter, decoder = Adapter([128], [8], 4, 1, 16, 128), Decoder(16, [16, 16, 16, 16, 8], [16], [], 0, w_channels=16)
    VFMVAE(adapter, decoder, FrozenVFM("vit_photos_patch8_64")).save_pretrained(folder / "tokenizer")
    save(folder / "texts.ckpt", TextLightningDiT(8, **SIZES))
    save(folder / "classes.ckpt", LightningDiT(**SIZES, num_classes=3), conditioning=None)
    return folder


def save(file: Path, denoiser: Denoiser, **options) -> None:
    module = captioner(denoiser, **options)
    for parameter in denoiser.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    module.normalization.take(LatentStatistics(torch.zeros(1, 4, 1, 1), torch.ones(1, 4, 1, 1)))
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(file)


def ldm(folder: Path, command: str, *options: str) -> Ended:
    return run(folder, "ldm", command, "-c", "texts.yaml", "--ckpt_path", "texts.ckpt", *options)


def predict(folder: Path, output: str, *options: str) -> Ended:
    return ldm(folder, "predict", "--trainer.callbacks=SampleWriter", f"--run.output={output}", *options)


def check_drawn(folder: Path, output: str, prompts: list[str]) -> None:
    """Whether the samples are those of the model on its own, by seed, number and prompt."""
    model = LatentDiffusion.from_checkpoint(folder / "texts.ckpt", folder / "tokenizer")
    expected = to_uint8(model.sample(prompts=prompts, seed=1).images).permute(0, 2, 3, 1).numpy().astype(int)
    files = sorted((folder / output).glob("*.png"))
    assert np.abs(np.stack([np.asarray(Image.open(file)) for file in files]) - expected).max() <= 1
    notes = [json.loads(line) for line in (folder / output / "prompts.jsonl").read_text().splitlines()]
    assert [note["prompt"] for note in notes] == prompts


def test_prompts_are_drawn_as_the_model_draws_them(folder):
    given = [f"--prompt={prompt}" for prompt in PROMPTS]  # as good as one --prompt with both
    ended = ldm(folder, "predict", "--run.output=a", *given)  # what writes them need not be named
    assert ended.code == 0, ended.err
    check_drawn(folder, "a", PROMPTS)
    ended = predict(folder, "a", "--prompt", "a fox", "two dogs!")
    assert ended.code == 2 and "holds what was made otherwise: prompts was" in ended.err


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["txt", "jsonl", "folder", "list"])
def test_prompts_from_files_are_drawn_alike(folder, kind):
    place = folder / {"txt": "p.txt", "jsonl": "p.jsonl"}.get(kind, "p")
    if kind == "folder":
        place.mkdir()
        for number, prompt in enumerate(PROMPTS):
            (place / f"{number}.txt").write_text(prompt)
    elif kind != "list":
        lines = PROMPTS if kind == "txt" else [json.dumps({"prompt": prompt}) for prompt in PROMPTS]
        place.write_text("\n".join(lines))
    given = json.dumps(PROMPTS) if kind == "list" else place
    ended = predict(folder, kind, f"--data.prompts={given}", "--data.images_per_prompt=2")
    assert ended.code == 0, ended.err
    check_drawn(folder, kind, [prompt for prompt in PROMPTS for _ in range(2)])


@pytest.mark.slow
def test_a_test_measures_samples_of_prompts(folder):
    clip = write_clip(folder / "clip")
    callbacks = [{"class_path": "CLIPScoreCallback", "init_args": {"name": clip}}, {"class_path": "Report"}]
    ended = ldm(folder, "test", f"--trainer.callbacks={json.dumps(callbacks)}", "--prompt", *PROMPTS)
    assert ended.code == 0, ended.err
    (entry,) = json.loads((folder / "metrics.json").read_text()).values()
    assert 0 <= entry["metrics"]["test/clip_score"] <= 100
    assert entry["settings"]["CLIPScoreCallback"]["num_images"] == 2


@pytest.mark.slow
def test_a_sweep_takes_prompts(folder):
    callbacks = f"--trainer.callbacks={Size.__module__}.Size"
    options = [callbacks, "--sweep.scales=[1,2]", "--sweep.folder=sweep", "--data.images_per_prompt=3"]
    ended = ldm(folder, "sweep", *options, "--prompt", *PROMPTS)
    assert ended.code == 0, ended.err
    assert "6 samples each" in (folder / "sweep/sweep.md").read_text()


def test_a_sweep_measures_anew_for_other_prompts(folder, tmp_path, capsys):
    def sweep(*prompts):
        options = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
        trainer = SweepingTrainer(accelerator="cpu", logger=False, callbacks=[Size()], **options)
        given = {"prompts": prompts, "images_per_prompt": 3, "val_batch_size": 4, "num_workers": 0}
        data, module = ImageNetDataModule("nowhere", **given), captioner(TextLightningDiT(8, **SIZES))
        grid = Sweep([1, 2], folder=str(tmp_path), confirm=False)
        trainer.sweep(module, data, grid, str(folder / "texts.ckpt"))
        return json.loads((tmp_path / "sweep.json").read_text()), " ".join(capsys.readouterr().out.split())

    found, _ = sweep(*PROMPTS)
    again, told = sweep(*PROMPTS)
    assert "2 of them are measured already" in told and again == found
    others, told = sweep("a fox", PROMPTS[1])
    assert "measured anew: 2, because of what changed: prompts" in told and others != found
    assert "6 samples each" in (tmp_path / "sweep.md").read_text()


def test_what_configs_draw_gives_way(folder):
    for other in ("num_samples: 3", "prompts: [a dog]"):
        (folder / "other.yaml").write_text(f"data: {{{other}}}")
        ended = ldm(folder, "predict", "-c", "other.yaml", "--run.output=e", "--prompt", *PROMPTS)
        assert ended.code == 0, ended.err
    check_drawn(folder, "e", PROMPTS)


def test_mistakes_are_told_in_one_line(folder):
    for options, message in (
        (["--data.prompts=[a dog]", "--data.num_samples=3"], "num_samples: "),
        (["--data.prompts=none.txt"], "prompts: 'none.txt' is no file .txt or .jsonl"),
    ):
        ended = predict(folder, "b", *options)
        assert ended.code == 2 and ended.err.startswith(f"error: {message}"), ended.err
        assert len(ended.err.strip().splitlines()) == 2  # the other tells of the traceback
    assert not (folder / "b").exists()


def test_a_model_of_classes_takes_no_prompts(folder):
    before, _, after = TEXTS.partition("  conditioning:")
    config = before + after[after.index("  optimizer:") :]
    config = config.replace("TextLightningDiT", "LightningDiT").replace("text_channels: 8", "num_classes: 3")
    (folder / "classes.yaml").write_text(config)
    options = ["--trainer.callbacks=SampleWriter", "--run.output=c", "--prompt", "a cat"]
    ended = run(folder, "ldm", "predict", "-c", "classes.yaml", "--ckpt_path", "classes.ckpt", *options)
    assert ended.code == 2 and ended.err.startswith(
        "error: data.prompts (--prompt): the model draws samples of 3 classes"
    )
    assert not (folder / "c").exists()


def test_help_tells_of_prompts(folder):
    told = " ".join(run(folder, "ldm", "predict", "--help").out.split())
    assert "--prompt PROMPT [PROMPT ...] One or several texts to draw samples for" in told
