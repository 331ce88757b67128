"""The metrics file and the table of it."""

import io
import json
import math

import pytest
import torch
from rich.console import Console

from callbacks.report import Report, summary_table
from vfm_vae.metrics import summary


def test_runs_share_a_file_and_a_table(new_module, data, trainer, tmp_path, capsys):
    path = tmp_path / "results" / "metrics.json"
    for name in ("strong", "weak"):
        run = trainer(Report(str(path), name), val_check_interval=3, num_sanity_val_steps=1)
        run.fit(new_module(), data)
    entries = json.loads(path.read_text())
    assert list(entries) == ["strong", "weak"]
    entry = entries["weak"]
    assert entry["images_seen"] == 24 and entry["step"] == 6
    assert entry["metrics"]["val/loss"] == pytest.approx(run.callback_metrics["val/loss"].item())
    assert "train/loss" in entry["metrics"]
    assert entry["versions"].keys() >= {"vfm_vae", "torch", "lightning", "timm", "torchmetrics", "torch-fidelity"}
    assert entry["versions"]["torch"].startswith(torch.__version__.split("+")[0])
    printed = capsys.readouterr().out
    assert "strong" in printed and "weak" in printed and "val/loss" in printed and "train/loss" not in printed
    assert [file.name for file in path.parent.iterdir()] == ["metrics.json"]  # nothing half-written is left


def test_a_finished_run_that_is_started_again_keeps_its_numbers(new_module, data, trainer, tmp_path):
    path = tmp_path / "metrics.json"
    trainer(Report(str(path))).fit(new_module(), data)
    before = path.read_text()
    trainer(Report(str(path)), max_steps=0).fit(new_module(), data)
    assert path.read_text() == before


def test_evaluations_alone_are_reported_in_the_log_directory(module, data, trainer, tmp_path, capsys):
    trainer(Report()).test(module, data, verbose=False)
    entries = json.loads((tmp_path / "metrics.json").read_text())
    assert entries["run"]["metrics"].keys() == {"test/loss"}
    assert "test/loss" in capsys.readouterr().out


@pytest.mark.parametrize("place", ["folder", "text", "list", "in a file"])
def test_a_place_that_can_not_be_written_is_refused_before_anything_is_measured(module, data, trainer, tmp_path, place):
    path = tmp_path / "metrics.json"
    if place == "folder":
        path.mkdir()
    else:
        path.write_text("[1, 2]" if place == "list" else "no numbers")
    path = path / "metrics.json" if place == "in a file" else path
    with pytest.raises(ValueError, match=r"^path: .*give another path$"):
        trainer(Report(str(path))).test(module, data, verbose=False)
    assert not module.validated


def test_numbers_that_json_lacks_become_null(module, trainer, tmp_path):
    run = trainer()
    run.strategy.connect(module)
    run.callback_metrics.update({"val/psnr": torch.tensor(math.inf), "val/loss": torch.tensor(math.nan)})
    entry = Report()._entry(run, module)
    assert entry["metrics"] == {"val/psnr": None, "val/loss": None}


def test_a_package_without_metadata_does_not_end_a_run(monkeypatch):
    monkeypatch.setitem(summary._PACKAGES, "vfm_vae", "copied-but-not-installed")
    versions = summary.versions()
    assert versions["vfm_vae"] == "unknown" and versions["torch"].startswith(torch.__version__.split("+")[0])


def test_the_table_puts_entries_side_by_side():
    entries = {
        "a": {"step": 1000, "images_seen": None, "metrics": {"val/psnr": 23.456789}},
        "b": {"step": 2000, "metrics": {"val/ssim": 0.5}},
    }
    console = Console(width=80, file=io.StringIO())
    console.print(summary_table(entries, title="numbers"))
    text = console.file.getvalue()
    assert "1,000" in text and "23.46" in text and "0.5" in text and "numbers" in text
