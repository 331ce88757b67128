"""The report of a study: what it says of known numbers, and its figures."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from ldm.study.figures import draw_figures
from ldm.study.plan import DenoiserPlan, Distance, Plan, Question, TokenizerPlan
from ldm.study.report import answer, curve_table, write_report
from ldm.study.results import Results, compare, read_curves

VFM = "val/fd_vfm"
JUDGE = "val/fd_judge"
FD = {"ours": [4.0, 4.1, 4.2], "other": [6.0, 6.1, 6.2]}


@pytest.fixture
def measured(tmp_path: Path):
    """A study's folder with known numbers: distances at the last step by diffusion model, for each network and seed."""

    def write(vfm: dict[str, list[float]] = FD, judge: dict[str, list[float]] = FD, seeds: int = 3) -> Plan:
        plan = Plan(
            folder=str(tmp_path),
            tokenizers={name: TokenizerPlan(name.title(), {"only": []}, [], ["test.yaml"]) for name in vfm},
            denoisers={name: DenoiserPlan(name.title(), name, []) for name in vfm},
            distances={"VFM": Distance(VFM, "test/fd_vfm"), "judge": Distance(JUDGE, "test/fd_judge")},
            question=Question("ours", [name for name in vfm if name != "ours"]),
            data="none",
            alignment=list(vfm),
            seeds=list(range(seeds)),
        )
        for seed in plan.seeds:
            for name in vfm:
                write_run(plan.denoiser_run(name, seed), {VFM: vfm[name][seed], JUDGE: judge[name][seed]}, seed)
                write_tokenizer(plan.tokenizer_run(name, seed), seed)
        return plan

    return write


def write_run(folder: Path, last: dict[str, float], seed: int) -> None:
    writer = SummaryWriter(str(folder))
    for step, factor in ((100, 2.0), (200, 1.0)):
        for tag, value in last.items():
            writer.add_scalar(tag, factor * value, 32 * step)  # images seen
        writer.add_scalar("val/class_accuracy", 0.5 + 0.1 * seed, 32 * step)
        for block in (1, 2):
            writer.add_scalar(f"val/cknna/block_{block:02d}", 0.1 * block / factor, 32 * step)
    writer.close()
    write_counts(folder)
    grid(folder / "images/samples_guidance_1.png", rows=13, columns=2)


def write_counts(folder: Path) -> None:
    """What a run's report says of a training of 200 steps, and of an evaluation."""
    entries = {"ldm": {"step": 200, "images_seen": 6400, "metrics": {}}, "test": {"step": 0, "metrics": {}}}
    (folder / "metrics.json").write_text(json.dumps(entries))


def write_tokenizer(folder: Path, seed: int) -> None:
    metrics = {"test/psnr": 20.0 + seed, "test/fd_vfm": 1.0, "test/se_cknna/latent/mean": 0.5}
    for kind, strengths in (("noise", ("0.05", "0.20")), ("scale", ("1", "0.5")), ("rotation", ("0", "90"))):
        metrics |= {f"test/se_cknna/latent/{kind}_{strength}": 0.7 for strength in strengths}
    grid(folder / "images/val.png", rows=8, columns=3)
    entries = {"only": {"step": 9, "metrics": {}}, "test": {"step": 0, "metrics": metrics}}
    (folder / "metrics.json").write_text(json.dumps(entries))
    model = {"class_path": "vfm_vae.conv_vae.ConvVAE", "init_args": {"vfm": None}}
    optimizer = {"class_path": "torch.optim.Adam", "init_args": {"lr": 0.002}}
    objective = {"l1": 1.0, "kl": 1e-6, "l2": 0.0, "adversarial": 0.02, "adversarial_from": 3900}
    config = {"model": model, "objective": objective, "optimizer": optimizer, "max_images": 5200}
    (folder / "config.yaml").write_text(yaml.safe_dump({"model": config, "data": {"batch_size": 8}}))


def grid(file: Path, rows: int, columns: int, side: int = 16) -> None:
    """A grid as runs draw them; every image is of one colour, that of its row and column."""
    file.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.full((rows * (side + 2) + 2, columns * (side + 2) + 2, 3), 255, np.uint8)
    for row in range(rows):
        for column in range(columns):
            top, left = 2 + row * (side + 2), 2 + column * (side + 2)
            pixels[top : top + side, left : left + side] = (row * 10, column * 50, 0)
    Image.fromarray(pixels).save(file)


def said_of(plan: Plan) -> str:
    return answer(Results(plan), plan.question)


