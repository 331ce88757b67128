"""Guidance in configs and on the command line, as former versions had it and as there are several kinds of it."""

import pytest
import torch
from building import build_ldm
from command_line import run
from jsonargparse import ArgumentParser

from ldm.guidance import Autoguidance, Guidance, InternalGuidance
from vfm_vae.cli import LOADER, words

RUN = ("ldm/lightningdit.yaml", "ldm/epochs64.yaml", "data/latents.yaml", "trainer/cpu.yaml")
CONFIGS = {
    "published": "{start: 0.125, channels: 3}",
    "none": "null",
    "plain": "{scale: 2.0, start: 0.1}",
    "former": "{class_path: ldm.guidance.Guidance, init_args: {scale: 3.0}}",
    "internal": "{class_path: InternalGuidance, init_args: {scale: 1.5, end: 0.9}}",
    "on_top": "{scale: 2.0, inner: {class_path: InternalGuidance, init_args: {scale: 1.5, end: 0.9}}}",
}


@pytest.mark.parametrize(
    ("configs", "options", "expected"),
    [
        ("published", "--model.guidance.scale=6.0", Guidance(6.0, 0.125, channels=3)),
        ("published none", "--model.guidance.scale=6.0", Guidance(6.0)),
        ("", "--model.guidance.scale 6.0", Guidance(6.0)),
        ("plain", "--model.guidance.scale 6.0", Guidance(6.0, 0.1)),
        ("plain", "--model.guidance=null", None),
        ("former", "--model.guidance.init_args.start=0.5", Guidance(3.0, 0.5)),
        (
            "published",
            "--model.guidance=InternalGuidance --model.guidance.scale=1.78",
            InternalGuidance(1.78, 0.125, channels=3),
        ),
        ("internal plain", "", InternalGuidance(2.0, 0.1, 0.9)),
        ("internal former", "", Guidance(3.0, end=0.9)),
        ("on_top", "--model.guidance.scale=4.0", Guidance(4.0, inner=InternalGuidance(1.5, end=0.9))),
        (
            "plain",
            "--model.guidance=Autoguidance --model.guidance.partner=weak.ckpt --model.guidance.scale=1.42",
            Autoguidance("weak.ckpt", 1.42, 0.1),
        ),
    ],
)
def test_guidance_is_what_the_last_word_says(tmp_path, configs, options, expected):
    parser = ArgumentParser(exit_on_error=False, parser_mode=LOADER)
    parser.add_argument("-c", action="config")
    parser.add_argument("--model.guidance", type=Guidance | None, default=None)
    arguments = options.split()
    for name in reversed(configs.split()):
        (tmp_path / name).write_text(f"model: {{guidance: {CONFIGS[name]}}}")
        arguments = ["-c", str(tmp_path / name), *arguments]
    guidance = parser.instantiate_classes(parser.parse_args(words(arguments))).model.guidance
    assert type(guidance) is type(expected)
    if expected is not None:
        inner = guidance.arguments.get("inner"), expected.arguments.get("inner")
        assert guidance.arguments | {"inner": None} == expected.arguments | {"inner": None}
        assert type(inner[0]) is type(inner[1]) and (inner[0] is None or inner[0].arguments == inner[1].arguments)


def test_a_run_takes_another_kind_of_guidance():
    head = ["--model.model.init_args.base_depth=1", "--model.optimizer.init_args.fused=false"]
    internal = ["--model.guidance=InternalGuidance", "--model.guidance.scale=1.78", "--model.guidance.channels=null"]
    with torch.device("meta"):
        guidance = build_ldm(*RUN, options=[*head, *internal]).model.pipeline.guidance
    assert guidance.settings() == InternalGuidance(1.78, 0.125).settings()


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (
            "guidance=InternalGuidence",
            "guidance: there is no class 'InternalGuidence' for it; did you mean InternalGui",
        ),
        (
            "guidance=Internal",
            "guidance: there is no class 'Internal' for it; give the full path, package.module.Class",
        ),
        ("guidance=Autoguidance", "guidance: Autoguidance: the following arguments are required: partner"),
        ("guidance.partner=here", "guidance: Guidance: Option 'partner' is not accepted"),
        ("lr_scheduler=CosineAnnealingLR", "lr_scheduler: the following arguments are required: T_max"),
    ],
)
def test_a_mistake_is_told_in_one_line(tmp_path, option, message):
    configs = [word for config in RUN for word in ("-c", config)]
    ended = run(tmp_path, "ldm", "fit", *configs, f"--model.{option}")
    assert ended.code == 2
    (line,) = [line for line in ended.err.splitlines() if line.startswith("error: ")]
    assert line.startswith(f"error: model.{message}") and "Union" not in line
