"""What the command lines share: LightningCLI with short errors and our defaults."""

import difflib
import importlib
import os
import re
import signal
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch
import torch
import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace, get_loader, set_loader
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_warn

from vfm_vae import contracts
from vfm_vae.board import Board, SaveTrainingConfig
from vfm_vae.derived import complete
from vfm_vae.description import class_at, class_path
from vfm_vae.former import upgrade, upgrade_words
from vfm_vae.history import History
from vfm_vae.lightning_private import HookedCLI, checkpoint_path
from vfm_vae.options import within
from vfm_vae.run import Run
from vfm_vae.saving import WholeCheckpoints, local_path
from vfm_vae.timeline import Timeline
from vfm_vae.trial import cut_short_by, without_output
from vfm_vae.writing import check_place

DEBUG = "VFM_VAE_DEBUG"
PACKAGES = ("vfm_vae", "ldm", "callbacks")
MATMUL_PRECISION = "matmul_precision"
UNTRAINED = "untrained"
EVALUATIONS = ("validate", "test", "predict")
MAX_SEED = 2**32 - 1  # NumPy's
CONFIGS = Path(__file__).parent / "configs"
# Once these are imported, configs name their classes without modules.
NAMED = ("callbacks", "vfm_vae.tokenizer", "vfm_vae.transformers_vfm", "vfm_vae.text", "vfm_vae.transformers_text")
LOADER = "vfm_vae"
set_loader(LOADER, lambda text: upgrade(get_loader("yaml")(text)), (yaml.YAMLError,))


