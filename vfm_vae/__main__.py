"""`python -m vfm_vae fit|validate|test|predict`: the tokenizer's command line; `app` opens a page to try models."""

import importlib
import sys

APP = "app"


def main() -> None:
    """Runs the command line of this process."""
    if sys.argv[1:2] == [APP]:  # before anything is imported that takes long: the page is to be there soon
        importlib.import_module("ldm.app.command").main(sys.argv[2:])
        return
    from vfm_vae.cli import run
    from vfm_vae.data.datamodule import ImageNetDataModule
    from vfm_vae.module import TokenizerModule

    run(
        TokenizerModule,
        ImageNetDataModule,
        description=f"Trains tokenizers and measures them. `python -m vfm_vae {APP} --help`: a page to try models on.",
    )


if __name__ == "__main__":
    main()
