"""`python -m vfm_vae fit|validate|test|predict`: the tokenizer's command line."""

from vfm_vae.cli import run
from vfm_vae.data.datamodule import ImageNetDataModule
from vfm_vae.module import TokenizerModule


def main() -> None:
    """Runs the command line of this process."""
    run(TokenizerModule, ImageNetDataModule)


if __name__ == "__main__":
    main()