class CLI(HookedCLI):
    """LightningCLI that reads checkpoints without unpickling objects, and lets configs have the last word.

    Trial runs (`vfm_vae.trial`) leave nothing behind, and only who asks for it measures a model without a checkpoint.
    Configs of former versions are brought into this one's form, and options that follow from others are filled in.
    """

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """The parser, which reads configs of former versions, too."""
        return super().init_parser(**{"parser_mode": LOADER} | kwargs)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds what is set before anything is built."""
        parser.add_class_arguments(Run, "run", instantiate=False)
        add_matmul_precision(parser)

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parses a command line, or a config as plain data; by default the command line of this process."""
        for module in NAMED:
            importlib.import_module(module)
        if isinstance(args, Mapping | Namespace):
            self.config = parser.parse_object(args)
        else:
            self.config = parser.parse_args(words(sys.argv[1:] if args is None else args))
        within(0, MAX_SEED, seed_everything=self.config[self.config.subcommand]["seed_everything"])

    def instantiate_classes(self) -> None:
        """Builds everything by the completed config; what `config.yaml` keeps is the one that was given."""
        self.given = self.config
        self.config = self._completed()
        super().instantiate_classes()

    def _completed(self) -> Namespace:
        config = self.config.clone()
        options = config[self.subcommand]
        assert isinstance(self.model_class, type)
        model = {"class_path": class_path(self.model_class), "init_args": options.model.as_dict()}
        fill_in(options.model, complete(model)["init_args"])
        run = Run(**options.run.as_dict())
        callbacks = options.trainer.callbacks or []
        for callback in callbacks if isinstance(callbacks, list) else [callbacks]:
            run.tell(callback)
        return config

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Makes the trainer.

        A run that has a name is logged to its folder, unless the config has a logger of its own. A trial run goes
        without everything that would write.

        Raises:
            ValueError: if the trainer refuses an option; the message names it, or the options whose values Lightning's
                own message mentions.
        """
        self.config = self.given
        options = self.config[self.subcommand]
        if options.trainer.logger in (None, True):
            logger = Run(**options.run.as_dict()).logger()
            kwargs |= {} if logger is None else {"logger": logger}
        config = {**self.config_init[self.subcommand]["trainer"], **kwargs}
        self.cut_short_by = cut_short_by(config, str(self.subcommand))
        if self.cut_short_by is not None:
            rank_zero_warn(
                f"{self.cut_short_by}: a trial run, which reads no last checkpoint and writes nothing: no "
                "checkpoints, numbers, pictures or samples; leave the option out for a run that counts"
            )
            self.save_config_callback = None
            given = config["callbacks"] or []
            config = without_output(config | {"callbacks": given if isinstance(given, list) else [given]})
        try:
            return super().instantiate_trainer(**config)
        except (MisconfigurationException, TypeError, ValueError) as error:
            named = [name for name in config if name in str(error)]
            told = [name for name, value in config.items() if isinstance(value, str) and value in str(error)]
            place = ", ".join(f"trainer.{name}" for name in named or told)
            raise ValueError(f"{place or 'trainer'}: {error}") from error

    def before_instantiate_classes(self) -> None:
        """Sets the precision of matrix products."""
        set_matmul_precision(self.config[self.subcommand][MATMUL_PRECISION])

    def add_subcommand_arguments(self, parser: LightningArgumentParser, subcommand: str) -> None:
        """Reads checkpoints without unpickling, and lets an evaluation ask for an untrained model."""
        parser.set_defaults(weights_only=True)
        if subcommand in EVALUATIONS:
            parser.add_argument(
                f"--{UNTRAINED}", type=bool, default=False, help="Take a model without a checkpoint, as it is built."
            )

    def before_fit(self) -> None:
        """Checks that the run's folder is not another run's, and can be written to; loggers' own messages are longer.

        Ranks are not connected yet, so a logger that numbers its runs would have a folder for each of them.
        """
        folder = local_path(self.trainer.log_dir) if self.trainer.is_global_zero else None
        if folder is not None and self.cut_short_by is None:
            if isinstance(self.trainer.logger, TensorBoardLogger | CSVLogger):
                Run(**self.config[self.subcommand].run.as_dict()).check_folder(folder)
            check_place(folder / "config.yaml")

    def fit(self, ckpt_path: str | None, **options: Any) -> None:
        """Trains, from the checkpoint that is asked for; a trial run reads no last one."""
        # Set here, `setup` knows whether the run goes on; Lightning would say so after it.
        self.trainer.ckpt_path = self._found("fit", ckpt_path)
        self.trainer.fit(**options)

    def validate(self, **options: Any) -> None:
        """Measures on the validation data, by a checkpoint unless an untrained model is asked for."""
        self.trainer.validate(**self._with_checkpoint("validate", **options))

    def test(self, **options: Any) -> None:
        """Measures on the test data, likewise."""
        self.trainer.test(**self._with_checkpoint("test", **options))

    def predict(self, **options: Any) -> None:
        """Predicts, likewise."""
        self.trainer.predict(**self._with_checkpoint("predict", **options))

    def _with_checkpoint(self, subcommand: str, ckpt_path: str | None, **options: Any) -> dict[str, Any]:
        if not self.config[subcommand][UNTRAINED]:
            return options | {"ckpt_path": self._trained(subcommand, ckpt_path)}
        if ckpt_path not in (None, "last"):
            raise ValueError(f"{UNTRAINED}: a model without a checkpoint was asked for; leave --ckpt_path out")
        return options

    def _trained(self, subcommand: str, ckpt_path: str | None) -> str:
        """The checkpoint that an evaluation reads.

        Raises:
            ValueError: if there is none: without one, Lightning would take the weights that a model is built with.
        """
        found = self._found(subcommand, ckpt_path)
        if found is None:
            reason = "there is no last one" if ckpt_path == "last" else "none is given"
            if self.cut_short_by is not None and ckpt_path == "last":
                reason = "a trial run reads no last one"
            raise ValueError(
                f"ckpt_path: {reason}, so {subcommand} would take an untrained model; give --ckpt_path FILE, or "
                f"--{UNTRAINED}=true if that is meant"
            )
        return str(found)

    def _found(self, subcommand: str, ckpt_path: str | None) -> str | None:
        """The checkpoint that Lightning will load; None if there is none, or a trial run does not load it."""
        if self.cut_short_by is not None and ckpt_path == "last":
            return None
        return checkpoint_path(self.trainer, subcommand, ckpt_path)


def run(
    module: type[LightningModule],
    datamodule: type[LightningDataModule],
    command_line: type[CLI] = CLI,
    trainer: type[Trainer] = Trainer,
    description: str = "",
) -> None:
    """Runs `fit`, `validate`, `test` or `predict` from the command line, with `short_errors`.

    Args:
        module: The LightningModule that the configs fill in.
        datamodule: The LightningDataModule that they fill in.
        command_line: The command line, which may have further commands.
        trainer: The trainer, whose methods the commands are.
        description: What `--help` says of the program.
    """
    package = module.__module__.partition(".")[0]
    program = {"prog": f"python -m {package}", "description": description}
    with short_errors():
        command_line(
            module,
            datamodule,
            trainer_class=trainer,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,  # which takes a second; no module logs or keeps hyper-parameters
            parser_kwargs=program | parser_options(command_line, sys.argv[1:]),
            save_config_callback=SaveTrainingConfig,
            # Rerunning a stage in its folder is how it is resumed.
            save_config_kwargs={"overwrite": True},
            trainer_defaults={"callbacks": [WholeCheckpoints(), Timeline(), History(package), Board(package)]},
        )


def parser_options(command_line: type[CLI], arguments: Sequence[str]) -> dict[str, Any]:
    """Options of a command line's parsers: they raise their errors, and commands nobody asks for collect no options.

    A command that a config names, and no word does, is among all that are collected.

    Args:
        command_line: The command line.
        arguments: What follows the program's name.
    """
    names = command_line.subcommands().keys()
    asked = names & set(arguments) or names
    raising = {"exit_on_error": False}
    return raising | {name: raising | {"passed_over": name not in asked} for name in names}


def words(arguments: Sequence[str]) -> list[str]:
    """A command line with today's names, and with the paths of its configs.

    Raises:
        ValueError: if there is no such config.
    """
    changed = upgrade_words(arguments)
    for place, word in enumerate(changed):
        option, equals, value = word.partition("=")
        if option in ("-c", "--config") and equals:
            changed[place] = f"{option}={find_config(value)}"
        elif option in ("-c", "--config") and place + 1 < len(changed):
            changed[place + 1] = find_config(changed[place + 1])
    return changed


def find_config(name: str) -> str:
    """The file of a config: a file of one's own, or one that comes with this package.

    Args:
        name: Path of one's own, or the config's name in the package, such as `vfm_vae/strong.yaml`; with `configs/`
            before it, too.

    Raises:
        ValueError: if there is neither.
    """
    ours = CONFIGS / name.removeprefix("configs/")
    if Path(name).is_file() or not (name.endswith(".yaml") or ours.is_file()):
        return name
    if not ours.is_file():
        raise ValueError(
            f"config: there is no file {name!r}, and no config of that name comes with vfm_vae ({CONFIGS})"
        )
    return str(ours)


def fill_in(config: Namespace, completed: Mapping[str, Any]) -> None:
    """Sets the options of a parsed config that are null to what a completed copy says."""
    for name, value in completed.items():
        given = config.get(name)
        if isinstance(given, Namespace) and isinstance(value, Mapping):
            fill_in(given, value)
        elif given is None:
            config[name] = value


def add_matmul_precision(parser: ArgumentParser) -> None:
    """Adds the option whose value `set_matmul_precision` takes."""
    parser.add_argument(
        f"--{MATMUL_PRECISION}",
        type=Literal["highest", "high", "medium"],
        default="high",
        help="Precision of float32 matrix products and convolutions on GPUs: `highest` is float32, `high` and `medium` "
        "are TF32, which is several times faster. Some CPUs use bfloat16 with `medium`.",
    )


def set_matmul_precision(precision: str) -> None:
    """Sets the precision of float32 matrix products and convolutions in this process.

    Args:
        precision: `highest`, `high` or `medium`, as `add_matmul_precision` explains them.
    """
    torch.set_float32_matmul_precision(precision)
    torch.backends.cudnn.allow_tf32 = precision != "highest"  # convolutions would take TF32 in any case


@contextmanager
def short_errors() -> Iterator[None]:
    """Ends mistakes in options and data, and files that can't be written, with one line on stderr and exit code 2.

    The environment variable `VFM_VAE_DEBUG` brings the traceback back.
    """
    try:
        yield
    except (ArgumentError, MisconfigurationException, ValueError) as error:
        if os.environ.get(DEBUG):
            raise
        message = _without_class(_one_line(_named_by_us(error)))
        print(f"error: {_without_union(message)}{_lacking(message)}\n({DEBUG}=1 shows the traceback)", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:  # before Lightning is at work, which ends by itself
        if os.environ.get(DEBUG):
            raise
        print("interrupted", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)


def _one_line(error: BaseException) -> str:
    """The message of an error, without the traceback that errors of loading processes contain."""
    return " ".join(str(error).rpartition(f"\n{type(error).__name__}: ")[2].split())


def _lacking(message: str) -> str:
    """Adds which methods a class lacks, where the parser says only that it does not implement a contract."""
    found = re.search(r"implement protocol (\w+).*Given value:[^.]*?([\w.]+\.\w+)", message)
    contract = getattr(contracts, found[1], None) if found else None
    if found is None or contract is None:
        return ""
    try:
        given = class_at(found[2])
    except (ImportError, AttributeError):
        return ""
    methods = [name for name, part in vars(contract).items() if callable(part) and not name.startswith("_")]
    lacking = ", ".join(name for name in methods if not hasattr(given, name))
    mistake = f"lacks {lacking}" if lacking else f"has other arguments or annotations than {class_path(contract)}"
    return f"; {found[2]} {mistake}"


def _without_class(message: str) -> str:
    """The parser's message about a class's name that it does not know, in fewer words; any other as it is."""
    unknown = re.match(r"(.*?)Expected a dot import path string: (\w+)(?!\S)", message)
    if unknown is None:
        return message
    before, name = unknown.groups()
    option = ".".join(re.findall(r'Parser key "([^"]+)"', before)) or "config"
    modules = [sys.modules[place] for place in list(sys.modules) if place.partition(".")[0] in PACKAGES]
    modules += [lightning.pytorch.callbacks, lightning.pytorch.loggers, torch.optim, torch.optim.lr_scheduler]
    parts = [(found, value) for module in modules for found, value in vars(module).items() if isinstance(value, type)]
    usual = {*PACKAGES, "lightning", "torch"}
    known = {found for found, value in parts if value.__module__.partition(".")[0] in usual}
    close = " or ".join(difflib.get_close_matches(name, sorted(known - {name}), n=2, cutoff=0.7))
    meant = f"did you mean {close}? Other people's classes take" if close else "give"
    return f"{option}: there is no class {name!r} for it; {meant} the full path, package.module.Class"


def _without_union(message: str) -> str:
    """The parser's message about an optional part, without what else it has tried; any other as it is."""
    found = re.match(
        r"(.*?)Does not validate against any of the Union subtypes .*? Errors: - "
        r"(?:Problem with given class_path '[\w.]*?(\w+)'|Type .*? expects a function or a callable class): "
        r"(.*?)(?:\.? Got value: Namespace| - Expected a <class 'NoneType'>| - Not a valid subclass|$)",
        message,
    )
    if found is None:
        return message
    before, kind, reason = found.groups()
    option = ".".join(re.findall(r'Parser key "([^"]+)"', before))
    return ": ".join(part for part in (option, kind, reason) if part)


def _named_by_us(error: BaseException) -> BaseException:
    """The mistake that one of our parts found, without what the parser, which called it, says around it."""
    cause: BaseException | None = error
    while cause is not None:
        frames = list(traceback.walk_tb(cause.__traceback__))
        raised_in = frames[-1][0].f_globals.get("__name__", "") if frames else ""
        if raised_in.partition(".")[0] in PACKAGES:
            return cause
        cause = cause.__cause__
    return error
