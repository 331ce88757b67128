"""The command line of `python -m ldm`: the same as the tokenizer's, with `sweep` and `--prompt`."""

from typing import Any

from jsonargparse import Namespace, dict_to_namespace
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.cli import ArgsType, LightningArgumentParser

from ldm.sweep.grid import Sweep
from vfm_vae.cli import CLI
from vfm_vae.description import class_at
from vfm_vae.trial import Output

SWEEP, PROMPT = "sweep", "prompt"
WRITER = "callbacks.SampleWriter"
PROMPTED = ("test", "predict", SWEEP)  # commands that draw samples for prompts


class DiffusionCLI(CLI):
    """The command line of diffusion models.

    `sweep` takes the options of `test` and those of its grid. It writes its own files, so it does without loggers and
    callbacks that would write.

    `--prompt` takes the place of what configs say is to be drawn. `predict` writes the samples of prompts even if no
    config names a callback for that.
    """

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The trainer's methods that can be called, and which of their arguments are no options of theirs."""
        return CLI.subcommands() | {SWEEP: {"model", "datamodule", "sweep"}}

    def add_subcommand_arguments(self, parser: LightningArgumentParser, subcommand: str) -> None:
        """Adds prompts, and the options of the grid."""
        super().add_subcommand_arguments(parser, subcommand)
        if subcommand in PROMPTED:
            parser.add_argument(
                f"--{PROMPT}",
                type=str,
                nargs="+",
                action="extend",  # of several, none is lost
                help='One or several texts to draw samples for, in quotes, such as --prompt "a cat" "a dog"; '
                "`data.images_per_prompt` says how many of each. Takes the place of `data.num_samples` and of "
                "`data.prompts`, which reads files as well.",
            )
        if subcommand == SWEEP:
            parser.add_class_arguments(Sweep, SWEEP)

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parses a command line."""
        super().parse_arguments(parser, args)
        options = self.config[self.config.subcommand]
        if prompts := options.get(PROMPT):
            options.data.prompts, options.data.num_samples = prompts, None  # in the place of what configs say
        if self.config.subcommand == "predict" and options.data.prompts is not None:
            _write_samples(options.trainer)
        if self.config.subcommand == SWEEP:
            options.trainer.logger = False

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Makes the trainer."""
        if self.subcommand == SWEEP:
            options = self.config_init[SWEEP]["trainer"]
            given = _listed(options["callbacks"])
            options["callbacks"] = [callback for callback in given if not isinstance(callback, Output | Checkpoint)]
            options["enable_checkpointing"] = False
        return super().instantiate_trainer(**kwargs)

    def sweep(self, **options: Any) -> None:
        """Sweeps over a checkpoint."""
        trainer: Any = self.trainer
        trainer.sweep(**options, sweep=self.config_init[SWEEP][SWEEP])


def _listed(callbacks: Any) -> list[Any]:
    """Callbacks as the trainer's option may hold them: several, one, or none."""
    return callbacks if isinstance(callbacks, list) else [callbacks] if callbacks else []


def _write_samples(trainer: Namespace) -> None:
    """Adds a callback that writes samples, unless one is there."""
    callbacks = _listed(trainer.callbacks)
    if not any(issubclass(class_at(callback.class_path), class_at(WRITER)) for callback in callbacks):
        trainer.callbacks = [*callbacks, dict_to_namespace({"class_path": WRITER, "init_args": {"directory": None}})]
