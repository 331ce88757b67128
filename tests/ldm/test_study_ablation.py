"""A study of additions to a diffusion model: its parts, its configs, and what its report says of known numbers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from building import CONFIGS, build_ldm, count
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import SummaryWriter

from ldm.guidance import Guidance
from ldm.models.lightningdit import LightningDiT
from ldm.pipeline import LatentDiffusion
from ldm.samplers import Euler
from ldm.study.ablation import ablation_sections, chosen_scales
from ldm.study.costs import operations
from ldm.study.plan import Ablation, DenoiserPlan, Distance, GuidedPlan, Plan, TokenizerPlan, parts_of, read_plan
from ldm.study.report import write_report
from ldm.study.results import Results, seconds_per_step
from vfm_vae.data.latents import LatentStatistics

ABLATION = "study/ablation.yaml"
VFM, JUDGE, ACCURACY = "val/fd_vfm", "val/fd_judge", "val/class_accuracy"


# The plan


def test_guided_samples_are_measured_once_all_that_they_need_is_trained():
    parts = {part.name: part for part in parts_of(read_plan(ABLATION), of_denoisers=["--mine"])}
    part = parts["seed1/guided/autoguidance_1.5"]
    assert part.needs == ("seed1/ldm/baseline", "seed1/ldm/partner")
    words, ldm = " ".join(part.words), "runs/ablation/seed1/ldm"
    assert words.startswith(f"ldm validate -c {ldm}/baseline/config.yaml -c study/ablation/autoguidance.yaml")
    assert f"--ckpt_path={ldm}/baseline/checkpoints/last.ckpt" in words
    assert f"--model.guidance.partner={ldm}/partner/checkpoints/last.ckpt --model.guidance.scale=1.5" in words
    assert "--run.name=autoguidance_1.5 --run.folder=runs/ablation/seed1/guided --run.entry=test --mine" in words
    assert part.output == Path("runs/ablation/seed1/guided/autoguidance_1.5")
    assert parts["seed0/guided/internal_guidance_2"].needs == ("seed0/ldm/internal_head",)
    assert not [name for name in parts if name.endswith("/test")]  # of the tokenizer, which is not compared


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seeds": [0]}, "seeds: give at least two, as the scale of guided.autoguidance is chosen for each by"),
        ({"ablation": {"baseline": "none", "additions": []}}, "ablation.baseline: there is no 'none'"),
        ({"ablation": {"baseline": "baseline", "additions": ["none"]}}, "ablation.additions: there is no 'none'"),
        ({"guided": {"muon": {"scales": [2.0]}}}, "guided.muon: a diffusion model has this name, too"),
        ({"guided": {"mine": {"scales": []}}}, "guided.mine.scales: give at least one"),
        ({"guided": {"mine": {"scales": [2.0], "denoiser": "none"}}}, "guided.mine.denoiser: there is no 'none'"),
        ({"guided": {"mine": {"scales": [2.0], "partner": "none"}}}, "guided.mine.partner: there is no 'none'"),
    ],
)
def test_plans_that_make_no_ablation_are_refused(change, message, tmp_path):
    plan = yaml.safe_load((CONFIGS / ABLATION).read_text())
    for name, guided in change.get("guided", {}).items():
        change["guided"][name] = {"title": name, "denoiser": "baseline", "configs": []} | guided
        plan["ablation"]["additions"] = []
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan | change))
    with pytest.raises(ValueError, match=message):
        read_plan(str(tmp_path / "plan.yaml"))


# Configs


def test_each_addition_is_one_file_more_than_the_baseline():
    plan = read_plan(ABLATION)
    baseline = read_plan("study/photos.yaml").denoisers["vfm_vae"].configs
    files = {name: [name] for name in plan.denoisers} | {"baseline": []}
    files["early_data_prediction"] = ["data_prediction", "early_times"]  # each of them is a row of its own, too
    for name, denoiser in plan.denoisers.items():
        assert denoiser.configs == [*baseline, *(f"study/ablation/{file}.yaml" for file in files[name])]
    scales = {tuple(guided.scales) for guided in plan.guided.values()}
    assert len(scales) == 1  # the same choice for guidance of all kinds
    assert {*plan.denoisers, *plan.guided} - {"baseline", "partner"} == set(plan.ablation.additions)


def test_additions_build_and_are_as_large():
    plan = read_plan(ABLATION)
    with torch.device("meta"):
        built = {
            name: build_ldm(*each.configs, options=["--trainer.callbacks=null"]).model
            for name, each in plan.denoisers.items()
        }
    sizes = {name: count(module.model) for name, module in built.items()}
    assert sizes.pop("partner") < 0.2 * sizes["baseline"]
    assert all(abs(size / sizes["baseline"] - 1) < 0.1 for size in sizes.values()), sizes
    assert built["internal_head"].model.base_depth == 2 and built["data_prediction"].model.predicts == "data"
    assert built["shift"].shift == pytest.approx(8**0.5) and built["shift"].pipeline.sampler.shift == "auto"
    assert built["baseline"].pipeline.sampler.steps == built["shift"].pipeline.sampler.steps == 11
    assert type(built["wide_head"].model).__name__ == "DiTDH" and built["muon"].matrix_optimizer is not None


# The report


NUMBERS = {"baseline": [4.0, 4.1], "better": [2.0, 2.1], "worse": [6.0, 6.1], "same": [4.0, 4.05]}


def write_counts(run: Path) -> None:
    """What a run's report says of how it was trained: in steps of 8 images."""
    (run / "metrics.json").write_text(json.dumps({"ldm": {"step": 200, "images_seen": 1600}}))