def test_answers_follow_the_rule_and_read_as_plain_english(measured):
    said = said_of(measured())
    assert said.startswith(
        "**Yes.** The same diffusion model reaches lower FD on latents of Ours than on those of Other"
    )
    assert "after 200 steps, by every network" in said
    assert (
        "By the judge, FD is 4.10 ± 0.10: lower than on Other (6.10 ± 0.10; lower at 2 of 2 points of training)" in said
    )


@pytest.mark.parametrize(
    ("vfm", "judge", "head"),
    [
        ([6.0, 6.1, 6.2], [6.0, 6.1, 6.2], "**Yes.**"),
        ([2.0, 2.1, 2.2], [2.0, 2.1, 2.2], "**No.**"),
        ([4.1, 4.2, 4.3], [4.0, 4.1, 4.2], "**No.**"),  # not told apart
        ([6.0, 6.1, 6.2], [2.0, 2.1, 2.2], "**Not in every case.**"),
        ([6.0, 6.1, 6.2], [4.1, 4.2, 4.3], "**Not in every case.**"),
    ],
)
def test_every_outcome_has_an_answer(vfm, judge, head, measured):
    ours = FD["ours"]
    assert said_of(measured({"ours": ours, "other": vfm}, {"ours": ours, "other": judge})).startswith(head)


def test_one_seed_decides_nothing(measured):
    assert said_of(measured(seeds=1)).startswith("**Not decided.**")


def test_a_difference_counts_from_two_spreads_on():
    first = np.array([1.0, 2.0, 3.0])  # a standard deviation of 1 each, of √2 in the difference
    assert compare(first, first + 2.9).verdict == "lower" and compare(first + 2.9, first).verdict == "higher"
    assert compare(first, first + 2.8).verdict == "not told apart"
    assert compare(first[:1], first[:1] + 9).verdict == "not told apart"


def test_a_report_has_means_deviations_and_figures(measured, tmp_path):
    plan = measured()
    text = write_report(plan).read_text()
    assert "| Ours | 8.20 ± 0.20 | 4.10 ± 0.10 |" in curve_table(Results(plan), "judge") and "4.10 ± 0.10" in text
    assert "| Ours | 4.10 ± 0.10 | 4.10 ± 0.10 | 0.600 ± 0.100 |" in text  # at the end: two distances, accuracy
    assert "| PSNR | 21.000 ± 1.000 | 21.000 ± 1.000 |" in text
    assert "| CKNNA of block 2 | 0.200 ± 0.000 | 0.200 ± 0.000 |" in text
    losses = "adversarial 0.02 from image 3900, kl 1e-06, l1 1"  # by their order in the config
    assert f"| losses | {losses} | {losses} |" in text
    for name in re.findall(r"!\[.*\]\((.*)\)", text):
        with Image.open(tmp_path / name) as picture:
            assert picture.width > 200
        assert (tmp_path / name).stat().st_size < 150_000
    assert len(list(tmp_path.glob("*.png"))) == 5


def test_pictures_show_whole_images(measured, tmp_path):
    draw_figures(Results(measured()), tmp_path)
    with Image.open(tmp_path / "samples.png") as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    rows = pixels[9, 150:]  # across the first row of images
    assert len({tuple(pixel) for pixel in rows}) == 6 + 1  # six images of one colour each, and the white between


def test_curves_take_the_last_of_two_values_for_a_step(tmp_path):
    for value in (1.0, 2.0):  # a run that was stopped after it had logged a step, and its continuation
        writer = SummaryWriter(str(tmp_path), filename_suffix=f".{value}")
        writer.add_scalar("val/a", value, 3200)
        writer.close()
    with pytest.raises(ValueError, match=r"metrics.json does not say how many images the run has seen"):
        read_curves(tmp_path)
    write_counts(tmp_path)
    assert read_curves(tmp_path) == {"val/a": {100: 2.0}}


def test_curves_of_a_former_version_are_by_steps(tmp_path):
    writer = SummaryWriter(str(tmp_path))
    writer.add_scalar("val/a", 3.0, 99)  # as Lightning counts
    writer.add_scalar("epoch", 1.0, 99)
    writer.close()
    assert read_curves(tmp_path)["val/a"] == {100: 3.0}


def test_what_is_missing_is_named(measured, tmp_path):
    plan = measured()
    (tmp_path / "seed1/ours/only/metrics.json").unlink()
    with pytest.raises(ValueError, match="seed1/ours/only was not measured; run the study"):
        Results(plan)
    with pytest.raises(ValueError, match="has logged no validation"):
        read_curves(tmp_path / "nowhere")
