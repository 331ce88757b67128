"""`python -m ldm fit|validate|test|predict`: the diffusion models' command line."""

import sys

from ldm.module import DiffusionModule
from vfm_vae.cli import run, short_errors
from vfm_vae.data.datamodule import ImageNetDataModule
from vfm_vae.evaluate import asks_for_files, main

if __name__ == "__main__":
    if asks_for_files(sys.argv[1:]):
        with short_errors():
            main()
    else:
        run(DiffusionModule, ImageNetDataModule, "Samples in files: python -m ldm test --samples FILE --help")
