"""A run's dashboard in TensorBoard: its charts, card and final numbers, and what other loggers are told."""

from pathlib import Path

import pytest
import yaml
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.hparams.metadata import EXPERIMENT_TAG, SESSION_START_INFO_TAG
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from vfm_vae.board import Board, options_of
from vfm_vae.charts import CHARTS, OTHERS, final_numbers, layout_of
from vfm_vae.timeline import Timeline

CONFIG = """
seed_everything: 3
model:
  model: {class_path: vfm_vae.tokenizer.VFMVAE, init_args: {vfm: {class_path: FrozenVFM, init_args: {name: vit}}}}
  optimizer: {class_path: torch.optim.AdamW, init_args: {lr: 0.002, betas: [0.9, 0.95], fused: true}}
  objective: {l1: 1.0, kl: 1.0e-6, l2: 0.0, adversarial_from: 10, adaptive: false}
  init_from: runs/strong/checkpoints/last.ckpt
data: {root: data/photos, batch_size: 8, cache: null}
trainer: {max_steps: 10, precision: 32-true, callbacks: [{class_path: EMA}], log_every_n_steps: 1}
run: {name: weak}
"""
OPTIONS = {
    "seed_everything": 3,
    "model.model": "VFMVAE",
    "model.model.vfm": "FrozenVFM",
    "model.model.vfm.name": "vit",
    "model.optimizer": "AdamW",
    "model.optimizer.lr": 0.002,
    "model.optimizer.fused": True,
    "model.objective.l1": 1.0,
    "model.objective.kl": 1e-6,
    "model.objective.l2": 0.0,
    "model.objective.adversarial_from": 10,
    "model.objective.adaptive": False,
    "data.batch_size": 8,
    "trainer.precision": "32-true",
    "trainer.max_steps": 10,
}
# What each kind of run logs, and the categories and some of the charts that it has.
KINDS = {
    "tokenizer": (
        "train/loss_l1 train/loss_kl train/loss_adversarial train/loss_discriminator_real train/logits_real "
        "train/alignment_weight train/loss_alignment train/lr train/grad_norm_discriminator val/psnr val/ssim "
        "val/fd_vit val/cknna/latent train/device/samples_per_sec train/skipped_steps train/time validate/samples",
        ["Quality", "Losses", "Game balance", "Alignment", "Optimisation", "Speed and memory"],
    ),
    "without an opponent": (
        "train/loss_l1 train/lr val/psnr",
        ["Quality", "Losses", "Optimisation"],
    ),
    "diffusion": (
        "train/loss val/loss train/loss_mse train/lr train/lr_matrices train/clip_share val/class_accuracy "
        "loss_by_time/val_0.30 loss_by_time/train_0.00 val/cknna/block_01 test/fd_vit loss_by_time/test_0.10",
        ["Quality", "Losses", "Alignment", "Optimisation", "Loss by time"],
    ),
    "somebody's": ("val/sharpness val/psnr train/loss_of_mine", ["Quality", OTHERS]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_dashboard_has_the_charts_of_its_kind_of_run(kind: str):
    tags, categories = KINDS[kind]
    layout = layout_of(tags.split())
    assert list(layout) == categories and all(layout.values())
    if kind == "diffusion":
        assert list(layout["Quality"]) == [
            "Class accuracy of samples (higher is better)",
            "Loss of validation and training",
        ]
        assert len(layout["Loss by time"]) == 2  # in one chart each
    if kind == "somebody's":
        assert layout[OTHERS] == {
            "train/loss_of_mine": ["Multiline", [r"train/loss_of_mine$"]],
            "val/sharpness": ["Multiline", [r"val/sharpness$"]],
        }


def test_no_curve_is_in_two_categories_and_none_is_lost():
    tags = {tag for kind in KINDS.values() for tag in kind[0].split()}
    shown = {tag: [c for c, charts in CHARTS.items() if any(chart.shows(tag) for chart in charts)] for tag in tags}
    assert {tag for tag, categories in shown.items() if len(categories) > 1} == set()
    assert {tag for tag, categories in shown.items() if not categories} == {
        *("train/time", "validate/samples", "test/fd_vit", "loss_by_time/test_0.10", "val/sharpness"),
        "train/loss_of_mine",
    }


def test_a_chart_is_the_same_in_all_runs():
    """Or TensorBoard would show it once for each of them."""
    strong, weak = layout_of(["val/psnr", "train/lr"]), layout_of(["val/psnr", "val/psnr_thumbnail"])
    assert strong["Quality"] == weak["Quality"]


def test_final_numbers_begin_with_those_that_matter():
    names = final_numbers(["val/cknna/latent", "val/ssim", "val/fd_vit", "val/psnr", "train/lr", "val/rfid"])
    assert names[:5] == ["val/psnr", "val/ssim", "val/fd_vit", "val/rfid", "val/cknna/latent"]
    assert names[5:10] == ["test/psnr", "test/ssim", "test/fd_vit", "test/rfid", "test/cknna/latent"]
    assert "train/lr" not in names and len(set(names)) == len(names)


def test_options_are_numbers_and_names_but_no_paths():
    assert options_of(CONFIG) == OPTIONS
    assert options_of(None) == {}


@pytest.fixture
def fit(trainer, new_module, data, tmp_path: Path):
    """Trains in one folder, up to a step, with the command line's callbacks."""

    def run(max_steps: int, ckpt_path: Path | None = None, logger=None):
        board = Board("vfm_vae")
        board.config = CONFIG
        logger = logger or TensorBoardLogger(tmp_path, "run", version="")
        options = {"log_every_n_steps": 1, "val_check_interval": 3, "check_val_every_n_epoch": None}
        run = trainer(Timeline(), board, logger=logger, max_steps=max_steps, **options)
        run.fit(new_module(), data, ckpt_path=ckpt_path, weights_only=True)
        run.save_checkpoint(tmp_path / "last.ckpt")
        files = sorted((tmp_path / "run").glob("events*"), key=lambda file: file.stat().st_ctime_ns)
        if files:  # TensorBoard reads them by their names, which begin with the second
            files[-1].rename(files[-1].with_name(f"events.out.tfevents.{len(files):010d}"))
        return EventAccumulator(str(tmp_path / "run"), size_guidance={"scalars": 0, "tensors": 0})

    return run


def layout(events: EventAccumulator) -> dict[str, list[str]]:
    """The titles of the charts that TensorBoard lays out, by category: the last layout counts."""
    content = events.Tensors("custom_scalars__config__")[-1].tensor_proto.string_val[0]
    return {
        category.title: [chart.title for chart in category.chart] for category in Layout.FromString(content).category
    }


def card(events: EventAccumulator, number: int) -> str:
    return events.Tensors("run/text_summary")[number].tensor_proto.string_val[0].decode()


def test_a_run_has_a_page_of_charts_and_a_card_for_each_start(fit, tmp_path: Path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["vfm_vae", "fit", "-c", "demo/weak.yaml"])
    first = fit(4).Reload()
    assert layout(first) == {"Quality": ["Loss of validation and training"]}
    assert "```\npython -m vfm_vae fit -c demo/weak.yaml\n```" in card(first, 0)
    assert f"```yaml\n{CONFIG.strip()}\n```" in card(first, 0) and "| images seen before | 0 |" in card(first, 0)
    assert all(f"| {name} |" in card(first, 0) for name in ("device", "commit", "versions"))
    second = fit(7, tmp_path / "last.ckpt").Reload()
    assert [event.step for event in second.Tensors("run/text_summary")] == [0, 16]
    assert "| images seen before | 16 |" in card(second, 1)
    assert [event.step for event in second.Scalars("val/loss")] == [12, 24]


def test_a_run_that_goes_on_shows_all_of_its_charts_at_once(fit, tmp_path: Path):
    fit(4)
    resumed = fit(5, tmp_path / "last.ckpt").Reload()  # without a validation
    assert layout(resumed) == {"Quality": ["Loss of validation and training"]}


def test_options_stand_beside_final_numbers_without_a_point_more(fit):
    events = fit(4).Reload()
    tags = events.Tags()["scalars"]
    assert not {"hp_metric", "epoch"} & {*tags} and [e.step for e in events.Scalars("val/loss")] == [12]
    content = {tag: HParamsPluginData.FromString(events.SummaryMetadata(tag).plugin_data.content)
               for tag in (EXPERIMENT_TAG, SESSION_START_INFO_TAG)}  # fmt: skip
    metrics = [info.name.tag for info in content[EXPERIMENT_TAG].experiment.metric_infos]
    assert metrics[:2] == ["val/loss", "test/loss"]
    assert content[SESSION_START_INFO_TAG].session_start_info.hparams["lr"].number_value == 0.002
    assert {info.name for info in content[EXPERIMENT_TAG].experiment.hparam_infos} == {
        *("seed", "model", "vfm", "optimizer", "lr", "batch_size", "max_steps", "weight of l1", "weight of kl")
    }


def test_other_loggers_are_told_the_options(fit, tmp_path: Path):
    fit(2, logger=CSVLogger(tmp_path, "table", ""))
    assert yaml.safe_load((tmp_path / "table/hparams.yaml").read_text()) == OPTIONS
