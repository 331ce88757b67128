"""The command line `python -m ldm`: that of Lightning, with `sweep` beside `fit`, `validate`, `test` and `predict`."""

from typing import Any

from jsonargparse import Namespace, dict_to_namespace
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.cli import ArgsType, LightningArgumentParser

from ldm.module import DiffusionModule
from ldm.sweep.grid import Sweep
from vfm_vae.cli import CLI
from vfm_vae.data.datamodule import ImageNetDataModule
from vfm_vae.description import class_at
from vfm_vae.trial import Output

SWEEP, PROMPT = "sweep", "prompt"
WRITER = "callbacks.SampleWriter"
PROMPTED = ("test", "predict", SWEEP)  # commands that draw samples for prompts
KEYWORDS = ("last", "best", "hpc", "registry")  # Lightning's, in the place of a file


class SweepingTrainer(Trainer):
    """Lightning's trainer, which can sweep as well."""

    def measure_grid(
        self,
        model: DiffusionModule,
        datamodule: ImageNetDataModule,
        sweep: Sweep,
        ckpt_path: str | None = None,
        weights_only: bool | None = None,
    ) -> None:
        """Finds the best guidance scale, interval and average of a checkpoint.

        Each setting is measured by a test with the callbacks at hand. Started again, it goes on where it was stopped.

        Args:
            model: The model.
            datamodule: The data, which numbers the samples.
            sweep: The grid of settings.
            ckpt_path: Checkpoint of the model.
            weights_only: Whether checkpoints are read without unpickling objects.

        Raises:
            ValueError: if there is no checkpoint.
        """
        from ldm.sweep.sweeper import Sweeper  # with what draws, which takes a second to import

        if ckpt_path in (None, *KEYWORDS):
            raise ValueError("ckpt_path: a sweep looks at one checkpoint; give --ckpt_path FILE")
        Sweeper(self, model, datamodule, sweep, str(ckpt_path), weights_only).run()

    sweep = measure_grid  # the parser calls a group of options by a function's name, and `sweep` are the grid's


class SweepingCLI(CLI):
    """The command line that has `sweep`, too: the options of `test`, and those of the grid.

    A sweep writes its own files, so it goes without loggers and callbacks that would write. Prompts can be given as
    `--prompt`, which takes the place of what configs say is to be drawn; `predict` writes samples of prompts even if no
    config names what writes them.
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
            given = options["callbacks"] or []
            given = given if isinstance(given, list) else [given]
            options["callbacks"] = [callback for callback in given if not isinstance(callback, Output | Checkpoint)]
            options["enable_checkpointing"] = False
        return super().instantiate_trainer(**kwargs)

    def sweep(self, **options: Any) -> None:
        """Sweeps over a checkpoint."""
        trainer: Any = self.trainer
        trainer.sweep(**options, sweep=self.config_init[SWEEP][SWEEP])


def _write_samples(trainer: Namespace) -> None:
    """Adds what writes samples, if there is nothing that does."""
    given = trainer.callbacks or []
    callbacks = given if isinstance(given, list) else [given]
    if not any(issubclass(class_at(callback.class_path), class_at(WRITER)) for callback in callbacks):
        trainer.callbacks = [*callbacks, dict_to_namespace({"class_path": WRITER, "init_args": {"directory": None}})]