@pytest.fixture
def measured(tmp_path: Path):
    """An ablation's folder with known distances; guided ones by scale, and by the judge alone other than the VFM's."""

    def write(guided: dict[float, list[float]], judge: dict[str, list[float]] = NUMBERS) -> Plan:
        plan = Plan(
            folder=str(tmp_path),
            tokenizers={"mine": TokenizerPlan("Mine", {"only": []}, [], [])},
            denoisers={name: DenoiserPlan(name.title(), "mine", []) for name in NUMBERS},
            distances={"VFM": Distance(VFM, ""), "judge": Distance(JUDGE, "")},
            data="none",
            seeds=[0, 1],
            guided={"guided": GuidedPlan("Guided", "baseline", [], list(guided))},
            ablation=Ablation("baseline", ["better", "worse", "same", "guided"]),
        )
        for seed in plan.seeds:
            for name, values in NUMBERS.items():
                writer = SummaryWriter(str(plan.denoiser_run(name, seed)))
                for step, factor in ((100, 2.0), (200, 1.0)):
                    for tag, value in ((VFM, values[seed]), (JUDGE, judge[name][seed]), (ACCURACY, 0.5)):
                        writer.add_scalar(tag, factor * value, 8 * step)  # images seen
                writer.close()
                write_counts(plan.denoiser_run(name, seed))
            for scale, values in guided.items():
                run = plan.guided_run("guided", scale, seed)
                run.mkdir(parents=True)
                metrics = {VFM: values[seed], JUDGE: values[seed], ACCURACY: 0.7 + 0.1 * seed}
                (run / "metrics.json").write_text(json.dumps({"test": {"metrics": metrics}}))
        return plan

    return write


def test_the_table_says_which_way_additions_differ(measured):
    plan = measured({2.0: [3.0, 3.1]})
    text = write_report(plan).read_text()
    assert text.startswith("- **Lower FD than the baseline by every network:** Better and Guided (scale 2).\n")
    assert "- **Higher FD by every network:** Worse.\n" in text
    assert "- **Not told apart from the baseline by any network:** Same.\n" in text
    assert "| Baseline | 4.05 ± 0.07 | 4.05 ± 0.07 | 0.500 ± 0.000 |" in text
    assert "| Better | 2.05 ± 0.07, lower | 2.05 ± 0.07, lower | 0.500 ± 0.000 |" in text
    assert "| Guided (scale 2) | 3.05 ± 0.07, lower | 3.05 ± 0.07, lower | 0.750 ± 0.071, higher |" in text
    assert "| Worse | 12.10 ± 0.14 | 6.05 ± 0.07 |" in text  # along training
    assert "of ten rows that do nothing, one would count by chance" in text and "![Samples" not in text


