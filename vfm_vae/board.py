"""Tells loggers what a run is: its dashboard, its command and options, its final numbers."""

import platform
import re
import sys
from collections.abc import Mapping
from typing import Any

import yaml
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils.tensorboard.summary import hparams

from vfm_vae.charts import final_numbers, layout_of
from vfm_vae.history import command_line, commit, device_name
from vfm_vae.lightning_private import add_summary, logs_now, undeclared
from vfm_vae.metrics.summary import versions
from vfm_vae.saving import alike, local_path
from vfm_vae.timeline import logged_position, tensorboards
from vfm_vae.trial import Output
from vfm_vae.writing import write_text

CARD = "run"
LOGGED_OPTIONS = ("seed_everything", "matmul_precision", "model", "data")
OF_TRAINER = ("precision", "devices", "num_nodes", "max_steps", "max_epochs", "gradient_clip_val")
# What TensorBoard's tables show, by the names that they have there; and all weights of losses.
SHOWN = {
    "model.model": "model",
    "model.model.vfm.name": "vfm",
    "model.model.depth": "depth",
    "model.model.width": "width",
    "model.model.patch_size": "patch_size",
    "model.model.adapter.latent_channels": "latent_channels",
    "model.optimizer": "optimizer",
    "model.optimizer.lr": "lr",
    "model.alignment": "alignment",
    "model.max_images": "max_images",
    "trainer.max_steps": "max_steps",
    "model.gradient_clip_val": "gradient_clip_val",
    "trainer.gradient_clip_val": "gradient_clip_val",
    "data.batch_size": "batch_size",
    "seed_everything": "seed",
}
WEIGHTS = "model.objective."
STEPS_OF_A_PATH = ("init_args", "class_path")  # of an option, which its name can do without


class Board(Output):
    """Lays out a run's dashboard, and tells its loggers what it is. The command lines add it to every run.

    TensorBoard gets a page of charts by what they answer (*Custom Scalars*), of numbers that this run logs; a card with
    command, config, versions, commit and device for each start (*Text*); and at the end of training its options beside
    its final numbers (*HParams*), which are those that are logged anyway. Other loggers get the options as their
    hyper-parameters when training starts. Trial runs have none of this.

    Args:
        program: The package whose command line it is; null outside of one.
    """

    def __init__(self, program: str | None = None) -> None:
        self.program = program
        self.config: str | None = None  # YAML, as `SaveTrainingConfig` gives it
        self._tags: set[str] = set()
        self._told = False

    def state_dict(self) -> dict[str, Any]:
        """The names of what was logged, so that a run that goes on shows all of its charts at once."""
        return {"tags": sorted(self._tags)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores them."""
        self._tags = set(state_dict["tags"])

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Begins anew."""
        self._told, self._tags = False, set()

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        """Before the first batch, tells what the run is; `Timeline`, listed before, has hidden what is to come."""
        if self._told or not trainer.is_global_zero:
            return
        self._told = True
        options = options_of(self.config)
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_text(CARD, self._card(trainer), logged_position(trainer))
            elif options:
                logger.log_hyperparams(options)
        self._lay_out(trainer, self._tags)

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        """Adds the charts of what training logs."""
        if logs_now(trainer):
            self._add(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Adds those of what validation logs."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._add(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Adds those of the rest, and puts options beside final numbers."""
        self._add(trainer)
        if not trainer.is_global_zero or not self._tags:
            return
        options = shown_of(options_of(self.config))
        for logger in tensorboards(trainer) if options else ():
            # Their values don't matter: TensorBoard takes the last ones logged.
            for summary in hparams(options, dict.fromkeys(final_numbers(self._tags), 0.0)):
                add_summary(logger, summary)

    def _add(self, trainer: Trainer) -> None:
        """Lays out anew where names were logged that were not known."""
        tags = {str(name) for name in trainer.logged_metrics}
        if trainer.is_global_zero and tags - self._tags:
            self._lay_out(trainer, tags)
        self._tags |= tags

    def _lay_out(self, trainer: Trainer, tags: set[str]) -> None:
        layout = layout_of(self._tags | tags)
        for logger in tensorboards(trainer) if layout else ():
            logger.experiment.add_custom_scalars(layout)

    def _card(self, trainer: Trainer) -> str:
        """What the run is, in Markdown."""
        command = None if self.program is None else command_line(self.program, sys.argv[1:])["command"]
        installed = {"python": platform.python_version(), **versions()}
        facts = {
            "device": device_name(trainer),
            "precision": str(trainer.precision),
            "commit": commit() or "none: this is no clone",
            "versions": ", ".join(f"{name} {version}" for name, version in installed.items()),
            "images seen before": f"{logged_position(trainer):,}",
        }
        parts = [_code(command)] if command else []
        parts.append("\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in facts.items())]))
        parts += [_code(self.config, "yaml")] if self.config else []
        return "\n\n".join(parts)


class SaveTrainingConfig(SaveConfigCallback):
    """Keeps the configuration of training in the run's folder; an evaluation does not write over it."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Writes `config.yaml` where training begins, and gives it to the run's dashboard."""
        if stage != "fit":
            return
        config = self.parser.dump(self.config, skip_unset=False)
        for callback in undeclared(trainer).callbacks:
            if isinstance(callback, Board):
                callback.config = config
        folder = local_path(trainer.log_dir)  # asks all ranks
        if folder is None:
            super().setup(trainer, pl_module, stage)
            return

        def write() -> None:
            if trainer.is_global_zero:
                write_text(folder / self.config_filename, config)

        alike(trainer.strategy, write)


def options_of(config: str | None) -> dict[str, bool | int | float | str]:
    """The options of a config that are numbers, switches or names, by their names; no paths.

    Args:
        config: YAML, as a run's `config.yaml` has it.
    """
    given = (yaml.safe_load(config) or {}) if config else {}
    chosen = {name: given[name] for name in LOGGED_OPTIONS if name in given}
    trainer = given.get("trainer") or {}
    chosen["trainer"] = {name: trainer[name] for name in OF_TRAINER if name in trainer}
    found: dict[str, bool | int | float | str] = {}

    def visit(name: str, value: Any) -> None:
        if isinstance(value, Mapping):
            for part, inner in value.items():
                visit(name if part in STEPS_OF_A_PATH else f"{name}.{part}".lstrip("."), inner)
        elif isinstance(value, bool | int | float):
            found[name] = value
        elif isinstance(value, str) and "/" not in value:
            found[name] = value.rpartition(".")[2] if re.fullmatch(r"[a-zA-Z_]\w*(\.\w+)+", value) else value

    visit("", chosen)
    return found


def shown_of(options: Mapping[str, Any]) -> dict[str, bool | int | float | str]:
    """Those of a run's options that tell it from others at a glance, for a table."""
    weights = {name.removeprefix(WEIGHTS): value for name, value in options.items() if name.startswith(WEIGHTS)}
    of_losses = {f"weight of {name}": value for name, value in weights.items() if type(value) is float and value}
    return {SHOWN[name]: value for name, value in options.items() if name in SHOWN} | of_losses


def _code(text: str, language: str = "") -> str:
    return f"```{language}\n{text.strip()}\n```"
