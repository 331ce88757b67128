"""What is used of Lightning's private parts is in one file, and of the versions that it is known to fit."""

import re
from configparser import ConfigParser
from importlib.metadata import version
from pathlib import Path

import pytest
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import CSVLogger
from packaging.requirements import Requirement

import callbacks
import ldm
import vfm_vae
from vfm_vae import lightning_private

ADAPTER = Path(lightning_private.__file__)
# An underscored attribute of something else than the object itself or its class; or a private name that is imported.
PRIVATE = re.compile(r"\b(?:trainer|strategy|\w*loop|\w*connector|bar|logger|checkpoint|pl_module|module)\._[a-z]\w*")
IMPORTED = re.compile(r"^from lightning\S* import .*\b_\w+", re.MULTILINE)


def test_the_versions_are_those_that_the_adapter_knows():
    config = ConfigParser()
    config.read(Path(__file__).parents[1] / "setup.cfg")
    needed = map(Requirement, config["options"]["install_requires"].split())
    (lightning,) = (requirement for requirement in needed if requirement.name == "lightning")
    assert str(lightning.specifier) == "<2.7,>=2.6.6"
    assert version("lightning") in lightning.specifier


@pytest.mark.parametrize("package", [vfm_vae, ldm, callbacks], ids=lambda package: package.__name__)
def test_nothing_else_reaches_into_lightning(package):
    for file in Path(package.__file__).parent.rglob("*.py"):
        if file != ADAPTER:
            text = file.read_text()
            assert PRIVATE.findall(text) == IMPORTED.findall(text) == [], file


class Inside(Callback):
    """What the adapter says in the middle of training."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, *_):
        steps, due = lightning_private.logged_steps(trainer), lightning_private.validation_is_due(trainer)
        self.seen.append((steps, lightning_private.logs_now(trainer), due))


def test_the_private_parts_do_what_is_said_of_them(trainer, tmp_path):
    module, inside = BoringModel(), Inside()
    checkpoint = ModelCheckpoint(tmp_path, save_last=True, save_top_k=0, every_n_train_steps=100)
    assert not lightning_private.has_trainer(module)
    intervals = {"log_every_n_steps": 2, "val_check_interval": 3, "limit_val_batches": 1, "num_sanity_val_steps": 0}
    run = trainer(
        max_steps=4, logger=CSVLogger(tmp_path), enable_checkpointing=True, callbacks=[checkpoint, inside], **intervals
    )
    run.fit(module)
    assert lightning_private.has_trainer(module)
    assert inside.seen == [(0, False, False), (1, True, False), (2, False, True), (3, True, False)]
    assert isinstance(lightning_private.cluster_environment(run), LightningEnvironment)
    lightning_private.log_numbers(run, {"speed": 3.0})
    assert run.logged_metrics["speed"] == 3.0
    lightning_private.save_last(checkpoint, run)
    path = Path(checkpoint.last_model_path)
    assert path.is_file() and lightning_private.checkpoint_path(run, "fit", "last") == str(path)
    assert lightning_private.checkpoint_path(run, "validate", None) is None
    path.unlink()
    other = trainer(max_steps=4)
    lightning_private.restore_logged_steps(other, {"loops": run._checkpoint_connector._get_loops_state_dict()})
    assert lightning_private.logged_steps(other) == 4


def test_ranks_ask_no_longer_for_sigterm_until_they_may_again(trainer):
    run = trainer(max_steps=1)
    loop = run.fit_loop.epoch_loop
    asks = type(loop)._broadcast_sigterm_tensor
    lightning_private.keep_sigterm(run)
    assert loop._broadcast_sigterm_tensor() is None and loop._broadcast_sigterm_tensor != asks.__get__(loop)
    lightning_private.give_sigterm_back(run)
    assert loop._broadcast_sigterm_tensor == asks.__get__(loop)


def test_progress_bars_are_told():
    bar = RichProgressBar()
    lightning_private.describe_epochs(bar, lambda epoch: f"epoch {epoch}")
    assert bar._get_train_description(3) == "epoch 3"


def test_the_hooks_of_the_command_line_are_there():
    for name in ("_prepare_subcommand_parser", "_parse_ckpt_path"):
        assert callable(getattr(LightningCLI, name))
