"""The benchmark of one GPU, at toy size on the CPU by the same code, whose compiled parts run eagerly."""

import argparse
import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

import processes
import pytest
import torch

BENCH = Path(__file__).parent / "bench"
TRAINING = {"batch_size", "first_step_s", "images_per_s", "ms", "tflop_per_image"}
FIGURES = {
    "lightningdit": TRAINING,
    "tokenizer": TRAINING | {"shapes", "first_steps_s"},
    "reg": TRAINING,
    "tokenizer_16_eager": TRAINING,
    "vavae": TRAINING,
    "rae": TRAINING,
    "ditdh": TRAINING,
    "sampling": {"compiled_latents_per_s", "guided_speedup", "decoded_images_per_s", "guided_minutes_of_50000"},
    "cknna": {"samples", "seconds"},
    "evaluation": {"images_per_s", "distances_s", "precision_recall_s"},
}

FAST = ("lightningdit", "tokenizer_16_eager", "sampling")


@pytest.fixture
def bench(monkeypatch):
    """Finds the benchmark's modules."""
    monkeypatch.syspath_prepend(BENCH)
    monkeypatch.setattr(sys, "argv", sys.argv[:1])
    return import_module


@pytest.fixture
def options() -> argparse.Namespace:
    return argparse.Namespace(device="cpu", toy=True, batch_size=None, option=[], budget=0.0)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in FAST else pytest.mark.slow) for name in FIGURES]
)
def test_a_run_notes_its_figures(bench, name, tmp_path):
    runs = bench("gpu_runs")
    toy = runs.Bench(tmp_path / "figures.json", "cpu", toy=True)
    with torch.compiler.set_stance("force_eager"):
        assert runs.measure(name, toy), toy.figures["traceback"]
    noted = json.loads(toy.out.read_text())
    assert FIGURES[name] <= noted.keys()
    assert all(noted[figure] > 0 for figure in FIGURES[name])


def test_a_counted_step_computes_nothing_twice(bench, tmp_path):
    runs = bench("gpu_runs")
    flops = []
    for value in ("false", "true"):
        option = f"--model.model.init_args.activation_checkpointing={value}"
        toy = runs.Bench(tmp_path / "figures.json", "cpu", toy=True, options=[option])
        assert runs.measure("lightningdit_eager", toy)
        flops.append(toy.figures["tflop_per_image"])
    assert flops[0] == flops[1]
    full_size: ModuleType = bench("full_size")
    assert full_size.count("diffusion", 1, [option], toy=True)[0] > flops[0] * 1e12


def test_every_grid_gets_a_step(bench):
    transforms = bench("gpu_runs").other_shapes(bench("gpu_runs").EquivarianceRegularizer(), 16, 4)
    assert {round(16 * t.scale * t.prior_scale) for t in transforms} == {4, 8, 12, 16}
    assert {t.prior_scale for t in transforms} == {0.25, 0.5, 0.75, 1.0}


def test_driver_and_runs_know_the_same_names(bench):
    assert list(bench("gpu").RUNS) == list(bench("gpu_runs").RUNS)


def test_what_no_longer_fits_is_left_out(bench, options, tmp_path, capsys):
    gpu = bench("gpu")
    results = gpu.Results(tmp_path / "out.json")
    gpu.run_all(["cknna"], options, results)
    assert "left out" in json.loads(results.path.read_text())["runs"]["cknna"]["error"]
    assert "left out" in capsys.readouterr().out


def test_a_late_run_is_ended(bench, options, tmp_path):
    gpu = bench("gpu")
    worker, results = gpu.Worker(tmp_path, options), gpu.Results(tmp_path / "out.json")
    assert gpu.follow(worker, "cknna", 0.1, results)["error"] == "ended after 0 s"
    assert worker.process.poll() is not None


def test_figures_stand_beside_those_of_the_same_card(bench, tmp_path):
    gpu = bench("gpu")
    for card, cell in (("NVIDIA H200", "239.5 (2.00x)"), ("NVIDIA H100 80GB HBM3", "239.5")):
        results = gpu.Results(tmp_path / "out.json")
        results.put("lightningdit", {"card": card, "images_per_s": 479.0, "first_step_s": 20.0})
        results.put("lightningdit_warm", {"card": card, "first_step_s": 5.0})
        rows = gpu.rows(results)
        assert ("lightningdit", "images_per_s", "479", cell) in [row[:4] for row in rows]
        assert rows[-1] == ("lightningdit_warm / lightningdit", "first_step_s", "0.25", "", "", "≤ 0.25")


@pytest.mark.slow
def test_a_run_that_fails_leaves_the_others(tmp_path):
    out = tmp_path / "out.json"
    command = [sys.executable, BENCH / "gpu.py", "--toy", "--device=cpu", f"--out={out}", "--option=--model.typo=1"]
    done = subprocess.run([*command, "--only=lightningdit", "--only=cknna"], capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    results = json.loads(out.read_text())
    assert "typo" in results["runs"]["lightningdit"]["log"]
    assert results["runs"]["cknna"]["samples"] == 500
    assert results["date"] and results["torch"] == torch.__version__


def test_without_a_gpu_it_says_so():
    hidden = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = processes.run([BENCH / "gpu.py"], cwd=BENCH, env=hidden)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_an_image_of_the_strong_stage_keeps_little_for_few_operations_more(bench):
    count = bench("full_size").count
    plain = ["--model.model.init_args.decoder.init_args.activation_checkpointing=false"]
    (flops, one), (_, two) = count("tokenizer", 1, []), count("tokenizer", 2, [])
    flops_of_plain, _ = count("tokenizer", 1, plain)
    assert two - one <= 1.0e9
    assert flops <= 1.15 * flops_of_plain
    assert flops_of_plain == pytest.approx(2.73e12, rel=0.02)