def test_networks_may_say_different_things(measured):
    plan = measured({2.0: [4.0, 4.1]}, NUMBERS | {"better": [4.0, 4.1]})
    (said, *_), results = ablation_sections(Results(plan), plan.ablation), Results(plan)
    assert "- **Told apart by one network and not, or otherwise, by another:** Better." in said
    assert results.guided["guided"][2.0][JUDGE].tolist() == [4.0, 4.1]


def test_no_number_takes_part_in_choosing_its_scale(measured):
    """Seed 0 alone would take 1.5, seed 1 alone 3: each takes the other's."""
    plan = measured({1.5: [1.0, 9.0], 2.0: [5.0, 5.0], 3.0: [8.0, 2.0]})
    assert chosen_scales(Results(plan), "guided") == [3.0, 1.5]
    text = write_report(plan).read_text()
    assert "| Guided (scale 3 and 1.5) | 8.50 ± 0.71" in text and "| Guided | 2 | 5.00 ± 0.00 |" in text


def test_the_median_step_counts_no_validation(tmp_path):
    writer = SummaryWriter(str(tmp_path))
    for place, second in enumerate((0, 5, 10, 60, 65)):  # every ten steps of 8 images, with a validation in between
        summary = Summary(value=[Summary.Value(tag="train/loss", simple_value=1.0)])
        event = Event(wall_time=second, step=8 * 10 * place, summary=summary)
        writer._get_file_writer().event_writer.add_event(event)
    writer.close()
    write_counts(tmp_path)
    assert seconds_per_step(tmp_path) == 0.5


def test_operations_are_those_of_all_forwards():
    width, tokens = 16, 4
    denoiser = LightningDiT(2, 2, patch_size=1, depth=1, width=width, num_heads=2, num_classes=3)
    model = LatentDiffusion(denoiser, Euler(steps=3), Guidance())
    model.normalization.take(LatentStatistics(torch.zeros(2, 1, 1), torch.ones(2, 1, 1)))
    plain = operations(model)
    assert plain > 2 * 2 * tokens * 4 * width**2  # two forwards, of whose products these are attention's linear layers
    model.sampler = Euler(steps=5)
    assert operations(model) == 2 * plain  # four forwards
    model.sampler, model.guidance = Euler(steps=3), Guidance(2.0)
    assert operations(model) == 2 * plain


# The whole


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_miniature_ablation_runs(tmp_path):
    plan = yaml.safe_load((CONFIGS / ABLATION).read_text())
    few = {"model": {"max_images": 16, "objective": {"adversarial_from": 16}}}
    (tmp_path / "tokenizer.yaml").write_text(yaml.safe_dump(few))
    (tmp_path / "ldm.yaml").write_text(yaml.safe_dump({"trainer": {"max_steps": 20, "val_check_interval": 20}}))
    plan["tokenizers"]["vfm_vae"]["stages"] = {"only": ["study/tokenizer.yaml", "study/vfm_vae.yaml", "tokenizer.yaml"]}
    for denoiser in plan["denoisers"].values():
        denoiser["configs"].append("ldm.yaml")
    for guided in plan["guided"].values():
        guided["scales"] = [2.0]
    plan |= {"seeds": [0], "folder": "runs"}
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan))
    environment = os.environ | {"PYTHONPATH": str(CONFIGS.parent)}
    subprocess.run([sys.executable, "-m", "ldm.study", "plan.yaml"], env=environment, cwd=tmp_path, check=True)
    text = (tmp_path / "runs/report.md").read_text()
    titles = [each["title"] for each in (*plan["denoisers"].values(), *plan["guided"].values())]
    cells = [line.split("|") for line in text.partition("\n### ")[0].splitlines() if line.startswith("|")]
    rows = {row[1].strip().partition(" (scale")[0]: row for row in cells}
    assert {*titles} - {"partner of autoguidance"} <= {*rows}
    costs = {title: float(rows[title][7]) for title in titles if title in rows}  # operations of a sample
    assert costs["+ internal guidance"] < 1.1 * costs["baseline"] < 1.2 * costs["+ autoguidance"]
    assert costs["+ classifier-free guidance"] == pytest.approx(2 * costs["baseline"], rel=0.01)
    assert (tmp_path / "runs/samples.png").is_file() and (tmp_path / "runs/fd.png").is_file()
