"""The command lines' common part: LightningCLI with short errors and our defaults."""

import os
import sys

from jsonargparse import ArgumentError
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningCLI

DEBUG = "VFM_VAE_DEBUG"


def run(module: type[LightningModule], datamodule: type[LightningDataModule]) -> None:
    """Runs `fit`, `validate`, `test` or `predict` from the command line.

    Mistakes in configs and data end with one line on stderr and exit code 2; the environment variable `VFM_VAE_DEBUG`
    brings the traceback back.

    Args:
        module: The LightningModule that the configs fill in.
        datamodule: The LightningDataModule that they fill in.
    """
    try:
        LightningCLI(
            module,
            datamodule,
            auto_configure_optimizers=False,
            parser_kwargs={"exit_on_error": False},
            # Samplers of our own divide the data over ranks; two optimisers take turns on a part of the parameters each.
            trainer_defaults={"use_distributed_sampler": False},
        )
    except (ArgumentError, ValueError) as error:
        if os.environ.get(DEBUG):
            raise
        sys.exit(_fail(error))


def _fail(error: Exception) -> int:
    message = " ".join(str(error).split())
    print(f"error: {message}\n({DEBUG}=1 shows the traceback)", file=sys.stderr)
    return 2
